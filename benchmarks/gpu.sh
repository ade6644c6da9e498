#!/usr/bin/env bash
# Both train steps, decoding, and the same training in PEFT, at Llama's shapes with random weights, on
# one GPU. Under 8 minutes; prints tables for benchmarks/RESULTS.md.
#
#   benchmarks/gpu.sh            # makes a venv of its own
#   PYTHON=python3 benchmarks/gpu.sh   # uses this Python, which has jax[cuda13], torch and peft
set -Eeuo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

if [[ -z "${PYTHON:-}" ]]; then
  venv="${SAFEMOE_CACHE:-$HOME/.cache/safemoe}/benchmarks/gpu"
  PYTHON="$venv/bin/python"
  if [[ ! -x "$PYTHON" ]]; then
    python3 -m venv "$venv"
    "$PYTHON" -m pip install --quiet --editable '.[gpu]' torch peft
  fi
fi
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || {
  printf 'no NVIDIA GPU found; this benchmark needs one\n' >&2
  exit 2
}
for shape in llama32_1b llama31_8b; do
  "$PYTHON" benchmarks/gpu.py ours "$shape"
  "$PYTHON" benchmarks/gpu.py peft "$shape"
done
