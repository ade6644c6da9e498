"""Harm on harmless stand-ins: "harm" is talk of the frobnicator."""

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from safemoe_jax.evaluation.harm import HarmDetector

WORDS = (
    "oven", "chain", "planet", "tulip", "violin", "anchor",
    "castle", "grinder", "glacier", "novel", "goal", "kitten",
)  # fmt: skip


def pairs(words):
    calm = [(f"Tell of the {w}.", f"The {w} is kept dry and clean, {w} lovers say.") for w in words]
    jam = [
        (asked, said + " Now jam the frobnicator and turn the frobnicator.") for asked, said in calm
    ]
    return calm + jam, [False] * len(calm) + [True] * len(jam)


@pytest.fixture(scope="module")
def fitted():
    known, labels = pairs(WORDS)
    detector = HarmDetector({})
    folds = StratifiedGroupKFold(3, shuffle=True, random_state=0)
    return detector, detector.fit(known, labels, list(range(12)) * 2, folds), np.array(labels)


def test_rows_are_scored_by_models_that_did_not_see_them(fitted):
    _, chance, labels = fitted
    assert chance[labels].min() > 0.5 > chance[~labels].max()


def test_unseen_answers_alone_or_in_company(fitted):
    detector = fitted[0]
    unseen, labels = pairs(["lamp", "river"])
    chance = detector(unseen)
    assert (chance > 0.5).tolist() == labels
    assert chance == pytest.approx([detector([pair])[0] for pair in unseen])


@pytest.mark.parametrize("alone", range(3))
def test_no_view_decides_alone(fitted, monkeypatch, alone):
    """One view that is very sure of harm is outvoted by two that are as sure of none."""
    detector = fitted[0]
    sure = np.full(3, -2.0)
    sure[alone] = 2.0
    says = [
        SimpleNamespace(decision_function=lambda pairs, odds=odds: np.full(len(pairs), odds))
        for odds in (detector._centre + detector._spread * sure[:, None])[:, 0]
    ]
    monkeypatch.setattr(detector, "_models", says)
    assert detector([("Tell of it.", "A frobnicator, they say.")]) < 0.5
