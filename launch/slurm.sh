#!/usr/bin/env bash
# Exports on a SLURM cluster: `sbatch launch/slurm.sh --tp 8 ...` takes the flags of launch/export.py. Edit from here ...
#SBATCH --job-name=export
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --output=export-%j.log
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
TASK_PER_RANK=${TASK_PER_RANK:-}  # not empty: srun starts every rank itself, without torchrun
MAX_RESTARTS=${MAX_RESTARTS:-20}  # how often the job may go back into the queue
srun_flags=()                     # for example (--container-image=... --container-mounts=...)
# . .venv/bin/activate            # whatever brings a python that has megatron_export
# ... to here. SLURM sends the signal of --signal=B: to this script alone, so many seconds before the time limit.

say() { echo "launch/slurm.sh: $*" >&2; }
refuse() { say "error: $*" && exit 2; }

for name in SLURM_JOB_ID SLURM_JOB_NODELIST SLURM_JOB_NUM_NODES SLURM_SUBMIT_DIR; do
  [ -n "${!name:-}" ] || refuse "$name is empty, so this is no batch job. Start it with: sbatch launch/slurm.sh FLAGS"
done
cd "$SLURM_SUBMIT_DIR"
[ -f launch/export.py ] || refuse "no launch/export.py in $PWD. Run sbatch in the folder of the repository"
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST") ||
  refuse "scontrol names no host of SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST, so the ranks have no place to meet"
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))  # below the ports that systems give out; jobs that share a node have others
LOGS=$PWD/export-$SLURM_JOB_ID
mkdir -p "$LOGS"
export RANKS_PER_NODE MASTER_ADDR MASTER_PORT LOGS

restarts=${SLURM_RESTART_COUNT:-0}
[ "$restarts" = 0 ] || set -- "$@" --resume

if [ -n "$TASK_PER_RANK" ]; then
  step=(--ntasks-per-node="$RANKS_PER_NODE" --distribution=block bash launch/slurm_rank.sh)
  tasks=$((SLURM_JOB_NUM_NODES * RANKS_PER_NODE))
else
  step=(--ntasks-per-node=1 python launch/slurm_node.py)
  tasks=$SLURM_JOB_NUM_NODES
fi

srun='' ended=''
trap 'kill -USR1 "$srun" || :' USR1  # srun passes it on to its tasks
trap 'ended=1' TERM  # SLURM sends it to the tasks itself
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$tasks" --export=ALL --kill-on-bad-exit=0 --wait=60 \
  "${srun_flags[@]}" "${step[@]}" "$@" &
srun=$!
while kill -0 "$srun" 2>/dev/null; do  # a trap ends `wait`, not srun
  wait "$srun" || :
done
status=0
wait "$srun" || status=$?  # the highest of all tasks

case $status in
  0 | 1 | 2 | 75 | 130) ;;
  138 | 143) status=75 ;;  # SIGUSR1 or SIGTERM came before the ranks listened
  *) status=1 ;;
esac
if [ -n "$ended" ]; then
  say "the job was told to end (SIGTERM: scancel, preemption, time limit). With --resume it goes on where it was"
  status=75
elif [ "$status" = 75 ] && [ "$restarts" -ge "$MAX_RESTARTS" ]; then
  say "stopped by a signal, and not queued again after $restarts restarts. Give it more --time; --resume goes on where it was"
elif [ "$status" = 75 ]; then
  say "stopped by a signal: the job is queued again, restart $((restarts + 1)) of at most $MAX_RESTARTS"
  scontrol requeue "$SLURM_JOB_ID" || say "scontrol could not queue it: sbatch it again, with --resume"
fi
exit "$status"
