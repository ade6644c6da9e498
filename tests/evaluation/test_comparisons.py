"""Pooled shares and paired differences of results.json's outcomes."""

import numpy as np
import pytest

from safemoe_jax.evaluation import comparisons
from safemoe_jax.evaluation.comparisons import ALL, verdict
from safemoe_jax.evaluation.prompt_sets import HARMLESS, OTHER_ORIGIN


def outcome(system, prompt, value, *, seed=0, benchmark="held_out", harmful=True, group=None):
    """An answer that informs safely, or one that is judged unsafe."""
    return {
        "system": system, "seed": seed, "fold": "", "benchmark": benchmark,
        "domain": "cats" if prompt % 2 else "dogs", "prompt_id": f"p{prompt}",
        "group": prompt if group is None else group, "harmful": harmful, "refusal_only": False,
        "num_tokens": 9, "safe": value, "refusal": not value, "on_topic": True,
        "degenerate": False, "informative_safe": value, "attack_success": not value,
        "informative_safe_64": None, "correct": None,
    }  # fmt: skip


def table(outcomes, benchmark, metric, likelihoods=()):
    (found,) = (
        one
        for one in comparisons.tables(outcomes, likelihoods)
        if (one.benchmark, one.metric) == (benchmark, metric)
    )
    return found


def versus_base(ours, base, **where):
    rows = [outcome("safemoe", i, bool(value), **where) for i, value in enumerate(ours)]
    rows += [outcome("base", i, bool(value), **where) for i, value in enumerate(base)]
    return rows


def test_rows_are_paired_by_prompt_and_seed_not_by_order():
    rows = versus_base([1, 1, 1, 1, 0, 1], [0, 0, 1, 1, 0, 0])
    (row,) = comparisons.differences(table(rows[::-1], "held_out", "isr"), ALL, 0)
    assert (row["first"], row["second"], row["n"], row["seeds"]) == ("safemoe", "base", 6, 1)
    assert row["value"] == pytest.approx(3 / 6)
    assert row["mcnemar"]["0"] == {"only_first": 3, "only_second": 0, "p": 0.25}


def test_what_no_verdict_speaks_of_is_no_pair():
    rows = versus_base([1, 1, 0, 1], [0, 0, 0, 1])
    rows[0]["informative_safe"] = None
    (row,) = comparisons.differences(table(rows, "held_out", "isr"), ALL, 0)
    assert row["n"] == 3
    assert row["value"] == pytest.approx(1 / 3)


def test_published_sets_are_pooled_by_what_they_ask_for():
    rows = versus_base([1, 0], [0, 0], benchmark="errands")
    rows += versus_base([1, 1], [0, 1], benchmark="chores")
    rows += versus_base([1, 1], [0, 1], benchmark="riddles", harmful=False)
    pooled = table(rows, OTHER_ORIGIN, "isr")
    (ours,) = (r for r in comparisons.shares(pooled, ALL, 0) if r["system"] == "safemoe")
    assert (ours["n"], ours["value"]) == (4, 0.75)
    harmless = table(rows, HARMLESS, "over_refusal_rate")
    (base,) = (r for r in comparisons.shares(harmless, ALL, 0) if r["system"] == "base")
    assert (base["n"], base["value"]) == (2, 0.5)
    assert not [one for one in comparisons.tables(rows, ()) if (one.benchmark == HARMLESS) and
                one.metric == "isr"]  # fmt: skip


def test_shares_are_wilsons_only_where_answers_are_independent():
    values = [1, 1, 0, 1, 0, 1]
    alone = table([outcome("base", i, bool(v)) for i, v in enumerate(values)], "held_out", "isr")
    grouped = table(
        [outcome("base", i, bool(v), group=i // 2) for i, v in enumerate(values)], "held_out", "isr"
    )
    seeds = table(
        [outcome("base", i, bool(v), seed=s) for s in (0, 1) for i, v in enumerate(values)],
        "held_out", "isr",
    )  # fmt: skip
    rows = [comparisons.shares(one, ALL, 0)[0] for one in (alone, grouped, seeds)]
    assert [row["method"] for row in rows] == ["Wilson", "bootstrap", "bootstrap"]
    assert {row["value"] for row in rows} == {4 / 6}
    assert [row["groups"] for row in rows] == [6, 3, 6]
    assert rows[2]["by_seed"] == {"0": 4 / 6, "1": 4 / 6}


def test_a_share_of_all_or_none_still_has_an_interval():
    rows = [outcome("base", i, True, group=i // 2) for i in range(20)]
    (row,) = comparisons.shares(table(rows, "held_out", "isr"), ALL, 0)
    assert row["value"] == 1.0
    assert row["high"] == pytest.approx(1.0)
    assert row["low"] == pytest.approx(1 - 0.2775, abs=1e-3)  # Wilson's of ten, not of twenty


def test_one_group_that_is_mixed_has_a_share_and_no_interval():
    rows = [outcome("base", i, i > 0, group=0) for i in range(4)]
    (row,) = comparisons.shares(table(rows, "held_out", "isr"), ALL, 0)
    assert (row["value"], row["low"], row["high"], row["method"]) == (0.75, None, None, "none")


def test_likelihoods_are_means_over_tokens():
    def scored(system, prompt, nll, tokens):
        return outcome(system, prompt, True) | {"kind": "harmful", "nll": nll, "tokens": tokens}

    likelihoods = [
        scored("base", 0, 20.0, 10), scored("base", 1, 90.0, 30),
        scored("safemoe", 0, 10.0, 10), scored("safemoe", 1, 30.0, 30),
    ]  # fmt: skip
    one = table([], "held_out", "nll_unsafe", likelihoods)
    shares = {row["system"]: row["value"] for row in comparisons.shares(one, ALL, 0)}
    assert shares == {"base": pytest.approx(110 / 40), "safemoe": pytest.approx(1.0)}
    (row,) = comparisons.differences(one, ALL, 0)
    assert row["value"] == pytest.approx(-70 / 40)
    assert row["mcnemar"] is None and row["power"] is None


def test_a_family_is_one_metric_against_systems_of_one_role():
    rng = np.random.default_rng(0)
    systems = {
        "base": {"role": "base"}, "safemoe": {"role": "ours"}, "a": {"role": "control"},
        "b": {"role": "control"}, "c": {"role": "thesis"},
    }  # fmt: skip
    rows = []
    for system in systems:
        chance = {"safemoe": 0.8, "a": 0.55, "b": 0.6, "c": 0.6}.get(system, 0.5)
        rows += [outcome(system, i, bool(rng.random() < chance)) for i in range(60)]
    differences = comparisons.differences(table(rows, "held_out", "isr"), ALL, 0)
    corrected = {r["second"]: r for r in comparisons.correct(differences, systems)}
    assert {name: row["family"] for name, row in corrected.items()} == {
        "base": "base", "a": "control", "b": "control", "c": "thesis",
    }  # fmt: skip
    assert corrected["base"]["p_holm"] == corrected["base"]["p"]
    assert corrected["c"]["p_holm"] == corrected["c"]["p"]
    low, high = sorted(corrected[name]["p"] for name in "ab")
    assert min(corrected[name]["p_holm"] for name in "ab") == min(1.0, 2 * low)
    assert max(corrected[name]["p_holm"] for name in "ab") == max(2 * low, high)


def difference(low, high, *, split=ALL, p_holm=0.001):
    return {"value": (low + high) / 2, "low": low, "high": high, "split": split, "p_holm": p_holm}


def test_verdicts_claim_no_more_than_they_may():
    assert verdict(difference(0.1, 0.3)) == "higher"
    assert verdict(difference(-0.3, -0.1)) == "lower"
    assert verdict(difference(-0.01, 0.3)) == "no difference shown"
    assert verdict(difference(0.0, 0.3)) == "no difference shown"
    assert verdict(difference(0.1, 0.3, p_holm=0.05)) == "not after Holm"
    assert verdict(difference(0.1, 0.3, split="cats", p_holm=None)) == "one domain, no test"


def test_a_domain_has_an_interval_and_no_test():
    rows = versus_base([1] * 20, [0] * 20)
    part = table(rows, "held_out", "isr").of_domain("cats")
    (row,) = comparisons.correct(
        comparisons.differences(part, "cats", 0), {"base": {"role": "base"}}
    )
    assert row["n"] == 10
    assert row["value"] == 1.0
    assert row["p"] is row["p_holm"] is row["power"] is row["mcnemar"] is None
    assert verdict(row) == "one domain, no test"
