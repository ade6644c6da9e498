"""What a stage trains and remembers."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from safemoe_jax.config import AdamWConfig
from safemoe_jax.parallel.sharding import named_axes, shardings

EXPERT_AXIS = 1  # of the stacked leaves A [L, E, D, R] and B [L, E, R, O]


class Best(flax.struct.PyTreeNode):
    """The weights with the lowest validation loss so far.

    Attributes:
      trainable: weights; in stage one each expert's slice is its own best.
      loss: their validation loss in nats per token, [E] or [].
      step: when that was, [E] or [].
    """

    trainable: Any
    loss: jax.Array
    step: jax.Array


class TrainState(flax.struct.PyTreeNode):
    """All that changes in training; the base is never in it.

    Attributes:
      step: steps done.
      trainable: the experts (stage one) or the router (stage two); all that is differentiated.
      opt_state: the optimizer's, with the expert axis in front in stage one.
      best: what validation liked most.
    """

    step: jax.Array
    trainable: Any
    opt_state: Any
    best: Best


def make_optimizer(config: AdamWConfig, steps: int) -> optax.GradientTransformation:
    """Clipped AdamW (arXiv 1711.05101) with linear warm-up to the learning rate; from there it
    stays ("constant") or falls to zero with the last step ("linear", "cosine")."""
    decay = max(steps - config.warmup_steps, 1)
    rate = config.learning_rate
    after = {
        "constant": lambda: optax.constant_schedule(rate),
        "linear": lambda: optax.linear_schedule(rate, 0.0, decay),
        "cosine": lambda: optax.cosine_decay_schedule(rate, decay),
    }[config.schedule]()
    warmup = optax.linear_schedule(0.0, rate, config.warmup_steps)
    schedule = optax.join_schedules([warmup, after], [config.warmup_steps])
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay),
    )


def init_expert_state(experts: Any, tx: optax.GradientTransformation) -> TrainState:
    """A state in which every expert has an optimizer of its own; `experts` may be traced."""
    num_experts = jax.tree.leaves(experts)[0].shape[EXPERT_AXIS]
    opt_state = jax.vmap(tx.init, in_axes=EXPERT_AXIS)(experts)
    return _init(experts, opt_state, (num_experts,))


def init_router_state(router: Any, tx: optax.GradientTransformation) -> TrainState:
    return _init(router, tx.init(router), ())


def state_shardings(
    mesh: Mesh, boxed: Any, state: TrainState, tx: optax.GradientTransformation
) -> TrainState:
    """Where a state lives: all that is as large as a weight lies as the weight does.

    Args:
      mesh: the mesh.
      boxed: the trained collection, its leaves boxed with logical axis names.
      state: arrays or shapes.
      tx: the state's optimizer.
    """
    names = nn.get_partition_spec(boxed)
    moments, per_expert = names, state.best.loss.ndim == 1
    if per_expert:
        moments = jax.tree.map(_expert_first, names)
    scalar = named_axes()
    opt_state = optax.tree.map_params(
        tx, lambda _, spec: spec, state.opt_state, moments, transform_non_params=lambda _: scalar
    )
    best = Best(trainable=names, loss=scalar, step=scalar)
    return shardings(mesh, TrainState(scalar, names, opt_state, best))


def _expert_first(names: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(names[EXPERT_AXIS], *names[:EXPERT_AXIS], *names[EXPERT_AXIS + 1 :])


def _init(trainable: Any, opt_state: Any, shape: tuple[int, ...]) -> TrainState:
    best = Best(
        trainable=jax.tree.map(jnp.copy, trainable),  # its own buffers: the state is donated
        loss=jnp.full(shape, jnp.inf, jnp.float32),  # a weak type would compile each step twice
        step=jnp.zeros(shape, jnp.int32),
    )
    return TrainState(jnp.zeros((), jnp.int32), trainable, opt_state, best)


def keep_best(state: TrainState, loss: jax.Array) -> TrainState:
    """Remembers the weights where their validation loss, [E] or [], is a new low."""
    better = loss < state.best.loss
    per_expert = jnp.expand_dims(better, (0, 2, 3)) if better.ndim else better
    best = Best(
        trainable=jax.tree.map(
            lambda new, old: jnp.where(per_expert, new, old), state.trainable, state.best.trainable
        ),
        loss=jnp.where(better, loss, state.best.loss),
        step=jnp.where(better, state.step, state.best.step),
    )
    return state.replace(best=best)
