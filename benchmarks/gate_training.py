"""Gate training: seven experts of rank 32 on q, k, v, a scaling for each layer and expert.

    python benchmarks/gate_training.py [--rounds N]

Against PEFT's X-LoRA with layerwise scalings and a linear classifier, which trains in float32. 8
full rows of 256 tokens of safe answers.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from common import PEERS, in_turn, median, peer_python, report, rounds_argument, side, table
from inputs import base_file, config, full_rows, read_corpus, write_corpus
from ours import step_speed

ROWS, LENGTH, RANK, EXPERTS, STEPS = 8, 256, 32, 7, 3


def ours(path: str, dtype: str) -> None:
    of = config(
        experts__targets=("q", "k", "v"),
        experts__rank=RANK,
        experts__alpha=2.0 * RANK,
        model__param_dtype=dtype,
        model__compute_dtype=dtype,
    )
    assert len(of.data.domains) == EXPERTS
    report({"tokens_per_second": step_speed(of, "router", path, STEPS)})


def main() -> None:
    rounds = rounds_argument(__doc__).parse_args().rounds
    python = peer_python("peft", "peft==0.21.2")
    with tempfile.TemporaryDirectory() as directory:
        corpus, batch = Path(directory) / "corpus.npz", Path(directory) / "batch.npz"
        write_corpus(corpus, per_domain=20, safe=True)
        items, _ = read_corpus(corpus)
        np.savez(batch, allow_pickle=False, **full_rows(items, ROWS, LENGTH, all_tokens=False))
        peer = PEERS / "xlora.py"
        results = in_turn(
            {
                "ours, float32": side(sys.executable, Path(__file__), "ours", batch, "float32"),
                "ours, bfloat16": side(sys.executable, Path(__file__), "ours", batch, "bfloat16"),
                "X-LoRA, float32": side(
                    python, peer, "train", base_file(), batch, EXPERTS, RANK, STEPS
                ),
            },
            rounds,
        )
    mine = median(results["ours, bfloat16"], "tokens_per_second")
    lines = []
    for name, result in results.items():
        speed = median(result, "tokens_per_second")
        lines.append((name, f"{speed:.0f}", f"{mine / speed:.2f}"))
    table("Gate training, seven experts", ("side", "tokens/s", "ours, bfloat16 / it"), lines)


if __name__ == "__main__":
    ours(*sys.argv[2:]) if sys.argv[1:2] == ["ours"] else main()
