# Sourced by the launchers beside it: the job on a set of workers, each with a home directory.
#
# A launcher defines
#   on_workers COMMAND [DIR]   runs a shell command on all workers at once, with output to DIR/N.log
#   send TO FILE               copies a file to all workers
#   is_up                      0 they are there, 1 they are gone, 2 that cannot be found out
# and sets NAME, VERB, STATE, a directory of this machine, and by budget MOST and SPENT. What is
# written on the way has a directory for each verb, since a run is looked at while it goes on.
# shellcheck shell=bash

# shellcheck disable=SC2034 # read by the launchers
readonly SET_UP_TRIES=5 MOST_MISSES=10 SAVING_SECONDS=900
VERDICT="" REACHED="" STARTED=""

# fan_out COMMAND [DIR]: on_workers for workers that are reached one by one, by the command that
# `worker_argv N COMMAND` puts into ARGV.
fan_out() {
  local number pids=() failed=0
  for ((number = 0; number < NUM_WORKERS; number++)); do
    worker_argv "$number" "$1"
    if [[ "$DRY_RUN" ]]; then
      execute "${ARGV[@]}"
    elif [[ "${2:-}" ]]; then
      execute "${ARGV[@]}" >"$2/$number.log" 2>&1 &
      pids+=($!)
    else
      execute "${ARGV[@]}" &
      pids+=($!)
    fi
  done
  for number in "${pids[@]}"; do wait "$number" || failed=$?; done
  return "$failed"
}

# The shell command that runs a verb of _worker.sh on a worker.
worker() { printf 'cd safemoe/%s && bash code/launch/_worker.sh %s' "$NAME" "$(quoted "$@")"; }

# set_up ENVIRONMENT...: the code, and an environment for it, on all workers.
set_up() {
  local home="safemoe/$NAME"
  retry "$SET_UP_TRIES" on_workers "mkdir -p $home && chmod 700 safemoe $home" || return 1
  REACHED=1
  retry "$SET_UP_TRIES" send "$home/code.tar.gz" "$STATE/code.tar.gz" || return 1
  retry "$SET_UP_TRIES" on_workers \
    "cd $home && rm -rf code && mkdir code && tar -xzf code.tar.gz -C code" || return 1
  retry "$SET_UP_TRIES" on_workers "$(worker install "$@")"
}

# start_job DEVICES: on all workers, once all devices are there; a worker that has it is left alone.
start_job() {
  local left
  on_workers "$(worker check "$1")" || return 1
  left="$(seconds_left)"
  ((left > 0)) || end_at_deadline # `timeout` takes 0 for no limit, and less for a mistake
  if [[ "$ENV_FILE" ]]; then
    retry "$SET_UP_TRIES" send "safemoe/$NAME/secrets" "$ENV_FILE" || return 1
  fi
  retry "$SET_UP_TRIES" on_workers "$(worker start "$left" "${JOB[@]}")" || return 1
  STARTED=1
  say "started; it goes on without this terminal: Ctrl-C ends it, closing the terminal does not"
}

# What the workers say of their jobs, in VERDICT:
#   unreachable | new | running | straggling | done | saved | mistake | failed
look() {
  local there="safemoe/$NAME/code" answers="$STATE/$VERB/answers" said
  execute rm -rf "$answers"
  execute mkdir -p "$answers"
  if ! on_workers "if [ -d $there ]; then $(worker status); else echo job: new; fi" "$answers"; then
    VERDICT=unreachable
    say "not all workers can be reached by ssh:"
    tail -qn 1 "$answers/"* >&2 || true
  elif [[ "$DRY_RUN" ]]; then
    VERDICT=${STARTED:+done}
  else
    REACHED=1
    said="$(grep -h '^job: ' "$answers"/*.log | sort -u)" || true
    verdict_of "$said"
  fi
}

# verdict_of LINES: one verdict of what the workers said, each thing once.
verdict_of() {
  case "$1" in
    "") VERDICT=unreachable ;;
    "job: new") VERDICT=new ;;
    "job: running") VERDICT=running ;;
    *"job: running"*) VERDICT=straggling ;;
    "job: exited 0") VERDICT='done' ;;
    *"job: exited 2" | *$'job: exited 2\n'*) VERDICT=mistake ;; # and JAX ended the others
    *"job: exited 75"*) VERDICT=saved ;; # all save together, whatever the others end with then
    *) VERDICT=failed ;;
  esac
}

# One log for each worker below $STATE/logs; of each set of workers a directory of its own.
copy_logs() {
  local file fresh="$STATE/$VERB/logs"
  execute mkdir -p "$fresh" "$(log_directory)"
  on_workers "$(worker log)" "$fresh" || return 0 # what was copied before stays
  [[ ! "$DRY_RUN" ]] || return 0
  for file in "$fresh/"*.log; do
    mv "$file" "$(log_directory)/worker-$(basename "$file")"
  done
}

log_directory() { echo "$STATE/logs/$(cat "$STATE/generation" 2>/dev/null || echo 1)"; }

# Of a new set of workers.
new_logs() {
  [[ "$DRY_RUN" ]] || {
    mkdir -p "$STATE"
    echo $(($(cat "$STATE/generation" 2>/dev/null || echo 0) + 1)) >"$STATE/generation"
  }
}

# Until the job has ended or its workers are gone; VERDICT is then also lost or late.
watch_job() {
  local misses=0 straggling=0 up
  while true; do
    look
    copy_logs
    [[ "$VERDICT" == @(running|straggling|unreachable) ]] || return 0
    up=0 && is_up || up=$?
    case "$VERDICT:$up" in
      *:1) VERDICT=lost && return 0 ;;
      running:*) misses=0 straggling=0 ;;
      straggling:*) ((++straggling < MOST_MISSES)) || return 0 ;;
      unreachable:0) ((++misses < MOST_MISSES)) || return 0 ;; # with 2 it is this machine's network
    esac
    (($(seconds_left) + SAVING_SECONDS > 0)) || { VERDICT=late && return 0; }
    pause
  done
}

# Asks the job to save, and waits until it has ended on all workers.
stop_job() {
  local until=$((SECONDS + SAVING_SECONDS))
  say "asking the job to save; this may take minutes"
  on_workers "$(worker stop)" || true
  look
  while [[ "$VERDICT" == @(running|straggling) ]] && ((SECONDS < until)); do
    pause $((POLL < 5 ? POLL : 5))
    look
  done
  copy_logs
}

workers_status() {
  local file
  look
  for file in "$STATE/$VERB/answers/"*.log; do
    [[ -f "$file" ]] || continue
    echo "worker $(basename "$file" .log): $(grep '^job: ' "$file" || echo unreachable)"
  done
}

reached() {
  look
  [[ "$VERDICT" != unreachable ]]
}

seconds_left() { echo $(($(seconds "$DEADLINE") - SECONDS)); }

end_at_deadline() {
  say "--deadline=$DEADLINE is over; the same command goes on from the last checkpoint"
  exit "$EXIT_INTERRUPTED"
}

# spend BUDGET WHY: one of the preemptions or failures; gives up where none is left.
spend() {
  # shellcheck disable=SC2153
  local spent=$((++SPENT[$1])) most="${MOST[$1]}"
  say "$2 ($1: $spent, at most $most)"
  if ((spent > most)); then
    say "giving up: more $1 than --max-$1=$most; the same command goes on from here"
    exit "$EXIT_FAILED"
  fi
  backoff "$spent"
}
