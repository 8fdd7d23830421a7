#!/usr/bin/env bash
# One machine, all its GPUs: recipes/launch/torchrun.sh RECIPE [field=value ...]
# PROCESSES=N starts N processes instead of one per GPU (on the CPU: one).
# Name the run with run=NAME: torchrun takes an option --run for its own.
# VERB=practice runs a recipe of practice.
set -euo pipefail
gpus=$(python3 -c 'import torch; print(max(torch.cuda.device_count(), 1))')
exec torchrun --standalone --nproc-per-node "${PROCESSES:-$gpus}" -m etude "${VERB:-train}" "$@"
