"""A quantized base against the same in float32: memory, perplexity, experts' gradients, decoding.

    python benchmarks/quantized_base.py

The embedded base, whose file holds four to five bits a weight (Q4_1); nothing is trained.
Perplexity is that of every token of short answers to harmless questions, and of safe answers to
the corpus' validation prompts, under the bare base that computes in float32. The gradient is that
of drawn experts of rank 8 on q, k, v over eight rows of 256 tokens of the corpus, and "temp" what
its compiled step needs beside arguments and results. A decode step is of 32 rows, in bfloat16.
"""

import dataclasses
import json
import sys
import tempfile

import jax
import numpy as np
from common import side, table
from inputs import config, experiment, full_rows, read_corpus, write_corpus
from ours import decode_seconds, drawn

from safemoe_jax.evaluation.prompt_sets import harmless_answers
from safemoe_jax.inference.scoring import Scorer
from safemoe_jax.model.lora import OwnExpert
from safemoe_jax.model.quantization import PARAM_DTYPES
from safemoe_jax.training.losses import batch_nll

ROWS, LENGTH, RANK, DECODED, PROMPT, NEW = 8, 256, 8, 32, 64, 16
SHAPE = dict(experts__targets=("q", "k", "v"), experts__rank=RANK, experts__alpha=2.0 * RANK)


def perplexity(run, pairs) -> float:
    scores = Scorer(run.model, {"params": run.params}, None, run.chat, LENGTH)(pairs)
    return float(np.exp(-np.concatenate(scores).mean()))


def gradient(run, batch) -> tuple[np.ndarray, int]:
    """The experts' gradient as one vector, and its step's temp bytes."""

    def loss(experts, params):
        variables = {"params": params, "experts": experts}
        return batch_nll(run.model, variables, batch, OwnExpert(batch["expert_ids_B"]))[0].sum()

    experts = drawn(run.model, "experts")["experts"]
    step = jax.jit(jax.grad(loss)).lower(experts, run.params).compile()
    leaves = jax.tree.leaves(step(experts, run.params))
    return (
        np.concatenate([np.ravel(leaf) for leaf in leaves]),
        step.memory_analysis().temp_size_in_bytes,
    )


def of(dtype: str, corpus: str, gradients: str) -> None:
    """Measures one type; prints JSON, and leaves the gradient in `gradients`/TYPE.npy."""
    with tempfile.TemporaryDirectory() as directory:
        run = experiment(config(**SHAPE, model__param_dtype=dtype), directory)
        items, _ = read_corpus(corpus)
        batch = jax.device_put(full_rows(items, ROWS, LENGTH, all_tokens=False))
        harmless = [([{"role": "user", "content": q}], answer) for q, answer in harmless_answers()]
        safe = [(e.messages, e.response) for e in run.safe_informative("validation")]
        found, temp = gradient(run, batch)
        np.save(f"{gradients}/{dtype}.npy", found)
        result = {
            "resident": sum(leaf.nbytes for leaf in jax.tree.leaves(run.params)),
            "temp": temp,
            "harmless": perplexity(run, harmless),
            "safe": perplexity(run, safe),
        }
        tokens = np.random.default_rng(0).integers(100, 40_000, (DECODED, PROMPT))
        model = dataclasses.replace(run.model, compute_dtype=jax.numpy.bfloat16)
        result["decode"] = decode_seconds(model, {"params": run.params}, tokens, NEW)
    print(json.dumps(result))


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        corpus = f"{directory}/corpus.npz"
        write_corpus(corpus, per_domain=16)
        results, gradients = {}, {}
        for dtype in PARAM_DTYPES:
            results[dtype] = side(sys.executable, __file__, dtype, corpus, directory)()
            gradients[dtype] = np.load(f"{directory}/{dtype}.npy")
    rows, whole = [], results["float32"]
    for dtype, one in results.items():
        mine, theirs = gradients[dtype], gradients["float32"]
        cosine = mine @ theirs / np.linalg.norm(mine) / np.linalg.norm(theirs)
        rows.append(
            (
                dtype,
                f"{one['resident'] / 1e6:.1f}",
                f"{one['resident'] / results['bfloat16']['resident']:.3f}",
                *(
                    f"{one[text]:.3f} ({100 * (one[text] / whole[text] - 1):+.2f} %)"
                    for text in ("harmless", "safe")
                ),
                f"{cosine:.5f}",
                f"{one['temp'] / 1e6:.0f}",
                f"{1e3 * one['decode']:.0f}",
            )
        )
    columns = (
        *("param_dtype", "base, MB", "to bfloat16", "perplexity, harmless", "safe answers"),
        *("gradients' cosine", "temp, MB", "decode step, ms"),
    )
    table("A quantized base", columns, rows)


if __name__ == "__main__":
    of(*sys.argv[1:]) if sys.argv[1:] else main()
