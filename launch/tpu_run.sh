#!/usr/bin/env bash
# Runs `safemoe run` on a TPU slice of any number of hosts, through preemptions, to its end.
#
#   launch/tpu_run.sh VERB NAME --zone=ZONE [OPTION...] [-- SAFEMOE_RUN_OPTION...]
#
#   create   asks for the slice NAME and waits until it is up
#   run      creates it where it is missing, ships the committed code, installs, checks all devices,
#            starts the job and waits for it; what is preempted or fails is made anew and goes on
#            from the last checkpoint; in the end the slice is deleted
#   status   says how the slice and the job on each worker are
#   logs     copies one log for each worker to runs/launch/NAME/logs
#   attach   follows the log of worker 0
#   delete   deletes the slice
#
#   launch/tpu_run.sh run pod --zone=us-west4-a --accelerator=v5litepod-16 --capacity=spot -- \
#     --config experiments/llama31_8b.py --workdir gs://bucket/llama31_8b
#
# --accelerator=TYPE       v4-N, v5litepod-N, v5p-N or v6e-N, as gcloud names them
# --capacity=KIND          on-demand (default), spot or reserved
# --mode=MODE              qr (default): a queued resource; vm: a TPU VM at once, or a failure;
#                          local: a rehearsal on this machine's CPU (Linux)
# --deadline=TIME          of all that run does, waiting included; then the job saves (default 24h)
# --max-preemptions=N      how often the slice may be taken away or the job be interrupted (20)
# --max-failures=N         how often anything else may fail (3)
# --env-file=FILE          KEY=VALUE lines, of mode 600, for the job's environment: secrets
# --plan                   before a slice is asked for, `safemoe plan` must find that the job fits;
#                          minutes on this machine, with .venv or $PYTHON (Linux)
# --keep                   the slice outlives the run
# --allow-dirty            ships tracked files with their uncommitted changes
# --dry-run                prints each command that a run without trouble takes, and does nothing
# --project=P --runtime=VERSION --devices=N     where what is derived does not fit
# --create=FLAG --ssh=FLAG --alpha              more flags for gcloud's create, and ssh and scp;
#                          --alpha --ssh=--tunnel-through-iap; --create=--network=mine
# --poll=SECONDS           between looks at slice and job (60)
# --fake-devices=N --fake-workers=M             of a rehearsal (16 on 1)
#
# Several workers at once need your key in the agent: ssh-add ~/.ssh/google_compute_engine
#
# Exit codes: 0 done; 1 failed; 2 a mistake, in one line; 75 saved, run again. Ctrl-C lets the job
# save and deletes the slice; a lost terminal or connection leaves both, and the same command goes
# on with them. A slice of this name without the label safemoe=NAME is not touched.
#
# NEVER RUN ON A REAL TPU so far. Tested against a fake gcloud, and in the rehearsal.
set -Eeuo pipefail

# shellcheck source-path=SCRIPTDIR source=_common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"
# shellcheck source-path=SCRIPTDIR source=_job.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_job.sh"

VERB="" NAME="" ZONE="" PROJECT="" ACCELERATOR="" RUNTIME="" CAPACITY=on-demand MODE=qr KEEP=""
DEVICES="" FAKE_DEVICES=16 NUM_WORKERS=1 PLAN="" CREATE_FLAGS=() SSH_FLAGS=() TRACK=()
declare -A MOST=([preemptions]=20 [failures]=3) SPENT=([preemptions]=0 [failures]=0)
# MADE: this call made the slice that is there; FRESH: nothing is on it yet; IS_SET_UP: what this
# call ships is on it.
STATE="" WHERE=() ENVIRONMENT=() MADE="" FRESH="" IS_SET_UP=""

parse() {
  while (($#)); do
    case "$1" in
      --) JOB=("${@:2}") && return 0 ;;
      --accelerator=*) ACCELERATOR="${1#*=}" ;;
      --capacity=*) CAPACITY="${1#*=}" ;;
      --mode=*) MODE="${1#*=}" ;;
      --zone=*) ZONE="${1#*=}" ;;
      --project=*) PROJECT="${1#*=}" ;;
      --runtime=*) RUNTIME="${1#*=}" ;;
      --devices=*) DEVICES="${1#*=}" ;;
      --max-preemptions=*) MOST[preemptions]="${1#*=}" ;;
      --max-failures=*) MOST[failures]="${1#*=}" ;;
      --create=*) CREATE_FLAGS+=("${1#*=}") ;;
      --ssh=*) SSH_FLAGS+=("${1#*=}") ;;
      --alpha) TRACK=(alpha) ;;
      --plan) PLAN=1 ;;
      --keep) KEEP=1 ;;
      --fake-devices=*) FAKE_DEVICES="${1#*=}" ;;
      --fake-workers=*) NUM_WORKERS="${1#*=}" ;;
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
  local number
  [[ "$VERB" == @(create|run|status|logs|attach|delete) ]] ||
    die "'$VERB' is no verb; give create, run, status, logs, attach or delete"
  check_name
  for number in "${MOST[@]}" "${DEVICES:-0}" "$FAKE_DEVICES" "$NUM_WORKERS"; do
    is_whole "$number" || die "'$number' is no whole number like 8; see $0 --help"
  done
  STATE="$ROOT/runs/launch/$NAME"
  [[ "$VERB" != run ]] || check_job
  [[ ! "$PLAN" || "$VERB $MODE" == run\ @(qr|vm) ]] ||
    die "--plan asks whether a job fits a slice; leave it out of $VERB --mode=$MODE"
  case "$MODE" in
    qr | vm) check_cloud ;;
    local) check_local ;;
    *) die "--mode=$MODE is unknown; give qr, vm or local" ;;
  esac
}

check_cloud() {
  local number
  [[ "$DRY_RUN" ]] || command -v gcloud >/dev/null ||
    die "gcloud is not on the PATH; install the Google Cloud CLI, or rehearse by --mode=local"
  [[ "$ZONE" ]] || die "no --zone; give the one that has your quota, like --zone=us-west4-a"
  WHERE=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"} --quiet)
  [[ "$VERB" == @(create|run) ]] || return 0
  [[ "$CAPACITY" == @(on-demand|spot|reserved) ]] ||
    die "--capacity=$CAPACITY is unknown; give on-demand, spot or reserved"
  [[ "$ACCELERATOR" =~ ^(v4|v5litepod|v5p|v6e)-([0-9]+)$ ]] ||
    die "--accelerator is '$ACCELERATOR'; give v4-N, v5litepod-N, v5p-N or v6e-N; tpu7x is had" \
      "through GKE only: see launch/xpk_run.sh"
  number="${BASH_REMATCH[2]}"
  case "${BASH_REMATCH[1]}" in # v4 and v5p count cores, two for each chip, which JAX sees as one
    v4) RUNTIME="${RUNTIME:-tpu-ubuntu2204-base}" DEVICES="${DEVICES:-$((number / 2))}" ;;
    v5p) RUNTIME="${RUNTIME:-v2-alpha-tpuv5}" DEVICES="${DEVICES:-$((number / 2))}" ;;
    v5litepod) RUNTIME="${RUNTIME:-v2-alpha-tpuv5-lite}" DEVICES="${DEVICES:-$number}" ;;
    v6e) RUNTIME="${RUNTIME:-v2-alpha-tpuv6e}" DEVICES="${DEVICES:-$number}" ;;
  esac
  [[ "$VERB" != run || "$(job_option --workdir)" == *://* ]] ||
    die "--workdir is '$(job_option --workdir)', which goes with the slice; give gs://bucket/run"
}

check_local() {
  ((FAKE_DEVICES > 0 && NUM_WORKERS > 0 && FAKE_DEVICES % NUM_WORKERS == 0)) ||
    die "--fake-devices=$FAKE_DEVICES cannot be shared by --fake-workers=$NUM_WORKERS"
  DEVICES="$FAKE_DEVICES"
}

# ---- The slice: a queued resource and its node, a node alone, or directories of this machine.

tpus() { execute gcloud "${TRACK[@]}" compute tpus "$@"; }

# list KIND FIELDS: those of the one that has our name; nothing where there is none.
list() {
  local assumed="" # what a dry run goes on with
  [[ ! "$MADE" ]] || assumed="READY,$NAME"
  [[ ! "$MADE" || "$1" == tpu-vm ]] || assumed="ACTIVE,$NAME"
  ask "$assumed" gcloud "${TRACK[@]}" compute tpus "$1" list "${WHERE[@]}" \
    "--filter=name~/$NAME\$" "--format=csv[no-heading]($2)"
}

# ABSENT, WAITING, READY, PREEMPTED, FAILED; FOREIGN without our label; UNKNOWN where gcloud fails.
slice_state() {
  local answer="" state label
  case "$MODE" in
    qr) answer="$(list queued-resources "state.state,tpu.nodeSpec[0].node.labels.safemoe")" ;;
    vm) answer="$(list tpu-vm "state,labels.safemoe")" ;;
    local) [[ ! -d "$STATE/workers" && ! "$MADE" ]] || answer="READY,$NAME" ;;
  esac || { echo UNKNOWN && return 0; }
  [[ "$answer" ]] || { echo ABSENT && return 0; }
  IFS=, read -r state label <<<"$answer"
  [[ "$label" == "$NAME" ]] || { echo FOREIGN && return 0; }
  if [[ "$MODE" == qr && "$state" == ACTIVE ]]; then
    # Where a spot node was taken away, its queued resource says so later.
    answer="$(list tpu-vm "state,labels.safemoe")" || { echo UNKNOWN && return 0; }
    state="${answer%%,*}"
  fi
  case "$state" in
    READY) echo READY ;;
    FAILED) echo FAILED ;;
    "" | SUSPENDED | PREEMPTED | TERMINATED | STOPPED) echo PREEMPTED ;;
    *) echo WAITING ;;
  esac
}

is_up() {
  case "$(slice_state)" in
    READY | WAITING) return 0 ;;
    UNKNOWN) return 2 ;;
    *) return 1 ;;
  esac
}

slice_create() {
  local flags homes
  flags=("${WHERE[@]}" "--accelerator-type=$ACCELERATOR" "--labels=safemoe=$NAME")
  readarray -t homes < <(seq -f "$STATE/workers/%.0f" 0 $((NUM_WORKERS - 1)))
  [[ "$CAPACITY" == on-demand ]] || flags+=("--$CAPACITY")
  flags+=("${CREATE_FLAGS[@]}")
  new_logs
  case "$MODE" in
    qr) tpus queued-resources create "$NAME" "--node-id=$NAME" "--runtime-version=$RUNTIME" \
      "--valid-until-duration=$(seconds_left)s" "${flags[@]}" ;;
    vm) tpus tpu-vm create "$NAME" "--version=$RUNTIME" "${flags[@]}" ;;
    local) execute mkdir -p "${homes[@]}" ;;
  esac || return 1
  MADE=1 FRESH=1 IS_SET_UP="" VERDICT=new
}

slice_delete() {
  case "$MODE" in
    qr) tpus queued-resources delete "$NAME" "${WHERE[@]}" --force ;;
    vm) tpus tpu-vm delete "$NAME" "${WHERE[@]}" ;;
    local)
      on_workers "$(worker stop)" 2>/dev/null || true # nothing else ends what runs there
      execute rm -rf "$STATE/workers"
      ;;
  esac || return 1
  MADE=""
}

# ---- The workers.

on_workers() {
  local errors=/dev/stderr # gcloud tells each connection there
  if [[ "$MODE" == local ]]; then
    fan_out "$@"
    return $?
  fi
  [[ ! "${2:-}" || "$DRY_RUN" ]] || errors="$2/gcloud"
  tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker=all ${2:+"--output-directory=$2"} \
    --ssh-flag=-oServerAliveInterval=15 "${SSH_FLAGS[@]}" "--command=$1" 2>>"$errors"
}

send() {
  if [[ "$MODE" == local ]]; then
    local number
    for ((number = 0; number < NUM_WORKERS; number++)); do
      execute cp "$2" "$STATE/workers/$number/$1" || return 1
    done
    return 0
  fi
  tpus tpu-vm scp "$2" "$NAME:$1" "${WHERE[@]}" --worker=all "${SSH_FLAGS[@]}"
}

# One fake worker: a process with its share of the fake devices, that joins the others.
worker_argv() {
  ARGV=(env -C "$STATE/workers/$1" JAX_PLATFORMS=cpu
    "XLA_FLAGS=--xla_force_host_platform_device_count=$((FAKE_DEVICES / NUM_WORKERS))")
  ((NUM_WORKERS == 1)) || ARGV+=("JAX_COORDINATOR_ADDRESS=localhost:8476"
    "JAX_NUM_PROCESSES=$NUM_WORKERS" "JAX_PROCESS_ID=$1")
  ARGV+=(bash -c "$2")
}

# local_environment EXTRAS: one that has the package's dependencies, that of $PYTHON or .venv.
local_environment() {
  [[ "${PYTHON:-}" || "$DRY_RUN" ]] || install "$1" >&2
  dirname "$(dirname "${PYTHON:-$VENV/bin/python}")"
}

# ---- The verbs.

# Until the slice is up, made anew wherever it has to be.
ensure_slice() {
  local state
  while true; do
    state="$(slice_state)"
    case "$state" in
      READY) return 0 ;;
      FOREIGN) refuse_foreign ;;
      ABSENT)
        [[ ! "$PLAN" ]] || plan
        [[ ! "$MADE" ]] || spend preemptions "$NAME is gone and is made anew"
        slice_create || spend failures "$NAME could not be created"
        ;;
      PREEMPTED | FAILED)
        slice_delete || true
        if [[ "$state" == FAILED ]]; then
          spend failures "$NAME failed and is made anew"
        else
          spend preemptions "$NAME was taken away and is made anew"
        fi
        ;;
    esac
    (($(seconds_left) > 0)) || end_at_deadline
    pause
  done
}

# Asks for no slice where the TPU's compiler, which needs no TPU, finds that the job does not fit.
plan() {
  local index place options=()
  place="$(local_environment test)" # the extra that brings the compiler
  for index in "${!JOB[@]}"; do     # of the job's options those that plan has, too
    case "${JOB[index]}" in
      --config) options+=(--config "${JOB[index + 1]-}") ;;
      --config[=.]*) options+=("${JOB[index]}") ;;
    esac
  done
  execute "$place/bin/safemoe" plan --topology "$ACCELERATOR" "${options[@]}" >&2 || exit $?
  PLAN="" # once is enough
}

refuse_foreign() {
  KEEP=1
  die "$NAME is there without the label safemoe=$NAME: not this launcher's; give another NAME"
}

run() {
  local place
  ENVIRONMENT=(tpu)
  if [[ "$MODE" == local ]]; then
    place="$(local_environment "")"
    ENVIRONMENT=(local "$place")
  fi
  pack "$STATE/code.tar.gz"
  trap finish EXIT
  on_signal interrupted INT TERM
  on_signal 'KEEP=1; exit 129' HUP
  while true; do
    ensure_slice
    find_or_start_job || continue
    watch_job
    case "$VERDICT" in
      done) return 0 ;;
      mistake)
        say "the job ended with 2, a mistake in its command: see $(log_directory)"
        exit 2
        ;;
      late)
        stop_job
        end_at_deadline
        ;;
      lost) ;;
      saved)
        (($(seconds_left) > 0)) || end_at_deadline
        spend preemptions "the job was interrupted and has saved"
        ;;
      failed | straggling) job_failed ;;
      *) slice_failed ;;
    esac
  done
}

# Leaves alone a job that runs already; fails where none could be started.
find_or_start_job() {
  [[ "$FRESH" ]] || retry "$SET_UP_TRIES" reached || true
  if [[ "$VERDICT" == @(running|straggling) ]]; then
    say "$NAME runs the job already"
    return 0
  fi
  if [[ "$VERDICT" == unreachable ]] || ! set_up_once || ! start_job "$DEVICES"; then
    slice_failed
    return 1
  fi
}

# What this call has set up is as it should be, until the slice is another one.
set_up_once() {
  [[ ! "$IS_SET_UP" ]] || return 0
  set_up "${ENVIRONMENT[@]}" || return 1
  FRESH="" IS_SET_UP=1
}

# What went wrong is a failure only where the slice has not been taken away meanwhile.
is_still_there() {
  pause
  [[ "$(slice_state)" == READY ]]
}

job_failed() {
  is_still_there || return 0
  [[ "$VERDICT" != straggling ]] || stop_job
  spend failures "the job has failed: see $(log_directory)"
}

# It cannot be reached, or not be set up; a new one may do.
slice_failed() {
  is_still_there || return 0
  if [[ ! "$REACHED" && ! "$MADE" ]]; then
    KEEP=1
    say "no worker of $NAME can be reached by ssh from here, and it is left as it is; is your key" \
      "in the agent (ssh-add ~/.ssh/google_compute_engine), or is --ssh=--internal-ip needed?"
    exit "$EXIT_FAILED"
  fi
  slice_delete || true
  spend failures "$NAME could not be set up, or not be reached, and is made anew"
}

interrupted() {
  [[ "$(slice_state)" != READY ]] || stop_job
  exit "$EXIT_INTERRUPTED"
}

# However the run ends, nothing is left that costs money.
finish() {
  local code=$?
  trap - EXIT INT TERM HUP
  set +e
  if [[ "$KEEP" ]]; then
    say "$NAME is left as it is; delete it by: $(quoted "$0" delete "$NAME" "--mode=$MODE" \
      ${ZONE:+"--zone=$ZONE"} ${PROJECT:+"--project=$PROJECT"})"
  elif [[ "$(slice_state)" != @(ABSENT|FOREIGN) || "$DRY_RUN" ]]; then
    slice_delete || say "COULD NOT DELETE $NAME, which goes on costing; see the message above"
  fi
  [[ "$code" != 0 ]] || say "done; logs are in $(log_directory)"
  exit "$code"
}

status() {
  local state
  state="$(slice_state)"
  echo "$NAME: $state"
  [[ "$state" != READY ]] || workers_status
}

attach() {
  local command="tail -n 100 -F safemoe/$NAME/job.log"
  if [[ "$MODE" == local ]]; then
    execute bash -c "cd $(quoted "$STATE/workers/0") && exec $command"
  else
    tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker=0 "${SSH_FLAGS[@]}" "--command=$command"
  fi
}

main() {
  if [[ "${1:-}" == @(--help|-h|) ]]; then help && return 0; fi
  parse "$@"
  check
  case "$VERB" in
    create) ensure_slice ;;
    run) run ;;
    status) status ;;
    attach) attach ;;
    logs) copy_logs && say "logs are in $(log_directory)" ;;
    delete)
      case "$(slice_state)" in
        ABSENT) say "$NAME is not there" ;;
        FOREIGN) refuse_foreign ;;
        *) slice_delete ;;
      esac
      ;;
  esac
}

main "$@"
