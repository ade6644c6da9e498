#!/usr/bin/env bash
# Builds sdist and wheel, installs each in a clean venv of each Python, and tries it there: all modules are
# imported, and an experiment on a tiny random base goes from data to its report.
#
#   launch/test_packages.sh [PYTHON...]      versions or paths; default: 3.11 3.13
#
# Needs uv on PATH, or UV=/path/to/uv; it also brings a Python that is not here. What the judge learns from
# is taken from the cache of `safemoe`, or fetched. No part of CI: it takes minutes and GBs.
set -Eeuo pipefail

# shellcheck source-path=SCRIPTDIR source=_venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_venv.sh"
if [[ "${1:-}" == @(--help|-h) ]]; then help && exit; fi

UV="${UV:-uv}"
command -v "$UV" >/dev/null || die "$UV is no command; pip install uv, or give UV=/path/to/uv"
(($#)) || set -- 3.11 3.13

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/cache"
[[ ! -d "${SAFEMOE_CACHE:-$HOME/.cache/safemoe}/wheels" ]] ||
  ln -s "${SAFEMOE_CACHE:-$HOME/.cache/safemoe}/wheels" "$scratch/cache/wheels"

"$UV" build --quiet --out-dir "$scratch/dist" "$ROOT"

try() { # try PYTHON FILE: in a directory from which the checkout is not seen
  local here venv
  here="$(mktemp -d -p "$scratch")"
  venv="$here/venv"
  "$UV" venv --quiet --python "$1" "$venv"
  "$UV" pip install --quiet --python "$venv/bin/python" "$2"
  mkdir "$here/experiments"
  cp "$ROOT/experiments/pyrit.py" "$here/experiments/"
  cp "$ROOT/tests/tiny.py" "$here/"
  (
    cd "$here"
    unset PYTHONPATH
    "$venv/bin/safemoe" --help >/dev/null
    "$venv/bin/python" - <<'PYTHON'
import importlib, pkgutil
from pathlib import Path

import safemoe_jax
import tiny

needs_more = {"safemoe_jax.serving.harness", "safemoe_jax.weights.safemoe_torch"}  # lm-eval, torch
found = {module.name for module in pkgutil.walk_packages(safemoe_jax.__path__, "safemoe_jax.")}
assert needs_more < found and "site-packages" in safemoe_jax.__file__
for name in sorted(found - needs_more):
    importlib.import_module(name)

tiny.write_base(Path("base"))
tiny.write_corpus(Path("corpus.jsonl"))
tiny.write_experiment(Path("experiments/tiny.py"), Path("base"), Path("corpus.jsonl"))
PYTHON
    SAFEMOE_CACHE="$scratch/cache" JAX_PLATFORMS=cpu \
      "$venv/bin/safemoe" run --config experiments/tiny.py >log 2>&1 || { cat log >&2; exit 1; }
    grep -q '</html>' runs/tiny/report.html
  )
  printf '%s: %s, %s: works\n' "${2##*/}" "$("$venv/bin/python" --version)" \
    "$("$UV" pip list --python "$venv/bin/python" 2>/dev/null | awk '$1 == "jax" { print $1, $2 }')"
}

for python; do
  for file in "$scratch"/dist/*.whl "$scratch"/dist/*.tar.gz; do
    try "$python" "$file"
  done
done
