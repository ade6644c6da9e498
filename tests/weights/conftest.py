"""Bases that the tests of this room share."""

import shutil
from pathlib import Path

import pytest

from safemoe_jax.weights.base import fetch_base, load_base

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="session")
def smollm_path():
    return fetch_base("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def smollm(smollm_path):
    """The embedded base; nobody changes it."""
    return load_base("smollm2-135m-instruct", "bfloat16")


@pytest.fixture
def small(tmp_path):
    """A copy of a small Hugging Face directory, tied head, to be broken at will."""
    return shutil.copytree(GOLDEN / "gqa_tied", tmp_path / "small")
