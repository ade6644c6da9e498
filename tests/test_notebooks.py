"""The notebooks of the documentation run, and show what their words say."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"


def test_first_steps_run_and_end_as_they_say(monkeypatch):
    """Each expert knows its own domain best, and the router makes safe answers likelier."""
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as most who read it have
    notebook = nbformat.read(NOTEBOOKS / "first_steps.ipynb", as_version=4)
    claims = (
        "assert losses.idxmin(axis=1).to_dict() == {d: f'expert of {d}' for d in DOMAINS}",
        "assert safe['safemoe'] < min(safe['base'], safe['uniform'])",
    )
    notebook.cells += [nbformat.v4.new_code_cell(claim) for claim in claims]
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": NOTEBOOKS}}).execute()
