#!/usr/bin/env bash
# Makes .venv, installs the test extra, checks lint, format and types, and runs the tests.
#
#   launch/test.sh [--parity] [PYTEST_OPTION...]
#
# --parity, or EXTRAS=parity, also installs torch (CPU) and lm-eval: numbers are then compared with
# those of transformers itself, and not only with the golden ones in tests/golden.
set -Eeuo pipefail

# shellcheck source-path=SCRIPTDIR source=_venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_venv.sh"
if [[ "${1:-}" == @(--help|-h) ]]; then help && exit; fi

if [[ "${1:-}" == --parity ]]; then
  EXTRAS=parity
  shift
fi
if [[ "${EXTRAS:-}" == parity ]]; then
  # Pinned, so that a CPU wheel that PIP_FIND_LINKS or PIP_INDEX_URL offers is taken: a newer
  # release from PyPI would win over it, and on Linux brings several GB of CUDA.
  install test,parity "torch==2.13.0"
else
  install test
fi

cd "$ROOT"
"$VENV/bin/python" -m ruff check
"$VENV/bin/python" -m ruff format --check
"$VENV/bin/python" -m mypy
# Most of a test is compiling, on one core; --numprocesses 0 brings back -s and a debugger.
exec "$VENV/bin/python" -m pytest --numprocesses 2 --dist loadfile "$@"
