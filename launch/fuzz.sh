#!/usr/bin/env bash
# Feeds what reads files and requests with bytes, guided by coverage, and counts crashes.
#
#   launch/fuzz.sh [--seconds N] [TARGET...]
#
# Each target of tests/faults/fuzz_targets.py, or those that are named, runs for N seconds (300).
# What was found, and the corpus from where the next run goes on, is in runs/fuzz. atheris is
# installed into .venv; its wheels are for Linux.
set -Eeuo pipefail

# shellcheck source-path=SCRIPTDIR source=_venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_venv.sh"
if [[ "${1:-}" == @(--help|-h) ]]; then help && exit; fi

install test
cd "$ROOT"
"$VENV/bin/python" -m pip install --quiet "atheris==3.0.0"
exec nice -n 15 "$VENV/bin/python" tests/faults/fuzz_targets.py runs/fuzz "$@"
