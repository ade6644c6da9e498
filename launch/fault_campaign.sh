#!/usr/bin/env bash
# Disturbs training on toys in many ways, and writes what came of it into docs/reliability.md.
#
#   launch/fault_campaign.sh [DIRECTORY]
#
# 208 trials of the training loop, 34 of the whole command. DIRECTORY (default: runs/faults) keeps
# what is done: started again, it goes on from there. As root it also mounts small file systems.
set -Eeuo pipefail

# shellcheck source-path=SCRIPTDIR source=_venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_venv.sh"
if [[ "${1:-}" == @(--help|-h) ]]; then help && exit; fi

install test
cd "$ROOT"
directory="${1:-runs/faults}"
campaign=("$VENV/bin/python" tests/faults/campaign.py "$directory")
failed=0
nice -n 15 "${campaign[@]}" --part loops --trials 208 || failed=1
nice -n 15 "${campaign[@]}" --part commands --trials 34 || failed=1
"${campaign[@]}" --table
exit "$failed"
