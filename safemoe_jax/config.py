"""Configuration: a Python file of ml_collections in, frozen dataclasses out.

An experiment file holds every value; nothing here has a default. An unknown or a missing key, and a
value of the wrong type, is a `UserError` that names the key.
"""

import dataclasses
import math
import runpy
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from absl import flags
from ml_collections import ConfigDict, config_flags

from safemoe_jax.errors import UserError

# What `generate --routing` and `export --gates` take beside names of domains.
_TAKEN = ("router", "base", "uniform", "mean")

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The frozen base.

    Attributes:
      source: "smollm2-135m-instruct" (embedded), a Hugging Face directory, a .gguf file, or a hub
        id that `safemoe fetch` brings.
      param_dtype: how the frozen weights rest in memory. "int8" holds a matrix row's weights in a
        byte each; "nf4" those of layers in half a byte, with embedding and head in int8; "gguf"
        keeps a GGUF file's own blocks, rounding nothing again, with a byte for each weight of more
        than 4 bits and of embedding and head. Norms and biases are float32 then.
      compute_dtype: what activations and matmuls use; experts and router rest in float32.
      remat: what the backward pass recomputes: "none", "dots" (keeps matmul outputs) or "full".
      attention: "auto" takes what the platform has: splash attention on TPUs, cuDNN's on GPUs where
        compute_dtype has 16 bits, else the reference.
    """

    source: str
    param_dtype: Literal["float32", "bfloat16", "int8", "nf4", "gguf"]
    compute_dtype: Literal["float32", "bfloat16"]
    remat: Literal["none", "dots", "full"]
    attention: Literal["auto", "reference", "cudnn", "splash"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The corpora and how they become packed rows.

    Attributes:
      corpus: "pyrit" (embedded), "jsonl" (the file or directory in `path`), or "beavertails" (the
        hub's 330k_train, or a local file of its format in `path`; CC BY-NC 4.0).
      path: the corpus' file or directory; empty for one that is fetched.
      domains: harm domains in order; one expert each. Rows of other domains are dropped, counted.
      sequence_length: tokens in a packed row.
      unsafe_min_score: mean human harm score in [0, 1] from which a row of PyRIT is `unsafe`, be it
        the corpus' own or one for the judge.
      safe_max_score: mean human harm score up to which it is `safe`.
      informative_min_characters: shortest safe answer that may enter the safe-informative set.
    """

    corpus: Literal["pyrit", "jsonl", "beavertails"]
    path: str
    domains: tuple[str, ...]
    sequence_length: int
    unsafe_min_score: float
    safe_max_score: float
    informative_min_characters: int


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """LoRA experts: y = x W + (alpha / rank) * sum_e gates[e] (x A_e) B_e."""

    targets: tuple[Target, ...]
    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ExpertsSection(ExpertsConfig):
    """The experts and where they come from.

    Attributes:
      source: "" trains them in stage one; else a directory that `safemoe import` wrote, whose
        targets, rank and alpha are then those to give here.
    """

    source: str


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """The router's form; every axis is a choice, since the paper's full text is not public.

    Attributes:
      scope: "layer" (weights per layer) or "shared" (one set for all layers).
      granularity: "token" (this token's hidden state) or "sequence" (running mean over the prompt).
      activation: "softmax", "softmax_null" (one more slot that selects no expert), "sigmoid" or
        "signed" (tanh: an expert can be subtracted).
      top_k: experts kept per token, by magnitude of the gate; 0 keeps all. The others' gates are
        dropped, not shared out.
      temperature: divides the router's logits.
    """

    scope: Literal["layer", "shared"]
    granularity: Literal["token", "sequence"]
    activation: Literal["softmax", "softmax_null", "sigmoid", "signed"]
    top_k: int
    temperature: float


@dataclasses.dataclass(frozen=True)
class AdamWConfig:
    """AdamW with linear warm-up; then its rate stays, or falls to zero as named."""

    learning_rate: float
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: int
    weight_decay: float
    clip_norm: float
    b1: float
    b2: float


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One stage's loop.

    Attributes:
      steps: optimizer steps.
      rows: packed rows a step draws from each stream; stage one has one stream per expert, stage
        two has one.
      accumulation: microbatches that a step is cut into.
      validate_every: steps between validations; the best validated weights are what is kept.
      save_every: steps between checkpoints.
      keep: checkpoints kept.
    """

    steps: int
    rows: int
    accumulation: int
    validate_every: int
    save_every: int
    keep: int


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; their product is the number of devices used."""

    data: int
    fsdp: int
    tensor: int
    context: int


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is generated and how it is judged.

    Attributes:
      systems: systems compared, by their names in `evaluation.systems.SYSTEMS`.
      split: "test", or "validation" for choices that are still to be made.
      prompts_per_domain: held-out prompts per domain; 0 takes all.
      left_out: domains that some systems are also trained without, each in turn, and then asked
        about; (), or any of data.domains.
      attacks: what is done to base and SafeMoE besides: "prefix", "two_shot" (`attacks`).
      utility: also measures what is left of general ability: GSM8K, likelihood of benign answers.
      benchmarks: published sets that are asked besides, by name (docs/benchmarks.md), or
        "NAME=PATH" for a local copy.
      prompts_per_benchmark: prompts of each at most; 0 takes all.
      max_new_tokens: longest answer.
      temperature: 0 decodes greedily.
      top_p: nucleus kept when sampling.
      batch_size: answers decoded at once.
      judges: asked besides the embedded judge (docs/recipes/judges.md). TEMPLATE[@URL]#MODEL is at
        an OpenAI-compatible endpoint, localhost:8000 without a URL; the answers go there.
        TEMPLATE@local#MODEL runs here: MODEL is what model.source may be, and rests, computes and
        is cut as the base is.
      judge_rows: labelled rows from which the embedded judge learns topic and language; each costs
        it some four short forward passes.
      demonstration: true marks a run that is too short to judge the claim; the report says so.
    """

    systems: tuple[str, ...]
    split: Literal["test", "validation"]
    prompts_per_domain: int
    left_out: tuple[str, ...]
    attacks: tuple[Literal["prefix", "two_shot"], ...]
    utility: bool
    benchmarks: tuple[str, ...]
    prompts_per_benchmark: int
    max_new_tokens: int
    temperature: float
    top_p: float
    batch_size: int
    judges: tuple[str, ...]
    judge_rows: int
    demonstration: bool


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    experts: AdamWConfig
    router: AdamWConfig


@dataclasses.dataclass(frozen=True)
class TrainConfigs:
    experts: TrainConfig
    router: TrainConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment."""

    seed: int
    model: ModelConfig
    data: DataConfig
    experts: ExpertsSection
    router: RouterConfig
    optimizer: OptimizerConfig
    train: TrainConfigs
    mesh: MeshConfig
    evaluation: EvaluationConfig


def read_config(path: Path, overrides: Sequence[str]) -> ConfigDict:
    """What an experiment file's `get_config` returns, with changes applied; not checked yet.

    Args:
      path: the experiment file.
      overrides: as on the command line, `--config.KEY=VALUE`.

    Raises:
      UserError: where the file cannot be read, a key is not there, or a value is of another type.
    """
    config = call_of(path, "get_config")
    for override in overrides:
        current, values, argv = _current(config, override), flags.FlagValues(), ["", override]
        try:
            config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
            values(argv)
        except (flags.Error, TypeError, ValueError) as error:
            raise UserError(
                f"{override} does not fit: the value there is {current!r}; give another "
                f"{type(current).__name__}"
            ) from error
    return config


def call_of(path: Path, function: str) -> Any:
    """What a function of an experiment or sweep file returns.

    Raises:
      UserError: where there is no such file, or its code fails.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file; the shipped experiments are in experiments/")
    # Files import one another as `experiments.NAME`; sweeps are one level deeper, and a file may
    # lie beside that directory. A file's own directory comes last: what is in it hides no package.
    beside, *above = map(str, path.resolve().parents[:3])
    sys.path[:] = [*above, *sys.path, beside]
    try:
        found = runpy.run_path(str(path))
        if function in found:
            return found[function]()
    except Exception as error:  # whatever the user's own code raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} cannot be read as an experiment ({reason}); correct it") from error
    raise UserError(
        f"{path} has no {function}(); an experiment file has get_config(), a sweep file "
        "get_points() as well"
    )


def freeze(values: ConfigDict | dict[str, Any], *, trained: bool = False) -> Config:
    """Checks an experiment's values and freezes them.

    Args:
      values: the ConfigDict of an experiment file, overrides applied.
      trained: they are those of a bundle, whose training is over, however it was planned.

    Raises:
      UserError: on an unknown or missing key, a value of the wrong type, or values that contradict
        each other.
    """
    plain = values.to_dict() if isinstance(values, ConfigDict) else values
    config = _build(Config, plain, "config")
    _check(config)
    if not trained:
        _check_training(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The inverse of `freeze`, JSON-serializable."""
    return dataclasses.asdict(config)


def _current(config: ConfigDict, override: str) -> Any:
    """The value that `--config.a.b=value` would replace; it must be there."""
    key, equals, _ = override.partition("=")
    if not key.startswith("--config.") or not equals:
        raise UserError(
            f"unknown argument {override!r}; values are changed by --config.KEY=VALUE, for the "
            "rest see `safemoe --help`"
        )
    value: Any = config
    path = "config"
    for part in key.split(".")[1:]:
        known = list(value) if isinstance(value, ConfigDict) else []
        if part not in known:
            raise UserError(
                f"unknown key {path}.{part} in {override}; {path} has "
                f"{', '.join(known) or 'no keys'}"
            )
        value, path = value[part], f"{path}.{part}"
    if isinstance(value, ConfigDict):
        raise UserError(f"{override} names a section; set one of its keys: {', '.join(value)}")
    return value


def _build(kind: Any, values: Any, path: str) -> Any:
    """Builds the dataclass `kind` from a mapping, naming the full path of whatever is wrong."""
    if not isinstance(values, dict):
        raise UserError(f"{path} is {values!r}; it must be a section with keys")
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(values) - set(hints)):
        raise UserError(f"unknown key {path}.{unknown[0]}; known keys: {', '.join(hints)}")
    if missing := sorted(set(hints) - set(values)):
        raise UserError(f"missing key {path}.{missing[0]}; add it to the experiment file")
    return kind(**{key: _value(hint, values[key], f"{path}.{key}") for key, hint in hints.items()})


def _value(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{path} is {value!r}; choose one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{path} is {value!r}; it must be a tuple")
        return tuple(_value(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if hint is float and type(value) in (int, float):
        if not abs(value) <= sys.float_info.max:
            raise UserError(f"{path} is not finite; give it a number")
        return float(value)
    if type(value) is not hint:
        kind = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}[hint]
        raise UserError(f"{path} is {value!r} ({type(value).__name__}); it must be {kind}")
    return value


def _check_training(config: Config) -> None:
    for stage, streams in (("experts", len(config.data.domains)), ("router", 1)):
        train, warmup = getattr(config.train, stage), getattr(config.optimizer, stage).warmup_steps
        if warmup >= train.steps:
            raise UserError(
                f"config.optimizer.{stage}.warmup_steps is {warmup} and train.{stage}.steps "
                f"{train.steps}; a warm-up must end before the training does"
            )
        if train.rows * streams % train.accumulation:
            raise UserError(
                f"a step's {train.rows * streams} rows cannot be cut into {train.accumulation} "
                f"microbatches; choose train.{stage}.accumulation as a divisor of it"
            )


def _check(config: Config) -> None:
    """Rejects values that are well-typed and cannot work."""
    # From the first number on, and below the second.
    ranges: dict[str, tuple[float, float, float]] = {
        "seed": (config.seed, 0, 2**32),
        "data.sequence_length": (config.data.sequence_length, 2, math.inf),
        "evaluation.temperature": (config.evaluation.temperature, 0, math.inf),
    }
    positive = {
        "experts.alpha": config.experts.alpha,
        "evaluation.top_p": config.evaluation.top_p,
        "experts.rank": config.experts.rank,
        "router.temperature": config.router.temperature,
        "evaluation.max_new_tokens": config.evaluation.max_new_tokens,
        "evaluation.batch_size": config.evaluation.batch_size,
        "evaluation.judge_rows": config.evaluation.judge_rows,
    }
    for stage in ("experts", "router"):
        train, optimizer = getattr(config.train, stage), getattr(config.optimizer, stage)
        positive |= {
            f"train.{stage}.{key}": getattr(train, key)
            for key in ("steps", "rows", "accumulation", "validate_every", "save_every", "keep")
        }
        positive[f"optimizer.{stage}.clip_norm"] = optimizer.clip_norm
        positive[f"optimizer.{stage}.learning_rate"] = optimizer.learning_rate
        ranges |= {
            f"optimizer.{stage}.b1": (optimizer.b1, 0, 1),
            f"optimizer.{stage}.b2": (optimizer.b2, 0, 1),
            f"optimizer.{stage}.warmup_steps": (optimizer.warmup_steps, 0, math.inf),
            f"optimizer.{stage}.weight_decay": (optimizer.weight_decay, 0, math.inf),
        }
    for axis in ("data", "fsdp", "tensor", "context"):
        positive[f"mesh.{axis}"] = getattr(config.mesh, axis)
    for key, value in positive.items():
        if value <= 0:
            raise UserError(f"config.{key} is {value}; it must be greater than 0")
    for key, (value, first, end) in ranges.items():
        if not first <= value < end:
            below = f" and below {end}" if end < math.inf else ""
            raise UserError(f"config.{key} is {value}; it must be at least {first}{below}")
    if config.evaluation.top_p > 1:
        raise UserError(f"config.evaluation.top_p is {config.evaluation.top_p}; 1 keeps all")

    if config.model.attention == "cudnn" and config.model.compute_dtype == "float32":
        raise UserError(
            "config.model.attention is 'cudnn' with compute_dtype 'float32'; cuDNN's kernel needs "
            "compute_dtype 'bfloat16', or choose attention 'auto'"
        )
    domains, targets = config.data.domains, config.experts.targets
    if not domains or len(set(domains)) != len(domains):
        raise UserError(f"config.data.domains is {domains}; name each domain once, at least one")
    if taken := [domain for domain in domains if domain in _TAKEN]:
        raise UserError(
            f"config.data.domains names {taken[0]!r}, which --routing or --gates understand as "
            "something else; choose another name"
        )
    if not targets or len(set(targets)) != len(targets):
        raise UserError(f"config.experts.targets is {targets}; name each target once")
    if not 0 <= config.router.top_k <= len(domains):
        raise UserError(
            f"config.router.top_k is {config.router.top_k}; with {len(domains)} experts it must be "
            f"between 0 (all) and {len(domains)}"
        )
    for key in ("systems", "left_out", "attacks"):
        names = getattr(config.evaluation, key)
        if len(set(names)) != len(names):
            raise UserError(f"config.evaluation.{key} is {names}; name each once")
    left_out = config.evaluation.left_out
    if unknown := [domain for domain in left_out if domain not in domains]:
        raise UserError(
            f"config.evaluation.left_out names {unknown[0]!r}; choose of {', '.join(domains)}"
        )
    if left_out and len(domains) < 2:
        raise UserError(
            "config.evaluation.left_out leaves no expert; it needs two data.domains or more"
        )
    if config.router.activation == "softmax" and len(domains) - bool(left_out) < 2:
        raise UserError(
            "config.router.activation is 'softmax', which gives a single expert the gate 1 at "
            "every token, so that no router can learn; choose 'softmax_null', 'signed' or "
            "'sigmoid', or two data.domains (three with left_out) or more"
        )
    if config.data.safe_max_score >= config.data.unsafe_min_score:
        raise UserError(
            f"config.data.safe_max_score is {config.data.safe_max_score}, not below "
            f"unsafe_min_score {config.data.unsafe_min_score}; a row cannot be both"
        )
    needs_path = {"pyrit": False, "jsonl": True}.get(config.data.corpus)
    if needs_path is not None and needs_path != bool(config.data.path):
        raise UserError(
            f"config.data.path is {config.data.path!r} with corpus {config.data.corpus!r}; "
            'set a path with corpus "jsonl", none with "pyrit"'
        )
    for key in ("prompts_per_domain", "prompts_per_benchmark"):
        if (value := getattr(config.evaluation, key)) < 0:
            raise UserError(f"config.evaluation.{key} is {value}; 0 takes all, or name a number")
