# Sourced by the scripts beside it: makes .venv in the repository root and keeps it up to date.
# With nothing changed it costs milliseconds and needs no network.
# shellcheck shell=bash

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
readonly ROOT VENV

# The comment at the head of the script that was called.
help() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0"; }

say() { printf '%s\n' "$*" >&2; }

die() {
  say "$*"
  exit 2
}

# Prints the first Python that is new enough. Each candidate is run, not only looked up: version
# managers leave commands on PATH that start nothing.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    "$candidate" -c 'import ensurepip, venv' 2>/dev/null ||
      die "$candidate cannot make a virtual environment; install its venv module" \
        "(Debian, Ubuntu: apt-get install python3-venv) and run this again"
    printf '%s\n' "$candidate"
    return
  done
  die "no Python 3.11 or newer found as python3, python3.13, python3.12 or python3.11;" \
    "install one, or name it: PYTHON=/path/to/python $0"
}

# What an installation depends on; a moved checkout counts, since console scripts hold its path.
fingerprint() {
  { printf '%s\n' "$ROOT" && cat "$ROOT/setup.py" "$ROOT/pyproject.toml"; } | cksum
}

# install EXTRAS [REQUIREMENT...]: installs the package, editable, with its extras.
#
# EXTRAS is "", "test" or "test,parity": each holds the one before it, so what is installed covers
# what is asked for when the latter is its prefix. The stamp is written last and removed first; a
# .venv without a stamp was interrupted, may hold half a package, and is made anew.
install() {
  local extras="$1" stamp="$VENV/.safemoe-installed" installed_print="" installed_extras=""
  shift

  # Two scripts started at once would otherwise clear each other's work. Elsewhere than on Linux
  # flock may be missing, and that is then not guarded against.
  exec 9<"$ROOT/setup.py"
  ! command -v flock >/dev/null || flock 9

  if [[ -f "$stamp" ]] && "$VENV/bin/python" -c '' 2>/dev/null; then
    { read -r installed_print && read -r installed_extras; } <"$stamp" || true
    if [[ "$installed_print" == "$(fingerprint)" && "$installed_extras" == "$extras"* ]]; then
      exec 9<&-
      return
    fi
    [[ "$installed_extras" != "$extras"* ]] || extras="$installed_extras"
    rm -f "$stamp"
  else
    local python
    python="$(find_python)"
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear "$VENV"
  fi

  local quiet=(--quiet)
  [[ ! -t 1 ]] || quiet=()
  say "installing safemoe-jax${extras:+[$extras]} into .venv; the first time takes some minutes"
  PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    "$VENV/bin/python" -m pip install ${quiet[@]+"${quiet[@]}"} "$@" \
    --editable "$ROOT${extras:+[$extras]}" ||
    die "pip could not install; see its message above, then run this again"
  printf '%s\n' "$(fingerprint)" "$extras" >"$stamp"
  exec 9<&-
}
