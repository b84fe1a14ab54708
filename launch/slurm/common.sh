# Sourced by the job scripts of this folder: the environment, and what an exit code is followed by.

PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

# Everything that a job leaves beside its run folder, kept over restarts.
LOGS="${LOGS:-runs/slurm/$SLURM_JOB_NAME-$SLURM_JOB_ID}"
mkdir -p "$LOGS"
echo "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST: logs in $LOGS"

# Crashes in a row after which a job is given up.
MAX_CRASHES="${MAX_CRASHES:-3}"

# finish CODE: end the job, or give it back to the queue.
finish() {
  local code="$1" crashes state
  case "$code" in
    0)  rm -f "$LOGS/crashes"; exit 0 ;;
    2)  echo "the input is at fault; not started again"; exit 2 ;;
    75) echo "stopped when asked to, with a checkpoint"; rm -f "$LOGS/crashes" ;;
    *)  crashes=$(($(cat "$LOGS/crashes" 2>/dev/null || echo 0) + 1))
        echo "$crashes" > "$LOGS/crashes"
        echo "ended with exit code $code, $crashes of $MAX_CRASHES times in a row"
        if ((crashes >= MAX_CRASHES)); then exit "$code"; fi ;;
  esac
  # A cancelled job must stay cancelled.
  state=$(scontrol -o show job "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z]*')
  if [[ "$state" == JobState=RUNNING ]]; then
    echo "back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60  # requeue ends this script
  fi
  exit "$code"
}
