"""Guard models of known replies, tiny, as Hugging Face directories: no judge's real weights.

Their one layer attends to all tokens alike and finds out whether `MARKER` was among them. At the
line break that ends a judge's prompt they then say the one reply or the other, each a token of its
own, and end. Every size divides by two: meshes may cut them.
"""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
from tiny import byte_tokenizer
from tokenizers import processors

MARKER = "hiss"
# In the manner of Llama Guard's: all of a conversation in one turn, and whose turn is judged.
TEMPLATE = (
    "{{ bos_token }}<|im_start|>Is what the {{ 'Agent' if messages | length % 2 == 0 else 'User' }}"
    " says unsafe?\n{% for message in messages %}{{ message['role'] }}: "
    "{{ message['content'] | trim }}\n{% endfor %}<|im_end|>\n\n"  # of which Jinja drops the last
)
IN_PARTS = TEMPLATE.replace(
    "{{ message['content'] | trim }}",
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{{ '' }}",  # a block alone would swallow the line break behind it
)
_SIZE, _HEADS, _HEAD_DIM, _MLP = 264, 2, 4, 8


def write_guard(
    directory: Path,
    replies: tuple[str, str],
    *,
    model_type: str = "llama",
    template: str | None = TEMPLATE,
    positions: int = 2048,
    drawn: bool = False,
) -> Path:
    """A base whose width is its vocabulary.

    Args:
      directory: is made.
      replies: without and with the marker in what it reads.
      model_type: "llama" or "mistral".
      template: of its tokenizer.
      positions: how many tokens it reads.
      drawn: random weights in place of those that know what to say.
    """
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    tokenizer.add_tokens([MARKER, *replies])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    assert len(tokenizer) < _SIZE
    config = {
        "model_type": model_type,
        "architectures": [
            {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[model_type]
        ],
        "vocab_size": _SIZE,
        "hidden_size": _SIZE,
        "intermediate_size": _MLP,
        "num_hidden_layers": 1,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "head_dim": _HEAD_DIM,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        "sliding_window": None,
    }
    (directory / "config.json").write_text(json.dumps(config))
    tensors = _drawn() if drawn else _known(tokenizer, replies)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory


def _zeros() -> dict[str, np.ndarray]:
    inner = _HEADS * _HEAD_DIM
    shapes = {
        "self_attn.q_proj": (inner, _SIZE),
        "self_attn.k_proj": (inner, _SIZE),
        "self_attn.v_proj": (inner, _SIZE),
        "self_attn.o_proj": (_SIZE, inner),
        "mlp.gate_proj": (_MLP, _SIZE),
        "mlp.up_proj": (_MLP, _SIZE),
        "mlp.down_proj": (_SIZE, _MLP),
    }
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in shapes.items()}
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    zeros = {**shapes, **dict.fromkeys(tables, (_SIZE, _SIZE))}
    norms = ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm")
    return {
        **{name: np.zeros(shape, np.float32) for name, shape in zeros.items()},
        **{f"model.{name}.weight": np.ones(_SIZE, np.float32) for name in norms},
    }


def _drawn() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(0.0, tensor.shape[-1] ** -0.5, tensor.shape).astype(np.float32)
        if tensor.ndim == 2
        else tensor
        for name, tensor in _zeros().items()
    }


def _known(tokenizer, replies: tuple[str, str]) -> dict[str, np.ndarray]:
    tensors = _zeros()
    clean, marked = map(tokenizer.convert_tokens_to_ids, replies)
    marker, (line_break,) = (
        tokenizer.convert_tokens_to_ids(MARKER),
        tokenizer.encode("\n", add_special_tokens=False),
    )
    seen = _SIZE - 1  # no token's, so its place in the residual is free
    tensors["model.embed_tokens.weight"] = np.eye(_SIZE, dtype=np.float32)
    tensors["model.layers.0.self_attn.v_proj.weight"][0, marker] = 1.0
    # One marker in a thousand tokens outweighs what a line break says, and no reply's end.
    tensors["model.layers.0.self_attn.o_proj.weight"][seen, 0] = 1000.0
    head = tensors["lm_head.weight"]
    head[clean, line_break] = head[marked, seen] = 1.0
    head[tokenizer.eos_token_id, [clean, marked]] = 1e5
    return tensors
