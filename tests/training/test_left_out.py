"""Leaving a domain out: the other experts, trained beside it, are those trained without it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from tiny import byte_tokenizer
from toys import ADAMW, SPEC, toy_model, toy_variables

from safemoe_jax.config import ExpertsConfig
from safemoe_jax.data.chat import ChatFormat
from safemoe_jax.data.corpora import Example
from safemoe_jax.data.pipeline import pack, train_iterator
from safemoe_jax.evaluation.systems import without_expert
from safemoe_jax.training.state import init_expert_state, make_optimizer
from safemoe_jax.training.steps import expert_train_step

DOMAINS, LEFT_OUT = ("ants", "bees", "cats"), "bees"
STEPS, ROWS, LENGTH = 6, 2, 96
TX = make_optimizer(dataclasses.replace(ADAMW, schedule="cosine", warmup_steps=1), STEPS)


def examples():
    """In every domain of another number, so that rows and epochs differ."""
    counts = dict(zip(DOMAINS, (7, 4, 9), strict=True))
    return [
        Example(
            id=100 * number + i,
            messages=({"role": "user", "content": f"{i} {domain}?"},),
            response=f"{domain} " * (1 + i % 4),
            domain=domain,
            label="unsafe",
            source="made up",
            split="train",
            informative=False,
            group=100 * number + i,
        )
        for number, (domain, count) in enumerate(counts.items())
        for i in range(count)
    ]


def model(num_experts):
    return toy_model(
        spec=dataclasses.replace(SPEC, vocab_size=300),
        experts=ExpertsConfig(("v", "down"), rank=2, alpha=3.0),
        num_experts=num_experts,
        param_dtype=jnp.float64,
        compute_dtype=jnp.float64,
    )


def trained(domains, experts, base, directory):
    """From text to experts, as stage one goes; and which examples each step has read, by domain."""
    mine = [example for example in examples() if example.domain in domains]
    chat = ChatFormat(byte_tokenizer())
    packed = pack(mine, chat, LENGTH, 0, streams=domains, directory=directory)
    batches = train_iterator(packed, ROWS, seed=0)
    step = jax.jit(
        functools.partial(expert_train_step, model=model(len(domains)), tx=TX, accumulation=1)
    )
    state, read = init_expert_state(experts, TX), []
    for _ in range(STEPS):
        batch = next(batches)
        ids = batch["example_ids_BS"].reshape(len(domains), -1)
        read.append({domain: set(row[row >= 0]) for domain, row in zip(domains, ids, strict=True)})
        state, _ = step(state, {"params": base}, batch)
    return state.trainable, read


def test_the_others_are_what_they_would_be_without_it(float64, tmp_path):
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), toy_variables(model(3)))
    base, start = variables["params"], variables["experts"]
    together, read = trained(DOMAINS, start, base, tmp_path)
    index = DOMAINS.index(LEFT_OUT)
    others = tuple(domain for domain in DOMAINS if domain != LEFT_OUT)
    apart, read_apart = trained(others, without_expert(start, index), base, tmp_path)
    for with_it, without_it in zip(read, read_apart, strict=True):
        assert {domain: with_it[domain] for domain in others} == without_it
    kept = without_expert(together, index)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12), kept, apart)
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), kept, without_expert(start, index)
    )
    assert min(jax.tree.leaves(moved)) > 1e-3
