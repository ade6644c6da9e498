"""In which types a model computes: activations in the compute type, sums in float32 at least."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# On devices, or on the host on its way to them.
AnyArray = jax.Array | np.ndarray


def at_least_float32(x: jax.Array) -> jax.Array:
    """What norms, softmaxes and the router compute in: float32, or more where x has more."""
    return x.astype(_sum_type(x))


def bits(x: jax.Array) -> jax.Array:
    """A bfloat16 array's bits as integers; any other array as it is.

    What is stacked, and sliced or written piece by piece, is better stacked as bits. XLA on CPUs
    has no such operations on bfloat16: for every piece it would widen all of the stack to float32.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def floats(x: jax.Array) -> jax.Array:
    """What `bits` was given."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def contract(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum of two operands of one type, summed and returned in float32 at least.

    Matrix units (a TPU's, a GPU's, a CPU's with AMX) multiply 16-bit operands and add in float32.
    The backward pass does the same, with its cotangent rounded to the operands' type; JAX's own
    would multiply a float32 cotangent by a 16-bit operand, for which they have no instruction.

    Args:
      equation: such as "BTD,DR->BTR"; every letter stands in two of its three parts.
      x: first operand.
      y: second operand, of x's type.
    """
    return jnp.einsum(equation, x, y, preferred_element_type=_sum_type(x))


def _forward(equation: str, x: Any, y: Any) -> Any:
    return contract(equation, x, y), (x, y)


def _backward(equation: str, operands: Any, cotangent: Any) -> Any:
    x, y = operands
    left, right = equation.split("->")[0].split(",")
    out = equation.split("->")[1]
    cotangent = cotangent.astype(x.dtype)
    return (
        contract(f"{out},{right}->{left}", cotangent, y).astype(x.dtype),
        contract(f"{left},{out}->{right}", x, cotangent).astype(y.dtype),
    )


contract.defvjp(_forward, _backward)


def project(equation: str, x_BTD: jax.Array, y: jax.Array) -> jax.Array:
    """`contract` over D, of tokens with what all of them are multiplied by; a single token, as in
    decoding, goes the way that suits the platform.

    Args:
      equation: such as "BTD,EDR->BTER": the result has y's letters in y's order, without D.
      x_BTD: tokens.
      y: of x's type.
    """
    if x_BTD.shape[:2] != (1, 1):
        return contract(equation, x_BTD, y)
    axis = equation.split("->")[0].split(",")[1].index("D")
    return jax.lax.platform_dependent(
        x_BTD,
        y,
        cpu=functools.partial(_twice, equation),
        cuda=functools.partial(_by_sums, axis=axis),
        default=functools.partial(contract, equation),
    )


def _twice(equation: str, x_11D: jax.Array, y: jax.Array) -> jax.Array:
    """`contract` of one token, which XLA on CPUs multiplies faster as two where it has 16 bits."""
    if x_11D.dtype.itemsize > 2:
        return contract(equation, x_11D, y)
    return contract(equation, jnp.concatenate([x_11D, x_11D], axis=1), y)[:, :1]


def _by_sums(x_11D: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """The sum over `axis` of x * y, as [1, 1, ...].

    For this XLA on GPUs reads y where it lies; for a matmul it would first copy it out of the stack
    of layers. Sums along rows keep a GPU busy; others do if they are made in two steps.
    """
    dtype = _sum_type(x_11D)
    around = [other for other in range(y.ndim) if other != axis]
    products = y.astype(dtype) * jnp.expand_dims(x_11D[0, 0].astype(dtype), around)
    if axis < y.ndim - 1:
        parts = math.gcd(y.shape[axis], 64)
        cut = products.reshape(*y.shape[:axis], parts, -1, *y.shape[axis + 1 :])
        products = jax.lax.optimization_barrier(cut.sum(axis=axis + 1))
    return products.sum(axis=axis)[None, None]


def _sum_type(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
