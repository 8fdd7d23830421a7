#!/usr/bin/env bash
# `make gpu`: everything that needs a GPU, with the machine's own Python, offline, in under nine minutes.
#
# Wheels that the machine lacks (pybind11, setuptools, pytest, pydantic, ...) are taken from
# WHEELS (default: wheels/ beside the checkout's files, if present). Rows are written as they come
# to RESULTS (default: benchmarks/results), so that a cut run still leaves a file.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python3}
wheels=${WHEELS:-$root/wheels}
site=${SITE:-${TMPDIR:-/tmp}/etude-gpu-site}
export ETUDE_RESULTS=${RESULTS:-$root/benchmarks/results}
export PYTHONDONTWRITEBYTECODE=1
mkdir -p "$site" "$ETUDE_RESULTS"
status=0

# part SECONDS NAME COMMAND...: one part under its own time limit; a failure does not stop the rest.
part() {
  local limit=$1 name=$2 begun=$SECONDS code=0
  shift 2
  timeout --kill-after=10 "$limit" "$@" || code=$?
  echo "== $name: exit $code after $((SECONDS - begun)) s (limit $limit s)"
  [ $code -eq 0 ] || status=1
}

"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
  echo "make gpu: $("$python" -V) sees no CUDA device; set PYTHON to the one whose torch has CUDA" >&2
  exit 1
}
if compgen -G "$wheels/*.whl" >/dev/null; then
  part 60 wheels "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$wheels"/*.whl
fi
export PYTHONPATH=$site
part 90 build "$python" -m pip install -q --no-index --no-build-isolation --no-deps --upgrade --target "$site" .
part 10 kernels "$python" -P -c 'from etude.kernels import announce; print(announce("cuda"))'
part 150 tests "$python" -P -m pytest -q -m gpu tests
part 120 operators "$python" benchmarks/gpu_operators.py
part 100 step "$python" benchmarks/gpu_step.py
exit $status
