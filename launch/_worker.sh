#!/usr/bin/env bash
# What a launcher runs on each worker, in the directory that it has shipped code.tar.gz to.
#
#   _worker.sh install tpu|gpu|local VENV     the environment, from the lock file, with retries
#   _worker.sh check N                        do the workers see N devices together?
#   _worker.sh start SECONDS OPTION...        starts `safemoe run OPTION...`, once, detached
#   _worker.sh status                         job: new | running | exited CODE | vanished
#   _worker.sh stop                           asks the job to save and to end
#   _worker.sh log                            the job's log
#
# The job's files: job.log, pid, exit_code. `secrets` is deleted once the job has read it.
set -Eeuo pipefail

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
  exit 0
fi

readonly PYTHON_VERSION=3.11 UV_VERSION=0.13.9 # those that the lock files were made for and by
readonly TRIES=5 WAIT="${SAFEMOE_RETRY_SECONDS:-10}" GRACE=600

retry() {
  local try
  for ((try = 1; ; try++)); do
    "$@" && return
    ((try < TRIES)) || return 1
    echo "worker: try $try of $TRIES failed: $*" >&2
    sleep $((WAIT * try))
  done
}

# uv, since a worker's own Python may be older than ours; --target works where pip may not touch
# the system.
install_locked() {
  local lock="code/launch/requirements-$1.txt" print
  print="$PYTHON_VERSION $(cksum <"$lock")"
  if [[ "$(cat installed 2>/dev/null)" != "$print" ]]; then
    rm -rf installed venv
    retry python3 -m pip install --quiet --upgrade --target=tools "uv==$UV_VERSION"
    retry tools/bin/uv venv --quiet --clear --python "$PYTHON_VERSION" venv
    retry tools/bin/uv pip sync --quiet --python venv/bin/python "$lock"
    echo "$print" >installed
  fi
  retry tools/bin/uv pip install --quiet --python venv/bin/python --no-deps --editable code
}

install() {
  if [[ "$1" == local ]]; then ln -sfn "$2" venv; else install_locked "$1"; fi
}

running() {
  [[ -f pid ]] && ps -o args= -p "$(<pid)" 2>/dev/null | grep -qF '_worker.sh job'
}

# A second start leaves a running job alone, so it may be repeated after a lost connection.
start() {
  if running; then
    echo "worker: already running as process $(<pid)"
    return
  fi
  rm -f exit_code
  setsid bash code/launch/_worker.sh job "$@" >>job.log 2>&1 </dev/null &
  echo $! >pid
}

job() {
  local line limit="$1" child code asked
  shift
  echo "worker: $(date -u +%FT%TZ) $(hostname) starts safemoe run $*, commit $(<code/STAMP)"
  if [[ -f secrets ]]; then
    while IFS= read -r line; do
      [[ ! "$line" || "$line" == \#* ]] || export "${line?}"
    done <secrets
    rm secrets
  fi
  export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD/code"
  local program="$PWD/venv/bin/safemoe" top="$PWD"
  cd code
  # At the limit it is asked to save, as by a preemption; then it ends with 75.
  timeout --foreground --preserve-status --kill-after="$GRACE" "$limit" "$program" run "$@" &
  child=$!
  trap 'asked=1; kill -TERM "$child" 2>/dev/null || true' TERM INT
  asked=1
  while [[ "$asked" ]]; do # a signal ends the wait and not the job
    asked="" code=0
    wait "$child" || code=$?
  done
  trap '' TERM INT # too late
  echo "worker: $(date -u +%FT%TZ) ended with $code"
  echo "$code" >"$top/exit_code.new"
  mv "$top/exit_code.new" "$top/exit_code"
}

status() {
  if running; then
    echo "job: running"
  elif [[ -f exit_code ]]; then
    echo "job: exited $(<exit_code)"
  elif [[ -f pid ]]; then
    echo "job: vanished" # killed outright, or the machine was started anew
  else
    echo "job: new"
  fi
}

check() {
  PYTHONPATH=code timeout "$GRACE" venv/bin/python code/launch/check_devices.py "$1"
}

case "${1:-}" in
  install | check | start | job) "$@" ;;
  status) status ;;
  stop) ! running || kill -TERM "$(<pid)" ;;
  log) [[ ! -f job.log ]] || cat job.log ;;
  *)
    echo "worker: unknown verb '${1:-}'; see $0 --help" >&2
    exit 2
    ;;
esac
