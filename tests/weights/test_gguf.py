"""GGUF: small files of every family and type of block, and the embedded one."""

import dataclasses
import importlib.util
import json
import runpy
import struct
from pathlib import Path

import families
import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from gguf_files import BYTES, add_words, convert

from safemoe_jax.errors import UserError
from safemoe_jax.model.spec import FAMILIES
from safemoe_jax.weights import huggingface
from safemoe_jax.weights.gguf import NAMES, load, read_spec

GOLDEN = Path(__file__).parent.parent / "golden"

# What GGUF files do not say is as in published models.
PUBLISHED = {
    "llama": {
        "rope_parameters": families.LLAMA3
        | {"rope_theta": 500_000.0, "original_max_position_embeddings": 8192}
    },
    "qwen2": {"use_sliding_window": False, "sliding_window": None, "layer_types": None},
    "gemma2": {"query_pre_attn_scalar": 12},
    "gemma3_text": {"query_pre_attn_scalar": 12, "layer_types": None},
    "smollm3": {"no_rope_layers": None, "no_rope_layer_interval": 4, "layer_types": None},
}


def small(name, directory):
    """A family's small model as GGUF says it, in a Hugging Face directory."""
    families.write(name, directory)
    path = directory / "config.json"
    values = json.loads(path.read_text()) | PUBLISHED.get(name, {})
    path.write_text(json.dumps({key: x for key, x in values.items() if x is not None}))
    return directory


def leaves(checkpoint, dtype="float32"):
    return flatten_dict(checkpoint.weights.read(dtype), sep="/")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_the_same_from_gguf(name, tmp_path):
    directory, path = small(name, tmp_path / "huggingface"), tmp_path / "x.gguf"
    convert(directory, path)
    expected, found = huggingface.load(directory), load(path)
    # The format's numbers are float32.
    rounded = {
        key: pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
        for key, value in dataclasses.asdict(expected.spec).items()
    }
    assert dataclasses.asdict(found.spec) == rounded
    assert read_spec(path) == found.spec
    expected_leaves = leaves(expected)
    for leaf, values in leaves(found).items():
        np.testing.assert_allclose(values, expected_leaves.pop(leaf), rtol=0, atol=1e-6)
    assert not expected_leaves
    # Of these transformers knows no GGUF files.
    if importlib.util.find_spec("torch") and name not in ("mistral", "smollm3"):
        read = runpy.run_path(str(GOLDEN / "make.py"))["gguf_tensors"](path, directory)
        for tensor, values in families.weights(
            name, {k: list(v.shape) for k, v in read.items()}
        ).items():
            np.testing.assert_allclose(read[tensor], values, rtol=0, atol=1e-6)


@pytest.fixture
def llama(tmp_path):
    return small("llama", tmp_path / "llama")


def test_absent_output_means_a_tied_head(llama, tmp_path):
    convert(llama, tmp_path / "x.gguf")
    checkpoint = load(tmp_path / "x.gguf")
    assert checkpoint.spec.tie_embeddings
    params = checkpoint.weights.read("bfloat16")
    assert "head" not in params
    assert params["embed"]["embedding"].dtype == ml_dtypes.bfloat16


WIDE = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=1, head_dim=64)


@pytest.fixture
def wide(llama):
    """A base whose rows hold whole blocks of every type."""
    path = llama / "config.json"
    values = json.loads(path.read_text()) | WIDE
    path.write_text(json.dumps(values))
    golden = json.loads((families.GOLDEN / "llama.json").read_text())
    shapes = {
        name: [
            256 if size in (32, 48) and name != "model.embed_tokens.weight" else size
            for size in shape
        ]
        for name, shape in golden["shapes"].items()
        if "layers." not in name or "layers.0." in name
    }
    shapes["model.embed_tokens.weight"] = [48, 256]
    for which in "kv":
        shapes[f"model.layers.0.self_attn.{which}_proj.weight"] = [128, 256]
    drawn = families.weights("llama", shapes)
    safetensors.numpy.save_file(drawn, llama / "model.safetensors")
    return llama


# How a tensor rests, and the share of a row's largest weight that rounding may cost there.
TYPES = {
    "token_embd.weight": (gguf.GGMLQuantizationType.BF16, 2**-8),
    "blk.0.attn_q.weight": (gguf.GGMLQuantizationType.Q4_0, 1 / 7),
    "blk.0.attn_k.weight": (gguf.GGMLQuantizationType.Q4_1, 1 / 14),
    "blk.0.attn_v.weight": (gguf.GGMLQuantizationType.Q8_0, 1 / 127),
    "blk.0.attn_output.weight": (gguf.GGMLQuantizationType.F16, 2**-11),
    "blk.0.ffn_gate.weight": (gguf.GGMLQuantizationType.Q5_0, 1 / 15),
    "blk.0.ffn_up.weight": (gguf.GGMLQuantizationType.Q5_1, 1 / 30),
}


def test_types_that_the_package_can_write_come_back(wide, tmp_path):
    convert(wide, tmp_path / "x.gguf", stored=lambda name, _: TYPES.get(name, (None,))[0])
    kinds = {
        tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors
    }
    expected, found = leaves(huggingface.load(wide)), leaves(load(tmp_path / "x.gguf"))

    for leaf, name in NAMES.items():
        if leaf not in found:
            continue
        kind, share = TYPES.get(name.format(0), (gguf.GGMLQuantizationType.F32, 0.0))
        assert kinds[name.format(0)] == kind
        bound = share * np.abs(expected[leaf]).max(axis=-1, keepdims=True)
        assert (np.abs(found[leaf] - expected[leaf]) <= bound + 1e-6).all(), leaf


def k_block(kind, rng):
    """One random block of a type whose name ends in _K, and its 256 values by ggml's own layout."""
    scale, low = np.float16(rng.uniform(0.01, 0.1)), np.float16(rng.uniform(0.01, 0.1))
    if kind == "Q6_K":
        low_bits, high_bits = (
            rng.integers(0, 256, 128, np.uint8),
            rng.integers(0, 256, 64, np.uint8),
        )
        scales = rng.integers(-128, 128, 16).astype(np.int8)
        values = np.empty(256, np.float32)
        for half, i in np.ndindex(2, 32):  # 128 values each, in four groups of 32
            for group in range(4):
                byte = int(low_bits[64 * half + 32 * (group % 2) + i])
                four = byte >> 4 if group >= 2 else byte & 15
                two = int(high_bits[32 * half + i]) >> 2 * group & 3
                at = 128 * half + 32 * group + i
                values[at] = np.float32(scale) * scales[at // 16] * ((four | two << 4) - 32)
        return low_bits.tobytes() + high_bits.tobytes() + scales.tobytes() + scale.tobytes(), values
    packed, quants = rng.integers(0, 256, 12, np.uint8), rng.integers(0, 256, 128, np.uint8)
    fifth = rng.integers(0, 256, 32, np.uint8)
    values = np.empty(256, np.float32)
    for group in range(8):  # of 32 values; scales and minima have six bits
        if group < 4:
            s, m = packed[group] & 63, packed[group + 4] & 63
        else:
            s = (packed[group + 4] & 15) | packed[group - 4] >> 6 << 4
            m = packed[group + 4] >> 4 | packed[group] >> 6 << 4
        for i in range(32):
            quant = int(quants[32 * (group // 2) + i]) >> 4 * (group % 2) & 15
            if kind == "Q5_K":
                quant += (int(fifth[i]) >> group & 1) << 4
            values[32 * group + i] = np.float32(scale) * s * quant - np.float32(low) * m
    bits = fifth.tobytes() if kind == "Q5_K" else b""
    return scale.tobytes() + low.tobytes() + packed.tobytes() + bits + quants.tobytes(), values


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_types_that_only_others_write_are_read(kind, wide, tmp_path, monkeypatch):
    rng, blocks = np.random.default_rng(0), {}

    def quantize(values, of):
        if of.name != kind:
            return values
        made = [k_block(kind, rng) for _ in range(values.size // 256)]
        blocks["values"] = np.concatenate([one[1] for one in made]).reshape(values.shape)
        raw = np.frombuffer(b"".join(one[0] for one in made), np.uint8)
        return raw.reshape(len(values), -1)

    monkeypatch.setattr(gguf, "quantize", quantize)
    of = gguf.GGMLQuantizationType[kind]
    convert(
        wide,
        tmp_path / "x.gguf",
        stored=lambda name, _: of if name.endswith("ffn_down.weight") else None,
    )
    found = leaves(load(tmp_path / "x.gguf"))["layers/mlp/down/kernel"]
    np.testing.assert_allclose(found[0], blocks["values"], rtol=1e-5, atol=1e-5)


def rewritten(path, change):
    """The file with tensors and keys changed: `change` gets both as dicts."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    keys = {key: field.contents() for key, field in reader.fields.items()}
    change(tensors, keys)
    writer = gguf.GGUFWriter(path, keys["general.architecture"])
    for key, value in keys.items():
        if key.startswith(("GGUF.", "general.architecture", "tokenizer.")):
            continue
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](
            key, value
        )
    add_words(writer, keys.get("tokenizer.ggml.pre", "smollm"))
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, _: x.pop("blk.1.attn_v.weight"), r"lacks tensor blk\.1\.attn_v\.weight"),
        (lambda x, _: x.pop("token_embd.weight"), r"lacks tensor token_embd\.weight"),
        (
            lambda x, _: x.update({"rope_freqs.weight": np.ones(4, np.float32)}),
            r"rope_freqs\.weight lowers frequencies otherwise than Llama 3\.1 and 3\.2 do",
        ),
        (
            lambda x, _: x.update({"blk.0.attn_sinks.weight": np.ones(2, np.float32)}),
            r"blk\.0\.attn_sinks\.weight has no place in a llama base",
        ),
        (
            lambda x, _: x.update({"blk.0.ffn_up.weight": np.ones((2, 8), np.float32)}),
            r"blk\.0\.ffn_up\.weight gives layers/mlp/up/kernel the shape \(2, 8\)",
        ),
        (
            lambda _, x: x.update({"tokenizer.ggml.pre": "bloom"}),
            "pre-tokenizer 'bloom' is not supp",
        ),
        (
            lambda _, x: x.update({"general.architecture": "gpt2"}),
            "architecture 'gpt2' is not support",
        ),
        (lambda _, x: x.update({"llama.rope.scaling.type": "yarn"}), "rope scaling 'yarn' is not"),
        (lambda _, x: x.update({"llama.rope.dimension_count": 4}), "4 of 8 head dims are rotated"),
        (lambda _, x: x.pop("llama.context_length"), "lacks the metadata 'llama.context_length'"),
    ],
)
def test_what_does_not_fit_is_named(llama, tmp_path, change, message):
    convert(llama, tmp_path / "x.gguf")
    rewritten(tmp_path / "x.gguf", change)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "x.gguf")


def test_an_array_longer_than_the_file_is_refused_at_once(tmp_path):
    """The package by itself looks for all of its items, one after the other."""
    convert(GOLDEN / "gqa_tied", tmp_path / "base.gguf")
    content = bytearray((tmp_path / "base.gguf").read_bytes())
    key = b"tokenizer.ggml.tokens"
    length = content.index(key) + len(key) + 8  # behind the types of the value and of its items
    assert content[length : length + 8] == len(BYTES).to_bytes(8, "little")
    content[length : length + 8] = (2**40).to_bytes(8, "little")
    (tmp_path / "base.gguf").write_bytes(content)
    with pytest.raises(UserError, match="it ends before what it tells of"):
        load(tmp_path / "base.gguf")


def test_arrays_of_arrays_without_end_are_refused(tmp_path):
    head = struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"a", 9)  # one value, which is an array
    (tmp_path / "deep.gguf").write_bytes(head + struct.pack("<IQ", 9, 1) * 5000)
    with pytest.raises(UserError, match="cannot be read as GGUF"):
        load(tmp_path / "deep.gguf")


def test_another_file_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"no model at all, but long enough")
    with pytest.raises(UserError, match="cannot be read as GGUF"):
        load(tmp_path / "x.gguf")


def test_gemmas_largest_models_divide_scores_by_another_width(tmp_path):
    directory = small("gemma2", tmp_path / "gemma2")
    convert(directory, tmp_path / "x.gguf")
    rewritten(tmp_path / "x.gguf", lambda _, keys: keys.update({"gemma2.block_count": 46}))
    assert read_spec(tmp_path / "x.gguf").query_scalar == 32 / 4


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
