"""Matrices in few bits, and a model whose base is made of them."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import SPEC, forward, quantized, shapes, toy_batch, toy_model, toy_variables

from safemoe_jax.errors import UserError
from safemoe_jax.model.lora import Gates, OwnExpert, Routed
from safemoe_jax.model.quantization import NF4, Quantized, dequantized, quantize
from safemoe_jax.training.losses import batch_nll

GOLDEN = Path(__file__).parents[1] / "golden" / "nf4.npz"
WIDE = dataclasses.replace(SPEC, embed_dim=64, mlp_dim=128, head_dim=16)
BATCH = toy_batch([[(3, 5)], [(2, 2), (1, 3)]], 8)


def weights(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_nf4_is_that_of_bitsandbytes():
    with np.load(GOLDEN) as golden:
        np.testing.assert_array_equal(NF4, golden["levels"])
        back = dequantized(quantize(golden["weights"], "nf4"), np.float32)
        np.testing.assert_allclose(back, golden["back"], rtol=0, atol=1e-6)


def test_int8_is_nowhere_off_by_more_than_half_a_step_of_its_row():
    given = weights(2, 5, 48)
    given[0, 1] = 0.0
    given[1, 2, 3] = 40.0  # coarsens its own row alone
    step = np.abs(given).max(axis=-1, keepdims=True) / 127
    error = np.abs(dequantized(quantize(given, "int8"), np.float32) - given)
    assert (error <= 0.5001 * step).all()
    assert (error.max(axis=-1, keepdims=True) >= 0.4 * step).all()


@pytest.mark.parametrize("format, bits", [("int8", 8), ("nf4", 4)])
def test_jax_and_numpy_make_the_same_of_a_matrix(format, bits):
    given = weights(3, 6, 128)
    host = quantize(given, format)
    device = jax.jit(functools.partial(quantize, format=format))(given)
    np.testing.assert_array_equal(device.codes, host.codes)
    np.testing.assert_allclose(device.scale, host.scale, rtol=2e-7)
    assert host.codes.nbytes == given.size * bits / 8
    assert (host.shape, host.size) == (given.shape, given.size)
    for dtype in (np.float32, jnp.bfloat16):
        back = jax.jit(dequantized, static_argnums=1)(device, dtype)
        assert back.dtype == dtype
        np.testing.assert_allclose(
            back.astype(np.float32), dequantized(host, np.float32), rtol=2 * jnp.finfo(dtype).eps
        )


@pytest.mark.parametrize("shape", [(4, 96), (3, 64)])
def test_nf4_refuses_what_is_not_whole_blocks(shape):
    with pytest.raises(UserError, match=f"{shape[0]} rows of {shape[1]}; .*'int8'"):
        quantize(weights(*shape), "nf4")


def test_what_a_quantized_smollm2_weighs():
    smollm2 = dataclasses.replace(
        SPEC,
        vocab_size=49_152,
        embed_dim=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        mlp_dim=1536,
    )

    def weight(param_dtype):
        params = shapes(toy_model(spec=smollm2, param_dtype=param_dtype))["params"]
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))

    whole = weight(jnp.bfloat16)
    assert whole == 2 * 134_515_008
    assert 0.50 < weight("int8") / whole <= 0.505
    assert 0.32 < weight("nf4") / whole <= 0.33


@pytest.mark.parametrize("format, tied", [("int8", True), ("nf4", False)])
def test_a_model_computes_with_what_its_quantized_base_stands_for(format, tied):
    spec = dataclasses.replace(WIDE, tie_embeddings=tied)
    model, plain = toy_model(spec=spec, param_dtype=format), toy_model(spec=spec)
    variables = quantized(toy_variables(plain), format)
    like = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes(model)["params"])
    assert like == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables["params"])
    stands_for = jax.tree.map(
        lambda leaf: dequantized(leaf, jnp.float32),
        variables["params"],
        is_leaf=lambda leaf: isinstance(leaf, Quantized),
    )
    found, _ = forward(model, variables, BATCH, Routed())
    expected, _ = forward(plain, variables | {"params": stands_for}, BATCH, Routed())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_experts_get_nearly_the_gradient_that_they_have_over_the_whole_base():
    model = toy_model(spec=WIDE)
    variables = toy_variables(model)

    def gradient(model, variables, routing):
        def loss(experts, batch):
            nll_BT, _ = batch_nll(model, variables | {"experts": experts}, batch, routing)
            return nll_BT.sum()

        leaves = jax.tree.leaves(jax.jit(jax.grad(loss))(variables["experts"], BATCH))
        return np.concatenate([np.ravel(leaf) for leaf in leaves])

    for routing in (OwnExpert(np.array([0, 2])), Gates(jnp.full(3, 0.3))):
        whole = gradient(model, variables, routing)
        mine = gradient(
            toy_model(spec=WIDE, param_dtype="int8"), quantized(variables, "int8"), routing
        )
        cosine = mine @ whole / np.linalg.norm(mine) / np.linalg.norm(whole)
        assert 0.98 <= cosine < 0.99999
