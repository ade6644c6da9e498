"""Causal attention with grouped queries: one reference, and the fused kernels that stand in for it.

The reference reads a cache; the kernels serve training, scoring and prefill, where there is none.
Which one is used is said when a model is built (`choose_kernel`), by the kind of its devices.

Shape letters: B batch, T new tokens, C cache slots, N query heads, K key/value heads, G = N / K
queries per key head, H head dim, X = G * T.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from safemoe_jax.model.precision import at_least_float32, contract
from safemoe_jax.parallel.sharding import layout

Kernel = Literal["reference", "cudnn", "splash"]

# Splash attention works on tiles of this many tokens at least.
_TILE = 128


def choose_kernel(platform: str, compute_dtype: jnp.dtype) -> Kernel:
    """The fused kernel of a platform ("cpu", "gpu", "tpu"), or the reference where it has none.

    cuDNN's knows 16-bit types only.
    """
    if platform == "tpu":
        return "splash"
    if platform == "gpu" and jnp.dtype(compute_dtype).itemsize == 2:
        return "cudnn"
    return "reference"


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


def fused_attention(
    kernel: Kernel,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    mask_BTT: jax.Array,
    segment_ids_BT: jax.Array,
) -> jax.Array:
    """What `attention` computes without a cache, by the named kernel; padding may differ.

    Args:
      kernel: "cudnn" is `jax.nn.dot_product_attention` with a mask (its packed form has no segment
        ids); "splash" is the TPU kernel in Pallas, causal by construction, with segment ids.
      q_BTNH: queries.
      k_BTKH: keys.
      v_BTKH: values.
      mask_BTT: true where token t may see token s; the mask of `segment_ids_BT`.
      segment_ids_BT: 0 is padding.

    Returns:
      [B, T, N, H].
    """
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(
            q_BTNH, k_BTKH, v_BTKH, mask=mask_BTT[:, None], implementation="cudnn"
        )
    if kernel == "splash" and segment_ids_BT.shape[1] % _TILE == 0:
        return splash_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    return attention(q_BTNH, k_BTKH, v_BTKH, mask_BTT, None)


def splash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within segments by the TPU kernel; no [T, T] array exists.

    Under a mesh each device computes its own rows and heads, with whole rows: a Pallas kernel is
    opaque to the partitioner.

    Args:
      q_BTNH: queries; T a multiple of 128.
      k_BTKH: keys.
      v_BTKH: values.
      segment_ids_BT: tokens see earlier tokens of their own segment; padding (0) sees padding.
      interpret: runs on any platform, slowly; for tests.
    """

    # Imported where it is used: Pallas takes half a second, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def local(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
        _, length, heads, head_dim = q_BTNH.shape
        block = next(size for size in (512, 256, _TILE) if length % size == 0)
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([splash.CausalMask((length, length))] * heads),
            block_sizes=splash.BlockSizes(**dict.fromkeys(_BLOCKS, block)),
            interpret=interpret,
        )
        heads_first = (x.swapaxes(1, 2) for x in (q_BTNH * head_dim**-0.5, k_BTKH, v_BTKH))
        ids = splash.SegmentIds(segment_ids_BT, segment_ids_BT)
        return jax.vmap(kernel)(*heads_first, ids).swapaxes(1, 2)

    arrays = (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    if jax.sharding.get_abstract_mesh().empty:
        return local(*arrays)
    heads = ("heads", "kv_heads", "kv_heads")
    names = [*(("batch", None, name, None) for name in heads), ("batch", None)]
    specs = tuple(layout(x.shape, axes) for x, axes in zip(arrays, names, strict=True))
    mapped = jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)
    return mapped(*arrays)


_BLOCKS = (
    "block_q",
    "block_kv",
    "block_kv_compute",
    "block_q_dkv",
    "block_kv_dkv",
    "block_kv_dkv_compute",
    "block_q_dq",
    "block_kv_dq",
)


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
    kv_heads = k_BTKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, -1, head_dim) * head_dim**-0.5
    # Heads first: so the products are plain matmuls of every head, for which XLA is fast on CPUs.
    q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)

    def scores(k_BKSH, mask):
        found = contract("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH)
        # A finite floor: a padding token sees nothing, and its softmax must not be NaN.
        return jnp.where(mask, found, jnp.finfo(found.dtype).min)

    parts = [scores(k_BKTH, mask_BTT[:, None, None])]
    if cached is not None:
        past_k_BKCH, past_v_BKCH, filled_BC = cached
        parts.append(scores(past_k_BKCH, filled_BC[:, None, None, None]))
    weights = jax.nn.softmax(jnp.concatenate(parts, axis=-1), axis=-1).astype(v_BTKH.dtype)
    out_BKGTH = contract("BKGTS,BKSH->BKGTH", weights[..., :length], v_BKTH)
    if cached is not None:
        out_BKGTH += contract("BKGTC,BKCH->BKGTH", weights[..., length:], past_v_BKCH)
    out_BTKGH = out_BKGTH.transpose(0, 3, 1, 2, 4).astype(v_BTKH.dtype)
    return out_BTKGH.reshape(batch, length, heads, head_dim)
