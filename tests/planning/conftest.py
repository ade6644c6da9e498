"""What these tests need."""

import importlib.util

import pytest

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU's compiler comes for Linux on x86-64 only, by the extra test",
)
