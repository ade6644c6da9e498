"""Our side of the comparisons: both train steps and decoding, on the embedded base.

Every function makes a model of the given shape and returns a closure that does the work once.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safemoe_jax.experiment import Experiment
from safemoe_jax.inference.sampler import Sampler
from safemoe_jax.model.lora import Routed
from safemoe_jax.training.state import init_expert_state, init_router_state, make_optimizer
from safemoe_jax.training.steps import expert_train_step, gate_train_step


class Training:
    """A jitted train step and all that it needs; `run(batch)` does one step."""

    def __init__(self, run: Experiment, stage: str) -> None:
        """
        Args:
          run: whose model is trained; experts of stage two are drawn, not trained.
          stage: "experts" or "router".
        """
        config, model = run.config, run.model
        optimizer = getattr(config.optimizer, stage)
        tx = make_optimizer(optimizer, getattr(config.train, stage).steps)
        step = {"experts": expert_train_step, "router": gate_train_step}[stage]
        self._step = jax.jit(
            functools.partial(step, model=model, tx=tx, accumulation=1), donate_argnums=0
        )
        self._frozen = {"params": run.params}
        if stage == "experts":
            self._state = init_expert_state(run.init(model, "experts"), tx)
        else:
            self._frozen["experts"] = drawn_experts(run)
            self._state = init_router_state(run.init(model, "router"), tx)

    def run(self, batch: dict[str, Any]) -> None:
        self._state, metrics = self._step(self._state, self._frozen, batch)
        jax.block_until_ready(metrics)

    def flops(self, batch: dict[str, Any]) -> float:
        """Of the compiled step, as XLA counts them; a scan's body counts once."""
        return self._step.lower(self._state, self._frozen, batch).compile().cost_analysis()["flops"]


def drawn_experts(run: Experiment) -> Any:
    """Experts whose B is away from zero, as trained ones have it."""
    experts = run.init(run.model, "experts")
    leaves, structure = jax.tree.flatten(experts)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [0.01 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def seconds(work: Callable[[], Any], times: int) -> float:
    """Mean time of `times` calls, after one that compiles and warms up."""
    work()
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times


def decode_seconds(run: Experiment, tokens: np.ndarray, new: int, *, gated: bool) -> float:
    """Seconds per decode step of a batch of equally long prompts, prefill not counted."""
    variables, routing = {"params": run.params}, None
    if gated:
        variables |= {"experts": drawn_experts(run), "router": drawn_router(run)}
        routing = Routed()
    # A token that the vocabulary does not have: no answer ends early, the work is known.
    sampler = Sampler(run.model, variables, routing, end_of_turn=-1)

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


def drawn_router(run: Experiment) -> Any:
    """A router away from zero, so that every expert takes part."""
    router = run.init(run.model, "router")
    return jax.tree.map(
        lambda x: x + 0.05 * jnp.sign(jnp.sin(jnp.arange(x.size))).reshape(x.shape), router
    )
