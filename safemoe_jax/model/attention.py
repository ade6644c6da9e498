"""Causal attention with grouped queries: one reference, and the fused kernels that stand in for it.

The reference reads a cache; the kernels serve training, scoring and prefill, where there is none.
Which one is used is said when a model is built (`choose_kernel`), by the kind of its devices.

Shape letters: B batch, T new tokens, C cache slots, N query heads, K key/value heads, G = N / K
queries per key head, H head dim, X = G * T.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from safemoe_jax.model.precision import at_least_float32, contract
from safemoe_jax.model.spec import LayerKind, RopeScaling
from safemoe_jax.parallel.sharding import extent, layout

Kernel = Literal["reference", "cudnn", "splash"]

# Splash attention works on tiles of this many tokens at least.
_TILE = 128


class Scores(NamedTuple):
    """How the product of a query and a key becomes a score: c * tanh(scale * q k / c).

    Attributes:
      scale: what the product is multiplied by.
      softcap: c, the bound of the scores; None where there is none.
    """

    scale: float
    softcap: float | None


def why_not(
    kernel: Kernel, platform: str, compute_dtype: jnp.dtype, head_dim: int, softcap: float | None
) -> str:
    """What keeps a kernel from computing a model's attention; "" where nothing does.

    Args:
      kernel: which.
      platform: "cpu", "gpu" or "tpu", that of the devices; a GPU is this process's.
      compute_dtype: of queries, keys and values.
      head_dim: their width.
      softcap: the bound of the scores, or None.

    Source: for cuDNN `check_is_flash_attention` of jax 0.10.2.
    """
    if kernel == "reference" or (kernel == "splash" and platform == "tpu"):
        return ""
    if kernel == "splash":
        return f"runs on TPUs, and this is {platform!r}"
    widest = _widest_of_cudnn() if platform == "gpu" else 0
    if not widest:
        return f"runs on NVIDIA's GPUs, and this is {platform!r}"
    if jnp.dtype(compute_dtype).itemsize != 2:
        return f"computes in 16-bit types, and compute_dtype is '{jnp.dtype(compute_dtype)}'"
    if head_dim > widest or head_dim % 8:
        return (
            f"on this GPU takes heads up to {widest} wide, in steps of 8, and this base's are "
            f"{head_dim}"
        )
    if softcap is not None:
        return f"cannot bound scores, and this base bounds them by {softcap}"
    return ""


def _widest_of_cudnn() -> int:
    """The widest heads of cuDNN's attention on this process's GPU; 0 where it is not NVIDIA's."""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    major = capability.partition(".")[0]  # AMD's have names there
    if not major.isdecimal():
        return 0
    return 256 if int(major) >= 9 else 128


def choose_kernel(
    platform: str, compute_dtype: jnp.dtype, head_dim: int, softcap: float | None
) -> Kernel:
    """The fused kernel for a model, or the reference where none can; arguments of `why_not`."""
    model = (platform, compute_dtype, head_dim, softcap)
    fused: tuple[Kernel, ...] = ("splash", "cudnn")
    return next((kernel for kernel in fused if not why_not(kernel, *model)), "reference")


def frequencies(head_dim: int, theta: float | None, scaling: RopeScaling | None) -> np.ndarray:
    """Rotary frequencies [H / 2] in float64, in radians a position; zero where nothing is rotated.

    Source: RoFormer, arXiv 2104.09864, section 3.2.2; the scaling of Llama 3.1 is that of its
    published code, `transformers`' rope_type "llama3".
    """
    half = head_dim // 2
    if theta is None:
        return np.zeros(half)
    plain = theta ** (-np.arange(half) / half)
    if scaling is None:
        return plain
    kept = np.zeros(half)  # the share of a frequency that stays as it was
    if scaling.original_positions:
        turns = scaling.original_positions * plain / (2 * math.pi)
        width = scaling.high_freq_factor - scaling.low_freq_factor
        kept = np.clip((turns - scaling.low_freq_factor) / width, 0.0, 1.0)
    return plain * (kept + (1.0 - kept) / scaling.factor)


def capped(x: jax.Array, softcap: float | None) -> jax.Array:
    """c * tanh(x / c), which bounds x by c (Gemma 2, arXiv 2408.00118, section 2)."""
    return x if softcap is None else softcap * jnp.tanh(x / softcap)


def rotation(
    positions_BT: jax.Array, head_dim: int, kinds: Sequence[LayerKind]
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, each [kinds, B, T, 1, H / 2] in float32, by which `rotary` turns these
    positions in layers of each kind.

    They are made once, outside the scan over layers. Where nothing is rotated they are 1 and 0.
    """
    found = [frequencies(head_dim, kind.rope_theta, kind.rope_scaling) for kind in kinds]
    frequency_KH = jnp.asarray(np.stack(found), jnp.float32)
    angle_KBT1H = positions_BT[None, ..., None, None] * frequency_KH[:, None, None, None]
    return jnp.cos(angle_KBT1H), jnp.sin(angle_KBT1H)


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
    windows: Sequence[int | None],
    kind: jax.Array | int,
    form: Scores,
) -> jax.Array:
    """What `attention` computes without a cache, by the named kernel; padding may differ.

    Args:
      kernel: "cudnn" is `jax.nn.dot_product_attention` with a mask (its packed form has no segment
        ids); "splash" is the TPU kernel in Pallas, causal by construction, with segment ids.
      q_BTNH: queries.
      k_BTKH: keys.
      v_BTKH: values.
      mask_BTT: true where token t may see token s; the mask of `segment_ids_BT` and the window.
      segment_ids_BT: 0 is padding.
      windows: for each kind of layers how many tokens a token sees, itself included; None for all.
      kind: of this layer.
      form: how products become scores.

    Returns:
      [B, T, N, H].
    """
    # cuDNN has no gradient under a mask where T is odd.
    if kernel == "cudnn" and segment_ids_BT.shape[1] % 2 == 0:
        return cudnn_attention(q_BTNH, k_BTKH, v_BTKH, mask_BTT, form)
    if kernel == "splash" and segment_ids_BT.shape[1] % _TILE == 0:
        # The kernel's mask is static, so layers of several kinds choose among kernels.
        each = [
            functools.partial(splash_attention, window=window, form=form)
            for window in dict.fromkeys(windows)
        ]
        arrays = (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
        if len(each) == 1:
            return each[0](*arrays)
        which = np.array([list(dict.fromkeys(windows)).index(window) for window in windows])
        return jax.lax.switch(jnp.asarray(which)[kind], each, *arrays)
    return attention(q_BTNH, k_BTKH, v_BTKH, mask_BTT, None, form)


def cudnn_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask_BTT: jax.Array, form: Scores
) -> jax.Array:
    """Attention under a causal mask by cuDNN, which skips what is above the diagonal."""
    assert form.softcap is None

    def local(q_BTNH, k_BTKH, v_BTKH, mask_BTT):
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            mask=mask_BTT[:, None],
            is_causal=True,
            scale=form.scale,
            implementation="cudnn",
        )

    return _on_own_heads(local, q_BTNH, k_BTKH, v_BTKH, mask_BTT)


def by_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    """A remat policy that keeps what cuDNN's attention made: forward it runs once."""
    return primitive.name.startswith("dot_product_attention_fwd")


def splash_block(length: int) -> int:
    """Tokens in a block of queries, and of keys; blocks above the diagonal are left out."""
    return next(size for size in (512, 256, _TILE) if length % size == 0)


def splash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    window: int | None,
    form: Scores,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within segments by the TPU kernel; no [T, T] array exists.

    Args:
      q_BTNH: queries; T a multiple of 128.
      k_BTKH: keys.
      v_BTKH: values.
      segment_ids_BT: tokens see earlier tokens of their own segment; padding (0) sees padding.
      window: how many tokens a token sees, itself included; None for all.
      form: how products become scores.
      interpret: runs on any platform, slowly; for tests.
    """

    # Imported where it is used: Pallas takes half a second, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def local(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
        _, length, heads, _ = q_BTNH.shape
        block = splash_block(length)
        square = (length, length)
        mask = (
            splash.CausalMask(square)
            if window is None
            else splash.LocalMask(square, (window - 1, 0), offset=0)
        )
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=splash.BlockSizes(
                block_q=block,
                block_kv=block,
                block_kv_compute=block,
                block_q_dkv=block,
                block_kv_dkv=block,
                block_kv_dkv_compute=block,
                block_q_dq=block,
                block_kv_dq=block,
            ),
            attn_logits_soft_cap=form.softcap,
            interpret=interpret,
        )
        heads_first = (x.swapaxes(1, 2) for x in (q_BTNH * form.scale, k_BTKH, v_BTKH))
        ids = splash.SegmentIds(segment_ids_BT, segment_ids_BT)
        return jax.vmap(kernel)(*heads_first, ids).swapaxes(1, 2)

    return _on_own_heads(local, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def _on_own_heads(local: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`local` of queries, keys, values and what each row has besides.

    Under a mesh each device computes its own rows and heads, with whole rows: a fused kernel is
    opaque to the partitioner.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return local(*arrays)
    heads = ("heads", "kv_heads", "kv_heads")
    names: list[tuple[str | None, ...]] = [("batch", None, name, None) for name in heads]
    names += [("batch", *[None] * (x.ndim - 1)) for x in arrays[len(heads) :]]
    specs = tuple(layout(x.shape, axes) for x, axes in zip(arrays, names, strict=True))
    mapped = jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)
    return mapped(*arrays)


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    mask_BTT: jax.Array,
    cached: tuple[jax.Array, jax.Array, jax.Array] | None,
    form: Scores,
) -> jax.Array:
    """Causal softmax attention, scores in float32.

    Queries go in blocks, each with the keys up to its end: most of what lies above the diagonal is
    never computed, and scores exist for one block at a time.

    Args:
      q_BTNH: queries of the new tokens.
      k_BTKH: their keys.
      v_BTKH: their values.
      mask_BTT: true where new token t may see new token s; never for s > t.
      cached: keys [B, K, C, H] and values [B, K, C, H] of earlier tokens, and which slots new token
        t may see, [B, T, C] (or [B, 1, C], alike for all); or None. Heads come first, as the
        matmuls want them: no step transposes the cache.
      form: how products become scores.

    Returns:
      [B, T, N, H].
    """
    batch, length, heads, head_dim = q_BTNH.shape
    kv_heads = k_BTKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, -1, head_dim) * form.scale
    # Heads first: so the products are plain matmuls of every head, for which XLA is fast on CPUs.
    q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)

    def scores(q_BKGTH, k_BKSH, mask_BTS):
        found = capped(contract("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH), form.softcap)
        # A finite floor: a padding token sees nothing, and its softmax must not be NaN.
        return jnp.where(mask_BTS[:, None, None], found, jnp.finfo(found.dtype).min)

    def of_queries(start: int, end: int) -> jax.Array:
        new = (q_BKGTH[:, :, :, start:end], k_BKTH[:, :, :end], mask_BTT[:, start:end, :end])
        if cached is None:
            weights = jax.nn.softmax(scores(*new), axis=-1).astype(v_BKTH.dtype)
            return contract("BKGTS,BKSH->BKGTH", weights, v_BKTH[:, :, :end])
        past_k_BKCH, past_v_BKCH, seen_BTC = cached
        seen = seen_BTC if seen_BTC.shape[1] == 1 else seen_BTC[:, start:end]
        past = (new[0], past_k_BKCH, seen)
        # One softmax over both, which are not copied next to one another for it.
        parts = [(scores(*new), v_BKTH[:, :, :end]), (scores(*past), past_v_BKCH)]
        largest = functools.reduce(jnp.maximum, [x.max(axis=-1, keepdims=True) for x, _ in parts])
        parts = [(jnp.exp(x - largest), v_BKSH) for x, v_BKSH in parts]
        mixed = [
            contract("BKGTS,BKSH->BKGTH", x.astype(v_BKSH.dtype), v_BKSH) for x, v_BKSH in parts
        ]
        return sum(mixed) / sum(x.sum(axis=-1, keepdims=True) for x, _ in parts)

    block = _block_of_queries(length)
    blocks = [of_queries(at, min(at + block, length)) for at in range(0, length, block)]
    out_BTKGH = jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).astype(v_BTKH.dtype)
    return out_BTKGH.reshape(batch, length, heads, head_dim)


def _block_of_queries(length: int) -> int:
    """128, or what makes eight blocks of longer rows: each is compiled on its own. One block where
    the mesh cuts rows along T."""
    return length if extent("length") > 1 else max(128, -(-length // 8))
