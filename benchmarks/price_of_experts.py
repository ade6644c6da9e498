"""What experts cost: stage one against the number of experts, stage two against no experts at all.

    python benchmarks/price_of_experts.py [--rounds N]

Stage one: the step with eight experts over the step with one, on as many rows. Stage two: the gate
step over a step of the bare base whose gradient goes back through every layer, which is the least
that any training through the base can cost; the bar is 1.05 plus 1.1 times the experts' share of
the FLOPs.
"""

import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from common import rounds_argument, table
from inputs import config, experiment, full_rows, read_corpus, write_corpus
from ours import Training

from safemoe_jax.training.losses import batch_nll

ROWS, LENGTH, RANK = 8, 256, 32
SHAPE = dict(experts__targets=("q", "k", "v"), experts__rank=RANK, experts__alpha=2.0 * RANK)
NAMES = tuple("abcdefgh")


def base_step(run):
    """Loss of the bare base, and a gradient that has gone back through every layer.

    It is that of the first norms' scales: next to nothing itself, and as deep as the router's.
    """
    params = run.params

    def loss(scale_LD, batch):
        norm = {"attention_norm": {"scale": scale_LD}}
        variables = {"params": {**params, "layers": {**params["layers"], **norm}}}
        return batch_nll(run.model, variables, batch, None)[0].sum()

    step = jax.jit(jax.grad(loss))
    scale_LD = params["layers"]["attention_norm"]["scale"]
    return lambda batch: jax.block_until_ready(step(scale_LD, batch))


def experts_share(run) -> float:
    """The mixture's FLOPs over the base's, in one pass: matmul weights touched per token."""
    spec, experts = run.base.spec, run.model.num_experts
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    mixture = sum(experts * RANK * (spec.embed_dim + out) for out in (q, kv, kv))
    layer = spec.embed_dim * (2 * q + 2 * kv + 3 * spec.mlp_dim)
    return spec.num_layers * mixture / (spec.num_layers * layer + spec.vocab_size * spec.embed_dim)


def main() -> None:
    rounds = rounds_argument(__doc__, default=5).parse_args().rounds
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "corpus.npz"
        write_corpus(path, per_domain=16)
        batch = full_rows(read_corpus(path)[0], ROWS, LENGTH, all_tokens=False)
        many = {**batch, "expert_ids_B": jnp.arange(ROWS, dtype=jnp.int32)}
        eight = experiment(config(data__domains=NAMES, **SHAPE), directory)
        one = experiment(config(data__domains=NAMES[:1], **SHAPE), directory)
        stage_one = {
            len(run.config.data.domains): Training(run.model, run.config, "experts", run.params)
            for run in (eight, one)
        }
        gate = Training(eight.model, eight.config, "router", eight.params)
        bare = base_step(eight)
        flops = stage_one[8].flops(many) / stage_one[1].flops(batch)
        works = {
            "E=8": lambda: stage_one[8].run(many),
            "E=1": lambda: stage_one[1].run(batch),
            "gate step": lambda: gate.run(batch),
            "base step": lambda: bare(batch),
        }
        times: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(rounds + 1):
            for name, work in works.items():
                start = time.perf_counter()
                work()
                if turn:  # the first compiles
                    times[name].append(time.perf_counter() - start)
        share = experts_share(eight)
    took = {name: statistics.median(values) for name, values in times.items()}
    lines = [
        ("stage one, E=8 over E=1: time", f"{took['E=8'] / took['E=1']:.3f}", "1.10"),
        ("stage one, E=8 over E=1: compiled FLOPs", f"{flops:.4f}", "1.01"),
        (
            f"stage two, gate step over base step (experts' share of FLOPs {share:.3f})",
            f"{took['gate step'] / took['base step']:.3f}",
            f"{1.05 + 1.1 * share:.3f}",
        ),
    ]
    table("The price of experts", ("ratio", "measured", "bar"), lines)


if __name__ == "__main__":
    main()
