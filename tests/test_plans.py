"""docs/plans.md and the docstrings of the planned experiments say the same."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLANNED = {
    "llama32_1b": {"v5e:2x4"},
    "llama31_8b": {"v5e:4x4", "v6e:4x4"},
    "llama31_70b": {"v5p:4x4x4"},
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
