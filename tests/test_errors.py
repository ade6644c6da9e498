import errno

import pytest

from safemoe_jax.errors import refused_by_the_machine


def test_a_full_disk_is_told_wherever_it_was_noticed():
    remedy = "; make room there, and the same command goes on from what is done"
    error = OSError(errno.ENOSPC, "No space left on device", "/runs/a/metrics.jsonl")
    said = f"No space left on device (/runs/a/metrics.jsonl){remedy}"
    assert refused_by_the_machine(error) == said
    try:
        raise RuntimeError("the save failed") from error
    except RuntimeError as outer:
        assert refused_by_the_machine(outer) == said
    tensorstore = ValueError("RESOURCE_EXHAUSTED: Failed to write [os_error_code='28']")
    assert refused_by_the_machine(tensorstore) == f"No space left on device{remedy}"


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "No such file", "x"), ValueError("28"), OSError()]
)
def test_what_may_be_the_packages_fault_keeps_its_traceback(error):
    assert refused_by_the_machine(error) is None
