#!/usr/bin/env bash
# The batch job that `gpu_run.sh run NAME --slurm` submits; it starts in the run's directory.
#
#   _slurm_job.sh MOST_REQUEUES DEVICES OPTION...
#
# A task for each GPU runs `safemoe run OPTION...`. Where Slurm is about to end them, they save and
# end with 75, and the job is queued again: MOST_REQUEUES times, and not where a file `stop` is.
set -Eeuo pipefail

most="$1" devices="$2"
shift 2
if [[ -f secrets ]]; then
  while IFS= read -r line; do
    [[ ! "$line" || "$line" == \#* ]] || export "${line?}"
  done <secrets
fi
top="$PWD"
export PYTHONUNBUFFERED=1 PYTHONPATH="$top/code" SLURM_OPEN_MODE=append
export SLURM_KILL_BAD_EXIT=0 # the first to end must not cut short those that still save

tasks() { srun --unbuffered --output "$top/logs/%t.log" --error "$top/logs/%t.log" "$@"; }

echo "job $SLURM_JOB_ID starts safemoe run $*, commit $(<code/STAMP)"
cd code
tasks "$top/venv/bin/python" launch/check_devices.py "$devices"
code=0
tasks "$top/venv/bin/safemoe" run "$@" || code=$?
echo "job $SLURM_JOB_ID ended with $code"
if ((code == 75 && ${SLURM_RESTART_COUNT:-0} < most)) && [[ ! -e "$top/stop" ]]; then
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
