"""GGUF: the embedded file's tokenizer against `transformers`, and small files written here."""

import importlib.util
import json
import runpy
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest

from safemoe_jax.errors import UserError
from safemoe_jax.model.spec import ModelSpec
from safemoe_jax.weights.gguf import NAMES, PRE_TOKENIZERS, load
from safemoe_jax.weights.layout import leaf_shapes

GOLDEN = Path(__file__).parent.parent / "golden"
SPEC = ModelSpec(
    vocab_size=6,
    embed_dim=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_dim=3,
    rope_theta=20_000.0,
    norm_eps=1e-5,
    tie_embeddings=False,
    max_positions=32,
)
TOKENS = ["<end>", "a", "b", "1", "\u0120", "ab"]


def write(path, *, without=(), change=None, pre="smollm", architecture="llama"):
    """A GGUF file of `SPEC` with random weights; returns them by tensor name, [out, in]."""
    rng = np.random.default_rng(0)
    tensors = {}
    for leaf, shape in leaf_shapes(SPEC).items():
        layers = range(shape[0]) if leaf.startswith("layers/") else [None]
        for layer in layers:
            own = shape if layer is None else shape[1:]
            tensors[NAMES[leaf].format(layer)] = rng.normal(size=own).astype(np.float32)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(SPEC.num_layers)
    writer.add_context_length(SPEC.max_positions)
    writer.add_embedding_length(SPEC.embed_dim)
    writer.add_feed_forward_length(SPEC.mlp_dim)
    writer.add_head_count(SPEC.num_heads)
    writer.add_head_count_kv(SPEC.num_kv_heads)
    writer.add_rope_freq_base(SPEC.rope_theta)
    writer.add_layer_norm_rms_eps(SPEC.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * 5)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(True)
    for name, tensor in (tensors | (change or {})).items():
        if name not in without:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_every_tensor_lands_in_its_leaf(tmp_path):
    tensors = write(tmp_path / "x.gguf")
    checkpoint = load(tmp_path / "x.gguf", "float32")
    assert checkpoint.spec.rope_theta == SPEC.rope_theta
    np.testing.assert_allclose(checkpoint.spec.norm_eps, SPEC.norm_eps, rtol=1e-6)
    assert not checkpoint.spec.tie_embeddings
    params = checkpoint.params
    np.testing.assert_array_equal(params["embed"]["embedding"], tensors["token_embd.weight"])
    np.testing.assert_array_equal(params["head"]["kernel"], tensors["output.weight"])
    np.testing.assert_array_equal(params["final_norm"]["scale"], tensors["output_norm.weight"])
    layers = params["layers"]
    for i in range(2):
        np.testing.assert_array_equal(
            layers["mlp"]["down"]["kernel"][i], tensors[f"blk.{i}.ffn_down.weight"]
        )
        # ggml keeps rotated pairs side by side; "rotate half" keeps firsts, then seconds.
        order = [0, 2, 1, 3, 4, 6, 5, 7]
        q = tensors[f"blk.{i}.attn_q.weight"]
        np.testing.assert_array_equal(layers["attention"]["q"]["kernel"][i], q[order])
        k = tensors[f"blk.{i}.attn_k.weight"]
        np.testing.assert_array_equal(layers["attention"]["k"]["kernel"][i], k[order[:4]])
        v = tensors[f"blk.{i}.attn_v.weight"]
        np.testing.assert_array_equal(layers["attention"]["v"]["kernel"][i], v)


def test_absent_output_means_a_tied_head(tmp_path):
    write(tmp_path / "x.gguf", without=("output.weight",))
    checkpoint = load(tmp_path / "x.gguf", "bfloat16")
    assert checkpoint.spec.tie_embeddings
    assert "head" not in checkpoint.params
    assert checkpoint.params["embed"]["embedding"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"without": ("blk.1.attn_v.weight",)}, r"lacks tensor blk\.1\.attn_v\.weight"),
        ({"change": {"rope_freqs.weight": np.ones(2, np.float32)}}, "rope_freqs.weight has no pl"),
        (
            {"change": {"blk.0.ffn_up.weight": np.ones((2, 8), np.float32)}},
            r"blk\.0\.ffn_up\.weight gives layers/mlp/up/kernel the shape \(2, 8\)",
        ),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken' is not supported"),
        ({"architecture": "qwen2"}, "architecture 'qwen2' is not supported"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, message):
    write(tmp_path / "x.gguf", **changes)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "x.gguf", "float32")


def test_another_file_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"no model at all, but long enough")
    with pytest.raises(UserError, match="cannot be read as GGUF"):
        load(tmp_path / "x.gguf", "float32")


def test_small_tokenizer_cuts_digits_and_adds_its_beginning(tmp_path):
    write(tmp_path / "x.gguf")
    tokenizer = load(tmp_path / "x.gguf", "float32").tokenizer
    assert tokenizer("ab 1<end>")["input_ids"] == [0, 5, 4, 3, 0]
    assert tokenizer("ab 1", add_special_tokens=False)["input_ids"] == [5, 4, 3]
    assert tokenizer.model_max_length == SPEC.max_positions
    assert "smollm" in PRE_TOKENIZERS


def test_smollm2_ids_equal_those_of_transformers(smollm, smollm_path):
    texts = json.loads((GOLDEN / "texts.json").read_text(encoding="utf-8"))
    golden = json.loads((GOLDEN / "ids.json").read_text())
    found = [smollm.tokenizer(text)["input_ids"] for text in texts]
    assert found == golden
    for text, ids in zip(texts, found, strict=True):
        assert smollm.tokenizer.decode(ids) == text
    if importlib.util.find_spec("torch"):
        reference = runpy.run_path(str(GOLDEN / "make.py"))["gguf_tokenizer"](smollm_path)
        assert found == [reference.encode(text).ids for text in texts]


def test_smollm2_as_its_file_describes_it(smollm):
    tokenizer = smollm.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (2, 0)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert smollm.identity.license == "apache-2.0"
    assert smollm.spec.num_kv_heads == 3
    assert smollm.params["layers"]["attention"]["k"]["kernel"].shape == (30, 192, 576)
