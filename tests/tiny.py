"""A whole experiment, tiny, as files: a random base, a harmless corpus, an experiment file.

The base is a Llama of two layers in Hugging Face's layout, with one token a byte. Of the corpus
only the labels say "unsafe"; it speaks of cats and dogs.
"""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DOMAINS = ("cats", "dogs")
BASE_SHAPE = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=512,
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, three special ones, and a template with a default system prompt."""
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]  # ids from 0, which is padding
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[])
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_base(directory: Path) -> None:
    """A random Llama as a Hugging Face directory: config, safetensors, tokenizer."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(directory)
    config = BASE_SHAPE | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(tokenizer),
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    (directory / "config.json").write_text(json.dumps(config))

    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(0.0, shape[-1] ** -0.5, shape).astype(np.float32)

    width, mlp = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    tensors = {
        "model.embed_tokens.weight": draw(len(tokenizer), width),
        "model.norm.weight": np.ones(width, np.float32),
    }
    for layer in range(config["num_hidden_layers"]):
        shapes = {
            "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, queries),
            "mlp.gate_proj": (mlp, width),
            "mlp.up_proj": (mlp, width),
            "mlp.down_proj": (width, mlp),
        }
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = draw(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ones(width, np.float32)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")


def write_corpus(path: Path, prompts_per_domain: int = 30) -> None:
    """Prompts of no two words in common, each with an answer of either label."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))

    def word() -> str:
        return "".join(rng.choice(letters, 5))

    rows = []
    for domain in DOMAINS:
        for _ in range(prompts_per_domain):
            prompt = f"{word()} {word()} {domain}"
            for label, answer in (("unsafe", "They hiss"), ("safe", "They like to sleep")):
                rows.append(
                    {
                        "prompt": prompt,
                        "response": f"{answer}, say {word()} and {word()}.",
                        "domain": domain,
                        "label": label,
                        "source": "made up",
                    }
                )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_experiment(path: Path, base: Path, corpus: Path) -> None:
    """An experiment file that changes the shipped one, as a user's would."""
    path.write_text(
        f'''"""A tiny run."""

from experiments import pyrit


def get_config():
    config = pyrit.get_config()
    config.model.source = {str(base)!r}
    config.data.corpus = "jsonl"
    config.data.path = {str(corpus)!r}
    config.data.domains = {DOMAINS!r}
    config.data.sequence_length = 128
    config.data.informative_min_characters = 20
    config.experts.targets = ("q", "down")
    config.experts.rank = 2
    config.experts.alpha = 4.0
    config.optimizer.experts.warmup_steps = 1
    config.optimizer.router.warmup_steps = 1
    config.train.experts = pyrit.loop(steps=4, rows=1, validate_every=2, save_every=2)
    config.train.router = pyrit.loop(steps=4, rows=2, validate_every=2, save_every=2)
    config.evaluation.systems = ("base", "safemoe")
    config.evaluation.prompts_per_domain = 2
    config.evaluation.max_new_tokens = 8
    config.evaluation.batch_size = 4
    config.evaluation.judge_rows = 20
    config.evaluation.judge_rows = 40
    return config
'''
    )
