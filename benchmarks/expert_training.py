"""Expert training at equal shapes: one expert, rank 32 on q, k, v, 8 rows of 256 tokens.

    python benchmarks/expert_training.py [--rounds N]

Against PEFT's LoRA, both in float32 and bfloat16, the base included: tokens per second and peak
memory. Rows are full, so nobody gains by packing. Two losses: on every token, and on answers only,
which is what stage one trains.
"""

import functools
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import PEERS, in_turn, median, peer_python, report, rounds_argument, side, table
from inputs import base_file, config, full_rows, read_corpus, write_corpus
from ours import step_speed

ROWS, LENGTH, RANK, STEPS = 8, 256, 32, 4


def ours(path: str, dtype: str) -> None:
    of = config(
        data__domains=("violence",),
        experts__targets=("q", "k", "v"),
        experts__rank=RANK,
        experts__alpha=2.0 * RANK,
        model__param_dtype=dtype,
        model__compute_dtype=dtype,
    )
    report({"tokens_per_second": step_speed(of, "experts", path, STEPS)})


def main() -> None:
    rounds = rounds_argument(__doc__).parse_args().rounds
    python = peer_python("peft", "peft==0.21.2")
    lines = []
    with tempfile.TemporaryDirectory() as directory:
        corpus = Path(directory) / "corpus.npz"
        write_corpus(corpus, per_domain=16)
        items, _ = read_corpus(corpus)
        for loss, all_tokens in (("every token", True), ("answers", False)):
            batch = Path(directory) / f"{all_tokens}.npz"
            np.savez(
                batch, allow_pickle=False, **full_rows(items, ROWS, LENGTH, all_tokens=all_tokens)
            )
            mine = functools.partial(side, sys.executable, Path(__file__), "ours", batch)
            peft = functools.partial(side, python, PEERS / "peft_lora.py", base_file(), batch)
            results = in_turn(
                {
                    "ours, float32": mine("float32"),
                    "ours, bfloat16": mine("bfloat16"),
                    "PEFT, float32": peft("float32", RANK, STEPS),
                    "PEFT, bfloat16": peft("bfloat16", RANK, STEPS),
                },
                rounds,
            )
            fastest = {
                key: median(results["ours, bfloat16"], key)
                for key in ("tokens_per_second", "peak_bytes")
            }
            for name, result in results.items():
                speed, peak = median(result, "tokens_per_second"), median(result, "peak_bytes")
                gib = f"{peak / 2**30:.2f}"
                lines.append(
                    (
                        loss,
                        name,
                        f"{speed:.0f}",
                        f"{fastest['tokens_per_second'] / speed:.2f}",
                        gib,
                        f"{fastest['peak_bytes'] / peak:.2f}",
                    )
                )
    columns = (
        "loss on",
        "side",
        "tokens/s",
        "ours, bfloat16 / it",
        "peak RSS, GiB",
        "ours, bfloat16 / it",
    )
    table("Expert training, equal shapes, one expert", columns, lines)


if __name__ == "__main__":
    ours(*sys.argv[2:]) if sys.argv[1:2] == ["ours"] else main()
