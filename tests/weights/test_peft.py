"""Adapters in PEFT's format, held to the update that they stand for, and to PEFT where it is there.

The files are written here, tensor by tensor; `peft.PeftModel.from_pretrained` reads the same ones.
"""

import importlib
import importlib.util
import json
import math
from pathlib import Path

import families
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from toys import toy_variables

from safemoe_jax.config import ExpertsConfig, RouterConfig
from safemoe_jax.errors import UserError
from safemoe_jax.model.lora import Gates, Routing
from safemoe_jax.model.transformer import Transformer, logits
from safemoe_jax.weights.base import load_base
from safemoe_jax.weights.peft import PATHS, read_adapter, stack, write_adapter

GOLDEN = Path(__file__).parent.parent / "golden"
BASE = GOLDEN / "gqa_tied"
HAS_PEFT = all(importlib.util.find_spec(name) for name in ("torch", "peft"))
TOKENS = np.random.default_rng(0).integers(48, size=24)
WIDTHS = {"q": (16, 16), "k": (16, 8), "v": (16, 8), "o": (16, 16), "gate": (16, 32)}
WIDTHS |= {"up": (16, 32), "down": (32, 16)}  # of BASE, [D, O]


def peft_logits(*args):
    """What PEFT computes now."""
    return importlib.import_module("peft_reference").logits(*args)


@pytest.fixture(scope="module")
def base():
    return load_base(str(BASE), "float32")


def our_logits(base, params, experts, config: ExpertsConfig, routing: Routing):
    """float32 logits [T, V]."""
    count = next(iter(jax.tree.leaves(experts))).shape[1] if experts else 1
    router = RouterConfig("layer", "token", "signed", top_k=0, temperature=1.0)
    model = Transformer(base.spec, config, router, count)

    @jax.jit
    def forward(variables):
        tokens_BT = TOKENS[None]
        positions_BT, ones_BT = np.arange(len(TOKENS))[None], np.ones_like(tokens_BT)
        out = model.apply(variables, tokens_BT, positions_BT, ones_BT, ones_BT, routing)
        return logits(out.hidden_BTD, out.head)

    return np.asarray(forward({"params": params, "experts": experts}))[0]


def module(target: str, layer: int) -> str:
    part = "self_attn" if target in "qkvo" else "mlp"
    return f"model.layers.{layer}.{part}.{target}_proj"


def write(directory, ranks, *, seed=0, dtype=np.float32, **config):
    """An adapter with these ranks by (target, layer), and a config that says them alike."""
    rng, tensors = np.random.default_rng(seed), {}
    for (target, layer), rank in ranks.items():
        width, features = WIDTHS[target]
        for letter, shape in (("A", (rank, width)), ("B", (features, rank))):
            name = f"base_model.model.{module(target, layer)}.lora_{letter}.weight"
            tensors[name] = (0.3 * rng.normal(size=shape)).astype(dtype)
    directory.mkdir()
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "someone/llama",
        "r": next(iter(ranks.values())),
        "lora_alpha": 8,
        "target_modules": sorted({f"{target}_proj" for target, _ in ranks}),
    }
    (directory / "adapter_config.json").write_text(json.dumps(values | config))
    return directory


def everywhere(targets, rank):
    return {(target, layer): rank for target in targets for layer in range(2)}


def updated(base, directory, scales):
    """The base's parameters with scale * (B A)^T added by hand, `scales` by (target, layer)."""
    tensors = safetensors.numpy.load_file(directory / "adapter_model.safetensors")
    params = jax.tree.map(np.copy, base.params)
    for (target, layer), scale in scales.items():
        a_RD, b_OR = (
            tensors[f"base_model.model.{module(target, layer)}.lora_{letter}.weight"]
            for letter in "AB"
        )
        group = params["layers"]["attention" if target in "qkvo" else "mlp"]
        group[target]["kernel"][layer] += scale * (b_OR @ a_RD)
    return params


# In each case: the ranks in the file, the config's fields, and the scale that PEFT gives them.
READ = {
    "every target": (everywhere(PATHS, 3), {}, 8 / 3),
    "all-linear": (everywhere(PATHS, 3), {"target_modules": "all-linear"}, 8 / 3),
    "rslora": (everywhere("qv", 4), {"use_rslora": True}, 8 / 2),
    "a pattern": (
        {("q", 1): 2, ("v", 1): 2},
        {"target_modules": r".*\.1\.self_attn\.(q|v)_proj"},
        8 / 2,
    ),
    "one layer": ({("down", 1): 2}, {"layers_to_transform": [1]}, 8 / 2),
    "one layer, as a number": (
        {("q", 0): 2},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        8 / 2,
    ),
    "a module left out": ({("q", 0): 2}, {"exclude_modules": ["layers.1.self_attn.q_proj"]}, 4.0),
    "a whole name": ({("up", 1): 2}, {"target_modules": [module("up", 1)]}, 4.0),
    "ranks and alphas by pattern": (
        {("q", 0): 2, ("q", 1): 2, ("v", 0): 5, ("v", 1): 4},
        {
            "rank_pattern": {r"layers\.0.*v_proj": 5, "v_proj": 4},
            "alpha_pattern": {"v_proj": 3.0, "1.self_attn.q_proj": 7},
        },
        {("q", 0): 8 / 2, ("q", 1): 7 / 2, ("v", 0): 3 / 5, ("v", 1): 3 / 4},
    ),
    "bfloat16, gaussian, fan_in_fan_out": (
        everywhere("o", 2),
        {
            "dtype": ml_dtypes.bfloat16,
            "init_lora_weights": "gaussian",
            "lora_dropout": 0.5,
            "fan_in_fan_out": True,
        },
        4.0,
    ),
}


@pytest.mark.parametrize("case", READ)
@pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to True"
)  # PEFT says that it turns it off
def test_an_adapter_is_the_update_that_peft_makes_of_it(tmp_path, base, case):
    ranks, fields, scales = READ[case]
    directory = write(tmp_path / "adapter", ranks, **fields)
    adapter = read_adapter(directory, base.spec)
    assert adapter.updates.keys() == ranks.keys()
    scales = scales if isinstance(scales, dict) else dict.fromkeys(ranks, scales)
    for place, update in adapter.updates.items():
        assert update.scale == pytest.approx(scales[place], rel=1e-12)
        assert update.a_DR.shape[1] == ranks[place]
    config, experts = stack([adapter], base.spec)
    found = our_logits(base, base.params, experts, config, Gates(np.ones(1, np.float32)))
    without = our_logits(base, base.params, {}, config, None)
    assert np.abs(found - without).max() > 0.1
    if "dtype" not in fields:
        params = updated(base, directory, scales)
        by_hand = our_logits(base, params, {}, config, None)
        np.testing.assert_allclose(found, by_hand, rtol=0, atol=1e-4)
    if HAS_PEFT:
        expected = peft_logits(BASE, directory, TOKENS)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_adapters_of_other_ranks_alphas_and_targets_stand_side_by_side(tmp_path, base):
    """And what fills the smaller ones up is zero on both sides: it adds and would learn nothing."""
    directories = [
        write(tmp_path / "a", everywhere("qk", 2), seed=1),
        write(tmp_path / "b", everywhere(("v", "down"), 5), seed=2, lora_alpha=3.0),
        write(tmp_path / "c", everywhere("q", 4), seed=3, use_rslora=True),
    ]
    adapters = [read_adapter(directory, base.spec) for directory in directories]
    config, experts = stack(adapters, base.spec)
    assert config == ExpertsConfig(("q", "k", "v", "down"), rank=5, alpha=5.0)
    leaves = flatten_dict(experts, sep="/")
    a_LEDR, b_LERO = (leaves[f"layers/attention/q/{x}"] for x in "ab")
    assert np.abs(a_LEDR[:, 0, :, :2]).min() > 0
    for leaf in (a_LEDR[:, 0, :, 2:], b_LERO[:, 0, 2:], a_LEDR[:, 1], b_LERO[:, 1]):
        assert not leaf.any()
    scales = [8 / 2, 3 / 5, 8 / 2]
    for index, directory in enumerate(directories):
        gates = Gates(np.eye(3, dtype=np.float32)[index])
        found = our_logits(base, base.params, experts, config, gates)
        params = updated(base, directory, dict.fromkeys(adapters[index].updates, scales[index]))
        by_hand = our_logits(base, params, {}, config, None)
        np.testing.assert_allclose(found, by_hand, rtol=0, atol=1e-4)
        if HAS_PEFT:
            expected = peft_logits(BASE, directory, TOKENS)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_common_scale_stays_where_it_is(tmp_path, base):
    adapters = [
        read_adapter(write(tmp_path / "a", everywhere("q", 2)), base.spec),
        read_adapter(write(tmp_path / "b", everywhere("q", 4), lora_alpha=16), base.spec),
    ]
    config, experts = stack(adapters, base.spec)
    assert config == ExpertsConfig(("q",), rank=4, alpha=16.0)
    b_LERO = experts["layers"]["attention"]["q"]["b"]
    np.testing.assert_array_equal(b_LERO[1, 0, :2], adapters[0].updates["q", 1].b_RO)


@pytest.mark.parametrize("targets", [tuple(PATHS), ("v", "down")])
def test_an_expert_goes_out_as_plain_lora_and_comes_back_to_the_bit(tmp_path, base, targets):
    """One expert with its gate at 1 is what PEFT makes of the same weights."""
    config = ExpertsConfig(targets, rank=3, alpha=7.5)
    drawn = [
        read_adapter(
            write(tmp_path / name, everywhere(targets, 3), seed=seed, lora_alpha=7.5), base.spec
        )
        for seed, name in enumerate(("x", "y"))
    ]
    stacked, experts = stack(drawn, base.spec)
    assert stacked == config
    again = []
    for index in range(2):
        directory = tmp_path / f"out{index}"
        directory.mkdir()
        write_adapter(directory, experts, index, config, base.spec, "someone/llama")
        gates = Gates(np.eye(2, dtype=np.float32)[index])
        found = our_logits(base, base.params, experts, config, gates)
        if HAS_PEFT:
            expected = peft_logits(BASE, directory, TOKENS)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
        again.append(read_adapter(directory, base.spec))
    restacked, returned = stack(again, base.spec)
    assert restacked == config
    jax.tree.map(np.testing.assert_array_equal, returned, experts)


@pytest.fixture
def fused(tmp_path):
    """A base that keeps q, k and v in one tensor, and gate and up."""
    return load_base(str(families.write("phi3", tmp_path / "fused")), "float32")


def test_an_adapter_of_fused_projections_is_one_of_each(tmp_path, fused):
    rng, rank = np.random.default_rng(0), 3
    name = "base_model.model.model.layers.{}.self_attn.qkv_proj.lora_{}.weight"
    shapes = {"A": (rank, 32), "B": (32 + 16 + 16, rank)}
    tensors = {
        name.format(layer, letter): rng.normal(size=shape).astype(np.float32)
        for layer in range(4)
        for letter, shape in shapes.items()
    }
    directory = tmp_path / "adapter"
    directory.mkdir()
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": ["qkv_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(values))
    updates = read_adapter(directory, fused.spec).updates
    assert updates.keys() == {(target, layer) for target in "qkv" for layer in range(4)}
    delta_OD = 2.0 * tensors[name.format(1, "B")] @ tensors[name.format(1, "A")]
    for target, rows in (("q", slice(0, 32)), ("k", slice(32, 48)), ("v", slice(48, 64))):
        a_DR, b_RO, scale = updates[target, 1]
        np.testing.assert_allclose(scale * (a_DR @ b_RO).T, delta_OD[rows], rtol=0, atol=1e-5)


def test_an_expert_of_fused_projections_goes_out_and_comes_back(tmp_path, fused):
    config = ExpertsConfig(("q", "v", "o", "up"), rank=2, alpha=3.0)
    router = RouterConfig("layer", "token", "signed", top_k=0, temperature=1.0)
    model = Transformer(fused.spec, config, router, 1)
    experts = jax.tree.map(np.asarray, toy_variables(model)["experts"])
    directory = tmp_path / "out"
    directory.mkdir()
    write_adapter(directory, experts, 0, config, fused.spec, "someone/phi")
    adapter, leaves = read_adapter(directory, fused.spec), flatten_dict(experts, sep="/")
    for (target, layer), (a_DR, b_RO, scale) in adapter.updates.items():
        expected = np.zeros((a_DR.shape[0], b_RO.shape[1]))
        if target in config.targets:
            a_LEDR, b_LERO = (leaves[f"{PATHS[target]}/{x}"] for x in "ab")
            expected = config.scale * a_LEDR[layer, 0] @ b_LERO[layer, 0]
        np.testing.assert_allclose(scale * a_DR @ b_RO, expected, rtol=0, atol=1e-5)
    if HAS_PEFT:
        found = our_logits(fused, fused.params, experts, config, Gates(np.ones(1, np.float32)))
        assert np.abs(found - our_logits(fused, fused.params, {}, config, None)).max() > 0.1
        expected = peft_logits(tmp_path / "fused", directory, TOKENS)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_what_peft_itself_saves_is_read(tmp_path, base):
    """All fields of its config at once; the golden one was saved by PEFT 0.21.2."""
    directory = write(tmp_path / "a", everywhere("qv", 4))
    (directory / "adapter_config.json").write_bytes((GOLDEN / "adapter_config.json").read_bytes())
    assert read_adapter(directory, base.spec).updates["q", 0].scale == 16 / math.sqrt(4)
    if HAS_PEFT:
        saved = tmp_path / "saved"
        importlib.import_module("peft_reference").save_adapter(
            BASE,
            saved,
            r=4,
            lora_alpha=16,
            target_modules=["q_proj", "v_proj"],
            use_rslora=True,
            lora_dropout=0.1,
        )
        config, experts = stack([read_adapter(saved, base.spec)], base.spec)
        np.testing.assert_allclose(
            our_logits(base, base.params, experts, config, Gates(np.ones(1, np.float32))),
            peft_logits(BASE, saved, TOKENS),
            rtol=0,
            atol=1e-4,
        )


def test_the_origin_is_written_down(tmp_path, base):
    directory = write(tmp_path / "a", everywhere("q", 2))
    origin = read_adapter(directory, base.spec).origin
    assert origin.license == "unknown"
    assert origin.base_model_name_or_path == "someone/llama"
    (directory / "README.md").write_text("---\nlicense: mit\n---\n# An adapter\n")
    again = read_adapter(directory, base.spec).origin
    assert (again.license, again.sha256) == ("mit", origin.sha256)
    write(tmp_path / "b", everywhere("q", 2), seed=1)
    assert read_adapter(tmp_path / "b", base.spec).origin.sha256 != origin.sha256


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora is True, which an expert cannot be exactly"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config is "),
        ({"layer_replication": [[0, 2]]}, "layer_replication is "),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is "),
        ({"target_parameters": ["x"]}, "target_parameters is "),
        ({"a_field_of_tomorrow": 0.5}, "a_field_of_tomorrow is 0.5"),
        ({"r": 0}, "r is 0 and lora_alpha 8 for model.layers.0"),
        ({"lora_alpha": "8"}, "r is 2 and lora_alpha '8' for"),
        ({"lora_alpha": -8}, "r is 2 and lora_alpha -8 for"),
        ({"lora_alpha": math.nan}, "r is 2 and lora_alpha nan for"),
        ({"lora_alpha": math.inf}, "r is 2 and lora_alpha inf for"),
        ({"lora_alpha": 10**400}, "r is 2 and lora_alpha 1000"),
        ({"use_rslora": "false"}, "use_rslora is 'false', which PEFT never writes"),
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern is \['q_proj'\]"),
        ({"alpha_pattern": "x"}, "alpha_pattern is 'x'"),
        ({"exclude_modules": 5}, "exclude_modules is 5"),
        ({"layers_to_transform": "0"}, "layers_to_transform is '0'"),
        ({"layers_to_transform": 1.5}, "layers_to_transform is 1.5"),
        ({"layers_to_transform": [0], "layers_pattern": 5}, "layers_pattern is 5"),
        ({"target_modules": 5}, "target_modules is 5, which PEFT never writes"),
        ({"target_modules": None}, "target_modules is None; it must name linear layers"),
        ({"target_modules": ["c_attn"]}, r"target_modules \['c_attn'\] names no linear layer"),
        ({"target_modules": "(q"}, "unterminated subpattern"),
        ({"target_modules": ["q_proj", "v_proj"]}, r"lacks \S+layers.0.self_attn.v_proj.lora_A"),
        ({"layers_to_transform": [0]}, r"holds \S+layers.1.self_attn.q_proj.lora_A.weight, which"),
        ({"r": 3}, r"q_proj.lora_A.weight is \[2, 16\]; its config and the base make it \[3, 16\]"),
    ],
)
def test_what_is_not_exact_is_refused_by_name(tmp_path, base, fields, message):
    directory = write(tmp_path / "a", everywhere("q", 2), **fields)
    with pytest.raises(UserError, match=message) as error:
        read_adapter(directory, base.spec)
    assert "\n" not in str(error.value)


def test_files_that_are_missing_broken_or_pickled(tmp_path, base):
    directory = write(tmp_path / "a", everywhere("q", 2))
    weights = directory / "adapter_model.safetensors"
    weights.write_bytes(b"no tensors here, none at all")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors cannot be read"):
        read_adapter(directory, base.spec)
    weights.unlink()
    with pytest.raises(UserError, match="give a directory that PEFT's save_pretrained wrote"):
        read_adapter(directory, base.spec)
    (directory / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"adapter_model\.bin is pickled .* safe_serialization=Tru"):
        read_adapter(directory, base.spec)
    config = directory / "adapter_config.json"
    values = json.loads(config.read_text())
    del values["r"]
    config.write_text(json.dumps(values))
    with pytest.raises(UserError, match="lacks 'r'"):
        read_adapter(directory, base.spec)
    for text, message in (("{", "is not JSON"), ("[]", "is not a JSON object")):
        config.write_text(text)
        with pytest.raises(UserError, match=message):
            read_adapter(directory, base.spec)
    config.unlink()
    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        read_adapter(directory, base.spec)
