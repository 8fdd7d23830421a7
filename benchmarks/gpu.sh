#!/usr/bin/env bash
# `make gpu`: all that needs a GPU, with the machine's own Python, offline, in under nine minutes.
#
#   WHEELS   folder of wheels that the machine lacks: pybind11, setuptools, pytest, pydantic, ...
#            (default: wheels/ in the checkout)
#   RESULTS  where rows are appended, one by one, so that a cut run keeps what it measured
#            (default: benchmarks/results)
#   PYTHON   the Python whose torch sees the GPU (default: python3)
#   SITE     where wheels and Etude are installed (default: a folder under TMPDIR)
#   DEVICE   cuda; cpu rehearses every step on a machine without a GPU, with a tiny model
#   ETUDE_REVISION  what rows say of the code's revision where the copy has no .git
set -uo pipefail
here=$PWD
cd "$(dirname "$0")/.."
root=$PWD
absolute() { case $1 in /*) echo "$1" ;; *) echo "$here/$1" ;; esac; }
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
wheels=$(absolute "${WHEELS:-$root/wheels}")
site=$(absolute "${SITE:-${TMPDIR:-/tmp}/etude-gpu-site}")
export ETUDE_RESULTS=$(absolute "${RESULTS:-$root/benchmarks/results}")
export PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
mkdir -p "$site" "$ETUDE_RESULTS" || exit 1
total=525
failed=()

# part SECONDS NAME COMMAND...: one part under its own limit and what is left of the whole; its
# failure does not stop the later ones.
part() {
  local limit=$1 name=$2 begun=$SECONDS code=0
  shift 2
  [ "$limit" -le $((total - SECONDS)) ] || limit=$((total - SECONDS))
  if [ "$limit" -le 0 ]; then
    echo "== $name: left out, the $total s are used up"
    failed+=("$name")
    return
  fi
  timeout --kill-after=5 "$limit" "$@" || code=$?
  echo "== $name: exit $code after $((SECONDS - begun)) s (limit $limit s)"
  [ $code -eq 0 ] || failed+=("$name")
}

case $device in
  cuda)
    "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
      echo "make gpu: $("$python" -V 2>&1) sees no CUDA device; set PYTHON to the one whose torch has CUDA" >&2
      exit 1
    }
    end_to_end=(--model DiT-B/2); sampling=(--model DiT-B/2); guidance=(--batch 16 --rounds 2)
    features=() ;;
  cpu)
    end_to_end=(--model tiny --steps 3); sampling=(--model tiny --steps 3 --batch 4)
    guidance=(--batch 1 --rounds 1); features=(--tiny --batch 2 --batches 1 --rounds 1) ;;
  *) echo "make gpu: DEVICE=$device: type cuda, or cpu to rehearse" >&2; exit 1 ;;
esac

# Order: what everything needs, then the comparison that is asked for most, then the details.
export PYTHONPATH=$site
if compgen -G "$wheels/*.whl" >/dev/null; then
  part 60 wheels "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$wheels"/*.whl
elif [ -n "${WHEELS:-}" ]; then
  echo "make gpu: WHEELS=$wheels holds no .whl file" >&2
  exit 1
fi
part 90 build "$python" -m pip install -q --no-index --no-build-isolation --no-deps --upgrade --target "$site" .
part 40 kernels "$python" -P -c 'import sys; from etude.kernels import announce, attention_status; print(announce(sys.argv[1]), *attention_status(sys.argv[1]), sep="\n")' "$device"
part 120 end-to-end "$python" -m benchmarks.end_to_end --device "$device" "${end_to_end[@]}"
part 45 sampling "$python" -m benchmarks.sampling --device "$device" "${sampling[@]}"
part 80 features "$python" -m benchmarks.features --device "$device" "${features[@]}"
# Only files with such tests: others import libraries that this machine lacks.
mapfile -t gpu_tests < <(grep -rlE 'mark\.gpu\b' --include='test_*.py' tests | sort)
# Four files at a time: most of their time is Triton compiling on the CPU.
one='out=$("$0" -P -m pytest -q -m gpu "$1" 2>&1); code=$?; echo "$out"; exit $code'
part 190 tests bash -c 'printf "%s\0" "${@:2}" | xargs -0 -n 1 -P 4 bash -c "$0" "$1"' "$one" "$python" "${gpu_tests[@]}"
if [ "$device" = cuda ]; then
  part 130 operators "$python" -m benchmarks.gpu_operators --seconds 115
fi
if "$python" -c 'import diffusers' 2>/dev/null; then
  part 90 guidance "$python" -m benchmarks.guidance_cost --device "$device" "${guidance[@]}"
else
  echo "== guidance: left out, diffusers is not installed"
fi

echo "== rows are in $ETUDE_RESULTS; $SECONDS s in all; failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
