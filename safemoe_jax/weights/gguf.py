"""Base weights from a GGUF file; its tokenizer is in `weights.gguf_tokenizer`."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import ml_dtypes
import numpy as np

from safemoe_jax.errors import UserError
from safemoe_jax.model.attention import frequencies
from safemoe_jax.model.quantization import Blocks, Quantized
from safemoe_jax.model.spec import FAMILIES, ModelSpec, RopeScaling
from safemoe_jax.weights.gguf_tokenizer import read_tokenizer
from safemoe_jax.weights.layout import (
    UNKNOWN_LICENSE,
    Checkpoint,
    Index,
    Tensor,
    Weights,
    leaf_shapes,
)

NAMES = {
    "embed/embedding": "token_embd.weight",
    "layers/attention_norm/scale": "blk.{}.attn_norm.weight",
    "layers/attention/q/kernel": "blk.{}.attn_q.weight",
    "layers/attention/k/kernel": "blk.{}.attn_k.weight",
    "layers/attention/v/kernel": "blk.{}.attn_v.weight",
    "layers/attention/o/kernel": "blk.{}.attn_output.weight",
    "layers/attention/q/bias": "blk.{}.attn_q.bias",
    "layers/attention/k/bias": "blk.{}.attn_k.bias",
    "layers/attention/v/bias": "blk.{}.attn_v.bias",
    "layers/attention/q_norm/scale": "blk.{}.attn_q_norm.weight",
    "layers/attention/k_norm/scale": "blk.{}.attn_k_norm.weight",
    "layers/attention_post_norm/scale": "blk.{}.post_attention_norm.weight",
    "layers/mlp_norm/scale": "blk.{}.ffn_norm.weight",
    "layers/mlp_post_norm/scale": "blk.{}.post_ffw_norm.weight",
    "layers/mlp/gate/kernel": "blk.{}.ffn_gate.weight",
    "layers/mlp/up/kernel": "blk.{}.ffn_up.weight",
    "layers/mlp/down/kernel": "blk.{}.ffn_down.weight",
    "final_norm/scale": "output_norm.weight",
    "head/kernel": "output.weight",
}
_FUSED_NAMES = {
    **{f"layers/attention/{x}/kernel": "blk.{}.attn_qkv.weight" for x in "qkv"},
    "layers/mlp/gate/kernel": "blk.{}.ffn_up.weight",
}

_ROTATED = ("layers/attention/q/kernel", "layers/attention/k/kernel")

# Llama 3's lowering of frequencies, as factors [H / 2]; the file does not say how they were made.
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3_SCALINGS = [RopeScaling(factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0)]

# Gemma's largest models divide scores by sqrt(D / N), the others by sqrt(H). Files do not say it;
# llama.cpp knows these models by their number of layers, too.
_WIDE_SCORES = {"gemma2": 46, "gemma3_text": 62}


# What Gemma 2's first files leave out; llama.cpp takes these values for it, too.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {
        "attention.sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
}


class Field(NamedTuple):
    """A part of a block: what it holds, and the bytes that make this one in all of its weights."""

    holds: Literal["scale", "minimum", "code"]
    one: bytes


_ONE = np.float16(1).tobytes()
_SCALE, _MINIMUM = Field("scale", _ONE), Field("minimum", _ONE)
_SIX_BITS = Field("scale", b"\1\1\1\1\0\0\0\0\1\1\1\1")  # of scales and minima, interleaved
_CODES_16, _CODES_128 = Field("code", b"\x11" * 16), Field("code", b"\x11" * 128)


def _high_bits(size: int) -> Field:
    return Field("code", bytes(size))


# Scales and offsets of _K types are products, of which a float16 would cut digits off.
_HALF, _SINGLE = np.dtype(np.float16), np.dtype(np.float32)

# Each type of block: how its tensors can stay, and its fields in their order (ggml-common.h of
# llama.cpp). What else the fields mean is the gguf package's to know.
BLOCKS: dict[str, tuple[Blocks, tuple[Field, ...]]] = {
    "Q4_0": (Blocks(4, 32, _HALF, True), (_SCALE, _CODES_16)),
    "Q4_1": (Blocks(4, 32, _HALF, True), (_SCALE, _MINIMUM, _CODES_16)),
    "Q5_0": (Blocks(8, 32, _HALF, True), (_SCALE, _high_bits(4), _CODES_16)),
    "Q5_1": (Blocks(8, 32, _HALF, True), (_SCALE, _MINIMUM, _high_bits(4), _CODES_16)),
    "Q8_0": (Blocks(8, 32, _HALF, False), (_SCALE, Field("code", b"\1" * 32))),
    "Q4_K": (Blocks(4, 32, _SINGLE, True), (_SCALE, _MINIMUM, _SIX_BITS, _CODES_128)),
    "Q5_K": (
        Blocks(8, 32, _SINGLE, True),
        (_SCALE, _MINIMUM, _SIX_BITS, _high_bits(32), _CODES_128),
    ),
    "Q6_K": (
        Blocks(8, 16, _SINGLE, True),
        (_CODES_128, _high_bits(64), Field("scale", b"\1" * 16), _SCALE),
    ),
}


class Metadata(dict):
    """The file's key-value pairs; a key that is needed and absent is the user's to know."""

    def __missing__(self, key: str) -> Any:
        raise UserError(f"the GGUF file lacks the metadata {key!r}; convert the model again")


class _Reader(gguf.GGUFReader):
    """The reader over a plain array, slicing a memmap object costs three times the whole load; and
    one that sees the file's end."""

    @property
    def data(self) -> Any:  # its types say that it is a memmap
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = np.asarray(mapped)

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        # Past the end the package finds empty values, and would look for as many as the file says.
        if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self._data):
            raise ValueError("it ends before what it tells of")
        return super()._get(offset, dtype, count, override_order)


def names(spec: ModelSpec) -> dict[str, str]:
    """The tensor of each leaf of a base, "{}" standing for the layer."""
    found = NAMES | _FUSED_NAMES if spec.traits.fused else NAMES
    return {leaf: found[leaf] for leaf in leaf_shapes(spec)}


def load(path: Path) -> Checkpoint:
    """Opens a GGUF file; its weights are dequantized as they are read.

    Args:
      path: the file.

    Raises:
      UserError: where the file is no GGUF, or holds what this package does not model.
    """
    metadata, tensors = _open(path)
    with _lies_told(path):
        spec = _spec(metadata, tensors)
        tokenizer = read_tokenizer(metadata, spec)
    leaf_of = {
        name.format(layer): leaf
        for leaf, name in names(spec).items()
        for layer in range(spec.num_layers)
    }
    used = {
        name: Tensor(
            tuple(map(int, reversed(tensor.shape))),
            functools.partial(_read, tensor, spec, leaf_of.get(name, "")),
            _rests(tensor.tensor_type.name),
            functools.partial(_blocks, tensor, spec, leaf_of.get(name, "")),
        )
        for name, tensor in tensors.items()
        if name != _ROPE_FACTORS
    }
    return Checkpoint(
        spec,
        Weights(spec, names(spec), used),
        tokenizer,
        metadata.get("general.license", UNKNOWN_LICENSE),
        (path,),
    )


def read_spec(path: Path) -> ModelSpec:
    """The spec that a GGUF file describes; its weights are not read.

    Raises:
      UserError: as `load`.
    """
    metadata, tensors = _open(path)
    with _lies_told(path):
        return _spec(metadata, tensors)


@contextlib.contextmanager
def _lies_told(path: Path) -> Iterator[None]:
    """Names metadata that are of no model or no tokenizer."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a bare one is what the tokenizers package raises
        raise UserError(
            f"{path} has metadata of no model ({type(error).__name__}: {str(error)[:200]!r}); "
            "fetch it again"
        ) from error


def _open(path: Path) -> tuple[Metadata, dict[str, gguf.ReaderTensor]]:
    try:
        reader = _Reader(path)
        metadata = Metadata({key: field.contents() for key, field in reader.fields.items()})
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as GGUF ({error}); fetch it again") from error
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _read(tensor: gguf.ReaderTensor, spec: ModelSpec, leaf: str, index: Index) -> np.ndarray:
    """A slice of a tensor, dequantized, as the model has it."""
    rows, *columns = index
    # A block of weights never spans two rows; a vector is one row.
    stored = _rows(tensor, spec, leaf, rows) if columns else tensor.data
    try:
        weights = gguf.dequantize(stored, tensor.tensor_type)
    except NotImplementedError as error:
        raise UserError(
            f"tensor {tensor.name} is of type {tensor.tensor_type.name}, which the gguf package "
            "cannot dequantize; use a file of another quantization"
        ) from error
    if spec.traits.zero_centered_norms and leaf.endswith("/scale"):
        weights = weights - 1.0
    return weights[:, *columns] if columns else weights[rows]


def _rows(tensor: gguf.ReaderTensor, spec: ModelSpec, leaf: str, rows: slice) -> np.ndarray:
    """Rows of a matrix as the model has them, in their bytes."""
    if spec.traits.gguf_pairs and leaf in _ROTATED:
        return tensor.data[_halves(len(tensor.data), spec.head_dim)[rows]]
    return tensor.data[rows]


def _rests(kind: str) -> np.dtype | Blocks:
    """How a tensor of a type can stay; in float32, where that is no known block and not BF16."""
    if kind in BLOCKS:
        return BLOCKS[kind][0]
    return np.dtype(ml_dtypes.bfloat16 if kind == "BF16" else np.float32)


def _blocks(tensor: gguf.ReaderTensor, spec: ModelSpec, leaf: str, rows: slice) -> Quantized:
    """Rows of a matrix that rests in one of `BLOCKS`.

    A weight is (scale * code + offset). Each of the three is what the package makes of blocks in
    which fields were overwritten: code of a scale of one without a minimum, and so on.
    """
    kind = tensor.tensor_type
    stored, (rests, fields) = _rows(tensor, spec, leaf, rows), BLOCKS[kind.name]

    def of(**filled: int) -> np.ndarray:
        blocks, at = stored.reshape(-1, sum(len(field.one) for field in fields)).copy(), 0
        for field in fields:
            if field.holds in filled:
                ones = np.frombuffer(field.one, np.uint8)
                blocks[:, at : at + len(ones)] = filled[field.holds] * ones
            at += len(field.one)
        return gguf.dequantize(blocks.reshape(stored.shape), kind)

    codes = of(scale=1, minimum=0) - of(scale=1, minimum=0, code=0)
    scale = of(minimum=0, code=1) - of(minimum=0, code=0)
    offset = of(code=0)[:, :: rests.size] if rests.offset else None
    return Quantized(codes.astype(np.int8), scale[:, :: rests.size], offset)


def _halves(rows: int, head_dim: int) -> np.ndarray:
    """Where in ggml's q or k "rotate half" finds its rows.

    ggml rotates neighbours (2i, 2i+1): its converter interleaves the halves of each head.
    """
    return np.arange(rows).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _spec(metadata: Metadata, tensors: Mapping[str, gguf.ReaderTensor]) -> ModelSpec:
    architecture = metadata["general.architecture"]
    known = {traits.gguf: family for family, traits in FAMILIES.items() if traits.gguf}
    if architecture not in known:
        raise UserError(
            f"GGUF architecture {architecture!r} is not supported; known: {', '.join(known)}"
        )
    family = known[architecture]

    def optional(key: str, default: Any = None) -> Any:
        default = _DEFAULTS.get(architecture, {}).get(key, default)
        return metadata.get(f"{architecture}.{key}", default)

    def needed(key: str) -> Any:
        return metadata[f"{architecture}.{key}"]

    if NAMES["embed/embedding"] not in tensors:
        raise UserError(f"the checkpoint lacks tensor {NAMES['embed/embedding']}")
    width, vocab_size = map(int, tensors[NAMES["embed/embedding"]].shape)
    heads, layers = needed("attention.head_count"), needed("block_count")
    # The format's own rules for keys that a converter may leave out.
    head_dim = optional("attention.key_length", width // heads)
    rotated = optional("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise UserError(f"{rotated} of {head_dim} head dims are rotated; only all is supported")
    window = optional("attention.sliding_window") or None
    pattern = FAMILIES[family].gguf_pattern
    if pattern == ("global",) and window:
        pattern = ("local",)
        # The same name and tensors, and Llama itself has no window.
        family = "mistral" if family == "llama" else family
    theta = optional("rope.freq_base", 10_000.0)
    return ModelSpec(
        vocab_size=vocab_size,
        embed_dim=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=optional("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_dim=needed("feed_forward_length"),
        rope_theta=theta,
        norm_eps=needed("attention.layer_norm_rms_epsilon"),
        tie_embeddings=NAMES["head/kernel"] not in tensors,
        max_positions=needed("context_length"),
        family=family,
        pattern=pattern,
        window=window,
        local_rope_theta=optional("rope.freq_base_swa", FAMILIES[family].gguf_local_rope_theta),
        rope_scaling=_rope_scaling(optional, tensors, head_dim, theta),
        query_scalar=width / heads if layers == _WIDE_SCORES.get(family) else None,
        attention_softcap=optional("attn_logit_softcapping") or None,
        logit_softcap=optional("final_logit_softcapping") or None,
    )


def _rope_scaling(optional, tensors, head_dim: int, theta: float) -> RopeScaling | None:
    # The format's own rules again: linear without a type, and an older name of the factor.
    kind = optional("rope.scaling.type", "linear")
    factor = optional("rope.scaling.factor", optional("rope.scale_linear")) or 1.0
    if kind == "linear" and factor != 1.0:
        return RopeScaling(factor)
    if kind not in ("none", "linear"):
        raise UserError(f"rope scaling {kind!r} is not supported; use a model without it")
    if (tensor := tensors.get(_ROPE_FACTORS)) is None:
        return None
    plain = frequencies(head_dim, theta, None)
    for scaling in _LLAMA3_SCALINGS:
        factors = plain / frequencies(head_dim, theta, scaling)
        if factors.shape == tensor.data.shape and np.allclose(tensor.data, factors, rtol=1e-4):
            return scaling
    raise UserError(
        f"tensor {_ROPE_FACTORS} lowers frequencies otherwise than Llama 3.1 and 3.2 do; use the "
        "model's Hugging Face directory"
    )
