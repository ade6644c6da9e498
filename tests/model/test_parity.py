"""Logits against `transformers`: golden values always, the library itself where torch is there."""

import importlib.util
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from safemoe_jax.config import ExpertsConfig, RouterConfig
from safemoe_jax.model.transformer import Transformer, logits
from safemoe_jax.weights.base import fetch_base, load_base

GOLDEN = Path(__file__).parent.parent / "golden"
HAS_TORCH = importlib.util.find_spec("torch") is not None


def live(function, *args):
    """The value that tests/golden/make.py computes with torch now."""
    return runpy.run_path(str(GOLDEN / "make.py"))[function](*args)


def base_logits(source, tokens):
    """float32 logits [T, V] of the base alone."""
    base = load_base(source, "float32")
    model = Transformer(
        base.spec,
        ExpertsConfig(targets=("q",), rank=1, alpha=1.0),
        RouterConfig("layer", "token", "signed", top_k=0, temperature=1.0),
        num_experts=1,
    )

    @jax.jit
    def forward(params, tokens_BT):
        positions_BT = np.arange(tokens_BT.shape[1])[None]
        one_segment_BT = np.ones(tokens_BT.shape, np.int32)
        out = model.apply(
            {"params": params}, tokens_BT, positions_BT, one_segment_BT, one_segment_BT, None
        )
        return logits(out.hidden_BTD, out.head)

    return np.asarray(forward(base.params, tokens[None]))[0]


@pytest.mark.parametrize("name", ["gqa_tied", "untied_theta", "wide_heads_sharded_bfloat16"])
def test_small_random_models(name):
    golden = np.load(GOLDEN / name / "golden.npz")
    found = base_logits(str(GOLDEN / name), golden["tokens"])
    assert np.ptp(golden["logits"]) > 1.0
    np.testing.assert_allclose(found, golden["logits"], rtol=0, atol=1e-4)
    if HAS_TORCH:
        expected = live("directory_logits", GOLDEN / name, golden["tokens"])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_smollm2_over_512_tokens():
    golden = np.load(GOLDEN / "smollm2.npz")
    assert golden["tokens"].shape == (512,)
    found = base_logits("smollm2-135m-instruct", golden["tokens"])
    np.testing.assert_allclose(found[:, golden["columns"]], golden["logits"], rtol=0, atol=2e-3)
    total = jax.nn.logsumexp(found, axis=-1)
    np.testing.assert_allclose(total, golden["logsumexp"], rtol=0, atol=2e-3)
    if HAS_TORCH:
        expected = live("gguf_logits", fetch_base("smollm2-135m-instruct"), golden["tokens"])
        assert np.abs(found - expected).max() <= 2e-3
