#!/usr/bin/env bash
# Runs `safemoe run` on GPUs of one or several machines: by ssh, or as a job of Slurm.
#
#   launch/gpu_run.sh VERB NAME --hosts=HOST,HOST,... [OPTION...] [-- SAFEMOE_RUN_OPTION...]
#   launch/gpu_run.sh VERB NAME --slurm [OPTION...] [-- SAFEMOE_RUN_OPTION...]
#
#   run      ships the committed code, installs from the lock file, checks all GPUs, starts the job.
#            By ssh it then waits; what was interrupted or failed is started again. With Slurm it
#            submits; the job queues itself again where it was interrupted and has saved
#   status   says how the job is
#   logs     copies one log for each host to runs/launch/NAME/logs; Slurm: prints where they are
#   attach   follows the log of the first host, or of Slurm's first task
#   stop     lets the job save and end
#
#   launch/gpu_run.sh run mine --hosts=node1,node2 --gpus=8 -- \
#     --config experiments/llama31_8b.py --workdir /shared/llama31_8b
#
# --gpus=N                 on each host (8)
# --env-file=FILE          KEY=VALUE lines, of mode 600, for the job's environment: secrets
# --allow-dirty            ships tracked files with their uncommitted changes
# --dry-run                prints each command that a run without trouble takes, and does nothing
# By ssh: --ssh=FLAG (for ssh and scp), --port=N (of the first host, for the others; 8476),
#   --deadline=TIME (then the job saves; 24h), --max-interruptions=N (20), --max-failures=N (3),
#   --poll=SECONDS (60)
# Slurm: --nodes=N (1), --time=TIME (24:00:00), --max-requeues=N (20), --sbatch=FLAG (more flags of
#   sbatch, one each: --sbatch=--partition=x). One task for each GPU, as JAX has it. Your home
#   directory must be shared by the nodes, and this machine reach the package index. Secrets stay
#   in that directory.
#
# Exit codes: 0 done, or submitted; 1 failed; 2 a mistake, in one line; 75 saved, run again. Ctrl-C
# lets a job that was started by ssh save and end; a lost terminal or connection leaves it alone,
# and the same command goes on with it.
#
# NEVER RUN ON A REAL GPU OR CLUSTER so far. Tested against fakes of ssh and Slurm.
set -Eeuo pipefail

# shellcheck source-path=SCRIPTDIR source=_common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"
# shellcheck source-path=SCRIPTDIR source=_job.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_job.sh"

VERB="" NAME="" STATE="" SHARED="" HOSTS=() SLURM="" GPUS=8 PORT=8476 SSH_FLAGS=()
NODES=1 TIME=24:00:00 SBATCH_FLAGS=() MAX_REQUEUES=20
declare -A MOST=([interruptions]=20 [failures]=3) SPENT=([interruptions]=0 [failures]=0)

parse() {
  while (($#)); do
    case "$1" in
      --) JOB=("${@:2}") && return 0 ;;
      --hosts=*) IFS=, read -ra HOSTS <<<"${1#*=}" ;;
      --slurm) SLURM=1 ;;
      --gpus=*) GPUS="${1#*=}" ;;
      --port=*) PORT="${1#*=}" ;;
      --ssh=*) SSH_FLAGS+=("${1#*=}") ;;
      --nodes=*) NODES="${1#*=}" ;;
      --time=*) TIME="${1#*=}" ;;
      --sbatch=*) SBATCH_FLAGS+=("${1#*=}") ;;
      --max-requeues=*) MAX_REQUEUES="${1#*=}" ;;
      --max-interruptions=*) MOST[interruptions]="${1#*=}" ;;
      --max-failures=*) MOST[failures]="${1#*=}" ;;
      -*) option "$1" || die "unknown option $1; see $0 --help" ;;
      *)
        [[ ! "$NAME" ]] || die "unexpected '$1'; options of safemoe run stand behind --"
        if [[ "$VERB" ]]; then NAME="$1"; else VERB="$1"; fi
        ;;
    esac
    shift
  done
}

check() {
  [[ "$VERB" == @(run|status|logs|attach|stop) ]] ||
    die "'$VERB' is no verb; give run, status, logs, attach or stop"
  check_name
  NUM_WORKERS="${#HOSTS[@]}"
  ((NUM_WORKERS)) || [[ "$SLURM" ]] || die "no machines; give --hosts=HOST,HOST,... or --slurm"
  ((NUM_WORKERS == 0)) || [[ ! "$SLURM" ]] || die "--hosts and --slurm exclude each other"
  local number
  for number in "$GPUS" "$PORT" "$NODES" "$MAX_REQUEUES" "${MOST[@]}"; do
    is_whole "$number" || die "'$number' is no whole number like 8; see $0 --help"
  done
  STATE="$ROOT/runs/launch/$NAME" SHARED="$HOME/safemoe/$NAME"
  [[ "$VERB" != run ]] || check_job
}

# ---- By ssh.

# shellcheck disable=SC2034 # ARGV is fan_out's
worker_argv() {
  local command="$2"
  ((NUM_WORKERS == 1)) || command="export JAX_COORDINATOR_ADDRESS=${HOSTS[0]##*@}:$PORT \
JAX_NUM_PROCESSES=$NUM_WORKERS JAX_PROCESS_ID=$1; $2"
  ARGV=(ssh -oBatchMode=yes -oServerAliveInterval=15 "${SSH_FLAGS[@]}" "${HOSTS[$1]}" "$command")
}

on_workers() { fan_out "$@"; }

send() {
  local host
  for host in "${HOSTS[@]}"; do
    execute scp -q -oBatchMode=yes "${SSH_FLAGS[@]}" "$2" "$host:$1" || return 1
  done
}

# Nobody takes these machines away; one that is out of reach for long counts as a failure.
is_up() { return 0; }

interrupted() {
  stop_job
  exit "$EXIT_INTERRUPTED"
}

run_by_ssh() {
  pack "$STATE/code.tar.gz"
  on_signal interrupted INT TERM
  on_signal 'exit 129' HUP
  new_logs
  while true; do
    retry "$SET_UP_TRIES" reached || die "${HOSTS[*]}: not all can be reached by ssh; see above"
    if [[ "$VERDICT" == running ]]; then
      say "$NAME runs already"
    elif [[ "$VERDICT" == straggling ]] || ! set_up gpu || ! start_job $((GPUS * NUM_WORKERS)); then
      again failures "the job could not be started on all hosts"
      continue
    fi
    watch_job
    case "$VERDICT" in
      done) say "done; logs are in $(log_directory)" && return 0 ;;
      mistake) die "the job ended with 2, a mistake in its command: see $(log_directory)" ;;
      late)
        stop_job
        end_at_deadline
        ;;
      saved)
        (($(seconds_left) > 0)) || end_at_deadline
        again interruptions "the job was interrupted and has saved"
        ;;
      *) again failures "the job has failed: see $(log_directory)" ;;
    esac
  done
}

# again BUDGET WHY: with what still runs ended.
again() {
  [[ "$VERDICT" == saved ]] || stop_job
  spend "$@"
}

attach_by_ssh() {
  worker_argv 0 "tail -n 100 -F safemoe/$NAME/job.log"
  execute "${ARGV[@]}"
}

# ---- By Slurm: in a home directory that this machine and the nodes share.

run_by_slurm() {
  local flags said
  said="$(ask "" squeue --noheader "--user=$(id -un)" "--name=$NAME")"
  [[ ! "$said" ]] || # it would lose its code
    die "$NAME is queued or runs already; end it first by: $(quoted "$0" stop "$NAME" --slurm)"
  pack "$STATE/code.tar.gz"
  execute mkdir -p "$SHARED/logs"
  execute chmod 700 "$HOME/safemoe" "$SHARED"
  execute rm -rf "$SHARED/code" "$SHARED/stop"
  execute mkdir "$SHARED/code"
  execute tar -xzf "$STATE/code.tar.gz" -C "$SHARED/code"
  execute env -C "$SHARED" bash code/launch/_worker.sh install gpu
  [[ ! "$ENV_FILE" ]] || execute cp "$ENV_FILE" "$SHARED/secrets"
  flags=("--job-name=$NAME" "--chdir=$SHARED" "--output=$SHARED/logs/batch.log" --open-mode=append
    "--nodes=$NODES" "--ntasks-per-node=$GPUS" "--gpus-per-node=$GPUS" "--time=$TIME"
    --requeue --signal=TERM@300 "${SBATCH_FLAGS[@]}")
  said="$(ask "" sbatch "${flags[@]}" "$SHARED/code/launch/_slurm_job.sh" \
    "$MAX_REQUEUES" "$((NODES * GPUS))" "${JOB[@]}")"
  [[ "$DRY_RUN" ]] || echo "$said" | tee "$STATE/submitted"
}

# The number of the job that was submitted last.
job_number() {
  sed -n 's/^Submitted batch job \([0-9]*\).*/\1/p' "$STATE/submitted" 2>/dev/null | grep . ||
    die "nothing named $NAME has been submitted from here"
}

stop_by_slurm() {
  local number
  number="$(job_number)"
  execute touch "$SHARED/stop" # it would be queued again
  execute scancel --state=PENDING "$number"
  execute scancel --signal=TERM "$number"
}

# ---- The verbs.

main() {
  local number
  if [[ "${1:-}" == @(--help|-h|) ]]; then help && return 0; fi
  parse "$@"
  check
  case "$VERB${SLURM:+ slurm}" in
    "run") run_by_ssh ;;
    "status") workers_status ;;
    "logs") copy_logs && say "logs are in $(log_directory)" ;;
    "attach") attach_by_ssh ;;
    "stop") stop_job ;;
    "run slurm") run_by_slurm ;;
    "status slurm")
      number="$(job_number)"
      execute sacct -o JobID,State,NodeList --parsable2 -j "$number"
      ;;
    "logs slurm") printf '%s\n' "$SHARED/logs/"*.log ;;
    "attach slurm") execute tail -n 100 -F "$SHARED/logs/0.log" ;;
    "stop slurm") stop_by_slurm ;;
  esac
}

main "$@"
