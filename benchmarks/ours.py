"""Our side of the comparisons: both train steps, and decoding."""

import functools
import tempfile
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from inputs import experiment
from jax.sharding import NamedSharding, PartitionSpec

from safemoe_jax.config import Config
from safemoe_jax.inference.sampler import Sampler
from safemoe_jax.model.lora import Routed
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.training.state import init_expert_state, init_router_state, make_optimizer
from safemoe_jax.training.steps import expert_train_step, gate_train_step

STAGES = {
    "experts": (expert_train_step, init_expert_state, ("params",)),
    "router": (gate_train_step, init_router_state, ("params", "experts")),
}


def drawn(model: Transformer, *collections: str) -> dict[str, Any]:
    """Collections at random, with no zero among them: every expert takes part, as once trained."""
    key = jax.random.key(0)

    def make():
        tree = nn.unbox(model.initial(key))
        leaves, structure = jax.tree.flatten({name: tree[name] for name in collections})
        keys = jax.random.split(key, len(leaves))
        new = [
            (0.02 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)
            for key, leaf in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, new)

    return jax.jit(make)()


class Training:
    """A stage's jitted train step with all that it needs; `run(batch)` does one step."""

    def __init__(self, model: Transformer, config: Config, stage: str, params: Any) -> None:
        """
        Args:
          model: the transformer.
          config: whose optimizer is used.
          stage: "experts" or "router".
          params: the frozen base.
        """
        step, begin, frozen = STAGES[stage]
        tx = make_optimizer(getattr(config.optimizer, stage), getattr(config.train, stage).steps)
        step = functools.partial(step, model=model, tx=tx, accumulation=1)
        self._step = jax.jit(step, donate_argnums=0)
        variables = {"params": params, **drawn(model, "experts", "router")}
        self._frozen = {name: variables[name] for name in frozen}
        # Where the base is, as after the first step: else the second would compile anew.
        everywhere = NamedSharding(jax.tree.leaves(params)[0].sharding.mesh, PartitionSpec())
        self._state = jax.device_put(begin(variables[stage], tx), everywhere)

    def run(self, batch: dict[str, Any]) -> None:
        self._state, metrics = self._step(self._state, self._frozen, batch)
        jax.block_until_ready(metrics)

    def flops(self, batch: dict[str, Any]) -> float:
        """Of the compiled step, as XLA counts them; a scan's body counts once."""
        compiled = self._step.lower(self._state, self._frozen, batch).compile()
        return dict(compiled.cost_analysis() or {})["flops"]


def step_speed(of: Config, stage: str, path: str, steps: int) -> float:
    """Tokens per second of a stage's step on the batch in a file."""
    with tempfile.TemporaryDirectory() as directory, np.load(path) as file:
        run = experiment(of, directory)
        training = Training(run.model, of, stage, run.params)
        batch = jax.device_put(dict(file))
        return batch["tokens_BT"].size / seconds(functools.partial(training.run, batch), steps)


def seconds(work: Callable[[], Any], times: int) -> float:
    """Mean time of `times` calls, after one that compiles and warms up."""
    work()
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times


def decode_seconds(
    model: Transformer, variables: dict[str, Any], tokens: np.ndarray, new: int
) -> float:
    """Seconds per decode step of equally long prompts [B, T], prefill not counted.

    With a router among the variables its gates are used, else the base alone.
    """
    routing = Routed() if "router" in variables else None
    # A token that the vocabulary does not have: no answer ends early, the work is known.
    sampler = Sampler(model, variables, routing, ends=frozenset({-1}))

    def generate(count: int) -> float:
        start = time.perf_counter()
        sampler.generate(
            tokens.tolist(),
            max_new_tokens=count,
            temperature=0.0,
            top_p=1.0,
            seed=0,
            batch_size=len(tokens),
        )
        return time.perf_counter() - start

    for count in (1, new):
        generate(count)  # compiles
    return (generate(new) - generate(1)) / (new - 1)
