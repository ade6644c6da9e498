"""metrics.jsonl: one line per logged step, appended as training goes."""

import json
import os
import time
from pathlib import Path
from typing import Any

from safemoe_jax.parallel.hosts import is_first


class MetricsWriter:
    """Appends rows of one stage; numbers only, never text of a corpus. Process 0 alone writes."""

    def __init__(self, path: Path, stage: str, from_step: int) -> None:
        """Opens the file and drops the stage's rows after `from_step`, which a killed run left."""
        self._path, self._stage = path, stage
        if not is_first():
            return
        rows = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        kept = [row for row in rows if not self._is_stale(row, from_step)]
        if len(kept) < len(rows):
            scratch = path.with_name(f".{path.name}.new")
            scratch.write_text("".join(kept))
            os.replace(scratch, path)  # a kill in between loses no row

    def write(self, step: int, split: str, **values: Any) -> None:
        """Adds a row.

        Args:
          step: steps done.
          split: "train" or "validation".
          **values: numbers by name.
        """
        if not is_first():
            return
        row = {"stage": self._stage, "step": step, "split": split, "time": time.time(), **values}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _is_stale(self, line: str, from_step: int) -> bool:
        try:
            row = json.loads(line)
            stale = row["stage"] == self._stage and row["step"] > from_step
        except (ValueError, TypeError, KeyError):
            return True  # cut short by a kill or a full disk
        return stale or not line.endswith("\n")
