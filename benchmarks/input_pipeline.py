"""What the input pipeline yields against what the train step consumes, and whether a step waits.

    python benchmarks/input_pipeline.py

The real corpora and the real run's batches. The bar is 20 times.
"""

import tempfile
import time

import numpy as np
from common import table
from inputs import config, experiment
from ours import Training

from safemoe_jax.data.pipeline import train_iterator
from safemoe_jax.parallel.sharding import put_batch

BATCHES, STEPS = 200, 6


def main() -> None:
    of = config()
    with tempfile.TemporaryDirectory() as directory:
        run = experiment(of, directory)
        packed = run.packed(run.unsafe("train"), by_domain=True)
        batches = train_iterator(packed, of.train.experts.rows, of.seed)
        next(batches)
        start = time.perf_counter()
        tokens = sum(next(batches)["tokens_BT"].size for _ in range(BATCHES))
        yields = tokens / (time.perf_counter() - start)

        training = Training(run.model, of, "experts", run.params)
        training.run(put_batch(run.mesh, next(batches)))
        waits, start = [], time.perf_counter()
        for _ in range(STEPS):
            asked = time.perf_counter()
            batch = put_batch(run.mesh, next(batches))
            waits.append(time.perf_counter() - asked)
            training.run(batch)
        consumes = STEPS * batch["tokens_BT"].size / (time.perf_counter() - start)
    wait = f"{1e3 * np.max(waits):.1f}"
    columns = ("pipeline, tokens/s", "step, tokens/s", "ratio", "longest wait of a step, ms")
    line = (f"{yields:.0f}", f"{consumes:.0f}", f"{yields / consumes:.0f}", wait)
    table("Input pipeline", columns, [line])


if __name__ == "__main__":
    main()
