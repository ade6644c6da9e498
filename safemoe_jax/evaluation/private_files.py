"""Files that their owner alone may read, of JSON lines that a kill may cut short."""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any


def open_private(path: Path, mode: str) -> IO[str]:
    """Opens a file that its owner alone may read; `mode` is "w" or "a"."""
    flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if mode == "a" else os.O_TRUNC)
    return os.fdopen(os.open(path, flags, 0o600), mode, encoding="utf-8", newline="")


def replace_json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes all rows anew, in one step."""
    scratch = path.with_name(f".{path.name}.new")
    with open_private(scratch, "w") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)
    os.replace(scratch, path)


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
