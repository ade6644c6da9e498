"""GGUF files out of small Hugging Face directories, as llama.cpp's converter makes them.

Names of tensors and of metadata are those of the `gguf` package; nothing here is this project's.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import safetensors.numpy

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "phi3": gguf.MODEL_ARCH.PHI3,
}
BYTES = ["<|endoftext|>", "a", "b", "1", "\u0120", "ab"]


def add_words(writer: gguf.GGUFWriter, pre: str = "smollm") -> None:
    """A byte-level tokenizer of six tokens."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(BYTES)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * 5)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(True)


def convert(
    directory: Path,
    path: Path,
    *,
    stored: Callable[[str, np.ndarray], gguf.GGMLQuantizationType] | None = None,
    tokenizer: Callable[[gguf.GGUFWriter], None] = add_words,
) -> None:
    """Writes a directory's model as one GGUF file.

    Args:
      directory: a Hugging Face directory, its weights in one file.
      path: the file.
      stored: how a tensor rests, by its GGUF name and values; float32 where not given.
      tokenizer: adds one to the file.
    """
    config = json.loads((directory / "config.json").read_text())
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    family, layers = config["model_type"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {"rope_type": "default", "rope_theta": 10_000.0}
    rope, local = rope.get("full_attention", rope), rope.get("sliding_attention")

    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[family]])
    writer.add_name(f"small {family}")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if local:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if window := config.get("sliding_window"):
        writer.add_sliding_window(window)
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    tokenizer(writer)

    names = gguf.get_tensor_name_map(ARCHITECTURES[family], layers)
    if rope["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = llama3_factors(rope, head_dim)
    for name, values in tensors.items():
        new = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        if family in ("llama", "mistral", "smollm3") and new.endswith(
            ("attn_q.weight", "attn_k.weight")
        ):
            halves = values.reshape(-1, 2, head_dim // 2, values.shape[-1])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if family.startswith("gemma") and new.endswith("norm.weight"):
            values = values + np.float32(1)
        kind = stored and stored(new, values)
        if kind is None or values.ndim == 1:
            writer.add_tensor(new, values.astype(np.float32))
        else:
            writer.add_tensor(new, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_factors(rope: dict, head_dim: int) -> np.ndarray:
    """What llama.cpp's converter writes for rope_type "llama3", [H / 2]."""
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (index / head_dim)
        turns = rope["original_max_position_embeddings"] / wavelength
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if turns > high:
            factors.append(1.0)
        elif turns < low:
            factors.append(rope["factor"])
        else:
            smooth = (turns - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)
