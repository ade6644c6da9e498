"""docs/plans.md and the docstrings of the planned experiments say the same."""

import importlib
import re
from pathlib import Path

import pytest

from benchmarks import plans
from experiments import llama32_1b
from safemoe_jax.config import freeze
from safemoe_jax.parallel.chips import CHIPS
from safemoe_jax.planning.plan import Figures, Plan
from safemoe_jax.planning.topologies import Topology

ROOT = Path(__file__).parent.parent
PLANNED = {
    "llama32_1b": {"v5e:2x4"},
    "llama31_8b": {"v5e:4x4", "v6e:4x4"},
    "llama31_70b": {"v5p:4x4x4"},
    "llama31_70b_int8": {"v6e:8x8"},
}
FUNCTIONS = ["train-experts", "train-gate", "prefill", "decode"]


def in_docs():
    """{experiment: its rows}, each row as the cells after the experiment's name."""
    rows = {}
    for line in (ROOT / "docs" / "plans.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in PLANNED:
            rows.setdefault(cells[0], []).append(cells[1:])
    return rows


@pytest.mark.parametrize("name", PLANNED)
def test_a_docstring_has_the_numbers_of_the_docs(name):
    text = importlib.import_module(f"experiments.{name}").__doc__
    rows = [line.split() for line in text.splitlines() if re.match(r" +v\w+:\w+ +\w", line)]
    assert rows == in_docs()[name]
    assert {row[0] for row in rows} == PLANNED[name]
    assert [row[1] for row in rows] == FUNCTIONS * len(PLANNED[name])
    for topology in PLANNED[name]:
        command = f"safemoe plan --config experiments/{name}.py --topology {topology}"
        assert command in text


def test_a_plan_is_written_where_its_experiment_is_described():
    slice_ = Topology("v5e:2x4", CHIPS["v5e"], (2, 4), [None] * 8, "0.1")
    seconds = {"compute": 0.5, "hbm": 0.25, "ici": 0.125}
    one = Figures(
        "train-gate", 4, 64, True, {"base": 2.0**30}, 2.0**30, 1e12, 2e12, seconds=seconds
    )
    parameters = {"base": 1_000, "experts": 20, "router": 3}
    found = Plan(freeze(llama32_1b.get_config()), slice_, parameters, (one,))
    values = ["v5e:2x4", "train-gate", "1.00", "2.00", "0.00"]
    values += ["0.5000", "0.2500", "0.1250", "1.0%", "128"]

    old = '"""What.\n\n    safemoe plan\n\nPlanned: not yet.\n"""\n\nPlanned = """\n"""\n'
    text = plans.described(old, [found])
    assert text.startswith('"""What.\n\n    safemoe plan\n\nPlanned on 2')
    said = " ".join(text.split())
    assert "1,000 parameters of the base, 20 of the experts, 3 of the router; it fits." in said
    assert "Hours at least: v5e:2x4 train-gate 0.07." in said
    assert values in [line.split() for line in text.splitlines()]
    assert text.endswith('\n"""\n\nPlanned = """\n"""\n')
    assert plans.described(text, [found]) == text

    row = f"| mine | {' | '.join(values)} |\n"
    assert plans.tabled("| a | 1 |\n", "mine", [found]) == "| a | 1 |\n" + row
    again = plans.tabled("| mine | 1 |\n| mine | 2 |\n| z | 3 |\n", "mine", [found])
    assert again == row + "| z | 3 |\n"
