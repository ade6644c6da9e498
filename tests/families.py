"""A small random base of every family: its weights by numpy, everything else by `transformers`.

`tests/golden/make.py` makes the models, with torch, and writes `golden/families/NAME.json` (config
and shapes of the tensors, as `save_pretrained` wrote them) and NAME.npz (tokens and logits). From
these the tests write the same checkpoint without torch.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

GOLDEN = Path(__file__).parent / "golden" / "families"
WINDOW, PROMPT, LENGTH = 6, 9, 24
SIZES = dict(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# What each says of itself beside its sizes, by `model_type`. What is not as in published models
# makes a difference within a few tokens and layers.
FAMILIES = {
    "llama": dict(rope_parameters=LLAMA3, tie_word_embeddings=True),
    "mistral": dict(sliding_window=WINDOW, head_dim=12),
    "qwen2": dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=3),
    "qwen3": dict(head_dim=12, tie_word_embeddings=True),
    "gemma2": dict(
        head_dim=12,
        query_pre_attn_scalar=9,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3_text": dict(
        head_dim=12,
        query_pre_attn_scalar=9,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        num_hidden_layers=6,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "smollm3": dict(no_rope_layer_interval=2, tie_word_embeddings=True),
    "phi3": dict(sliding_window=WINDOW),
}


def weights(model_type: str, shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Weights under which everything matters, drawn by each tensor's name."""
    drawn = {}
    for name, shape in shapes.items():
        values = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
        if name.endswith("norm.weight"):
            values = 0.3 * values + (not model_type.startswith("gemma"))
        elif len(shape) == 2 and "embed" not in name:
            values *= 1.5 * shape[-1] ** -0.5
        drawn[name] = values.astype(np.float32)
    return drawn


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One word a token."""
    vocabulary = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|endoftext|>", chat_template="{{ messages }}"
    )


def write(name: str, directory: Path) -> Path:
    """The checkpoint of a family, as `save_pretrained` wrote it where torch was."""
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(golden["config"]))
    safetensors.numpy.save_file(
        weights(name, golden["shapes"]), directory / "model.safetensors", {"format": "pt"}
    )
    tokenizer(golden["config"]["vocab_size"]).save_pretrained(directory)
    return directory
