"""The gated model for torch: what it holds, and that it says what ours says."""

import dataclasses
import functools
import importlib
import importlib.util
import json

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from toys import leaves_equal, toy_variables

from experiments import pyrit
from safemoe_jax import cli
from safemoe_jax.config import freeze
from safemoe_jax.inference.engine import decode_step, prefill
from safemoe_jax.model.lora import Routed
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.weights.base import load_base
from safemoe_jax.weights.bundle import read_bundle, write_bundle
from safemoe_jax.weights.portable import MODULE

HAS_TORCH = importlib.util.find_spec("torch") is not None
DOMAINS = ("cats", "dogs", "birds")
NEW_TOKENS = 24
LENGTHS = (9, 5)  # of two prompts; with windows of 6
TEMPLATE = "{% for message in messages %}{{ message['content'] }} w1 {% endfor %}"
# A family, what carries experts, and the router: each scope with each granularity, each activation,
# with and without top_k; fused projections, norms behind attention, windows, biases.
CASES = {
    "llama": (("q", "k", "v", "o", "gate", "up", "down"), "layer token signed 2 1.0"),
    "gemma2": (("q", "o", "down"), "layer sequence softmax_null 1 0.5"),
    "phi3": (("k", "gate"), "shared token sigmoid 0 1.0"),
    "qwen2": (("q", "up"), "shared sequence softmax 2 2.0"),
}


@pytest.fixture(scope="module", params=CASES)
def portable(request, tmp_path_factory):
    """A drawn bundle, its base and its export -> bundle, base, directory."""
    home = tmp_path_factory.mktemp(request.param)
    targets, router = CASES[request.param]
    families.write(request.param, home / "base")
    tokenizer = families.tokenizer(families.SIZES["vocab_size"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(home / "base")
    values = pyrit.get_config()
    values.model.source = str(home / "base")
    values.data.domains = DOMAINS
    values.experts.update(targets=targets, rank=2, alpha=1.0)
    scope, granularity, activation, top_k, temperature = router.split()
    values.router.update(
        scope=scope,
        granularity=granularity,
        activation=activation,
        top_k=int(top_k),
        temperature=float(temperature),
    )
    config = freeze(values)
    base = load_base(config.model.source, config.model.param_dtype)
    drawn = toy_variables(Transformer.from_config(config, base.spec))
    trained = {name: drawn[name] for name in ("experts", "router")}
    provenance = {"corpus": "none"}
    write_bundle(home / "bundle", base=base, config=config, **trained, provenance=provenance)
    where = ("--bundle", str(home / "bundle"), "--out", str(home / "out"))
    assert cli.main(["export", *where, "--format", "transformers", "--allow-ungated"]) == 0
    return read_bundle(home / "bundle", base), base, home / "out"


@functools.partial(jax.jit, static_argnums=0)
def our_answers(model, variables, tokens_BT, length_B):
    """Greedy, with the cache -> tokens [T, B], logits [T, B, V], gates [T, L, B, E]."""

    def step(state, _):
        cache, logits_BV = state
        token_B = logits_BV.argmax(axis=-1)
        *after, gates_LBE = decode_step(model, variables, Routed(), token_B, cache)
        return tuple(after), (token_B, logits_BV, gates_LBE)

    cache = model.empty_cache(len(LENGTHS), max(LENGTHS) + NEW_TOKENS)
    start = prefill(model, variables, Routed(), tokens_BT, length_B, cache)
    return jax.lax.scan(step, start, length=NEW_TOKENS)[1]


def test_a_portable_model_is_the_bundle_and_says_the_same(portable):
    bundle, base, out = portable
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {name for name in files if not name.startswith("base/")} == {
        *("README.md", "manifest.json", "safemoe.json", "safemoe.safetensors", "safemoe_torch.py")
    }
    assert (out / "safemoe_torch.py").read_bytes() == MODULE.read_bytes()
    assert leaves_equal(load_base(str(out / "base"), "float32").params, base.params)
    settings = json.loads((out / "safemoe.json").read_text())
    assert settings == {
        "domains": list(DOMAINS),
        "scale": 0.5,
        "router": dataclasses.asdict(bundle.config.router),
    }
    tensors = safetensors.numpy.load_file(out / "safemoe.safetensors")
    leaves = jax.tree.leaves(bundle.router)  # bias, kernel
    np.testing.assert_array_equal(tensors["router.bias"], leaves[0])
    np.testing.assert_array_equal(tensors["router.kernel"], leaves[1])
    experts = {name for name in tensors if name.startswith("model.layers.0.")}
    assert len(experts) == 2 * len(bundle.config.experts.targets)
    if HAS_TORCH:
        check_answers(bundle, base, out)


def check_answers(bundle, base, out):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, base.spec.vocab_size, n).tolist() for n in LENGTHS]
    tokens_BT = np.zeros((len(prompts), max(LENGTHS)), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    model = Transformer.from_config(bundle.config, base.spec)
    trained = {"experts": bundle.experts, "router": bundle.router}
    variables = jax.tree.map(jnp.asarray, {"params": base.params, **trained})
    tokens_TB, logits_TBV, gates_TLBE = our_answers(model, variables, tokens_BT, np.array(LENGTHS))
    reference = importlib.import_module("portable_reference")
    tokens_BT, logits_BTV, gates_LBE = reference.generate(out, prompts, NEW_TOKENS)
    np.testing.assert_array_equal(tokens_BT, tokens_TB.T)
    assert np.ptp(logits_BTV) > 1.0
    np.testing.assert_allclose(logits_BTV, logits_TBV.swapaxes(0, 1), rtol=0, atol=1e-4)
    np.testing.assert_allclose(gates_LBE, gates_TLBE[-2], rtol=0, atol=1e-4)
    if bundle.config.router.granularity == "sequence":
        with pytest.raises(ValueError, match="3 tokens follow 2 in the cache; this router"):
            reference.read_in_parts(out, [prompts[0][:2], prompts[0][2:5]])
    added = out / "base" / "adapter_config.json"
    added.write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not of this export"):
        reference.module(out).load(out)
    added.unlink()
    settings = out / "safemoe.json"
    settings.write_text(settings.read_text().replace("0.5", "5.0"))
    with pytest.raises(ValueError, match=r"safemoe\.json was changed since its export; copy"):
        reference.module(out).load(out)
