"""Next-token loss without logits where nobody asks for them.

Shape letters: B batch, T tokens, P parts of rows, C tokens of a chunk, D model, V vocabulary, L
layers, E experts.
"""

import math

import jax
import jax.numpy as jnp

from safemoe_jax.model.lora import Routing
from safemoe_jax.model.precision import contract
from safemoe_jax.model.quantization import dequantized
from safemoe_jax.model.transformer import Head, Transformer, forward, logits
from safemoe_jax.parallel.sharding import constrain, extent

# Bounds a device's [P, C, V] block: 128 MiB in float32, of which a GPU is not busy.
_LOGITS_AT_ONCE = {"cpu": 2**25, "gpu": 2**27, "tpu": 2**25}


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
    out = forward(
        model,
        variables,
        batch["tokens_BT"],
        batch["positions_BT"],
        batch["segment_ids_BT"],
        batch["prompt_mask_BT"],
        routing,
    )
    mask_BT = batch["loss_mask_BT"] > 0
    return token_nll(out.hidden_BTD, out.head, batch["targets_BT"], mask_BT), out.gates_LBTE


@jax.custom_vjp
def token_nll(
    hidden_BTD: jax.Array, head: Head, targets_BT: jax.Array, mask_BT: jax.Array
) -> jax.Array:
    """-log p(target) [B, T] under a frozen head; zero outside the mask.

    The tokens that carry loss are moved to the front of their row and go through the head in
    chunks, as many as the fullest row needs, so that [B, T, V] never exists. The head is frozen:
    the gradient of hidden_BTD is all there is, and it is computed with the loss, while the chunk's
    logits are there.
    """
    return _chunked(hidden_BTD, head, targets_BT, mask_BT, with_gradient=False)[0]


def _token_nll_forward(hidden_BTD, head, targets_BT, mask_BT):
    return _chunked(hidden_BTD, head, targets_BT, mask_BT, with_gradient=True)


def _token_nll_backward(gradient_BTD, cotangent_BT):
    return cotangent_BT[..., None].astype(gradient_BTD.dtype) * gradient_BTD, None, None, None


token_nll.defvjp(_token_nll_forward, _token_nll_backward)


def num_chunks(rows: int, length: int, vocab_size: int) -> int:
    """In how many chunks rows whose every token carries loss go through the head, on the mesh that
    is set."""
    parts = _parts(length)
    at_once = _tokens_at_once(rows * parts, length // parts, vocab_size)
    return -(-(length // parts) // at_once)


def _parts(length: int) -> int:
    """Where the mesh cuts rows along T, each part is compacted where it is."""
    return math.gcd(length, extent("length"))


def _tokens_at_once(parts: int, length: int, vocab_size: int) -> int:
    at_once = _LOGITS_AT_ONCE.get(jax.default_backend(), _LOGITS_AT_ONCE["gpu"]) * extent(
        "parts", "vocab"
    )
    return max(1, min(length, at_once // (parts * vocab_size)))


def _chunked(hidden_BTD, head, targets_BT, mask_BT, *, with_gradient):
    batch, length, _ = hidden_BTD.shape
    parts = _parts(length)
    hidden_PTD, targets_PT, mask_PT = (
        constrain(
            x.reshape(batch * parts, length // parts, *x.shape[2:]), "parts", *[None] * (x.ndim - 1)
        )
        for x in (hidden_BTD, targets_BT, mask_BT)
    )
    nll_PT, gradient_PTD = _compacted(
        hidden_PTD, head, targets_PT, mask_PT, with_gradient=with_gradient
    )
    nll_BT = constrain(nll_PT.reshape(batch, length), "batch", "length")
    if not with_gradient:
        return nll_BT, None
    gradient_BTD = gradient_PTD.reshape(hidden_BTD.shape)
    return nll_BT, constrain(gradient_BTD, "batch", "length", "activation")


def _compacted(hidden_PTD, head, targets_PT, mask_PT, *, with_gradient):
    parts, length, _ = hidden_PTD.shape
    chunk = _tokens_at_once(parts, length, head.kernel_VD.shape[0])
    padding = -length % chunk
    # Gathered once, not for each chunk.
    kernel_VD = jax.tree.map(lambda part: constrain(part, "vocab", "activation"), head.kernel_VD)
    head = head.replace(kernel_VD=kernel_VD)
    front_PT = jnp.argsort(~mask_PT, axis=1, stable=True)

    def to_front(x):
        order = front_PT if x.ndim == 2 else front_PT[..., None]
        x = jnp.take_along_axis(x, order, axis=1)
        return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))

    def to_place(x):
        order = jnp.argsort(front_PT, axis=1)
        return jnp.take_along_axis(x, order if x.ndim == 2 else order[..., None], axis=1)

    hidden_PTD, targets_PT, sorted_mask_PT = map(to_front, (hidden_PTD, targets_PT, mask_PT))
    fullest = mask_PT.sum(axis=1).max()

    def block(carry):
        at, nll_PT, gradient_PTD = carry
        hidden_PCD, targets_PC, mask_PC = (
            jax.lax.dynamic_slice_in_dim(x, at, chunk, axis=1)
            for x in (hidden_PTD, targets_PT, sorted_mask_PT)
        )
        logits_PCV = logits(hidden_PCD, head)
        # A softmax by hand: its exponentials, computed once, serve the loss and the gradient.
        largest_PC = logits_PCV.max(axis=-1)
        exp_PCV = jnp.exp(logits_PCV - largest_PC[..., None])
        z_PC = exp_PCV.sum(axis=-1)
        target_PC = jnp.take_along_axis(logits_PCV, targets_PC[..., None], axis=-1)[..., 0]
        nll_PC = jnp.where(mask_PC, jnp.log(z_PC) + largest_PC - target_PC, 0.0)
        nll_PT = jax.lax.dynamic_update_slice_in_dim(nll_PT, nll_PC, at, axis=1)
        if with_gradient:
            # d nll / d logits = softmax - one_hot(target), and so through the bound and the head.
            # Not a row of the head for each target: XLA on CPUs widens all of it to look them up.
            one_hot_PCV = jax.nn.one_hot(targets_PC, logits_PCV.shape[-1], dtype=exp_PCV.dtype)
            slope_PCV = exp_PCV - z_PC[..., None] * one_hot_PCV
            if (cap := head.softcap) is not None:
                slope_PCV *= 1.0 - (logits_PCV / cap) ** 2
            kernel_VD = dequantized(head.kernel_VD, hidden_PCD.dtype)
            gradient_PCD = contract("PCV,VD->PCD", slope_PCV.astype(kernel_VD.dtype), kernel_VD)
            gradient_PCD /= z_PC[..., None]
            gradient_PCD = jnp.where(mask_PC[..., None], gradient_PCD, 0.0).astype(kernel_VD.dtype)
            gradient_PTD = jax.lax.dynamic_update_slice_in_dim(
                gradient_PTD, gradient_PCD, at, axis=1
            )
        return at + chunk, nll_PT, gradient_PTD

    log_dtype = jnp.promote_types(hidden_PTD.dtype, jnp.float32)
    start = (
        jnp.zeros((), fullest.dtype),
        jnp.zeros((parts, length + padding), log_dtype),
        jnp.zeros_like(hidden_PTD) if with_gradient else jnp.zeros((parts, 1, 1)),
    )
    _, nll_PT, gradient_PTD = jax.lax.while_loop(lambda carry: carry[0] < fullest, block, start)
    return to_place(nll_PT), to_place(gradient_PTD) if with_gradient else None
