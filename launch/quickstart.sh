#!/usr/bin/env bash
# From a bare machine to a safety report: makes .venv, installs, fetches model and data, trains a
# small SafeMoE on the CPU, evaluates it, and prints where the report lies.
#
#   launch/quickstart.sh [OPTION...]
#
# Options go to `safemoe run`; for example --config.seed=1. PYTHON=/path/to/python chooses the
# interpreter. The outcome is in runs/quickstart; a second run reuses what is done.
set -Eeuo pipefail

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
  exit 0
fi

# shellcheck source-path=SCRIPTDIR source=_venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_venv.sh"

install ""
cd "$ROOT"
exec "$VENV/bin/safemoe" run --config experiments/quickstart.py --workdir runs/quickstart "$@"
