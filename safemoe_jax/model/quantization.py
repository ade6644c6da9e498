"""Frozen matrices in 8 or 4 bits a weight.

int8: each row is rounded to 127 steps either side of zero, scaled by its largest magnitude.
nf4: blocks of 64 weights of a row are rounded to the 16 levels of NormalFloat, scaled alike (QLoRA,
arXiv 2305.14314, section 3; the scales are not quantized again).

Shape letters: O rows (output width, or vocabulary), D columns, G blocks of a row.
"""

from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from safemoe_jax.errors import UserError

Format = Literal["int8", "nf4"]

# How the base rests: in floats of one type, or with its matrices in a format.
ParamDtype = jnp.dtype | Format

# By config.model.param_dtype.
PARAM_DTYPES: dict[str, ParamDtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": "int8",
    "nf4": "nf4",
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
# The levels of a byte's high and low half.
_NF4_HALVES = np.repeat(NF4, 16), np.tile(NF4, 16)


@flax.struct.dataclass
class Quantized:
    """A matrix [..., O, D], quantized. Its format shows in the type of its codes.

    Attributes:
      codes: int8 [..., O, D]; of nf4 uint8 [..., O / 2, D], row 2i in the high half of a byte and
        row 2i + 1 in the low one, so that columns can be cut anywhere.
      absmax: the largest magnitude of each block, float32 [..., O, G]; a row of int8 is one block.
    """

    codes: jax.Array
    absmax: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return *self.absmax.shape[:-1], self.codes.shape[-1]

    @property
    def size(self) -> int:
        """Weights."""
        return int(np.prod(self.shape))


# A frozen matrix as it rests: quantized, or an array of floats.
Matrix = jax.Array | Quantized


def of_tables(param_dtype: ParamDtype) -> ParamDtype:
    """How embedding and head rest: rows of theirs are looked up one by one, and four bits would
    cost the head too much."""
    return "int8" if isinstance(param_dtype, str) else param_dtype


def of_vectors(param_dtype: ParamDtype) -> jnp.dtype:
    """How norms and biases rest: too small to be worth a format."""
    return np.dtype(np.float32) if isinstance(param_dtype, str) else param_dtype


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
        return Quantized(xp.round(127 * scaled).astype(xp.int8).reshape(weights.shape), absmax)
    nearest = xp.searchsorted(xp.asarray((NF4[1:] + NF4[:-1]) / 2), scaled).astype(xp.uint8)
    pairs = nearest.reshape(*weights.shape[:-2], rows // 2, 2, width)
    return Quantized((pairs[..., 0, :] << 4) | pairs[..., 1, :], absmax)


def dequantized(matrix: Matrix, dtype: jnp.dtype) -> Any:
    """The floats [..., O, D] that a matrix stands for."""
    if not isinstance(matrix, Quantized):
        return matrix.astype(dtype)
    xp, codes, scale = matrix.codes.__array_namespace__(), matrix.codes, matrix.absmax
    if codes.dtype == xp.int8:
        values, scale = codes.astype(xp.float32), scale / 127
    else:
        # Look-ups, no shifts and selections: XLA hoists the constants of those out of the scan over
        # layers, each as large as a layer's matrix in float32.
        halves = [xp.take(xp.asarray(level), codes, mode="clip") for level in _NF4_HALVES]
        values = xp.stack(halves, axis=-2)
    blocks = values.reshape(*scale.shape, -1) * scale[..., None]
    return blocks.reshape(matrix.shape).astype(dtype)


def frozen_matrix(
    module: nn.Module,
    name: str,
    init: Any,
    shape: tuple[int, int],
    axes: tuple[str, str],
    param_dtype: ParamDtype,
) -> Matrix:
    """A parameter [O, D] of the base, with the logical names of O and D."""
    if not isinstance(param_dtype, str):
        return module.param(name, nn.with_logical_partitioning(init, axes), shape, param_dtype)

    def quantized(key: jax.Array) -> Quantized:
        made = quantize(init(key, shape, jnp.float32), param_dtype)
        of_absmax = axes if param_dtype == "nf4" else (axes[0], None)
        return Quantized(
            nn.LogicallyPartitioned(made.codes, axes),
            nn.LogicallyPartitioned(made.absmax, of_absmax),
        )

    return module.param(name, quantized)


class Table(nn.Module):
    """Embedding or head: one named matrix [V, D] of the base."""

    leaf: str
    shape: tuple[int, int]
    param_dtype: ParamDtype

    @nn.compact
    def __call__(self) -> Matrix:
        init, rests = nn.initializers.normal(0.02), of_tables(self.param_dtype)
        return frozen_matrix(self, self.leaf, init, self.shape, ("vocab", "embed"), rests)
