import errno
import os
from types import SimpleNamespace

import pytest

from safemoe_jax.errors import refused_by_the_machine, without_echoes
from safemoe_jax.fetch import cache_dir


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
    array_record = RuntimeError("write() failed: No space left on device; writing /runs/a/rows")
    assert refused_by_the_machine(array_record) == f"No space left on device{remedy}"


def test_what_stands_in_the_way_is_told_by_its_own_name(tmp_path, monkeypatch):
    file, directory = tmp_path / "file", tmp_path / "directory"
    file.write_text("mine")
    directory.mkdir()
    monkeypatch.setenv("SAFEMOE_CACHE", str(file))
    for do, said in (
        (cache_dir, f"File exists ({file}); name another path, or move away what is there"),
        (lambda: (file / "x").mkdir(), f"Not a directory ({file / 'x'}); name another path"),
        (lambda: os.replace(file, directory), f"Is a directory ({directory}); name another path"),
    ):
        with pytest.raises(OSError) as raised:
            do()
        assert refused_by_the_machine(raised.value).startswith(said)


def test_what_a_failed_save_leaves_running_is_not_printed(monkeypatch):
    printed = []
    monkeypatch.setattr("sys.__unraisablehook__", printed.append)
    echo, other = (
        SimpleNamespace(exc_value=RuntimeError(t)) for t in ("Event loop is closed", "x")
    )
    without_echoes(echo)
    without_echoes(other)
    assert printed == [other]


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "No such file", "x"), ValueError("28"), OSError()]
)
def test_what_may_be_the_packages_fault_keeps_its_traceback(error):
    assert refused_by_the_machine(error) is None
