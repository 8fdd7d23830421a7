#!/usr/bin/env bash
# Several machines over ssh: HOSTFILE=hosts recipes/launch/deepspeed.sh RECIPE [field=value ...]
# A hostfile has one line a machine: "node1 slots=8". Each machine needs the same paths; variables
# that every rank needs go into ~/.deepspeed_env, PATH among them (ssh starts with a bare one).
# VERB=practice runs a recipe of practice.
set -euo pipefail
exec deepspeed --hostfile "${HOSTFILE:?set HOSTFILE to the list of machines}" --module etude "${VERB:-train}" "$@"
