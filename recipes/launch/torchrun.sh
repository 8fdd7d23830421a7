#!/usr/bin/env bash
# One machine, all its GPUs: launch/torchrun.sh RECIPE [field=value ...]
set -euo pipefail
gpus=$(python3 -c 'import torch; print(max(torch.cuda.device_count(), 1))')
exec torchrun --standalone --nproc-per-node "$gpus" -m etude train "$@"
