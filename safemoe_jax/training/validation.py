"""Validation loss over a whole packed corpus."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from safemoe_jax.data.pipeline import PackedCorpus, epoch
from safemoe_jax.errors import UserError
from safemoe_jax.model.lora import OwnExpert, Routed, Routing
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.parallel.sharding import put_batch
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
    @jax.jit
    def sums(trainable, frozen, batch):
        variables = {**frozen, collection: trainable}
        nll_BT, _ = batch_nll(model, variables, batch, routing_of(batch))
        return nll_BT.sum(axis=1), batch["loss_mask_BT"].sum(axis=1)

    def loss(trainable, frozen, packed: PackedCorpus, batch_size: int, mesh: Mesh) -> np.ndarray:
        nll, tokens = np.zeros(packed.num_streams), np.zeros(packed.num_streams)
        for batch in epoch(packed, batch_size):
            nll_B, tokens_B = sums(trainable, frozen, put_batch(mesh, batch))
            np.add.at(nll, batch["expert_ids_B"], np.asarray(nll_B, np.float64))
            np.add.at(tokens, batch["expert_ids_B"], np.asarray(tokens_B, np.float64))
        return nll / tokens

    return loss
