"""In which types a model computes: activations in the compute type, sums in float32 at least."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


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


def _sum_type(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
