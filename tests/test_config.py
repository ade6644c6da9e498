import json
import re
import sys

import pytest

from experiments import pyrit
from safemoe_jax.config import call_of, freeze, to_dict
from safemoe_jax.errors import UserError


@pytest.fixture
def values():
    """The real experiment's values as a plain dict, to be broken at will."""
    return pyrit.get_config().to_dict()


def put(values, key, value):
    *sections, last = key.split(".")
    for section in sections:
        values = values[section]
    values[last] = value


def test_freezes_every_value(values):
    config = freeze(values)
    assert config.optimizer.router.learning_rate == values["optimizer"]["router"]["learning_rate"]
    assert config.experts.scale == values["experts"]["alpha"] / values["experts"]["rank"]
    assert config.data.domains == values["data"]["domains"]
    assert to_dict(config) == values


def test_a_config_survives_json(values):
    config = freeze(values)
    assert freeze(json.loads(json.dumps(to_dict(config)))) == config


def test_a_whole_number_serves_as_a_float(values):
    put(values, "experts.alpha", 8)
    alpha = freeze(values).experts.alpha
    assert alpha == 8.0
    assert type(alpha) is float


WRONG = {
    "an unknown key": ("train.router.stepps", 3, "unknown key config.train.router.stepps"),
    "an unknown section": ("trainer", {}, "unknown key config.trainer"),
    "a section that is a number": ("mesh", 3, "config.mesh is 3; it must be a section"),
    "text for an int": ("seed", "x", "config.seed is 'x' (str); it must be a whole number"),
    "a float for an int": ("seed", 1.5, "config.seed is 1.5 (float); it must be a whole number"),
    "a bool for an int": ("seed", True, "config.seed is True (bool)"),
    "a bool for a float": ("experts.alpha", True, "config.experts.alpha is True (bool)"),
    "text for a float": (
        "experts.alpha",
        "x",
        "config.experts.alpha is 'x' (str); it must be a number",
    ),
    "text for a tuple": ("data.domains", "privacy", "config.data.domains is 'privacy'"),
    "an item of a wrong type": ("data.domains", ("a", 2), "config.data.domains[1] is 2 (int)"),
    "an item that is no choice": (
        "experts.targets",
        ("q", "x"),
        "config.experts.targets[1] is 'x'; choose one of 'q', 'k', 'v', 'o', 'gate', 'up', 'down'",
    ),
    "no choice": (
        "router.activation",
        "relu",
        "config.router.activation is 'relu'; choose one of 'softmax', 'softmax_null', 'sigmoid', "
        "'signed'",
    ),
    "a domain twice": ("data.domains", ("a", "a"), "config.data.domains is ('a', 'a')"),
    "a domain that is a routing": (
        "data.domains",
        ("privacy", "uniform"),
        "config.data.domains names 'uniform', which --routing or --gates understand as",
    ),
    "no domain": ("data.domains", (), "config.data.domains is ()"),
    "a target twice": ("experts.targets", ("q", "q"), "config.experts.targets is ('q', 'q')"),
    "no target": ("experts.targets", (), "config.experts.targets is ()"),
    "more experts than there are": ("router.top_k", 8, "config.router.top_k is 8; with 7 experts"),
    "fewer experts than none": ("router.top_k", -1, "config.router.top_k is -1"),
    "a row both safe and unsafe": (
        "data.safe_max_score",
        0.5,
        "config.data.safe_max_score is 0.5, not below unsafe_min_score 0.5",
    ),
    "jsonl without a path": ("data.corpus", "jsonl", "config.data.path is '' with corpus 'jsonl'"),
    "a path with pyrit": ("data.path", "x", "config.data.path is 'x' with corpus 'pyrit'"),
    "a system twice": (
        "evaluation.systems",
        ("base", "base"),
        "config.evaluation.systems is ('base'",
    ),
    "a left-out domain of no expert": (
        "evaluation.left_out",
        ("privacy", "cats"),
        "config.evaluation.left_out names 'cats'; choose of exploits, ",
    ),
    "an attack that is none": (
        "evaluation.attacks",
        ("prefill",),
        "config.evaluation.attacks[0] is 'prefill'; choose one of 'prefix', 'two_shot'",
    ),
    "fewer prompts than none": (
        "evaluation.prompts_per_benchmark",
        -1,
        "config.evaluation.prompts_per_benchmark is -1; 0 takes all",
    ),
}


@pytest.mark.parametrize("key, value, message", WRONG.values(), ids=WRONG.keys())
def test_an_error_names_key_and_value(values, key, value, message):
    put(values, key, value)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        freeze(values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["seed", "router", "train.experts.keep"])
def test_a_missing_key_is_named(values, key):
    *sections, last = key.split(".")
    section = values
    for name in sections:
        section = section[name]
    del section[last]
    with pytest.raises(UserError, match=re.escape(f"missing key config.{key}; add it")):
        freeze(values)


@pytest.mark.parametrize("domains, left_out", [(["a"], []), (["a", "b"], ["b"])])
def test_a_softmax_needs_experts_to_choose_among(values, domains, left_out):
    put(values, "data.domains", domains)
    put(values, "evaluation.left_out", left_out)
    freeze(values)
    put(values, "router.activation", "softmax_null")
    freeze(values)
    put(values, "router.activation", "softmax")
    with pytest.raises(UserError, match=r"'softmax', which gives a single expert the gate 1"):
        freeze(values)
    put(values, "data.domains", ["a", "b", "c"])
    freeze(values)


POSITIVE = [
    "experts.rank",
    "experts.alpha",
    "evaluation.top_p",
    "router.temperature",
    "evaluation.max_new_tokens",
    "evaluation.batch_size",
    "evaluation.judge_rows",
    *(
        f"train.{stage}.{key}"
        for stage in ("experts", "router")
        for key in ("steps", "rows", "accumulation", "validate_every", "save_every", "keep")
    ),
    *(
        f"optimizer.{stage}.{key}"
        for stage in ("experts", "router")
        for key in ("clip_norm", "learning_rate")
    ),
    *(f"mesh.{axis}" for axis in ("data", "fsdp", "tensor", "context")),
]


@pytest.mark.parametrize("key", POSITIVE)
def test_what_counts_is_greater_than_zero(values, key):
    put(values, key, 0)
    with pytest.raises(UserError, match=rf"config\.{key} is 0(\.0)?; it must be greater than 0"):
        freeze(values)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("seed", -1, "is -1; it must be at least 0 and below 4294967296"),
        ("seed", 2**32, "is 4294967296; it must"),
        ("data.sequence_length", 1, "is 1; it must be at least 2"),
        ("evaluation.temperature", -0.5, "is -0.5; it must be at least 0"),
        ("evaluation.top_p", 1.5, "is 1.5; 1 keeps all"),
        ("optimizer.router.b1", 1.0, "is 1.0; it must be at least 0 and below 1"),
        ("optimizer.experts.b2", -0.1, "is -0.1; it must"),
        ("optimizer.experts.warmup_steps", -1, "is -1; it must be at least 0"),
        ("optimizer.experts.warmup_steps", 60, "is 60 and train.experts.steps 60; a warm-up must"),
        ("optimizer.router.warmup_steps", 99, "is 99 and train.router.steps 80; a warm-up must"),
        ("optimizer.router.weight_decay", -0.1, "is -0.1; it must be at least 0"),
    ],
)
def test_a_number_out_of_its_range_is_refused(values, key, value, message):
    put(values, key, value)
    with pytest.raises(UserError, match=re.escape(f"config.{key} {message}")):
        freeze(values)


def test_rows_that_cannot_be_cut_into_microbatches_are_refused(values):
    put(values, "train.experts.accumulation", 2)
    with pytest.raises(UserError, match=r"7 rows .* into 2 microbatches; .*experts.accumulation"):
        freeze(values)


def test_a_file_may_use_its_neighbours_and_hides_no_package_by_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "neighbours").mkdir()
    (tmp_path / "neighbours" / "ours.py").write_text("VALUE = 3\n")
    (tmp_path / "colorsys.py").write_text("raise ImportError('hidden')\n")
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import colorsys\nfrom neighbours.ours import VALUE\ndef get():\n    return VALUE\n"
    )
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    assert call_of(mine, "get") == 3
