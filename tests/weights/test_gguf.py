"""GGUF: small files of every family and type of block, and the embedded one."""

import dataclasses
import importlib.util
import json
import runpy
import struct
from pathlib import Path

import families
import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from gguf_files import BYTES, add_words, convert
from toys import forward, toy_batch, toy_model, toy_variables

from safemoe_jax.config import MeshConfig
from safemoe_jax.errors import UserError
from safemoe_jax.experiment import boxed_shapes
from safemoe_jax.model.lora import Routed
from safemoe_jax.model.quantization import Blocks
from safemoe_jax.model.spec import FAMILIES, RopeScaling
from safemoe_jax.parallel.mesh import make_mesh
from safemoe_jax.parallel.sharding import shardings
from safemoe_jax.weights import huggingface
from safemoe_jax.weights.base import load_base
from safemoe_jax.weights.gguf import BLOCKS, NAMES, load, read_spec

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


def leaves(checkpoint):
    return flatten_dict(checkpoint.weights.read(np.dtype(np.float32)), sep="/")


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
    params = checkpoint.weights.read(np.dtype(ml_dtypes.bfloat16))
    assert "head" not in params
    assert params["embed"]["embedding"].dtype == ml_dtypes.bfloat16


# Sizes of the small models, and what holds whole blocks of every type in their place.
WIDER = {16: 128, 32: 256, 48: 256, 64: 512, 96: 512}
WIDE = dict(hidden_size=256, intermediate_size=256, head_dim=64)


def widened(name, directory, layers=1):
    """A family's small model with rows that hold whole blocks of every type."""
    small(name, directory)
    path = directory / "config.json"
    values = json.loads(path.read_text()) | WIDE | {"num_hidden_layers": layers}
    path.write_text(json.dumps(values))
    golden = json.loads((families.GOLDEN / f"{name}.json").read_text())
    shapes = {
        tensor: [
            size
            if tensor in ("model.embed_tokens.weight", "lm_head.weight") and not axis
            else WIDER[size]
            for axis, size in enumerate(shape)
        ]
        for tensor, shape in golden["shapes"].items()
        if "layers." not in tensor or int(tensor.split(".")[2]) < layers
    }
    safetensors.numpy.save_file(families.weights(name, shapes), directory / "model.safetensors")
    return directory


@pytest.fixture
def wide(tmp_path):
    return widened("llama", tmp_path / "llama")


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


@pytest.fixture
def k_blocks(monkeypatch):
    """Makes the package write random blocks of types that it can only read -> their values."""
    rng, values, quantize = np.random.default_rng(0), {}, gguf.quantize

    def quantized(weights, of):
        if not of.name.endswith("_K"):
            return quantize(weights, of)
        made = [k_block(of.name, rng) for _ in range(weights.size // 256)]
        values[of.name] = np.concatenate([one[1] for one in made]).reshape(weights.shape)
        raw = np.frombuffer(b"".join(one[0] for one in made), np.uint8)
        return raw.reshape(len(weights), -1)

    monkeypatch.setattr(gguf, "quantize", quantized)
    return values


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_types_that_only_others_write_are_read(kind, wide, tmp_path, k_blocks):
    of = gguf.GGMLQuantizationType[kind]
    convert(
        wide,
        tmp_path / "x.gguf",
        stored=lambda name, _: of if name.endswith("ffn_down.weight") else None,
    )
    found = leaves(load(tmp_path / "x.gguf"))["layers/mlp/down/kernel"]
    np.testing.assert_allclose(found[0], k_blocks[kind], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_that_stay_are_what_the_package_reads(kind, wide, tmp_path, k_blocks):
    of = gguf.GGMLQuantizationType[kind]
    convert(wide, tmp_path / "x.gguf", stored=lambda _, values: of if values.ndim == 2 else None)
    checkpoint = load(tmp_path / "x.gguf")
    rests, expected = checkpoint.weights.in_blocks(), leaves(checkpoint)
    assert set(rests) == {leaf for leaf in expected if "norm" not in leaf}
    bits = 4 if kind.startswith("Q4") else 8
    assert {leaf.bits for name, leaf in rests.items() if name.startswith("layers")} == {bits}
    assert rests["embed/embedding"].bits == 8  # its rows are looked up one by one
    for leaf, values in flatten_dict(checkpoint.weights.read(rests), sep="/").items():
        np.testing.assert_array_equal(values, expected[leaf], err_msg=leaf)


# As llama.cpp mixes types, and worse: by the leaf, the types of its two layers.
MIXED = {
    "attn_v": ("Q4_K", "Q6_K"),
    "attn_qkv": ("Q4_1", "Q5_0"),
    "attn_q": ("Q4_0", "Q4_1"),
    "attn_output": ("BF16", "BF16"),
    "ffn_down": ("Q8_0", "F16"),
    "ffn_up": ("Q5_K", "Q8_0"),
    "ffn_gate": ("Q8_0", "Q8_0"),
}


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_model_of_mixed_blocks_is_that_of_their_numbers(name, tmp_path, k_blocks):
    def stored(tensor, values):
        if values.ndim == 1:
            return None
        part, layer = tensor.split(".")[-2], tensor.split(".")[1]
        kind = MIXED[part][int(layer)] if part in MIXED else "Q6_K"
        return gguf.GGMLQuantizationType[kind]

    convert(widened(name, tmp_path / name, layers=2), tmp_path / "x.gguf", stored=stored)
    base = load_base(str(tmp_path / "x.gguf"), "gguf")
    half, whole = np.dtype(np.float16), np.dtype(np.float32)
    assert base.rests["layers/attention/q/kernel"] == Blocks(
        *((4, 32, half, True) if name == "llama" else (8, 32, half, True))
    )
    assert base.rests["layers/mlp/up/kernel"] == Blocks(8, 32, whole, True)
    if name == "llama":
        assert base.rests["layers/attention/v/kernel"] == Blocks(8, 16, whole, True)
        assert base.rests["layers/mlp/gate/kernel"] == Blocks(8, 32, half, False)
    assert base.rests["layers/attention/o/kernel"] == ml_dtypes.bfloat16
    assert "layers/mlp/down/kernel" not in base.rests  # so in float32
    assert {leaf.dtype for leaf in jax.tree.leaves(base.params)} == {whole}  # for exports

    exact = load_base(str(tmp_path / "x.gguf"), "float32")
    model = toy_model(spec=base.spec, param_dtype=base.rests, num_experts=3)
    plain = model.clone(param_dtype=np.dtype(np.float32))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, context=1))
    variables = toy_variables(plain) | {"params": exact.params}
    batch = toy_batch([[(3, 5)], [(2, 2), (1, 3)]], 8)
    expected, _ = forward(plain, variables, batch, Routed())
    with jax.set_mesh(mesh):
        placed = base.placed(shardings(mesh, boxed_shapes(model)["params"]))
        found, _ = forward(model, variables | {"params": placed}, batch, Routed())
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_only_a_gguf_file_has_blocks_that_could_stay(llama):
    with pytest.raises(UserError, match=r"'gguf', which keeps a GGUF file's own blocks.*'int8'"):
        load_base(str(llama), "gguf")


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


def test_what_gemma2s_first_files_leave_out_is_what_llama_cpp_takes(tmp_path):
    convert(small("gemma2", tmp_path / "gemma2"), tmp_path / "x.gguf")
    left_out = ("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window")
    rewritten(tmp_path / "x.gguf", lambda _, x: [x.pop(f"gemma2.{key}") for key in left_out])
    spec = read_spec(tmp_path / "x.gguf")
    assert (spec.attention_softcap, spec.logit_softcap, spec.window) == (50.0, 30.0, 4096)


def test_gemma3_without_a_window_is_refused(tmp_path):
    convert(small("gemma3_text", tmp_path / "gemma3"), tmp_path / "x.gguf")
    rewritten(tmp_path / "x.gguf", lambda _, x: x.pop("gemma3.attention.sliding_window"))
    with pytest.raises(UserError, match="window is None"):
        read_spec(tmp_path / "x.gguf")


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_rope_factor_without_a_type_is_linear(tmp_path, key):
    convert(small("qwen3", tmp_path / "qwen3"), tmp_path / "x.gguf")
    rewritten(tmp_path / "x.gguf", lambda _, x: x.update({f"qwen3.{key}": 4.0}))
    assert read_spec(tmp_path / "x.gguf").rope_scaling == RopeScaling(4.0)


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
