"""Weights and tokenizer from and to a Hugging Face directory: config.json and safetensors."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors.numpy
import yaml
from flax.traverse_util import flatten_dict
from huggingface_hub import ModelCard
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from transformers import LlamaConfig, PreTrainedTokenizerFast

from safemoe_jax.errors import UserError
from safemoe_jax.model.spec import ModelSpec
from safemoe_jax.weights.layout import UNKNOWN_LICENSE, Checkpoint, assemble

NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/attention/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attention/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attention/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attention/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}

ARCHITECTURES = ("LlamaForCausalLM",)


def load(directory: Path, param_dtype: str) -> Checkpoint:
    """Reads a model directory as `save_pretrained` writes it, weights in one file or in shards.

    Args:
      directory: holds config.json, *.safetensors and tokenizer.json.
      param_dtype: "float32" or "bfloat16".

    Raises:
      UserError: naming the file or tensor that is absent, or what this package does not model.
    """
    spec = read_spec(directory / "config.json")
    files = _weight_files(directory)
    with ExitStack() as stack:
        try:
            shards = [stack.enter_context(safe_open(file, framework="np")) for file in files]
        except SafetensorError as error:
            raise UserError(
                f"{directory} has a broken safetensors file ({error}); fetch it again"
            ) from error
        home = {name: shard for shard in shards for name in shard.keys()}  # noqa: SIM118
        # transformers does not read them either: the frequencies follow from the config, and a tied
        # head is the embedding.
        present = [
            name
            for name in home
            if not name.endswith("rotary_emb.inv_freq")
            and not (spec.tie_embeddings and name == NAMES["head/kernel"])
        ]
        params = assemble(
            spec, NAMES, present, lambda name: home[name].get_tensor(name), param_dtype
        )
    return Checkpoint(spec, params, read_tokenizer(directory), read_license(directory), files)


def save(
    directory: Path,
    spec: ModelSpec,
    params: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    ends: Sequence[int],
) -> None:
    """Writes what `load` reads and `transformers` loads, in shards of at most 5 GB.

    Args:
      directory: is there already.
      spec: the shape of `params`.
      params: numpy leaves, all of one dtype, by the layout of `weights.layout`.
      tokenizer: is saved beside them.
      ends: ids of the tokens that end an answer.
    """
    tensors = {}
    for leaf, values in flatten_dict(params, sep="/").items():
        for index, value in enumerate(values) if leaf.startswith("layers/") else [(0, values)]:
            tensors[NAMES[leaf].format(index)] = value
    split = split_state_dict_into_shards_factory(
        tensors, get_storage_size=lambda x: x.nbytes, filename_pattern="model{suffix}.safetensors"
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensors[name] for name in names}
        safetensors.numpy.save_file(shard, directory / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        path = directory / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    LlamaConfig(
        architectures=list(ARCHITECTURES),
        vocab_size=spec.vocab_size,
        hidden_size=spec.embed_dim,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        intermediate_size=spec.mlp_dim,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        rms_norm_eps=spec.norm_eps,
        tie_word_embeddings=spec.tie_embeddings,
        max_position_embeddings=spec.max_positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(ends),
        pad_token_id=tokenizer.pad_token_id,
        dtype=str(params["embed"]["embedding"].dtype),
    ).to_json_file(directory / "config.json")
    tokenizer.save_pretrained(directory)


def read_spec(path: Path) -> ModelSpec:
    """The spec that a config.json describes.

    Raises:
      UserError: on an architecture, activation, bias or rope scaling that is not modelled.
    """
    values = _json(path)
    architectures = values.get("architectures") or [values.get("model_type")]
    if architectures[0] not in ARCHITECTURES:
        raise UserError(
            f"architecture {architectures[0]!r} in {path} is not supported; known: "
            f"{', '.join(ARCHITECTURES)}"
        )
    # Its defaults are the format's: save_pretrained leaves out what equals them.
    config = LlamaConfig.from_dict(values)
    rope = config.rope_parameters
    unsupported = {
        "rope_scaling": rope["rope_type"] != "default" and rope["rope_type"],
        "hidden_act": config.hidden_act != "silu" and config.hidden_act,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }
    for key, value in unsupported.items():
        if value:
            raise UserError(f"{key} {value!r} in {path} is not supported; use a model without it")
    return ModelSpec(
        vocab_size=config.vocab_size,
        embed_dim=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        mlp_dim=config.intermediate_size,
        rope_theta=float(rope["rope_theta"]),
        norm_eps=config.rms_norm_eps,
        tie_embeddings=config.tie_word_embeddings,
        max_positions=config.max_position_embeddings,
    )


def read_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model directory or a bundle, exactly as its tokenizer.json says.

    Not through AutoTokenizer, which rebuilds some tokenizers by the config's class instead.

    Raises:
      UserError: where there is no tokenizer.json.
    """
    if not (directory / "tokenizer.json").is_file():
        raise UserError(
            f"{directory} has no tokenizer.json; save the tokenizer there with transformers' "
            "save_pretrained"
        )
    return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)


def _weight_files(directory: Path) -> tuple[Path, ...]:
    index = directory / "model.safetensors.index.json"
    names = (
        sorted(set(_json(index)["weight_map"].values()))
        if index.exists()
        else ["model.safetensors"]
    )
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index} names {name!r}, which lies outside {directory}")
        if not (directory / name).is_file():
            raise UserError(
                f"{directory} has no {name}; fetch the model again, or save it as safetensors "
                "(pickled weights are not read)"
            )
    return tuple(directory / name for name in names)


def read_license(directory: Path) -> str:
    """The licence that a directory's model card states, or "unknown".

    Raises:
      UserError: where there is a card whose metadata cannot be read.
    """
    card = directory / "README.md"
    if not card.is_file():
        return UNKNOWN_LICENSE
    try:
        return str(ModelCard.load(card).data.get("license") or UNKNOWN_LICENSE)
    except (ValueError, yaml.YAMLError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{card} has metadata that cannot be read ({reason}); correct or remove it"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}; give a model directory") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from error
