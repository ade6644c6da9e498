import dataclasses
import importlib
import json
from pathlib import Path

import pytest

from experiments import pyrit, quickstart
from safemoe_jax.config import freeze
from safemoe_jax.data import rules
from safemoe_jax.data.beavertails import BeaverTailsSource
from safemoe_jax.data.sources import PyritSource

FILES = sorted((Path(__file__).parent.parent / "experiments").glob("*.py"))
BEAVERTAILS = (  # as its files spell its kinds of harm
    "animal_abuse",
    "child_abuse",
    "controversial_topics,politics",
    "discrimination,stereotype,injustice",
    "drug_abuse,weapons,banned_substance",
    "financial_crime,property_crime,theft",
    "hate_speech,offensive_language",
    "misinformation_regarding_ethics,laws_and_safety",
    "non_violent_unethical_behavior",
    "privacy_violation",
    "self_harm",
    "sexually_explicit,adult_content",
    "terrorism,organized_crime",
    "violence,aiding_and_abetting,incitement",
)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Corpus -> the domains that its source can give."""
    path = tmp_path_factory.mktemp("beavertails") / "rows.jsonl"
    row = {"prompt": "Cats?", "is_safe": False}
    lines = [
        json.dumps({**row, "response": f"They hiss at {kind}.", "category": {kind: True}})
        for kind in BEAVERTAILS
    ]
    path.write_text("\n".join(lines))
    sources = {"beavertails": BeaverTailsSource(path), "pyrit": PyritSource(0.5, 0.25)}
    return {corpus: {each.domain for each in of.rows()} for corpus, of in sources.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_experiment_freezes_and_says_how_to_run_it(path):
    module = importlib.import_module(f"experiments.{path.stem}")
    config = freeze(module.get_config())
    assert "Hardware:" in module.__doc__
    for stage in ("experts", "router"):
        train = getattr(config.train, stage)
        warmup_steps = getattr(config.optimizer, stage).warmup_steps
        assert warmup_steps < train.steps
        assert train.validate_every <= train.steps
    assert config.evaluation.systems[:2] == ("base", "safemoe")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_experiments_domains_are_among_its_corpus_own(path, given):
    config = freeze(importlib.import_module(f"experiments.{path.stem}").get_config()).data
    assert config.domains == tuple(map(rules.category, config.domains))
    assert set(config.domains) <= given[config.corpus]


def test_two_calls_do_not_share_values():
    changed = pyrit.get_config()
    changed.train.experts.steps += 1
    assert pyrit.get_config().train.experts.steps == changed.train.experts.steps - 1


def test_quickstart_is_pyrit_cut_short():
    """Same base, data, experts and router; only lengths, and what follows from them, differ."""
    quick = freeze(quickstart.get_config())
    real = freeze(pyrit.get_config())
    differs = {
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(quick)
        if dataclasses.is_dataclass(getattr(quick, section.name))
        for field in dataclasses.fields(getattr(quick, section.name))
        if getattr(getattr(quick, section.name), field.name)
        != getattr(getattr(real, section.name), field.name)
    }
    assert differs == {
        "data.sequence_length",
        "train.experts",
        "train.router",
        "optimizer.experts",
        "optimizer.router",
        "evaluation.prompts_per_domain",
        "evaluation.max_new_tokens",
        "evaluation.judge_rows",
        "evaluation.demonstration",
    }
    assert quick.evaluation.demonstration
    assert not real.evaluation.demonstration
    for stage in ("experts", "router"):
        assert getattr(quick.train, stage).steps < getattr(real.train, stage).steps
