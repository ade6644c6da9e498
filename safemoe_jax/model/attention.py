"""Causal attention over a read-only cache and the new tokens, with grouped queries.

Shape letters: B batch, T new tokens, C cache slots, N query heads, K key/value heads, G = N / K
queries per key head, H head dim.
"""

import jax
import jax.numpy as jnp


def at_least_float32(x: jax.Array) -> jax.Array:
    """What norms, softmaxes and the router compute in: float32, or more where x has more."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rotation(positions_BT: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, each [B, T, 1, H / 2] in float32, by which `rotary` turns these positions.

    All layers share them, so they are made once, outside the scan over layers.
    """
    half = head_dim // 2
    frequency_H = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1H = positions_BT[..., None, None] * frequency_H[None, None, None]
    return jnp.cos(angle_BT1H), jnp.sin(angle_BT1H)


def rotary(x_BTNH: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary position embedding, the "rotate half" form of the Hugging Face checkpoints.

    Source: Su et al., RoFormer, arXiv 2104.09864, equation 34, with halves instead of pairs.
    """
    cos, sin = turn
    first, second = jnp.split(at_least_float32(x_BTNH), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    mask_BTT: jax.Array,
    cached: tuple[jax.Array, jax.Array, jax.Array] | None,
) -> jax.Array:
    """Softmax attention, scores in float32.

    Args:
      q_BTNH: queries of the new tokens.
      k_BTKH: their keys.
      v_BTKH: their values.
      mask_BTT: true where new token t may see new token s.
      cached: keys [B, K, C, H] and values [B, K, C, H] of earlier tokens, and which slots hold one,
        [B, C]; or None. Heads come first, as the matmuls want them: no step transposes the cache.

    Returns:
      [B, T, N, H].
    """
    batch, length, heads, head_dim = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(batch, length, k_BTKH.shape[2], -1, head_dim) * head_dim**-0.5

    def scores(equation, k, mask):
        dtype = at_least_float32(q_BTKGH).dtype
        found = jnp.einsum(equation, q_BTKGH, k, preferred_element_type=dtype)
        # A finite floor: a padding token sees nothing, and its softmax must not be NaN.
        return jnp.where(mask, found, jnp.finfo(dtype).min)

    parts = [scores("BTKGH,BSKH->BKGTS", k_BTKH, mask_BTT[:, None, None])]
    if cached is not None:
        past_k_BKCH, past_v_BKCH, filled_BC = cached
        parts.append(scores("BTKGH,BKCH->BKGTC", past_k_BKCH, filled_BC[:, None, None, None]))
    weights = jax.nn.softmax(jnp.concatenate(parts, axis=-1), axis=-1).astype(v_BTKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights[..., :length], v_BTKH)
    if cached is not None:
        past_BKXC = weights[..., length:].reshape(*past_v_BKCH.shape[:2], -1, past_v_BKCH.shape[2])
        out_BKXH = past_BKXC @ past_v_BKCH
        out_BKGTH = out_BKXH.reshape(*weights.shape[:-1], head_dim)
        out_BTKGH += jnp.moveaxis(out_BKGTH, 3, 1)
    return out_BTKGH.reshape(batch, length, heads, head_dim)
