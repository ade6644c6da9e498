"""Expert training on the real corpora: seven experts at once against seven runs of a peer.

    python benchmarks/corpora_training.py [--rounds N]

Against PEFT with a padding collator, batches of 8, and TRL's SFTTrainer with packing, all in
float32 and bfloat16, the base included. The same 24 conversations of each domain, rank 16 on q, k,
v, o, loss on answers; loading is not counted, data handling and the optimizer are. Examples per
second.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import PEERS, Result, in_turn, median, peer_python, report, rounds_argument, side, table
from inputs import base_file, config, experiment, write_corpus
from ours import Training

from safemoe_jax.data.pipeline import train_iterator
from safemoe_jax.parallel.sharding import put_batch

PER_DOMAIN, RANK, STEPS, PEFT_BATCH = 24, 16, 8, 8


def ours(dtype: str) -> None:
    of = config(model__param_dtype=dtype, model__compute_dtype=dtype)
    assert of.experts.rank == RANK
    with tempfile.TemporaryDirectory() as directory:
        run = experiment(of, directory)
        examples = [
            example
            for domain in of.data.domains
            for example in [e for e in run.unsafe("train") if e.domain == domain][:PER_DOMAIN]
        ]
        batches = train_iterator(run.packed(examples, by_domain=True), of.train.experts.rows, 0)
        training = Training(run.model, of, "experts", run.params)
        training.run(put_batch(run.mesh, next(batches)))
        seen, start = 0, time.perf_counter()
        for _ in range(STEPS):
            batch = next(batches)
            training.run(put_batch(run.mesh, batch))
            seen += int((batch["example_ids_BS"] >= 0).sum())
        report({"examples_per_second": seen / (time.perf_counter() - start)})


def main() -> None:
    rounds = rounds_argument(__doc__, default=1).parse_args().rounds
    peft = peer_python("peft", "peft==0.21.2")
    trl = peer_python("trl", "peft==0.21.2", "trl==1.16.0", "datasets==5.2.0")
    of = config()
    rows, length = of.train.experts.rows * len(of.data.domains), of.data.sequence_length
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "corpus.npz"
        write_corpus(path, per_domain=PER_DOMAIN)
        corpus = (base_file(), path, RANK)
        sides: dict[str, Callable[[], Result]] = {}
        for dtype in ("float32", "bfloat16"):
            sides |= {
                f"ours, seven experts at once, {dtype}": side(
                    sys.executable, Path(__file__), "ours", dtype
                ),
                f"PEFT, padding collator, {dtype}": side(
                    peft, PEERS / "peft_corpora.py", *corpus, dtype, PEFT_BATCH
                ),
                f"TRL, packing, {dtype}": side(
                    trl, PEERS / "trl_sft.py", *corpus, dtype, rows, length
                ),
            }
        results = in_turn(sides, rounds)
    mine = median(results["ours, seven experts at once, bfloat16"], "examples_per_second")
    lines = []
    for name, result in results.items():
        speed = median(result, "examples_per_second")
        lines.append((name, f"{speed:.2f}", f"{mine / speed:.2f}"))
    table("Expert training, real corpora", ("side", "examples/s", "ours, bfloat16 / it"), lines)


if __name__ == "__main__":
    ours(*sys.argv[2:]) if sys.argv[1:2] == ["ours"] else main()
