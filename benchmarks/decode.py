"""Greedy decoding at batch 32: seven experts of rank 32 on q, k, v, the router on.

    python benchmarks/decode.py [--rounds N]

Against our own bare base, transformers' generate of the bare base, both in float32 and bfloat16,
weights included, and PEFT's X-LoRA, which runs in float32 and can use no KV cache. Prompts have 64
tokens; prefill is not counted, except for X-LoRA, which does all of it again for each token and is
given the fewest.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from common import PEERS, in_turn, median, peer_python, report, rounds_argument, side, table
from inputs import base_file, config, experiment
from ours import decode_seconds, drawn

BATCH, PROMPT, NEW, NEW_XLORA, RANK, EXPERTS = 32, 64, 64, 4, 32, 7


def ours(path: str, what: str, dtype: str) -> None:
    of = config(
        experts__targets=("q", "k", "v"),
        experts__rank=RANK,
        experts__alpha=2.0 * RANK,
        model__param_dtype=dtype,
        model__compute_dtype=dtype,
    )
    with tempfile.TemporaryDirectory() as directory, np.load(path) as file:
        run = experiment(of, directory)
        variables = {"params": run.params}
        if what == "gated":
            variables |= drawn(run.model, "experts", "router")
        seconds = decode_seconds(run.model, variables, file["tokens"], NEW)
        report({"tokens_per_second": BATCH / seconds})


def main() -> None:
    rounds = rounds_argument(__doc__).parse_args().rounds
    python = peer_python("peft", "peft==0.21.2")
    with tempfile.TemporaryDirectory() as directory:
        prompts = Path(directory) / "prompts.npz"
        tokens = np.random.default_rng(0).integers(100, 40_000, (BATCH, PROMPT))
        np.savez(prompts, tokens=tokens, mask=np.ones_like(tokens))
        xlora = (PEERS / "xlora.py", "generate", base_file(), prompts, EXPERTS, RANK, NEW_XLORA)
        sides = {}
        for dtype in ("float32", "bfloat16"):
            for what, title in (("gated", "gated"), ("base", "bare base")):
                mine = side(sys.executable, Path(__file__), "ours", prompts, what, dtype)
                sides[f"ours, {title}, {dtype}"] = mine
            sides[f"transformers, bare base, {dtype}"] = side(
                python, PEERS / "generate.py", base_file(), prompts, NEW, dtype
            )
        results = in_turn({**sides, "X-LoRA, float32": side(python, *xlora)}, rounds)
    gated = median(results["ours, gated, bfloat16"], "tokens_per_second")
    lines = []
    for name, result in results.items():
        speed = median(result, "tokens_per_second")
        lines.append((name, f"{speed:.1f}", f"{gated / speed:.2f}"))
    table("Decoding, batch 32", ("side", "new tokens/s", "ours, gated, bfloat16 / it"), lines)


if __name__ == "__main__":
    ours(*sys.argv[2:]) if sys.argv[1:2] == ["ours"] else main()
