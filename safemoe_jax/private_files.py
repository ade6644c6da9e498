"""Files that their owner alone may read: replaced when whole, or lines that a kill may cut."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from safemoe_jax.errors import UserError

LOCK = "lock"  # held in a directory while a process works in it
# Hidden names end so: what is not whole yet, and a whole directory that steps aside for it.
NEW, OLD = ".new", ".old"
_ASIDE = re.compile(rf"\.(.+)\.\w+\{OLD}")
# What flock says where there are no locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def open_private(path: Path, mode: str) -> IO[str]:
    """Opens a file that its owner alone may read; `mode` is "w" or "a"."""
    flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if mode == "a" else os.O_TRUNC)
    return os.fdopen(os.open(path, flags, 0o600), mode, encoding="utf-8", newline="")


def lock(file: IO[str], place: str, *, wait: bool) -> None:
    """Holds an open file's lock until it is closed.

    Args:
      file: open.
      place: what puts it there, for the message.
      wait: for another process that holds it, which is else a BlockingIOError.

    Raises:
      UserError: where the file system, or how it is mounted, has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise UserError(
            f"the file system of {place} has no locks ({error.strerror}); give another, or mount "
            "it with locks"
        ) from error


@contextlib.contextmanager
def replacing(
    path: Path, *, scratch: Path | None = None, binary: bool = False
) -> Iterator[IO[Any]]:
    """Writes a file that appears, or is replaced, when it is whole.

    Args:
      path: of the file.
      scratch: the directory that holds it until then, on the same file system; the file's own by
        default.
      binary: bytes instead of UTF-8 text.
    """
    place = path.parent if scratch is None else scratch
    descriptor, part = tempfile.mkstemp(NEW, f".{path.name}.", place)
    try:
        with os.fdopen(descriptor, *(("wb",) if binary else ("w", -1, "utf-8"))) as file:
            yield file
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise


def is_unfinished(name: str) -> bool:
    """Whether `replacing` or an artefact's writer has begun it, or it has stepped aside for it."""
    return (name.startswith(".") and name.endswith(NEW)) or bool(_ASIDE.fullmatch(name))


def clear_unfinished(directory: Path) -> None:
    """Removes what killed processes have left in a directory, or anywhere below it.

    What has stepped aside for a new one that never came goes back to its place. No link is
    followed, and no directory is entered that has a lock of its own.

    Args:
      directory: this process holds its lock.
    """
    for place, directories, files in os.walk(directory):
        here = Path(place)
        if here != directory and LOCK in files:
            directories.clear()
            continue
        for name in filter(is_unfinished, [*directories, *files]):
            _clear(here / name)
        directories[:] = [name for name in directories if not is_unfinished(name)]


def _clear(path: Path) -> None:
    aside = _ASIDE.fullmatch(path.name)
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif aside and not path.with_name(aside[1]).exists():
        path.rename(path.with_name(aside[1]))
    else:
        shutil.rmtree(path)


def replace_json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes all rows anew."""
    with replacing(path) as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)


def append_json(path: Path, *rows: Mapping[str, Any]) -> None:
    """Adds rows; a line that a kill has cut short does not swallow them."""
    with open_private(path, "a") as file:
        file.writelines(f"\n{json.dumps(row)}" for row in rows)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines, [] without a file; a line that was cut short does not count."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows
