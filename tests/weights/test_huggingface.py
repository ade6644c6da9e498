"""Hugging Face directories that are broken, each in one way; parity is in tests/model."""

import dataclasses
import json
import shutil

import families
import jax
import numpy as np
import pytest
import safetensors.numpy
from transformers import AutoConfig

from safemoe_jax.errors import UserError
from safemoe_jax.model.spec import FAMILIES
from safemoe_jax.weights.huggingface import load, read_spec, save


def change_config(directory, **changes):
    path = directory / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: x for key, x in values.items() if x is not ...}))


def change_weights(directory, change):
    path = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def test_spec_reads_both_styles_of_rope_theta(small):
    change_config(small, rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    assert read_spec(small / "config.json").rope_theta == 7.0
    change_config(small, rope_parameters=..., rope_theta=9.0)
    assert read_spec(small / "config.json").rope_theta == 9.0


def test_spec_takes_the_formats_defaults(small):
    change_config(small, head_dim=..., num_key_value_heads=..., tie_word_embeddings=False)
    spec = read_spec(small / "config.json")
    assert (spec.head_dim, spec.num_kv_heads, spec.tie_embeddings) == (4, 4, False)
    change_config(small, head_dim=8, num_key_value_heads=2)
    spec = read_spec(small / "config.json")
    assert (spec.head_dim, spec.num_kv_heads) == (8, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel'"),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 10_000.0,
                    "factor": 2.0,
                    "original_max_position_embeddings": 32,
                }
            },
            "rope_scaling 'yarn'",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"hidden_size": "wide"}, r"config\.json cannot be read \(.*hidden_size"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\.\S+ has no place"),
        ({"num_hidden_layers": 3}, r"lacks tensor model\.layers\.2"),
        ({"tie_word_embeddings": False}, "lacks tensor lm_head.weight"),
        ({"intermediate_size": 31}, r"mlp\.gate_proj\.weight gives .* \(32, 16\); the config says"),
    ],
)
def test_config_that_does_not_fit_is_named(small, changes, message):
    change_config(small, **changes)
    with pytest.raises(UserError, match=message):
        load(small)


def test_tensor_without_a_place_is_named(small):
    change_weights(small, lambda x: x.update({"model.layers.0.mlp.extra.weight": np.ones(2)}))
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.extra\.weight has no place"):
        load(small)


def test_what_transformers_passes_over_is_passed_over(small):
    extra = {"lm_head.weight": np.ones((48, 16)), "model.rotary_emb.inv_freq": np.ones(2)}
    expected = load(small).weights.read(np.float32)["embed"]["embedding"]
    change_weights(small, lambda x: x.update(extra))
    params = load(small).weights.read(np.float32)
    np.testing.assert_array_equal(params["embed"]["embedding"], expected)
    assert "head" not in params


def test_missing_files_are_named(small):
    shutil.move(small / "tokenizer.json", small / "elsewhere")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load(small)
    (small / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors; .*pickled weights are not read"):
        load(small)
    (small / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        load(small)


def test_broken_file_and_wandering_index_are_refused(small):
    (small / "model.safetensors").write_bytes(b"no tensors here, none at all")
    with pytest.raises(UserError, match="broken safetensors"):
        load(small)
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (small / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"'\.\./model\.safetensors', which lies outside"):
        load(small)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_base_is_read_as_it_was(name, tmp_path):
    directory = families.write(name, tmp_path / "first")
    first = load(directory)
    params = first.weights.read(np.float32)
    (tmp_path / "second").mkdir()
    save(tmp_path / "second", first.spec, params, first.tokenizer, ends=[0])
    second = load(tmp_path / "second")
    assert second.spec == first.spec
    jax.tree.map(np.testing.assert_array_equal, second.weights.read(np.float32), params)
    found = safetensors.numpy.load_file(tmp_path / "second" / "model.safetensors")
    expected = safetensors.numpy.load_file(directory / "model.safetensors")
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    config = AutoConfig.from_pretrained(tmp_path / "second").to_dict()
    given = AutoConfig.from_pretrained(directory).to_dict()
    # The layers are given one by one, and the special tokens are the tokenizer's.
    others = {"max_window_layers", "no_rope_layer_interval", "_name_or_path"}
    others |= {f"{role}_token_id" for role in ("bos", "eos", "pad")}
    assert {key for key in given if config[key] != given[key]} <= others


def test_what_a_config_cannot_say_is_not_saved(small, tmp_path):
    base = load(small)
    spec = dataclasses.replace(base.spec, logit_softcap=30.0)  # Llama's config has no such key
    with pytest.raises(UserError, match=r"transformers 5\.\S+ writes a config of .*30\.0"):
        save(tmp_path, spec, base.weights.read(np.float32), base.tokenizer, ends=[0])
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma2", {"sliding_window": None}, "window is None, no whole number from 1"),
        ("gemma2", {"sliding_window": -5}, "window is -5, no whole number from 1"),
        ("gemma2", {"final_logit_softcapping": -1.0}, "logit_softcap is -1.0, no number above 0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_act 'gelu'"),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window True"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "has 'chunked_attention', which"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        (
            "phi3",
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10_000.0,
                    "partial_rotary_factor": 0.5,
                }
            },
            "partial_rotary_factor 0.5",
        ),
        (
            "phi3",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 10_000.0,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                }
            },
            "rope_scaling 'longrope'",
        ),
        ("gemma3_text", {"architectures": ["Gemma3ForConditionalGeneration"]}, "'Gemma3ForCond"),
    ],
)
def test_what_a_family_can_be_and_is_not_modelled_is_named(name, changes, message, tmp_path):
    directory = families.write(name, tmp_path / "base")
    change_config(directory, **changes)
    with pytest.raises(UserError, match=message):
        load(directory)


def test_license_comes_from_the_model_card(small):
    assert load(small).license == "unknown"
    (small / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert load(small).license == "mit"
    other = "---\nlicense: other\nlicense_name: qwen-research\n---\n# A model\n"
    (small / "README.md").write_text(other)
    assert load(small).license == "qwen-research"
    (small / "README.md").write_text(other.replace("license_name: qwen-research\n", ""))
    assert load(small).license == "other"
    (small / "README.md").write_text("---\nlicense: [mit\n---\n# A model\n")
    with pytest.raises(UserError, match=r"README\.md has metadata that cannot be read \(while"):
        load(small)
