"""The table that `safemoe evaluate` ends with."""

import io

import demo_report
import pytest
from rich.console import Console

from safemoe_jax.evaluation.terminal import terminal_table

SYSTEMS = ("base", "safemoe", "uniform", "safe_lora")


def results(*, valid=True, benchmarks=("held_out",)):
    """What `safemoe evaluate` has to say on a terminal."""
    rows, likelihoods = [], []
    for benchmark in benchmarks:
        for i, system in enumerate(SYSTEMS):
            about = {"system": system, "seed": 0, "fold": "", "split": "all"}
            about |= {"benchmark": benchmark, "n": 24}
            for metric, value in (("srr", 0.58), ("isr", 0.41), ("refusal_rate", 0.1)):
                if benchmark == "riddles":
                    metric = "over_refusal_rate"
                share = {"value": value + 0.07 * i, "low": 0.3, "high": 1.0}
                rows.append({**about, "metric": metric, **share})
            if benchmark == "held_out":
                for metric in ("nll_safe", "nll_unsafe", "nll_difference"):
                    mean = {"value": 1.9, "low": None, "high": None}
                    likelihoods.append({**about, "metric": metric, **mean})
    return {
        "rows": rows,
        "nll": likelihoods,
        "systems": {name: {"title": demo_report.SYSTEMS[name][0]} for name in SYSTEMS},
        "validity": [{"name": "shuffled answers", "value": 0.373, "passed": valid}],
        "panel": {"judges": [], "agreement": []},
        "demonstration": True,
    }


def render(result, width=80, **settings):
    console = Console(width=width, record=True, file=io.StringIO(), **settings)
    console.print(terminal_table(result))
    return console.export_text()


def test_terminal_table_has_every_system_and_the_warnings():
    text = render(results())
    for name in ("base", "SafeMoE", "uniform mixture", "one LoRA", "65.0", "30 to 100"):
        assert name in text
    assert "too short a run to judge the claim" in text
    assert "95 % intervals: Wilson's, as if prompts were independent. NLL: nats" in text


@pytest.mark.parametrize("soft_wrap", [False, True])  # on a terminal, and off it
def test_terminal_table_fits_80_columns_with_nothing_clipped(soft_wrap):
    result = results()
    for row in result["rows"]:
        row["n"] = 999
    text = render(result, soft_wrap=soft_wrap)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in text
    assert [head.split() for head in lines[1:3]] == [
        ["safe", "informative", "refusals", "NLL", "NLL", "harmful"],
        ["system", "n", "%", "%", "%", "safe", "harmful", "-", "safe"],
    ]
    assert "(ungated)" in text
    assert text.count("to 100") == 3 * 4


def test_terminal_table_names_benchmarks_where_there_are_several():
    lines = [
        line.strip()
        for line in render(results(benchmarks=("held_out", "errands", "riddles"))).splitlines()
    ]
    assert lines[0] == "Held-out prompts and benchmarks"
    places = [lines.index(name) for name in ("held out", "errands", "riddles")]
    assert places == sorted(places)
    rows = [line.split() for line in lines if line.startswith("base")]
    assert rows[0][1:3] == ["24", "58.0"] and len(rows[0]) == 8
    assert rows[1] == ["base", "24", "58.0", "41.0", "10.0"]  # likelihoods are of held-out answers
    assert rows[2] == ["base", "24", "10.0"]
    assert "Held-out prompts and" not in render(results())


def test_terminal_table_on_a_narrow_screen_still_says_all():
    text = render(results(), width=50)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 60  # the caption's lines


def test_terminal_table_hides_an_invalid_isr():
    text = render(results(valid=False))
    assert "41.0" not in text
    assert text.count("not valid") == 5
    assert "shuffled answers scores 37.3 %" in text
