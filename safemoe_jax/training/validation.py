"""Validation loss over a whole packed corpus."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from safemoe_jax.data.pipeline import PackedCorpus, epoch
from safemoe_jax.errors import UserError
from safemoe_jax.model.lora import OwnExpert, Routed, Routing
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.parallel.sharding import constrain, local_rows, put_batch
from safemoe_jax.training.losses import batch_nll


def expert_validation(
    model: Transformer, frozen: dict[str, Any], packed: PackedCorpus, batch_size: int, mesh: Mesh
) -> Callable[[Any], np.ndarray]:
    """experts -> loss_E: each expert's nats per token on its own domain's text.

    Raises:
      UserError: where a domain has no validation text; its best step could not be told.
    """
    for stream, name in enumerate(packed.streams):
        if not len(packed.plan.rows_of(stream)):
            raise UserError(
                f"there is no validation example of {name!r}; add examples of it with other "
                "prompts, or take it out of data.domains"
            )
    own = _loss(model, "experts", lambda batch: OwnExpert(batch["expert_ids_B"]))
    return lambda experts: own(experts, frozen, packed, batch_size, mesh)


def gate_validation(
    model: Transformer, frozen: dict[str, Any], packed: PackedCorpus, batch_size: int, mesh: Mesh
) -> Callable[[Any], np.ndarray]:
    """router -> loss []: nats per token on safe, informative answers."""
    routed = _loss(model, "router", lambda batch: Routed())
    return lambda router: routed(router, frozen, packed, batch_size, mesh)[0]


def _loss(model: Transformer, collection: str, routing_of: Callable[[Any], Routing]):
    @functools.partial(jax.jit, static_argnums=3)
    def sums(trainable, frozen, batch, num_streams):
        variables = {**frozen, collection: trainable}
        nll_BT, _ = batch_nll(model, variables, batch, routing_of(batch))
        by_row = jnp.stack([nll_BT.sum(axis=1), batch["loss_mask_BT"].sum(axis=1)], axis=1)
        by_stream = jax.ops.segment_sum(by_row, batch["expert_ids_B"], num_streams)
        return constrain(by_stream, None, None)  # whole on every process

    def loss(trainable, frozen, packed: PackedCorpus, batch_size: int, mesh: Mesh) -> np.ndarray:
        total = np.zeros((packed.num_streams, 2))
        for batch in epoch(packed, batch_size, local_rows(mesh, batch_size)):
            total += sums(trainable, frozen, put_batch(mesh, batch), packed.num_streams)
        return total[:, 0] / total[:, 1]

    return loss
