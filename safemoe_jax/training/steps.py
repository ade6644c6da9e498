"""SafeMoE's two stages, each as one jitted train step: (state, frozen, batch) -> (state, metrics).

    stage              trains             frozen          data                    routing
    expert_train_step  all E experts      base            unsafe text, by domain  a row's own expert
    gate_train_step    the router         base, experts   safe, informative text  the router's gates

A step differentiates `state.trainable` and nothing else: what is frozen has no gradient anywhere.
Source: "Dialectics of Alignment", arXiv 2606.00686 (abstract); how the two stages are realised is
this project's choice.

Shape letters: B batch, T tokens, E experts, L layers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from safemoe_jax.model.lora import OwnExpert, Routed
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.training.losses import batch_nll
from safemoe_jax.training.state import EXPERT_AXIS, TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def expert_train_step(
    state: TrainState,
    frozen: dict[str, Any],
    batch: Batch,
    *,
    model: Transformer,
    tx: optax.GradientTransformation,
    accumulation: int,
) -> tuple[TrainState, Metrics]:
    """Stage one: every expert learns its own domain's text, all experts in one step.

    Each expert has its own loss, normalised over its own tokens, and its own optimizer, so that it
    goes the way it would go alone. An expert without a token in the step stays bit-identical.

    Args:
      state: trainable is the collection `experts`.
      frozen: {"params": base}.
      batch: packed rows; row b belongs to expert expert_ids_B[b].
      model: the transformer.
      tx: one expert's optimizer.
      accumulation: microbatches that the rows are cut into.

    Returns:
      The new state, and loss_E [nats per token; 0 without a token], tokens_E, gradient_norm_E.
    """
    tokens_E = _sum_by_expert(batch["loss_mask_BT"].sum(axis=1), batch, model.num_experts)

    def loss_fn(experts, rows: Batch):
        variables = {**frozen, "experts": experts}
        nll_BT, _ = batch_nll(model, variables, rows, OwnExpert(rows["expert_ids_B"]))
        nll_E = _sum_by_expert(nll_BT.sum(axis=1), rows, model.num_experts)
        loss_E = nll_E / jnp.maximum(tokens_E, 1)
        return loss_E.sum(), loss_E

    gradient, loss_E = _accumulate(
        jax.grad(loss_fn, has_aux=True), state.trainable, batch, accumulation
    )

    def update(gradient, opt_state, expert, tokens):
        updates, new_opt_state = tx.update(gradient, opt_state, expert)
        new = (optax.apply_updates(expert, updates), new_opt_state)
        expert, opt_state = jax.tree.map(
            lambda new, old: jnp.where(tokens > 0, new, old), new, (expert, opt_state)
        )
        return expert, opt_state, optax.tree.norm(gradient)

    experts, opt_state, norm_E = jax.vmap(
        update, in_axes=(EXPERT_AXIS, 0, EXPERT_AXIS, 0), out_axes=(EXPERT_AXIS, 0, 0)
    )(gradient, state.opt_state, state.trainable, tokens_E)
    metrics = {"loss": loss_E, "tokens": tokens_E, "gradient_norm": norm_E}
    return state.replace(step=state.step + 1, trainable=experts, opt_state=opt_state), metrics


def gate_train_step(
    state: TrainState,
    frozen: dict[str, Any],
    batch: Batch,
    *,
    model: Transformer,
    tx: optax.GradientTransformation,
    accumulation: int,
) -> tuple[TrainState, Metrics]:
    """Stage two: the router learns how much of each expert makes safe, informative answers likely.

    Args:
      state: trainable is the collection `router`.
      frozen: {"params": base, "experts": experts}.
      batch: packed rows of safe, informative answers.
      model: the transformer.
      tx: the router's optimizer.
      accumulation: microbatches that the rows are cut into.

    Returns:
      The new state, and loss [nats per token], tokens, gradient_norm, and of each expert's gate
      over tokens and layers the mean, gates_E, and the standard deviation, gates_std_E.
    """
    tokens = batch["loss_mask_BT"].sum()
    places = (batch["segment_ids_BT"] > 0).sum()

    def loss_fn(router, rows: Batch):
        nll_BT, gates_LBTE = batch_nll(model, {**frozen, "router": router}, rows, Routed())
        assert gates_LBTE is not None  # routed
        loss = nll_BT.sum() / jnp.maximum(tokens, 1)
        used_BT = rows["segment_ids_BT"] > 0
        gates_E, squares_E = (
            jnp.einsum("LBTE,BT->E", x_LBTE, used_BT) / (places * gates_LBTE.shape[0])
            for x_LBTE in (gates_LBTE, gates_LBTE**2)
        )
        return loss, (loss, gates_E, squares_E)

    gradient, (loss, gates_E, squares_E) = _accumulate(
        jax.grad(loss_fn, has_aux=True), state.trainable, batch, accumulation
    )
    updates, opt_state = tx.update(gradient, state.opt_state, state.trainable)
    router = optax.apply_updates(state.trainable, updates)
    metrics = {
        "loss": loss,
        "tokens": tokens,
        "gradient_norm": optax.tree.norm(gradient),
        "gates": gates_E,
        "gates_std": jnp.sqrt(jnp.maximum(squares_E - gates_E**2, 0)),
    }
    return state.replace(step=state.step + 1, trainable=router, opt_state=opt_state), metrics


def _sum_by_expert(values_B: jax.Array, batch: Batch, num_experts: int) -> jax.Array:
    return jax.ops.segment_sum(values_B, batch["expert_ids_B"], num_experts)


def _accumulate(gradient_of: Callable, trainable: Any, batch: Batch, accumulation: int) -> Any:
    """The sum of `gradient_of(trainable, rows)` over microbatches of the batch's rows.

    The losses are sums over tokens divided by the whole step's tokens, so the sum is the gradient
    of the whole step, however it is cut.
    """
    if accumulation == 1:
        return gradient_of(trainable, batch)
    # Every microbatch takes rows from all devices: each device cuts the rows that it has.
    micro = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, accumulation, *x.shape[1:]), 1, 0), batch
    )
    shape = jax.eval_shape(gradient_of, trainable, jax.tree.map(lambda x: x[0], micro))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)

    def add(total, rows):
        return jax.tree.map(jnp.add, total, gradient_of(trainable, rows)), None

    return jax.lax.scan(add, zero, micro)[0]
