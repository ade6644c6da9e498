"""Hugging Face directories that are broken, each in one way; parity is in tests/model."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from safemoe_jax.errors import UserError
from safemoe_jax.weights.huggingface import load, read_spec


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
            {"rope_parameters": ..., "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_scaling 'linear'",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\.\S+ has no place"),
        ({"num_hidden_layers": 3}, r"lacks tensor model\.layers\.2"),
        ({"tie_word_embeddings": False}, "lacks tensor lm_head.weight"),
        ({"intermediate_size": 31}, r"mlp\.gate_proj\.weight gives .* \(32, 16\); the config says"),
    ],
)
def test_config_that_does_not_fit_is_named(small, changes, message):
    change_config(small, **changes)
    with pytest.raises(UserError, match=message):
        load(small, "float32")


def test_tensor_without_a_place_is_named(small):
    change_weights(small, lambda x: x.update({"model.layers.0.mlp.extra.weight": np.ones(2)}))
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.extra\.weight has no place"):
        load(small, "float32")


def test_what_transformers_passes_over_is_passed_over(small):
    extra = {"lm_head.weight": np.ones((48, 16)), "model.rotary_emb.inv_freq": np.ones(2)}
    expected = load(small, "float32").params["embed"]["embedding"]
    change_weights(small, lambda x: x.update(extra))
    params = load(small, "float32").params
    np.testing.assert_array_equal(params["embed"]["embedding"], expected)
    assert "head" not in params


def test_missing_files_are_named(small):
    shutil.move(small / "tokenizer.json", small / "elsewhere")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load(small, "float32")
    (small / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors; .*pickled weights are not read"):
        load(small, "float32")
    (small / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        load(small, "float32")


def test_broken_file_and_wandering_index_are_refused(small):
    (small / "model.safetensors").write_bytes(b"no tensors here, none at all")
    with pytest.raises(UserError, match="broken safetensors"):
        load(small, "float32")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (small / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"'\.\./model\.safetensors', which lies outside"):
        load(small, "float32")


def test_license_comes_from_the_model_card(small):
    assert load(small, "float32").license == "unknown"
    (small / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert load(small, "float32").license == "mit"
    (small / "README.md").write_text("---\nlicense: [mit\n---\n# A model\n")
    with pytest.raises(UserError, match=r"README\.md has metadata that cannot be read \(while"):
        load(small, "float32")
