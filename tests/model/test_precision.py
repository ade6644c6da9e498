"""What is computed in which type."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safemoe_jax.model.lora import kept
from safemoe_jax.model.precision import (
    _by_sums,
    at_least_float32,
    bits,
    contract,
    floats,
    project,
)
from safemoe_jax.model.transformer import REMAT_POLICIES

EQUATION = "BTD,BDR->BTR"


def operands(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, 5, 8), (2, 8, 3), (2, 5, 3)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def test_at_least_float32_widens_and_never_narrows(float64):
    kinds = {
        kind: at_least_float32(jnp.ones(1, kind)).dtype.name for kind in ("bfloat16", "float64")
    }
    assert kinds == {"bfloat16": "float32", "float64": "float64"}


def test_contract_is_an_einsum_with_its_gradients(float64):
    x, y, cotangent = operands(jnp.float64)
    value, pullback = jax.vjp(lambda x, y: contract(EQUATION, x, y), x, y)
    reference, reference_pullback = jax.vjp(lambda x, y: jnp.einsum(EQUATION, x, y), x, y)
    np.testing.assert_allclose(value, reference, rtol=1e-12)
    for mine, theirs in zip(pullback(cotangent), reference_pullback(cotangent), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12)


@pytest.mark.parametrize(
    ("equation", "shape"), [("BTD,OD->BTO", (3, 192)), ("BTD,EDR->BTER", (2, 192, 5))]
)
def test_by_sums_is_projected_on_a_gpu_as_elsewhere(equation, shape, float64):
    x = jax.random.normal(jax.random.key(0), (1, 1, 192), jnp.float64)
    y = jax.random.normal(jax.random.key(1), shape, jnp.float64)
    expected = jnp.einsum(equation, x, y)
    np.testing.assert_allclose(project(equation, x, y), expected, rtol=1e-12)
    np.testing.assert_allclose(_by_sums(x, y, shape.index(192)), expected, rtol=1e-12)
    many = jnp.concatenate([x, 2 * x], axis=1)
    np.testing.assert_allclose(project(equation, many, y)[:, :1], expected, rtol=1e-12)


def test_by_sums_of_16_bits_is_what_it_is_among_others():
    x, y, _ = operands(jnp.bfloat16)
    y = y[0].T
    alone = project("BTD,RD->BTR", x[:1, :1], y)
    np.testing.assert_allclose(alone, contract("BTD,RD->BTR", x[:1], y)[:, :1], rtol=1e-6)


def test_contract_multiplies_16_bit_numbers_and_sums_in_float32_both_ways():
    x, y, _ = operands(jnp.bfloat16)

    def loss(x, y):
        return contract(EQUATION, x, y).sum()

    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, y).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 2
    for line in products:
        assert line.count("bf16>") == 2 and "-> tensor<" in line and line.endswith("xf32>"), line
    assert contract(EQUATION, x, y).dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_has_the_same_value_and_gradient(dtype):
    x = jnp.linspace(-3, 3, 7, dtype=dtype)
    value, gradient = jax.value_and_grad(lambda x: (kept(x) ** 2).sum())(x)
    assert value == (x**2).sum()
    np.testing.assert_array_equal(gradient, 2 * x)


@pytest.mark.parametrize("dtype, held", [("float32", "float32"), ("bfloat16", "uint16")])
def test_remat_keeps_the_bits_of_16_bit_floats(dtype, held):
    x = jnp.linspace(-1, 1, 7, dtype=dtype)

    @functools.partial(jax.checkpoint, policy=REMAT_POLICIES["dots"])
    def layer(x):
        return jnp.sin(kept(jnp.sin(x)))

    residuals = jax.tree.leaves(jax.vjp(layer, x)[1])
    assert sorted(leaf.dtype.name for leaf in residuals) == sorted((dtype, held))


def test_bits_are_those_of_bfloat16_and_nothing_elses():
    x = jnp.linspace(-3, 3, 7, dtype=jnp.bfloat16)
    assert bits(x).dtype == jnp.uint16
    np.testing.assert_array_equal(floats(bits(x)), x)
    for other in (x.astype(jnp.float32), x.astype(jnp.float16)):
        assert bits(other) is other and floats(other) is other
