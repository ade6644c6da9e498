"""Makes what the parity tests compare with; they also call it where torch is installed.

Every value comes from `transformers` on torch (nf4's from bitsandbytes), none from this package.

    python tests/golden/make.py             # needs the extra `parity` and bitsandbytes; rewrites
                                            # the files beside it
    python tests/golden/make.py mistral     # those of this family alone (see tests/families.py)
"""

import inspect
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import families  # noqa: E402

# Small random models; each differs from the next in what a loader can get wrong.
SMALL = dict(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
    max_position_embeddings=64,
)
CASES = {
    "gqa_tied": dict(tie_word_embeddings=True),
    "untied_theta": dict(
        num_key_value_heads=1,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    ),
    "wide_heads_sharded_bfloat16": dict(
        head_dim=8, rms_norm_eps=1e-5, tie_word_embeddings=False, dtype="bfloat16"
    ),
}

# As published for SmolLM2-135M-Instruct.
SMOLLM2 = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    rms_norm_eps=1e-5,
    max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    tie_word_embeddings=True,
)


def directory_logits(directory: Path, tokens: np.ndarray) -> np.ndarray:
    """float32 logits [T, V] of a model directory."""
    return _logits(LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32), tokens)


def gguf_logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    """float32 logits [T, V] of the SmolLM2 GGUF file, read by transformers' own reader."""
    config = LlamaConfig(**SMOLLM2)
    with torch.device("meta"):
        names = LlamaForCausalLM(config)
    state = load_gguf_checkpoint(path, return_tensors=True, model_to_load=names)["tensors"]
    model = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32
    )
    return _logits(model, tokens)


def gguf_tensors(path: Path, directory: Path) -> dict[str, np.ndarray]:
    """A GGUF file's weights as transformers' own reader names and turns them.

    `directory` holds the config of the same model.
    """
    with torch.device("meta"):
        names = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    state = load_gguf_checkpoint(path, return_tensors=True, model_to_load=names)["tensors"]
    return {name: values.numpy() for name, values in state.items()}


def gguf_tokenizer(path: Path) -> Tokenizer:
    """transformers' own conversion of the GGUF tokenizer, cut as the model was trained.

    The conversion passes over the file's pre-tokenizer "smollm", which cuts digits one by one, and
    so differs from the model's published tokenizer.json after a run of spaces ("x  1").
    """
    architecture, values, _ = get_gguf_tokenizer(str(path))
    tokenizer, _ = convert_gguf_tokenizer(architecture, values)
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, tokenizer.pre_tokenizer])
    return tokenizer


def _logits(model: LlamaForCausalLM, tokens: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model.eval()(torch.from_numpy(tokens)[None].long()).logits[0].numpy()


def _make_directory(directory: Path, seed: int, **changes) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    torch.manual_seed(seed)
    config = LlamaConfig(**SMALL | changes)
    model = LlamaForCausalLM(config).to(getattr(torch, changes.get("dtype", "float32")))
    model.save_pretrained(directory, max_shard_size="8KB" if "sharded" in directory.name else "1GB")
    (directory / "generation_config.json").unlink()

    vocabulary = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, config.vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|endoftext|>", chat_template="{{ messages }}"
    ).save_pretrained(directory)

    tokens = np.random.default_rng(seed).integers(config.vocab_size, size=24)
    np.savez(directory / "golden.npz", tokens=tokens, logits=directory_logits(directory, tokens))


def make_family(name: str, directory: Path) -> dict[str, torch.Tensor]:
    """Saves the small model of a family by `save_pretrained`.

    Returns:
      Its tokens [T], and logits [T, V] of one pass and of decoding with its cache.
    """
    config = CONFIG_MAPPING[name](**families.SIZES | families.FAMILIES[name])
    # Its faster attention passes over Gemma's bound of the scores.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    # A tied head is no parameter of its own.
    shapes = {key: list(value.shape) for key, value in model.named_parameters()}
    for key, value in families.weights(name, shapes).items():
        model.get_parameter(key).data = torch.from_numpy(value)
    model.tie_weights()
    model.save_pretrained(directory)
    families.tokenizer(config.vocab_size).save_pretrained(directory)

    tokens = np.random.default_rng(0).integers(config.vocab_size, size=families.LENGTH)
    ids = torch.from_numpy(tokens)[None]
    with torch.inference_mode():
        whole = model(ids).logits[0].numpy()
        # transformers 5.24 calls `cache` what was `past_key_values`.
        known = inspect.signature(model.forward).parameters
        name_of_cache = "cache" if "cache" in known else "past_key_values"
        cache = {name_of_cache: DynamicCache(config=config)}
        parts = [ids[:, : families.PROMPT], *ids[:, families.PROMPT :].split(1, dim=1)]
        decoded = [model(part, use_cache=True, **cache).logits[0] for part in parts]
    return {"tokens": tokens, "logits": whole, "decoded": torch.cat(decoded).numpy()}


def _make_family(name: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        made = make_family(name, Path(directory))
        config = json.loads((Path(directory) / "config.json").read_text())
        tensors = safetensors.numpy.load_file(Path(directory) / "model.safetensors")
    shapes = {key: list(value.shape) for key, value in sorted(tensors.items())}
    families.GOLDEN.mkdir(exist_ok=True)
    text = json.dumps({"config": config, "shapes": shapes}, indent=1) + "\n"
    (families.GOLDEN / f"{name}.json").write_text(text)
    np.savez(families.GOLDEN / f"{name}.npz", **made)


def save_adapter_config(directory: Path) -> None:
    """adapter_config.json with every field that PEFT writes."""
    import peft

    peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path="someone/llama",
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        use_rslora=True,
        lora_dropout=0.1,
        init_lora_weights=False,
        inference_mode=True,
    ).save_pretrained(directory)


def save_nf4() -> None:
    """Weights, and what is left of them after bitsandbytes' nf4 in blocks of 64."""
    from bitsandbytes import functional

    weights = torch.randn(6, 192, generator=torch.Generator().manual_seed(0))
    weights[3, 64:128] = 0.0
    quantized, state = functional.quantize_4bit(weights, blocksize=64, quant_type="nf4")
    back = functional.dequantize_4bit(quantized, state)
    np.savez(HERE / "nf4.npz", weights=weights, back=back, levels=state.code)


def main() -> None:
    from safemoe_jax.weights.base import fetch_base

    path = fetch_base("smollm2-135m-instruct")
    tokenizer = gguf_tokenizer(path)
    texts = json.loads((HERE / "texts.json").read_text(encoding="utf-8"))
    ids = [tokenizer.encode(text).ids for text in texts]
    (HERE / "ids.json").write_text(json.dumps(ids) + "\n")

    tokens = np.resize(np.concatenate(ids).astype(np.int32), 512)
    logits = gguf_logits(path, tokens)
    # Whole logits are 100 MB: every position, some columns, and a sum that sees all of them.
    columns = np.random.default_rng(0).choice(logits.shape[-1], 48, replace=False)
    np.savez(
        HERE / "smollm2.npz",
        tokens=tokens,
        columns=columns,
        logits=logits[:, columns],
        logsumexp=torch.logsumexp(torch.from_numpy(logits), dim=-1).numpy(),
    )
    for seed, (name, changes) in enumerate(CASES.items()):
        _make_directory(HERE / name, seed, **changes)
    for name in families.FAMILIES:
        _make_family(name)
    save_adapter_config(HERE)
    save_nf4()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        _make_family(name)
    if not sys.argv[1:]:
        main()
