"""One `safemoe` command in a process of its own, and what is done to that process.

The process is forked from one that has imported everything and never used JAX: it starts in
milliseconds, and may be killed like any other.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safemoe_jax import cli, stages

# First parts of the names of numbers that a machine's speed decides.
OF_THE_MACHINE = {
    "time",
    "loss_tokens_per_second",
    "tokens_per_second",
    "mfu",
    "seconds",
    "memory",
}


def logged(root: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl in an order of their own, without what a machine's speed decides."""
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k.split("/")[0] not in OF_THE_MACHINE} for row in rows]
    return sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))


HUNG_SECONDS = 600
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")

Prepare = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Ended:
    """How an attempt ended.

    Attributes:
      code: exit code; negative for the signal that ended it; None where it hung and was killed.
      error: what it wrote to stderr.
      restored: the step that each stage went on from.
    """

    code: int | None
    error: str
    restored: dict[str, int]

    @property
    def message(self) -> str:
        """The one line that says what is wrong; "" where there is none, or more than that."""
        lines = self.error.strip().splitlines()
        said = [line for line in lines if line.startswith("safemoe: ")]
        clean = len(said) == 1 and said == lines[-1:] and "Traceback" not in self.error
        return said[0] if clean else ""


class Attempt:
    """A running command; `prepare` is called in its process before it begins."""

    def __init__(self, argv: list[str], notes: Path, prepare: Prepare | None = None) -> None:
        self._notes, self._began = notes, time.monotonic()
        for name in ("error", "said", "restored"):
            (notes / name).write_bytes(b"")
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._be(argv, prepare)

    def wait(self, *, until: float | None = None) -> Ended | None:
        """How it ended; None where it goes on `until` seconds after it began."""
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            passed = time.monotonic() - self._began
            if pid:
                return self._ended(os.waitstatus_to_exitcode(status))
            if until is not None and passed > until:
                return None
            if passed > HUNG_SECONDS:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return self._ended(None)
            time.sleep(0.005)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def _ended(self, code: int | None) -> Ended:
        restored = [line.split() for line in (self._notes / "restored").read_text().splitlines()]
        error = (self._notes / "error").read_text(errors="replace")
        return Ended(code, error, {stage: int(step) for stage, step in restored})

    def _be(self, argv: list[str], prepare: Prepare | None) -> None:
        """In the new process: becomes the command, and never returns."""
        code = 1
        try:
            for number, name in ((1, "said"), (2, "error")):
                os.dup2(os.open(self._notes / name, os.O_WRONLY | os.O_APPEND), number)
            _note_restores(self._notes / "restored")
            if prepare:
                prepare()
            code = cli.main(argv)
        except SystemExit as exit:
            code = exit.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _note_restores(path: Path) -> None:
    restore = stages.Checkpoints.restore

    def noted(self, like):
        found = restore(self, like)
        with path.open("a") as file:
            file.write(f"{self._directory.parent.name} {int(found[0].step)}\n")
        return found

    stages.Checkpoints.restore = noted


def on_writes(root: Path, do: Callable[[int, str], None]) -> Prepare:
    """Calls `do` before every change that Python makes to files in `root`.

    It is given the change's number, from 1, and the path. What tensorstore writes by itself is not
    seen, but the directories round it are.
    """

    def prepare() -> None:
        count, inside, prefix = 0, False, str(root)

        def hook(event: str, arguments: tuple) -> None:
            nonlocal count, inside
            changes = event in _CHANGES or (event == "open" and (arguments[2] or 0) & _WRITING)
            if inside or not changes or not str(arguments[0]).startswith(prefix):
                return
            count, inside = count + 1, True
            try:
                do(count, str(arguments[0]))
            finally:
                inside = False

        sys.addaudithook(hook)

    return prepare


@contextlib.contextmanager
def timed() -> Iterator[Callable[[], tuple[float, float]]]:
    """Gives a function: seconds, and seconds of CPU of this process and its children, since."""

    def now() -> tuple[float, float]:
        return time.monotonic(), sum(os.times()[:4])

    begun = now()
    yield lambda: tuple(round(b - a, 2) for a, b in zip(begun, now(), strict=True))
