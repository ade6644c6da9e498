"""Base weights and tokenizer from a GGUF file of the llama architecture, without torch."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from safemoe_jax.errors import UserError
from safemoe_jax.model.spec import ModelSpec
from safemoe_jax.weights.layout import UNKNOWN_LICENSE, Checkpoint, assemble

NAMES = {
    "embed/embedding": "token_embd.weight",
    "layers/attention_norm/scale": "blk.{}.attn_norm.weight",
    "layers/attention/q/kernel": "blk.{}.attn_q.weight",
    "layers/attention/k/kernel": "blk.{}.attn_k.weight",
    "layers/attention/v/kernel": "blk.{}.attn_v.weight",
    "layers/attention/o/kernel": "blk.{}.attn_output.weight",
    "layers/mlp_norm/scale": "blk.{}.ffn_norm.weight",
    "layers/mlp/gate/kernel": "blk.{}.ffn_gate.weight",
    "layers/mlp/up/kernel": "blk.{}.ffn_up.weight",
    "layers/mlp/down/kernel": "blk.{}.ffn_down.weight",
    "final_norm/scale": "output_norm.weight",
    "head/kernel": "output.weight",
}

# How text is cut before the merges; llama.cpp keeps the same table, by the same names.
PRE_TOKENIZERS = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
}


class Metadata(dict):
    """The file's key-value pairs; a key that is needed and absent is the user's to know."""

    def __missing__(self, key: str) -> Any:
        raise UserError(f"the GGUF file lacks the metadata {key!r}; convert the model again")


class _Reader(gguf.GGUFReader):
    """The reader over a plain array: slicing a memmap object costs three times the whole load."""

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = np.asarray(mapped)


def load(path: Path, param_dtype: str) -> Checkpoint:
    """Reads a GGUF file, dequantized.

    Args:
      path: the file.
      param_dtype: "float32" or "bfloat16".

    Raises:
      UserError: where the file is no GGUF, or holds what this package does not model.
    """
    metadata, tensors = _open(path)
    spec = _spec(metadata, tensors)

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(
                f"tensor {name} is of type {tensor.tensor_type.name}, which the gguf package "
                "cannot dequantize; use a file of another quantization"
            ) from error
        if name.endswith((".attn_q.weight", ".attn_k.weight")):
            weights = _unpermute(weights, spec.head_dim)
        return weights

    return Checkpoint(
        spec,
        assemble(spec, NAMES, tensors, read, param_dtype),
        tokenizer(metadata),
        metadata.get("general.license", UNKNOWN_LICENSE),
        (path,),
    )


def read_spec(path: Path) -> ModelSpec:
    """The spec that a GGUF file describes; its weights are not read.

    Raises:
      UserError: as `load`.
    """
    return _spec(*_open(path))


def _open(path: Path) -> tuple[Metadata, dict[str, gguf.ReaderTensor]]:
    try:
        reader = _Reader(path)
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} cannot be read as GGUF ({error}); fetch it again") from error
    metadata = Metadata({key: field.contents() for key, field in reader.fields.items()})
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _unpermute(weights: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k [heads*H, D] from ggml's order to "rotate half".

    ggml's llama rotates neighbours (2i, 2i+1): its converter interleaves the halves of each head.
    """
    pairs = weights.reshape(-1, head_dim // 2, 2, weights.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weights.shape)


def _spec(metadata: Metadata, tensors: dict[str, gguf.ReaderTensor]) -> ModelSpec:
    if (architecture := metadata["general.architecture"]) != "llama":
        raise UserError(f"GGUF architecture {architecture!r} is not supported; use a llama model")
    if (scaling := metadata.get("llama.rope.scaling.type", "none")) != "none":
        raise UserError(f"rope scaling {scaling!r} is not supported; use a model without it")
    if NAMES["embed/embedding"] not in tensors:
        raise UserError(f"the checkpoint lacks tensor {NAMES['embed/embedding']}")
    width, vocab_size = map(int, tensors[NAMES["embed/embedding"]].shape)
    heads = metadata["llama.attention.head_count"]
    # The format's own rules for keys that a converter may leave out.
    head_dim = metadata.get("llama.attention.key_length", width // heads)
    rotated = metadata.get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise UserError(f"{rotated} of {head_dim} head dims are rotated; only all is supported")
    return ModelSpec(
        vocab_size=vocab_size,
        embed_dim=width,
        num_layers=metadata["llama.block_count"],
        num_heads=heads,
        num_kv_heads=metadata.get("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_dim=metadata["llama.feed_forward_length"],
        rope_theta=metadata.get("llama.rope.freq_base", 10_000.0),
        norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        tie_embeddings=NAMES["head/kernel"] not in tensors,
        max_positions=metadata["llama.context_length"],
    )


def tokenizer(metadata: Metadata) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file: byte-level BPE, its chat template and special tokens.

    Raises:
      UserError: on another tokenizer model or an unknown pre-tokenizer.
    """
    kind, cut = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]
    if kind != "gpt2" or cut not in PRE_TOKENIZERS:
        raise UserError(
            f"tokenizer {kind!r} with pre-tokenizer {cut!r} is not supported (known: 'gpt2' with "
            f"{', '.join(PRE_TOKENIZERS)}); use the model's Hugging Face directory"
        )
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*PRE_TOKENIZERS[cut], byte_level])
    backend.decoder = decoders.ByteLevel()
    added = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
    backend.add_tokens(
        [
            AddedToken(token, special=kind == gguf.TokenType.CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in added
        ]
    )

    ids = {
        f"{role}_token": metadata.get(f"tokenizer.ggml.{key}_token_id")
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    special = {role: tokens[i] for role, i in ids.items() if i is not None}
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, ids["bos_token"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **special,
    )
