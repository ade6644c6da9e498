"""Each family of bases against `transformers`, by whole passes and by decoding past the window."""

import functools
import importlib.util
import runpy

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import toy_model, toy_variables

from safemoe_jax.config import ExpertsConfig
from safemoe_jax.inference.engine import decode_step
from safemoe_jax.model.lora import Routed
from safemoe_jax.model.spec import FAMILIES, ModelSpec, RopeScaling, shortest_pattern
from safemoe_jax.model.transformer import logits
from safemoe_jax.weights.base import load_base


@functools.partial(jax.jit, static_argnums=0)
def both_ways(model, variables, tokens_T):
    """Logits [T, V] of one pass, and of decoding token by token; the router is on."""
    length = len(tokens_T)
    positions_BT, one_BT = jnp.arange(length)[None], jnp.ones((1, length), jnp.int32)
    out = model.apply(variables, tokens_T[None], positions_BT, one_BT, 0 * one_BT, Routed())

    def step(cache, token):
        cache, logits_BV, _ = decode_step(model, variables, Routed(), token[None], cache)
        return cache, logits_BV[0]

    _, decoded_TV = jax.lax.scan(step, model.empty_cache(1, length), tokens_T)
    return logits(out.hidden_BTD, out.head)[0], decoded_TV


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_family_agrees_with_transformers_and_decodes_as_it_is_trained(name, tmp_path):
    golden = dict(np.load(families.GOLDEN / f"{name}.npz"))
    base = load_base(str(families.write(name, tmp_path / "golden")), "float32")
    model = toy_model(
        spec=base.spec, experts=ExpertsConfig(("q", "v", "down"), 2, 3.0), num_experts=2
    )
    drawn = toy_variables(model) | {"params": base.params}
    # Experts that are zero change nothing, so one program computes the base as well.
    silent = drawn | {"experts": jax.tree.map(jnp.zeros_like, drawn["experts"])}

    whole, decoded = both_ways(model, silent, golden["tokens"])
    assert np.ptp(golden["logits"]) > 1.0
    np.testing.assert_allclose(whole, golden["logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(decoded, golden["logits"], rtol=0, atol=1e-4)

    routed, routed_decoded = both_ways(model, drawn, golden["tokens"])
    assert np.abs(routed - whole).max() > 0.1
    np.testing.assert_allclose(routed_decoded, routed, rtol=0, atol=1e-4)

    if importlib.util.find_spec("torch"):
        make = runpy.run_path(str(families.GOLDEN.parent / "make.py"))["make_family"]
        live = make(name, tmp_path / "live")
        params = load_base(str(tmp_path / "live"), "float32").params
        jax.tree.map(np.testing.assert_array_equal, params, base.params)
        np.testing.assert_allclose(whole, live["logits"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(decoded, live["decoded"], rtol=0, atol=1e-4)


def test_every_family_is_compared():
    assert families.FAMILIES.keys() == FAMILIES.keys()


def test_layers_of_a_spec_have_the_kinds_of_its_pattern():
    scaling = RopeScaling(8.0)
    spec = ModelSpec(
        vocab_size=8,
        embed_dim=8,
        num_layers=5,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        mlp_dim=8,
        rope_theta=100.0,
        norm_eps=1e-5,
        tie_embeddings=True,
        max_positions=16,
        family="gemma3_text",
        pattern=("local", "global", "unrotated"),
        window=3,
        local_rope_theta=10.0,
        rope_scaling=scaling,
    )
    assert spec.layer_kinds == ((3, 10.0, None), (None, 100.0, scaling), (None, None, None))
    assert spec.kind_of_layer == (0, 1, 2, 0, 1)


def test_the_shortest_pattern_that_gives_the_layers():
    assert shortest_pattern(("local",) * 4) == ("local",)
    alternating = ("local", "global") * 3
    assert shortest_pattern(alternating) == ("local", "global")
    assert shortest_pattern(alternating[:5]) == ("local", "global")
    irregular = ("global", "global", "local")
    assert shortest_pattern(irregular) == irregular
