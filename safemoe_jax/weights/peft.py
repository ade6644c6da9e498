"""LoRA adapters in PEFT's format: experts out, and adapters trained elsewhere in.

    adapter_model.safetensors  base_model.model.<module>.lora_A.weight [R, D], .lora_B.weight [O, R]
    adapter_config.json        rank, alpha, and which modules

What an adapter's config says is either computed exactly or refused by its field's name. Pickled
adapters are not read.

Shape letters: D input width, O output width, E experts, R rank, L layers.
"""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from safemoe_jax.config import ExpertsConfig, Target
from safemoe_jax.errors import UserError
from safemoe_jax.fetch import file_digest
from safemoe_jax.model.spec import ModelSpec
from safemoe_jax.weights.huggingface import names, read_license
from safemoe_jax.weights.layout import leaf_shapes

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

# Target -> where its leaves are in our trees.
PATHS: dict[Target, str] = {
    "q": "layers/attention/q",
    "k": "layers/attention/k",
    "v": "layers/attention/v",
    "o": "layers/attention/o",
    "gate": "layers/mlp/gate",
    "up": "layers/mlp/up",
    "down": "layers/mlp/down",
}
_TARGETS = {path: target for target, path in PATHS.items()}
_TENSOR = "base_model.model.{}.lora_{}.weight"

# Fields that say how large the adapter is and where, and what they may be: `_rank_and_scale` and
# `_is_targeted` read them.
_READ: dict[str, Callable[[Any], bool]] = {
    "r": lambda _: True,  # this and the next are looked at where patterns have been applied
    "lora_alpha": lambda _: True,
    "use_rslora": lambda x: isinstance(x, bool),
    "rank_pattern": lambda x: isinstance(x, dict),
    "alpha_pattern": lambda x: isinstance(x, dict),
    "target_modules": lambda x: _is_text(x) or _are(x, _is_text),
    "exclude_modules": lambda x: _is_text(x) or _are(x, _is_text),
    "layers_to_transform": lambda x: _is_whole(x) or _are(x, _is_whole),
    "layers_pattern": lambda x: _is_text(x) or _are(x, _is_text),
}
# Fields that change nothing about what a trained adapter on linear layers computes.
_IDLE = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",  # PEFT itself turns it off for linear layers
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# Every other field, known or not, must be off. Initializations that are not here change the base.
_OFF: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_whole(value: object) -> bool:
    return type(value) is int


def _are(values: object, kind: Callable[[object], bool]) -> bool:
    return isinstance(values, list) and all(map(kind, values))


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an adapter is from, as manifests record it.

    Attributes:
      sha256: of its weights.
      base_model_name_or_path: of the model that it was trained on, as its config says; "" where it
        does not.
      license: as its model card states it, or "unknown".
    """

    sha256: str
    base_model_name_or_path: str
    license: str


class Update(NamedTuple):
    """What an adapter adds to one projection: scale * (x A) B, with A [D, R] and B [R, O]."""

    a_DR: np.ndarray
    b_RO: np.ndarray
    scale: float


class Adapter(NamedTuple):
    """One adapter: its updates by (target, layer), and its origin."""

    updates: dict[tuple[Target, int], Update]
    origin: Origin


def write_adapter(
    directory: Path,
    experts: dict[str, Any],
    index: int,
    config: ExpertsConfig,
    spec: ModelSpec,
    base_name: str,
) -> None:
    """Writes one expert so that `peft.PeftModel.from_pretrained` loads it.

    Args:
      directory: an empty directory.
      experts: collection `experts`, numpy leaves.
      index: which expert.
      config: its targets, rank and alpha.
      spec: of the base.
      base_name: what the base is called.
    """
    carried, tensors = carriers(config, spec), {}
    for module, (a_RD, b_OR) in projections(experts, index, config, spec).items():
        tensors[_TENSOR.format(module, "A")] = a_RD
        tensors[_TENSOR.format(module, "B")] = b_OR
    safetensors.numpy.save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    alpha = int(config.alpha) if config.alpha.is_integer() else config.alpha  # PEFT's type is int
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": config.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": [_suffix(module) for module in carried],
        "rank_pattern": {
            _suffix(module): config.rank * len(targets)
            for module, targets in carried.items()
            if len(targets) > 1
        },
        "alpha_pattern": {
            _suffix(module): alpha * len(targets)
            for module, targets in carried.items()
            if len(targets) > 1
        },
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    (directory / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def carriers(config: ExpertsConfig, spec: ModelSpec) -> dict[str, list[Target]]:
    """Of the modules those that carry experts, and which of their targets do; see `modules`."""
    carried = {
        module: [target for target in targets if target in config.targets]
        for module, targets in modules(spec).items()
    }
    return {module: targets for module, targets in carried.items() if targets}


def projections(
    experts: dict[str, Any], index: int, config: ExpertsConfig, spec: ModelSpec
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """One expert's A [R, D] and B [O, R] of every module that carries it, by the module's name in
    `transformers`."""
    leaves = flatten_dict(experts, sep="/")
    return {
        module.format(layer): _joined(leaves, targets, modules(spec)[module], layer, index, spec)
        for module, targets in carriers(config, spec).items()
        for layer in range(spec.num_layers)
    }


def _joined(
    leaves: Mapping[str, np.ndarray],
    carried: Sequence[Target],
    targets: Sequence[Target],
    layer: int,
    index: int,
    spec: ModelSpec,
) -> tuple[np.ndarray, np.ndarray]:
    """A [R, D] and B [O, R] of one module: of its targets those that carry an expert, side by side.

    Where a module is several projections at once, A holds theirs one under the other, and B each
    one's in its own rows and columns.
    """
    a_RD = np.concatenate([leaves[f"{PATHS[target]}/a"][layer, index].T for target in carried])
    rank, shapes, blocks = len(a_RD) // len(carried), leaf_shapes(spec), []
    for target in targets:
        block = np.zeros((shapes[f"{PATHS[target]}/kernel"][1], len(a_RD)), np.float32)
        if target in carried:
            at = carried.index(target) * rank
            block[:, at : at + rank] = leaves[f"{PATHS[target]}/b"][layer, index].T
        blocks.append(block)
    # In order: safetensors writes a transposed array's buffer as it lies.
    return np.ascontiguousarray(a_RD), np.concatenate(blocks)


def base_name_of(directory: Path) -> str:
    """The base that an adapter names, or "".

    Raises:
      UserError: where the directory holds no adapter that can be read.
    """
    return str(_read_config(directory).get("base_model_name_or_path") or "")


def read_adapter(directory: Path, spec: ModelSpec) -> Adapter:
    """Reads an adapter for a base of this spec.

    Args:
      directory: holds adapter_config.json and adapter_model.safetensors.
      spec: of the base.

    Returns:
      Float32 updates of the modules that its config targets, with PEFT's scale: alpha / r, or
      alpha / sqrt(r) with rank stabilization (arXiv 2312.03732), patterns applied.

    Raises:
      UserError: naming the field that is not supported, or the tensor that is missing, has no place
        or has another shape.
    """
    config = _read_config(directory)
    try:
        targeted = {
            name: (at, *_rank_and_scale(config, name))
            for name, at in _modules(spec)
            if _is_targeted(config, name, at[1])
        }
    except (re.error, ValueError) as error:
        raise UserError(f"{directory}/{CONFIG}: {error}; save the adapter again") from error
    if not targeted:
        raise UserError(
            f"{directory}/{CONFIG}: target_modules {config['target_modules']!r} names no linear "
            "layer of the base; those that can carry an expert end in "
            f"{', '.join(map(_suffix, modules(spec)))}"
        )
    tensors = _read_tensors(directory)
    expected = {_TENSOR.format(name, letter): name for name in targeted for letter in "AB"}
    if missing := sorted(expected.keys() - tensors.keys()):
        raise UserError(
            f"{directory}/{WEIGHTS} lacks {missing[0]}, one of {len(missing)} that target_modules "
            "and layers_to_transform call for; is it of another base, or cut short?"
        )
    if extra := sorted(tensors.keys() - expected.keys()):
        raise UserError(
            f"{directory}/{WEIGHTS} holds {extra[0]}, which has no place in an expert "
            f"({len(extra)} such); experts are LoRA on "
            f"{', '.join(map(_suffix, modules(spec)))}"
        )
    shapes, updates = leaf_shapes(spec), {}
    for name, ((targets, layer), rank, scale) in targeted.items():
        parts = [shapes[f"{PATHS[target]}/kernel"] for target in targets]
        features = [part[1] for part in parts]
        wanted = {"A": (rank, parts[0][2]), "B": (sum(features), rank)}
        for letter, shape in wanted.items():
            tensor = _TENSOR.format(name, letter)
            if (found := tensors[tensor].shape) != shape:
                raise UserError(
                    f"{directory}/{WEIGHTS}: {tensor} is {list(found)}; its config and the base "
                    f"make it {list(shape)}"
                )
        a_DR, b_RO = (tensors[_TENSOR.format(name, letter)].T.astype(np.float32) for letter in "AB")
        own_RO = np.split(b_RO, np.cumsum(features)[:-1], axis=1)
        for target, part_RO in zip(targets, own_RO, strict=True):
            updates[target, layer] = Update(a_DR, part_RO, scale)
    return Adapter(
        updates,
        Origin(
            sha256=file_digest(directory / WEIGHTS),
            base_model_name_or_path=base_name_of(directory),
            license=read_license(directory),
        ),
    )


def stack(adapters: Sequence[Adapter], spec: ModelSpec) -> tuple[ExpertsConfig, dict[str, Any]]:
    """Adapters of any ranks, alphas and targets as one set of experts.

    The rank is the largest; smaller ones are filled up with zeros in A and in B, and what an
    adapter does not target is zero, so neither adds anything. The scale is what all have in common;
    where they differ it is 1, and each one's own is multiplied into its B.

    Returns:
      What the experts are, and their tree.
    """
    updates = [update for adapter in adapters for update in adapter.updates.values()]
    rank = max(update.a_DR.shape[1] for update in updates)
    scales = {update.scale for update in updates}
    scale = scales.pop() if len(scales) == 1 else 1.0
    used = {target for adapter in adapters for target, _ in adapter.updates}
    targets = tuple(target for target in PATHS if target in used)
    shapes, leaves = leaf_shapes(spec), {}
    for target in targets:
        path = PATHS[target]
        layers, features, width = shapes[f"{path}/kernel"]
        a_LEDR = np.zeros((layers, len(adapters), width, rank), np.float32)
        b_LERO = np.zeros((layers, len(adapters), rank, features), np.float32)
        for expert, adapter in enumerate(adapters):
            for layer in range(layers):
                if update := adapter.updates.get((target, layer)):
                    own = update.a_DR.shape[1]
                    a_LEDR[layer, expert, :, :own] = update.a_DR
                    b_LERO[layer, expert, :own] = update.b_RO * np.float64(update.scale / scale)
        leaves[f"{path}/a"], leaves[f"{path}/b"] = a_LEDR, b_LERO
    return ExpertsConfig(targets, rank, scale * rank), unflatten_dict(leaves, sep="/")


def modules(spec: ModelSpec) -> dict[str, list[Target]]:
    """The modules of `transformers` that can carry an expert, "{}" the layer, and the targets that
    each is: one, or several in the order of its rows."""
    found: dict[str, list[Target]] = {}
    for leaf, name in names(spec).items():
        if target := _TARGETS.get(leaf.removesuffix("/kernel")):
            found.setdefault(name.removesuffix(".weight"), []).append(target)
    return found


def _modules(spec: ModelSpec) -> Iterator[tuple[str, tuple[list[Target], int]]]:
    """Every module that can carry an expert, by its name in `transformers`: targets and layer."""
    for module, targets in modules(spec).items():
        for layer in range(spec.num_layers):
            yield module.format(layer), (targets, layer)


def _suffix(module: str) -> str:
    return module.rpartition(".")[-1]


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{directory} has no {CONFIG}; give a directory that PEFT's save_pretrained wrote"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); save the adapter again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object; save the adapter again")
    for field, value in config.items():
        if field in _READ and not (value is None or _READ[field](value)):
            raise UserError(f"{path}: {field} is {value!r}, which PEFT never writes; save it again")
        if field in _IDLE.union(_READ) or (field in _OFF and value in _OFF[field]):
            continue
        if field in _OFF or value not in (None, False, [], {}):
            raise UserError(
                f"{path}: {field} is {value!r}, which an expert cannot be exactly; give a plain "
                "LoRA adapter, without it"
            )
    if missing := sorted({"peft_type", "r", "lora_alpha", "target_modules"} - config.keys()):
        raise UserError(f"{path} lacks {missing[0]!r}; save the adapter again with PEFT")
    if config["target_modules"] is None:
        raise UserError(f"{path}: target_modules is None; it must name linear layers")
    return config


def _rank_and_scale(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    def by_pattern(patterns: Mapping[str, Any] | None, value: Any) -> Any:
        """PEFT's rule: the first pattern that the end of the module's name matches."""
        for pattern, own in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return own
        return value

    rank = by_pattern(config.get("rank_pattern"), config["r"])
    alpha = by_pattern(config.get("alpha_pattern"), config["lora_alpha"])
    if not (_is_whole(rank) and type(alpha) in (int, float)) or not (
        # JSON knows infinity, NaN, and whole numbers that no float holds.
        1 <= rank <= sys.float_info.max and 0 < alpha <= sys.float_info.max
    ):
        raise ValueError(f"r is {rank!r} and lora_alpha {alpha!r} for {module}")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _is_targeted(config: Mapping[str, Any], module: str, layer: int) -> bool:
    """PEFT's rules: text is a pattern for the whole name, a list holds ends of names."""
    if (excluded := config.get("exclude_modules")) and _names(excluded, module):
        return False
    targets, layers = config["target_modules"], config.get("layers_to_transform")
    if targets == "all-linear":
        return True
    if isinstance(targets, str) or module in targets or layers in (None, []):
        return _names(targets, module)
    patterns = config.get("layers_pattern") or ["layers"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    chosen = [layers] if isinstance(layers, int) else layers
    found = any(re.match(rf"(.*\.)?{pattern}\.{layer}\.", module) for pattern in patterns)
    return _names(targets, module) and found and layer in chosen


def _names(pattern: str | Sequence[str], module: str) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, module) is not None
    return any(module == end or module.endswith(f".{end}") for end in pattern)


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    path = directory / WEIGHTS
    if not path.is_file():
        remedy = (
            f"{PICKLED} is pickled and not read; load it where you trust it and save it with "
            "save_pretrained(DIR, safe_serialization=True)"
            if (directory / PICKLED).exists()
            else "give a directory that PEFT's save_pretrained wrote"
        )
        raise UserError(f"{directory} has no {WEIGHTS}; {remedy}")
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read ({error}); copy it again") from error
