#!/usr/bin/env bash
# From a bare machine to a safety report: makes .venv, installs, fetches model and data, trains a
# small SafeMoE on the CPU, evaluates it, and prints where the report lies.
#
#   launch/quickstart.sh [OPTION...]
#
# Options go to `safemoe run`; for example --config.seed=1. PYTHON=/path/to/python chooses the
# interpreter. The outcome is in runs/quickstart; a second run reuses what is done.
set -Eeuo pipefail

# shellcheck source-path=SCRIPTDIR source=_venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_venv.sh"
if [[ "${1:-}" == @(--help|-h) ]]; then help && exit; fi

install ""
cd "$ROOT"
exec "$VENV/bin/safemoe" run --config experiments/quickstart.py --workdir runs/quickstart "$@"
