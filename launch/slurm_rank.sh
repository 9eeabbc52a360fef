#!/usr/bin/env bash
# One rank of launch/slurm.sh: its place in the world, where torchrun did not give it one, and where its words go.
set -euo pipefail
if [ -z "${TORCHELASTIC_RUN_ID:-}" ]; then
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$RANKS_PER_NODE
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # as torchrun sets it
fi
[ "$RANK" = 0 ] || exec >>"$LOGS/rank-$RANK.log" 2>&1
exec python launch/export.py "$@"
