"""A quantized base against the same in float32: memory, perplexity, experts' gradients.

    python benchmarks/quantized_base.py

The embedded base, whose file holds four to five bits a weight (Q4_1); nothing is trained, and all
types compute in bfloat16. Perplexity is that of every token of 150 short answers to harmless
questions under the bare base. The gradient is that of drawn experts of rank 8 on q, k, v over two
rows of 256 tokens of the same; "temp" is what its compiled step needs beside arguments and results.
"""

import tempfile
from typing import Any

import jax
import numpy as np
from common import table
from inputs import config, experiment, full_rows
from ours import drawn

from safemoe_jax.evaluation.prompt_sets import harmless_answers
from safemoe_jax.experiment import Experiment
from safemoe_jax.inference.scoring import Scorer
from safemoe_jax.model.lora import OwnExpert
from safemoe_jax.training.losses import batch_nll

ROWS, LENGTH, RANK = 2, 256, 8
SHAPE = dict(
    experts__targets=("q", "k", "v"),
    experts__rank=RANK,
    experts__alpha=2.0 * RANK,
    model__compute_dtype="bfloat16",
)


def gradient(run: Experiment, batch: dict[str, jax.Array]) -> tuple[np.ndarray, int]:
    """The experts' gradient as one vector, and its step's temp bytes."""

    def loss(experts, params, batch):
        variables = {"params": params, "experts": experts}
        return batch_nll(run.model, variables, batch, OwnExpert(batch["expert_ids_B"]))[0].sum()

    arguments = drawn(run.model, "experts")["experts"], run.params, batch
    step = jax.jit(jax.grad(loss)).lower(*arguments).compile()
    found = [np.ravel(leaf) for leaf in jax.tree.leaves(step(*arguments))]
    memory = step.memory_analysis()
    assert memory
    return np.concatenate(found), memory.temp_size_in_bytes


def measured(dtype: str) -> dict[str, Any]:
    """What one type gives, and the experts' gradient."""
    with tempfile.TemporaryDirectory() as directory:
        run = experiment(config(**SHAPE, model__param_dtype=dtype), directory)
        pairs = [([{"role": "user", "content": q}], answer) for q, answer in harmless_answers()]
        scores = Scorer(run.model, {"params": run.params}, None, run.chat, LENGTH)(pairs)
        batch = full_rows(run.chat.encode_all(pairs), ROWS, LENGTH, all_tokens=False)
        found, temp = gradient(run, jax.device_put(batch))
        return {
            "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(run.params)),
            "perplexity": float(np.exp(-np.concatenate(scores).mean())),
            "tokens": sum(map(len, scores)),
            "gradient": found,
            "temp": temp,
        }


def main() -> None:
    results = {}
    for dtype in ("float32", "int8", "nf4", "gguf", "bfloat16"):
        results[dtype] = one = measured(dtype)
        print(dtype, {key: value for key, value in one.items() if key != "gradient"}, flush=True)
    rows, whole = [], results["float32"]
    for dtype, one in results.items():
        mine, theirs = one["gradient"], whole["gradient"]
        cosine = mine @ theirs / np.linalg.norm(mine) / np.linalg.norm(theirs)
        rows.append(
            (
                dtype,
                f"{one['bytes'] / 1e6:.1f}",
                f"{one['bytes'] / results['bfloat16']['bytes']:.3f}",
                f"{one['perplexity']:.4f}",
                f"{100 * (one['perplexity'] / whole['perplexity'] - 1):+.2f} %",
                f"{cosine:.5f}",
                f"{one['temp'] / 1e6:.1f}",
            )
        )
    columns = ("param_dtype", "base, MB", "to bfloat16", "perplexity", "", "cosine", "temp, MB")
    table("A quantized base", columns, rows)


if __name__ == "__main__":
    main()
