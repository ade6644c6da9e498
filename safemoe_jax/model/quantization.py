"""Frozen matrices in 8 or 4 bits a weight.

int8: each row is rounded to 127 steps either side of zero, scaled by its largest magnitude.
nf4: blocks of 64 weights of a row are rounded to the 16 levels of NormalFloat, scaled alike (QLoRA,
arXiv 2305.14314, section 3; the scales are not quantized again).
`Blocks`: nothing is rounded, the file that a matrix comes from has done it (GGUF).

Shape letters: O rows (output width, or vocabulary), D columns, G blocks of a row.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.core import FrozenDict

from safemoe_jax.errors import UserError

Format = Literal["int8", "nf4"]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a matrix rests as its file rounded it: a weight is scale * code + offset.

    Attributes:
      bits: of a code.
      size: weights of a row that have scale and offset in common.
      dtype: of scales and offsets.
      offset: whether there are any; codes of 4 bits always have them.
    """

    bits: Literal[4, 8]
    size: int
    dtype: np.dtype
    offset: bool


# How a leaf of the base rests, and how the base does: in floats of one type, with its matrices in a
# format, or each leaf, by its path, in a way of its own (what is not named: in float32).
LeafDtype = jnp.dtype | Format | Blocks
ParamDtype = jnp.dtype | Format | FrozenDict[str, LeafDtype]

# By config.model.param_dtype. Of "gguf" the base's file knows more: `BaseModel.rests`.
PARAM_DTYPES: dict[str, ParamDtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": "int8",
    "nf4": "nf4",
    "gguf": FrozenDict(),
}

NF4_BLOCK = 64
# QLoRA, appendix E: quantiles of a normal distribution, scaled to [-1, 1], zero among them.
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


@flax.struct.dataclass
class Quantized:
    """A matrix [..., O, D], quantized. Its format shows in the type of its codes.

    Attributes:
      codes: int8 [..., O, D]; of 4 bits uint8 [..., O / 2, D], row 2i in the high half of a byte
        and row 2i + 1 in the low one, so that columns can be cut anywhere.
      scale: what a block's codes are multiplied by, floats [..., O, G]; a row of int8 is one block.
        nf4's codes first become levels.
      offset: what is added then, like scale; None for int8 and nf4.
    """

    codes: jax.Array
    scale: jax.Array
    offset: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return *self.scale.shape[:-1], self.codes.shape[-1]

    @property
    def size(self) -> int:
        """Weights."""
        return int(np.prod(self.shape))


# A frozen matrix as it rests: quantized, or an array of floats.
Matrix = jax.Array | Quantized


def of_matrix(leaf: str, param_dtype: ParamDtype) -> LeafDtype:
    """How a matrix of the base, by its path joined with "/", rests.

    Rows of embedding and head are looked up one by one, and four bits would cost the head too much.
    """
    if isinstance(param_dtype, FrozenDict):
        return param_dtype.get(leaf, np.dtype(np.float32))
    if isinstance(param_dtype, str) and not leaf.startswith("layers/"):
        return "int8"
    return param_dtype


def of_vectors(param_dtype: ParamDtype) -> jnp.dtype:
    """How norms and biases rest: too small to be worth a format."""
    if isinstance(param_dtype, str | FrozenDict):
        return np.dtype(np.float32)
    return param_dtype


def largest_block(rests: ParamDtype) -> int:
    """Weights of a row that must stay together, however its columns are cut; 0 where any cut will
    do."""
    if isinstance(rests, FrozenDict):
        sizes = [leaf.size for leaf in rests.values() if isinstance(leaf, Blocks)]
        return max(sizes, default=0)
    return NF4_BLOCK if rests == "nf4" else 0


def quantize(weights: Any, format: Format) -> Quantized:
    """The nearest quantized matrix.

    Args:
      weights: floats [..., O, D], of numpy or JAX; the result is of the same.
      format: "nf4" wants D in whole blocks, and O even.

    Raises:
      UserError: where nf4's blocks do not fit.
    """
    xp = weights.__array_namespace__()
    rows, width = weights.shape[-2:]
    if format == "nf4" and (width % NF4_BLOCK or rows % 2):
        raise UserError(
            f"nf4 packs blocks of {NF4_BLOCK} weights of two rows; the base has a matrix of {rows} "
            f"rows of {width}; set config.model.param_dtype to 'int8'"
        )
    block = NF4_BLOCK if format == "nf4" else width
    blocks = weights.astype(xp.float32).reshape(*weights.shape[:-1], width // block, block)
    absmax = xp.abs(blocks).max(axis=-1)
    scaled = blocks / xp.where(absmax > 0, absmax, 1.0)[..., None]
    if format == "int8":
        codes = xp.round(127 * scaled).astype(xp.int8).reshape(weights.shape)
        return Quantized(codes, absmax / 127)
    nearest = xp.searchsorted(xp.asarray((NF4[1:] + NF4[:-1]) / 2), scaled).astype(xp.uint8)
    return Quantized(_paired(nearest.reshape(weights.shape)), absmax)


def common(kinds: Iterable[Blocks]) -> Blocks:
    """Blocks in which matrices of several kinds rest alike, none rounded again."""
    bits, sizes, dtypes, offsets = zip(*map(dataclasses.astuple, kinds), strict=True)
    return Blocks(max(bits), min(sizes), np.result_type(*dtypes), any(offsets))


def repacked(matrix: Quantized, blocks: Blocks) -> Quantized:
    """The same numbers in other blocks, in numpy.

    Args:
      matrix: [..., O, D], a code a byte.
      blocks: not larger than the matrix' own, with room for its codes; O is even for 4 bits.
    """
    repeats = matrix.shape[-1] // blocks.size // matrix.scale.shape[-1]
    scale = np.repeat(matrix.scale.astype(blocks.dtype), repeats, axis=-1)
    codes = matrix.codes if blocks.bits == 8 else _paired(matrix.codes.astype(np.uint8))
    if not blocks.offset:
        return Quantized(codes, scale)
    if matrix.offset is None:
        return Quantized(codes, scale, np.zeros_like(scale))
    return Quantized(codes, scale, np.repeat(matrix.offset.astype(blocks.dtype), repeats, axis=-1))


def _paired(codes: Any) -> Any:
    """Codes [..., O, D] of four bits, two rows in one."""
    *outer, rows, width = codes.shape
    pairs = codes.reshape(*outer, rows // 2, 2, width)
    return (pairs[..., 0, :] << 4) | pairs[..., 1, :]


def dequantized(matrix: Matrix, dtype: jnp.dtype) -> Any:
    """The floats [..., O, D] that a matrix stands for."""
    if not isinstance(matrix, Quantized):
        return matrix.astype(dtype)
    xp, codes, scale = matrix.codes.__array_namespace__(), matrix.codes, matrix.scale
    if codes.dtype == xp.int8:
        values = codes.astype(xp.float32)
    else:
        # Look-ups, no shifts and selections: XLA hoists the constants of those out of the scan over
        # layers, each as large as a layer's matrix in float32.
        levels = NF4 if matrix.offset is None else np.arange(16, dtype=np.float32)
        halves = np.repeat(levels, 16), np.tile(levels, 16)  # of a byte's high and low half
        values = xp.stack([xp.take(xp.asarray(h), codes, mode="clip") for h in halves], axis=-2)
    blocks = values.reshape(*scale.shape, -1) * scale.astype(xp.float32)[..., None]
    if matrix.offset is not None:
        blocks += matrix.offset.astype(xp.float32)[..., None]
    return blocks.reshape(matrix.shape).astype(dtype)


def zeros(shape: tuple[int, ...], format: Format | Blocks) -> Quantized:
    """A matrix [..., O, D] of zeros."""
    *outer, rows, width = shape
    if not isinstance(format, Blocks):
        return quantize(jnp.zeros(shape, jnp.float32), format)
    halved = format.bits == 4
    codes = jnp.zeros((*outer, rows // 2 if halved else rows, width), "uint8" if halved else "int8")
    scale = jnp.zeros((*outer, rows, width // format.size), format.dtype)
    return Quantized(codes, scale, scale if format.offset else None)


def frozen_matrix(
    module: nn.Module,
    name: str,
    init: Any,
    shape: tuple[int, int],
    axes: tuple[str, str],
    param_dtype: ParamDtype,
) -> Matrix:
    """A parameter [O, D] of the base, with the logical names of O and D."""
    rests = of_matrix("/".join((*module.path, name)), param_dtype)
    if not isinstance(rests, str | Blocks):
        return module.param(name, nn.with_logical_partitioning(init, axes), shape, rests)

    def quantized(key: jax.Array) -> Quantized:
        if isinstance(rests, Blocks):  # they are read, never drawn
            made = zeros(shape, rests)
        else:
            made = quantize(init(key, shape, jnp.float32), rests)
        of_blocks = (axes[0], None) if rests == "int8" else axes
        return Quantized(
            nn.LogicallyPartitioned(made.codes, axes),
            *(
                part if part is None else nn.LogicallyPartitioned(part, of_blocks)
                for part in (made.scale, made.offset)
            ),
        )

    return module.param(name, quantized)


class Table(nn.Module):
    """Embedding or head: one named matrix [V, D] of the base."""

    leaf: str
    shape: tuple[int, int]
    param_dtype: ParamDtype

    @nn.compact
    def __call__(self) -> Matrix:
        init, axes = nn.initializers.normal(0.02), ("vocab", "embed")
        return frozen_matrix(self, self.leaf, init, self.shape, axes, self.param_dtype)
