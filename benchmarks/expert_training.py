"""Expert training at equal shapes: one expert, rank 32 on q, k, v, 8 rows of 256 tokens.

    python benchmarks/expert_training.py [--rounds N]

Against PEFT's LoRA in float32 and bfloat16: tokens per second and peak memory. Rows are full, so
nobody gains by packing. Two losses: on every token, and on answers only, which is what stage one
trains.
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


def ours(path: str) -> None:
    of = config(
        data__domains=("violence",),
        experts__targets=("q", "k", "v"),
        experts__rank=RANK,
        experts__alpha=2.0 * RANK,
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
            np.savez(batch, **full_rows(items, ROWS, LENGTH, all_tokens=all_tokens))
            peft = functools.partial(side, python, PEERS / "peft_lora.py", base_file(), batch)
            results = in_turn(
                {
                    "ours, float32": side(sys.executable, Path(__file__), "ours", batch),
                    "PEFT, float32": peft("float32", RANK, STEPS),
                    "PEFT, bfloat16": peft("bfloat16", RANK, STEPS),
                },
                rounds,
            )
            mine = median(results["ours, float32"], "tokens_per_second")
            memory = median(results["ours, float32"], "peak_bytes")
            for name, result in results.items():
                speed, peak = median(result, "tokens_per_second"), median(result, "peak_bytes")
                gib = f"{peak / 2**30:.2f}"
                lines.append(
                    (loss, name, f"{speed:.0f}", f"{mine / speed:.2f}", gib, f"{memory / peak:.2f}")
                )
    columns = ("loss on", "side", "tokens/s", "ours / it", "peak RSS, GiB", "ours / it")
    table("Expert training, equal shapes, one expert", columns, lines)


if __name__ == "__main__":
    ours(sys.argv[2]) if sys.argv[1:2] == ["ours"] else main()
