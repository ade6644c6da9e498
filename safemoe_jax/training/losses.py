"""Next-token loss without logits where nobody asks for them.

Shape letters: B batch, T tokens, C tokens of a chunk, D model, V vocabulary, L layers, E experts.
"""

import jax
import jax.numpy as jnp

from safemoe_jax.model.lora import Routing
from safemoe_jax.model.transformer import Transformer, logits

_LOGITS_AT_ONCE = 2**25  # bounds the [B, C, V] block: 128 MiB in float32


def batch_nll(
    model: Transformer, variables: dict, batch: dict[str, jax.Array], routing: Routing
) -> tuple[jax.Array, jax.Array | None]:
    """Negative log-likelihood of a batch's targets, in nats.

    Args:
      model: the transformer.
      variables: its collections.
      batch: tokens_BT and its companions, as the data pipeline makes them.
      routing: how experts are mixed in.

    Returns:
      nll_BT, zero where the loss mask is zero, and gates_LBTE (None where there are none).
    """
    out = model.apply(
        variables,
        batch["tokens_BT"],
        batch["positions_BT"],
        batch["segment_ids_BT"],
        batch["prompt_mask_BT"],
        routing,
    )
    mask_BT = batch["loss_mask_BT"] > 0
    return token_nll(out.hidden_BTD, out.head_VD, batch["targets_BT"], mask_BT), out.gates_LBTE


@jax.custom_vjp
def token_nll(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array
) -> jax.Array:
    """-log p(target) [B, T] under a frozen head; zero outside the mask.

    The tokens that carry loss are moved to the front of their row and go through the head in
    chunks, as many as the fullest row needs, so that [B, T, V] never exists. The head is frozen:
    the gradient of hidden_BTD is all there is, and it is computed with the loss, while the chunk's
    logits are there.
    """
    return _chunked(hidden_BTD, head_VD, targets_BT, mask_BT, with_gradient=False)[0]


def _token_nll_forward(hidden_BTD, head_VD, targets_BT, mask_BT):
    return _chunked(hidden_BTD, head_VD, targets_BT, mask_BT, with_gradient=True)


def _token_nll_backward(gradient_BTD, cotangent_BT):
    return cotangent_BT[..., None].astype(gradient_BTD.dtype) * gradient_BTD, None, None, None


token_nll.defvjp(_token_nll_forward, _token_nll_backward)


def _chunked(hidden_BTD, head_VD, targets_BT, mask_BT, *, with_gradient):
    batch, length, _ = hidden_BTD.shape
    chunk = max(1, min(length, _LOGITS_AT_ONCE // (batch * head_VD.shape[0])))
    padding = -length % chunk
    front_BT = jnp.argsort(~mask_BT, axis=1, stable=True)

    def to_front(x):
        order = front_BT if x.ndim == 2 else front_BT[..., None]
        x = jnp.take_along_axis(x, order, axis=1)
        return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))

    def to_place(x):
        order = jnp.argsort(front_BT, axis=1)
        return jnp.take_along_axis(x, order if x.ndim == 2 else order[..., None], axis=1)

    hidden_BTD, targets_BT, sorted_mask_BT = map(to_front, (hidden_BTD, targets_BT, mask_BT))
    fullest = mask_BT.sum(axis=1).max()

    def block(carry):
        at, nll_BT, gradient_BTD = carry
        hidden_BCD, targets_BC, mask_BC = (
            jax.lax.dynamic_slice_in_dim(x, at, chunk, axis=1)
            for x in (hidden_BTD, targets_BT, sorted_mask_BT)
        )
        logits_BCV = logits(hidden_BCD, head_VD)
        log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        nll_BC = jnp.where(mask_BC, log_z_BC - target_BC, 0.0)
        nll_BT = jax.lax.dynamic_update_slice_in_dim(nll_BT, nll_BC, at, axis=1)
        if with_gradient:
            # d nll / d logits = softmax - one_hot(target), and so through the head.
            probability_BCV = jnp.exp(logits_BCV - log_z_BC[..., None]).astype(hidden_BCD.dtype)
            head = head_VD.astype(hidden_BCD.dtype)
            gradient_BCD = jnp.einsum("BCV,VD->BCD", probability_BCV, head) - head[targets_BC]
            gradient_BCD = jnp.where(mask_BC[..., None], gradient_BCD, 0.0)
            gradient_BTD = jax.lax.dynamic_update_slice_in_dim(
                gradient_BTD, gradient_BCD, at, axis=1
            )
        return at + chunk, nll_BT, gradient_BTD

    log_dtype = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
    start = (
        jnp.zeros((), fullest.dtype),
        jnp.zeros((batch, length + padding), log_dtype),
        jnp.zeros_like(hidden_BTD) if with_gradient else jnp.zeros((batch, 1, 1)),
    )
    _, nll_BT, gradient_BTD = jax.lax.while_loop(lambda carry: carry[0] < fullest, block, start)
    return to_place(nll_BT), to_place(gradient_BTD) if with_gradient else None
