#!/usr/bin/env bash
# Slurm: sbatch recipes/launch/slurm.sh RECIPE [field=value ...]
# VERB=practice in the environment runs a recipe of practice.
# USR1 arrives 300 s before the time limit: the ranks save and leave a REQUEUE file in the run, and
# this script puts the job back into the queue, where the same command resumes it.
#SBATCH --job-name=etude
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --open-mode=append
#SBATCH --requeue
set -uo pipefail
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE=$SLURM_NTASKS VERB=${VERB:-train}
srun --kill-on-bad-exit=0 bash -c \
  'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python -m etude $VERB "$@"' etude "$@"
status=$?
if [ "$status" -eq 85 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
