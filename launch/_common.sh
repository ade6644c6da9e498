# Sourced by the launchers beside it: messages, dry runs, waiting, and the archive of the code.
#
# NOTE a footgun: in what a trap calls, `return` without a number gives the status from before the
# trap. So every return here and in the launchers has its number.
# shellcheck shell=bash
# shellcheck source-path=SCRIPTDIR source=_venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_venv.sh"

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
  die "$0 needs bash 4.4 or newer, this is $BASH_VERSION; on macOS: brew install bash"

# shellcheck disable=SC2034 # for the launchers
readonly EXIT_FAILED=1 EXIT_INTERRUPTED=75 # those of safemoe; 2 is a user's mistake
DRY_RUN="" POLL=60 DEADLINE=24h ALLOW_DIRTY="" ENV_FILE="" JOB=()

exec 3>&1 # where a dry run prints, also from within $(...)

# Words as a shell would take them, quoted only where they must be.
quoted() {
  local word words=()
  for word; do
    [[ "$word" =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="${word@Q}"
    words+=("$word")
  done
  printf '%s\n' "${words[*]}"
}

# Whatever is done outside this script is done by execute or ask: a dry run prints it instead.
execute() {
  if [[ "$DRY_RUN" ]]; then quoted "$@" >&3; else "$@" </dev/null 3>&-; fi
}

# ask ASSUMED COMMAND...: the command's output; ASSUMED in a dry run.
ask() {
  local assumed="$1"
  shift
  execute "$@" || return 1
  [[ ! "$DRY_RUN" ]] || printf '%s\n' "$assumed"
}

# on_signal ACTION SIGNAL...: a trap whose ACTION ends the script.
#
# Bash 5.2 reads an action as a part of $(...) if the signal comes while that is expanded, and gives
# up for want of its ")". At any other time it has run the action before it comes to that line.
on_signal() {
  # shellcheck disable=SC2064 # the action is expanded when the signal comes
  trap "$1"$'\n)' "${@:2}"
}

# Waits; a signal's trap does not wait for its end.
pause() {
  [[ "$DRY_RUN" ]] || { sleep "${1:-$POLL}" & wait $!; }
}

# backoff N: waits before the N-th repetition, twice as long each time, at most 16 polls.
backoff() {
  local seconds=$((POLL << ($1 > 4 ? 4 : $1 - 1)))
  pause $((seconds + (seconds ? RANDOM % (seconds / 4 + 1) : 0)))
}

# retry N COMMAND...: until it succeeds, N times at most.
retry() {
  local tries="$1" try
  shift
  for ((try = 1; ; try++)); do
    "$@" && return 0
    ((try < tries)) || return 1
    say "did not work, trying again ($try of $((tries - 1)))"
    backoff "$try"
  done
}

# is_whole TEXT: a number as bash counts with it; it takes 08 for an octal one.
is_whole() { [[ "$1" =~ ^(0|[1-9][0-9]*)$ ]]; }

# seconds DURATION: of 90s, 30m or 24h.
seconds() {
  [[ "$1" =~ ^([0-9]+)([smh])$ ]] || die "$1 is no duration; give one like 90s, 30m or 24h"
  local number=$((10#${BASH_REMATCH[1]})) # 08 would be octal
  case "${BASH_REMATCH[2]}" in
    s) echo "$number" ;;
    m) echo $((number * 60)) ;;
    h) echo $((number * 3600)) ;;
  esac
}

# option ARGUMENT: takes an option that all launchers have; fails where it is none of them.
option() {
  case "$1" in
    --deadline=*) DEADLINE="${1#*=}" ;;
    --env-file=*) ENV_FILE="${1#*=}" ;;
    --poll=*) POLL="${1#*=}" ;;
    --allow-dirty) ALLOW_DIRTY=1 ;;
    --dry-run) DRY_RUN=1 ;;
    *) return 1 ;;
  esac
}

check_name() {
  [[ "$NAME" =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    die "NAME is '$NAME'; give 1 to 40 small letters, digits and dashes, a letter first"
}

# The value of an option of `safemoe run`, given as --key VALUE or --key=VALUE.
job_option() {
  local index
  for index in "${!JOB[@]}"; do
    [[ "${JOB[index]}" != "$1="* ]] || { echo "${JOB[index]#*=}"; return 0; }
    [[ "${JOB[index]}" != "$1" ]] || { echo "${JOB[index + 1]-}"; return 0; }
  done
}

# check_job: what follows -- must be such that another machine can run it.
check_job() {
  seconds "$DEADLINE" >/dev/null
  is_whole "$POLL" || die "--poll=$POLL is no number of seconds; give one like --poll=60"
  [[ "$(job_option --config)" ]] ||
    die "no --config; end the command with -- --config experiments/FILE.py --workdir URL"
  [[ "$(job_option --workdir)" =~ ^(/|[a-z0-9]+://) ]] ||
    die "--workdir is '$(job_option --workdir)'; give a URL like gs://bucket/run, or where the" \
      "hosts share a file system, an absolute path"
  [[ ! "$ENV_FILE" ]] || check_env_file
}

# Secrets go to the workers as a file, never as an argument.
check_env_file() {
  [[ -f "$ENV_FILE" ]] || die "--env-file=$ENV_FILE is no file"
  [[ ! "$(find -L "$ENV_FILE" -perm -040 -o -perm -004)" ]] ||
    die "others can read --env-file=$ENV_FILE; chmod 600 $ENV_FILE"
  local wrong
  wrong="$(grep -nvE '^([A-Za-z_][A-Za-z0-9_]*=.*|#.*)?$' "$ENV_FILE" | cut -d: -f1)" || true
  [[ ! "$wrong" ]] || die "line ${wrong%%$'\n'*} of --env-file=$ENV_FILE is no KEY=VALUE"
}

changed() { git -C "$ROOT" status --porcelain | cut -c 4-; }

# pack FILE: the committed code as a tar.gz with a file STAMP; sets STAMP.
pack() {
  local commit config
  commit="$(git -C "$ROOT" rev-parse HEAD 2>/dev/null)" ||
    die "$ROOT is no git repository with a commit; the code is shipped by git archive: clone it"
  STAMP="$commit"
  if [[ "$(changed)" ]]; then
    [[ "$ALLOW_DIRTY" ]] ||
      die "not committed: $(changed | paste -sd ' '); commit, or ship tracked files as they are" \
        "by --allow-dirty"
    commit="$(git -C "$ROOT" stash create)"
    commit="${commit:-$STAMP}"
    STAMP+=" with changes, $commit"
    say "shipping tracked files with their changes, and no untracked file"
  fi
  config="$(job_option --config)"
  git -C "$ROOT" cat-file -e "$commit:$config" 2>/dev/null ||
    die "--config $config is not in commit ${commit:0:12}; give a path from the repository's root" \
      "and commit the file"
  execute mkdir -p "$(dirname "$1")"
  [[ "$DRY_RUN" ]] || printf '%s\n' "$STAMP" >"$(dirname "$1")/STAMP"
  execute git -C "$ROOT" archive --format=tar.gz --add-file="$(dirname "$1")/STAMP" \
    --output="$1" "$commit"
}
