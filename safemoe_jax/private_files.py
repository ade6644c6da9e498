"""Files that their owner alone may read: replaced when whole, or lines that a kill may cut."""

import contextlib
import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from safemoe_jax.errors import UserError

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
    descriptor, part = tempfile.mkstemp(".new", f".{path.name}.", place)
    try:
        with os.fdopen(descriptor, *(("wb",) if binary else ("w", -1, "utf-8"))) as file:
            yield file
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise


def left_by_kills(directory: Path) -> list[Path]:
    """What `replacing` had begun in a directory when its process was killed."""
    return sorted(directory.glob(".*.new"))


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
