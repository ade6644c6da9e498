"""Weights and tokenizer from and to a Hugging Face directory: config.json and safetensors."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import transformers
import yaml
from flax.traverse_util import flatten_dict
from huggingface_hub import ModelCard
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerFast

from safemoe_jax.errors import UserError
from safemoe_jax.model.spec import FAMILIES, Kind, ModelSpec, RopeScaling, shortest_pattern
from safemoe_jax.weights.layout import (
    UNKNOWN_LICENSE,
    Checkpoint,
    Index,
    Tensor,
    Weights,
    leaf_shapes,
)

NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/attention/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attention/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attention/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attention/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/attention/q/bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/attention/k/bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/attention/v/bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers/attention/q_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers/attention/k_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
# With norms behind attention and MLP, "post_attention_layernorm" is not the one before the MLP.
_POST_NORM_NAMES = {
    "layers/attention_post_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp_norm/scale": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers/mlp_post_norm/scale": "model.layers.{}.post_feedforward_layernorm.weight",
}
_FUSED_NAMES = {
    **{f"layers/attention/{x}/kernel": "model.layers.{}.self_attn.qkv_proj.weight" for x in "qkv"},
    "layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_up_proj.weight",
    "layers/mlp/up/kernel": "model.layers.{}.mlp.gate_up_proj.weight",
}

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu_pytorch_tanh"}
_LAYER_TYPES: dict[str, Kind] = {"sliding_attention": "local", "full_attention": "global"}


def names(spec: ModelSpec) -> dict[str, str]:
    """The tensor of each leaf of a base, "{}" standing for the layer."""
    found = dict(NAMES)
    if spec.traits.post_norms:
        found |= _POST_NORM_NAMES
    if spec.traits.fused:
        found |= _FUSED_NAMES
    return {leaf: found[leaf] for leaf in leaf_shapes(spec)}


def load(directory: Path) -> Checkpoint:
    """Opens a model directory as `save_pretrained` writes it, weights in one file or in shards.

    Args:
      directory: holds config.json, *.safetensors and tokenizer.json.

    Raises:
      UserError: naming the file or tensor that is absent, or what this package does not model.
    """
    spec = read_spec(directory / "config.json")
    files = _weight_files(directory)
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="np") as shard:
                for name in shard.keys():  # noqa: SIM118
                    shape = tuple(shard.get_slice(name).get_shape())
                    tensors[name] = Tensor(shape, functools.partial(_read, file, name))
        except SafetensorError as error:
            raise UserError(
                f"{directory} has a broken safetensors file ({error}); fetch it again"
            ) from error
    # transformers does not read them either: the frequencies follow from the config, and a tied
    # head is the embedding.
    used = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith("rotary_emb.inv_freq")
        and not (spec.tie_embeddings and name == NAMES["head/kernel"])
    }
    weights = Weights(spec, names(spec), used)
    return Checkpoint(spec, weights, read_tokenizer(directory), read_license(directory), files)


def _read(file: Path, name: str, index: Index) -> np.ndarray:
    """A slice of a tensor. The file is mapped for as long as this takes, so that its pages do not
    stay with the process."""
    with safe_open(file, framework="np") as shard:
        return shard.get_slice(name)[index]


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

    Raises:
      UserError: where the config that `transformers` writes is not that of `spec`.
    """
    config = _config(spec)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, list(ends)
    config.pad_token_id = tokenizer.pad_token_id
    config.dtype = str(params["embed"]["embedding"].dtype)
    config.to_json_file(directory / "config.json")
    if (written := read_spec(directory / "config.json")) != spec:
        raise UserError(
            f"transformers {transformers.__version__} writes a config of {written}, and the "
            f"weights are of {spec}; install another version of transformers"
        )
    tensors: dict[str, np.ndarray] = {}
    leaves, named = flatten_dict(params, sep="/"), names(spec)
    for leaf in leaf_shapes(spec):  # whose order is that of the parts of a fused tensor
        values = leaves[leaf]
        for index, value in enumerate(values) if leaf.startswith("layers/") else [(0, values)]:
            name = named[leaf].format(index)
            tensors[name] = np.concatenate([tensors[name], value]) if name in tensors else value
    split = split_state_dict_into_shards_factory(
        tensors, get_storage_size=lambda x: x.nbytes, filename_pattern="model{suffix}.safetensors"
    )
    for file, of_file in split.filename_to_tensors.items():
        shard = {name: tensors[name] for name in of_file}
        safetensors.numpy.save_file(shard, directory / file, metadata={"format": "pt"})
    if split.is_sharded:
        where = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        path = directory / "model.safetensors.index.json"
        path.write_text(json.dumps(where, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(directory)


def _config(spec: ModelSpec) -> PreTrainedConfig:
    """The config of which `read_spec` makes this spec."""
    kind: type[Any] = CONFIG_MAPPING[spec.family]  # each takes arguments of its own
    layers = [spec.pattern[i % len(spec.pattern)] for i in range(spec.num_layers)]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": spec.rope_theta}
    if (scaling := spec.rope_scaling) is not None:
        rope |= {"rope_type": "linear", "factor": scaling.factor}
        if scaling.original_positions:
            rope |= {
                "rope_type": "llama3",
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_positions,
            }
    if spec.local_rope_theta is not None:
        local = {"rope_type": "default", "rope_theta": spec.local_rope_theta}
        rope = {"full_attention": rope, "sliding_attention": local}
    activation = _ACTIVATIONS[spec.traits.activation]
    # What a class does not know, a spec of its family does not have either.
    of_some = {
        "head_dim": spec.head_dim,
        "hidden_act": activation,
        "hidden_activation": activation,
        "sliding_window": spec.window,
        "use_sliding_window": spec.window is not None,
        "layer_types": [
            "sliding_attention" if layer == "local" else "full_attention" for layer in layers
        ],
        "no_rope_layers": [int(layer != "unrotated") for layer in layers],
        "query_pre_attn_scalar": spec.query_scalar or spec.head_dim,
        "attn_logit_softcapping": spec.attention_softcap,
        "final_logit_softcapping": spec.logit_softcap,
    }
    return kind(
        architectures=[spec.traits.architecture],
        vocab_size=spec.vocab_size,
        hidden_size=spec.embed_dim,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        intermediate_size=spec.mlp_dim,
        rope_parameters=rope,
        rms_norm_eps=spec.norm_eps,
        tie_word_embeddings=spec.tie_embeddings,
        max_position_embeddings=spec.max_positions,
        **{key: value for key, value in of_some.items() if hasattr(kind, key)},
    )


def read_spec(path: Path) -> ModelSpec:
    """The spec that a config.json describes.

    Raises:
      UserError: on an architecture, activation, bias or rope scaling that is not modelled, and on
        values that are of no model.
    """
    values = _json(path)
    try:
        return _spec(values, path)
    except UserError:
        raise
    except (
        *(TypeError, ValueError, KeyError, IndexError, AttributeError),
        *(ArithmeticError, StrictDataclassError),
    ) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UserError(f"{path} cannot be read ({reason}); fetch it again") from error


def _spec(values: dict[str, Any], path: Path) -> ModelSpec:
    architecture = (values.get("architectures") or [values.get("model_type")])[0]
    known = {traits.architecture: family for family, traits in FAMILIES.items()}
    if architecture not in known:
        raise UserError(
            f"architecture {architecture!r} in {path} is not supported; known: {', '.join(known)}"
        )
    family = known[architecture]
    # Its defaults are the format's: save_pretrained leaves out what equals them.
    config = CONFIG_MAPPING[family].from_dict(values)
    rope = config.rope_parameters
    rope, local_rope = rope.get("full_attention", rope), rope.get("sliding_attention")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    kinds = _kinds(config, path)
    rotated = rope.get("partial_rotary_factor", 1.0)
    off = {
        "hidden_act": activation != _ACTIVATIONS[FAMILIES[family].activation] and activation,
        "partial_rotary_factor": rotated != 1.0 and rotated,
        "local rope_scaling": local_rope and local_rope["rope_type"] != "default",
        "use_sliding_window": "unrotated" in kinds and config.use_sliding_window,
    } | {
        key: getattr(config, key, None)
        for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention")
    }
    for key, value in off.items():
        if value:
            raise UserError(f"{key} {value!r} in {path} is not supported; use a model without it")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scalar = getattr(config, "query_pre_attn_scalar", None)
    return ModelSpec(
        vocab_size=config.vocab_size,
        embed_dim=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        mlp_dim=config.intermediate_size,
        rope_theta=float(rope["rope_theta"]),
        norm_eps=config.rms_norm_eps,
        tie_embeddings=config.tie_word_embeddings,
        max_positions=config.max_position_embeddings,
        family=family,
        pattern=shortest_pattern(kinds),
        window=config.sliding_window if "local" in kinds else None,
        local_rope_theta=local_rope and float(local_rope["rope_theta"]),
        rope_scaling=_rope_scaling(rope, path),
        query_scalar=None if scalar == head_dim else scalar,
        attention_softcap=getattr(config, "attn_logit_softcapping", None),
        logit_softcap=getattr(config, "final_logit_softcapping", None),
    )


def _kinds(config: PreTrainedConfig, path: Path) -> tuple[Kind, ...]:
    """The kind of each layer."""
    layers = range(config.num_hidden_layers)
    if (rotated := getattr(config, "no_rope_layers", None)) is not None:
        return tuple("global" if rotated[i] else "unrotated" for i in layers)
    if (types := getattr(config, "layer_types", None)) is not None:
        if unknown := set(types) - _LAYER_TYPES.keys():
            raise UserError(
                f"layer_types in {path} has {unknown.pop()!r}, which is not supported; known: "
                f"{', '.join(_LAYER_TYPES)}"
            )
        return tuple(_LAYER_TYPES[types[i]] for i in layers)
    kind: Kind = "local" if getattr(config, "sliding_window", None) else "global"
    return tuple(kind for _ in layers)


def _rope_scaling(rope: dict[str, Any], path: Path) -> RopeScaling | None:
    if (kind := rope["rope_type"]) == "default":
        return None
    if kind == "linear":
        return RopeScaling(rope["factor"])
    if kind == "llama3":
        return RopeScaling(
            rope["factor"],
            rope["low_freq_factor"],
            rope["high_freq_factor"],
            rope["original_max_position_embeddings"],
        )
    raise UserError(
        f"rope_scaling {kind!r} in {path} is not supported (known: linear, llama3); use a model "
        "without it"
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
    try:
        return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # a bare one is what the tokenizers package raises
        raise UserError(
            f"{directory}/tokenizer.json, or a file beside it, is no tokenizer's "
            f"({type(error).__name__}: {str(error)[:200]!r}); fetch it again"
        ) from error


def _weight_files(directory: Path) -> tuple[Path, ...]:
    index = directory / "model.safetensors.index.json"
    names = (
        sorted(set(map(str, _weight_map(index).values())))
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


def _weight_map(index: Path) -> dict[str, Any]:
    if not isinstance(found := _json(index).get("weight_map"), dict):
        raise UserError(f"{index} has no weight_map; fetch the model again")
    return found


def read_license(directory: Path) -> str:
    """The licence that a directory's model card states, or "unknown".

    Raises:
      UserError: where there is a card whose metadata cannot be read.
    """
    card = directory / "README.md"
    if not card.is_file():
        return UNKNOWN_LICENSE
    try:
        data = ModelCard.load(card).data
        licence = data.get("license")
        if licence == "other":  # whose name stands beside it
            licence = data.get("license_name") or licence
        return str(licence or UNKNOWN_LICENSE)
    except (ValueError, yaml.YAMLError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{card} has metadata that cannot be read ({reason}); correct or remove it"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}; give a model directory") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object; fetch it again")
    return values
