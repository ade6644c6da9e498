"""What a stage tells while it trains: losses, gates, speed, memory; and traces of chosen steps."""

import contextlib
import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from safemoe_jax.parallel.hosts import is_first
from safemoe_jax.progress import Meter, console
from safemoe_jax.training.checkpoints import Checkpoints
from safemoe_jax.training.metrics import Writer

PARTS = ("data", "compute", "validation", "checkpoint")  # of a row's seconds


class Diverged(Exception):
    """The loss or its gradient is no number any more."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step of a stage does.

    Attributes:
      tokens: places in the packed rows of all processes, padding included.
      flops: what the result needs (`model.flops`).
      peak: FLOP/s of the mesh at most; None where that is not known.
    """

    tokens: int
    flops: float
    peak: float | None


@dataclasses.dataclass(frozen=True)
class Trace:
    """Steps, from 1, that the profiler traces, and where to."""

    steps: range
    directory: Path


@dataclasses.dataclass
class _Dispatched:
    """A step whose metrics have not been read yet."""

    step: int
    metrics: dict[str, jax.Array]
    example_ids: np.ndarray


class Observer:
    """Tells of one stage; it asks nothing of the devices that the loop does not ask anyway.

    A step's metrics are read once the next one is dispatched. A row of metrics.jsonl therefore has
    the seconds since the row before it: "data", in which the host drew and placed batches (while
    the devices had work), "validation", "checkpoint" (until training could go on), and "compute",
    the rest: dispatching, and waiting for the devices. The first row includes compilation.
    """

    def __init__(
        self,
        stage: str,
        *,
        streams: Sequence[str],
        domains: Sequence[str],
        work: Work,
        open_writers: Callable[[int], Sequence[Writer]],
        trace: Trace,
    ) -> None:
        """Touches nothing yet.

        Args:
          stage: its name.
          streams: names of the entries of loss and the like: the domains in stage one, ("all",)
            else.
          domains: names of the entries of gates.
          work: what a step does.
          open_writers: the step that training goes on from -> where its rows go.
          trace: what the profiler traces.
        """
        self.meter = Meter()
        self._stage, self._streams, self._domains = stage, streams, domains
        self._work, self._open_writers, self._trace = work, open_writers, trace
        self._pending: _Dispatched | None = None
        self._tracing = False

    @contextlib.contextmanager
    def watching(self, first: int, checkpoints: Checkpoints) -> Iterator[None]:
        """Around the steps after step `first`: opens what is written to, and closes it."""
        self._checkpoints = checkpoints
        self._writers = self._open_writers(first) if is_first() else ()
        self._last_read, self._seconds = time.monotonic(), dict.fromkeys(PARTS, 0.0)
        try:
            yield
        finally:
            if self._tracing:
                self._stop_trace()
            for writer in self._writers:
                writer.close()

    @contextlib.contextmanager
    def during(self, part: Literal["data", "validation", "checkpoint"]) -> Iterator[None]:
        """Around what the host does besides dispatching steps."""
        began = time.monotonic()
        yield
        self._seconds[part] += time.monotonic() - began

    @contextlib.contextmanager
    def dispatching(self, step: int) -> Iterator[None]:
        """Around the call of a train step."""
        if step in self._trace.steps and not self._tracing:
            self._trace.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            jax.profiler.start_trace(str(self._trace.directory))
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def dispatched(self, step: int, metrics: dict[str, jax.Array], example_ids: np.ndarray) -> None:
        """Reads the step before this one, while this one is under way.

        Raises:
          Diverged: where a loss is not finite; names step, rows and the last good checkpoint.
        """
        self._read(_Dispatched(step, metrics, example_ids))

    def catch_up(self) -> None:
        """Reads the last step that was dispatched, and so waits for it; raises as `dispatched`."""
        self._read(None)

    def validated(self, step: int, loss: np.ndarray) -> None:
        """Tells of a validation loss, [E] or []."""
        self._write(step, "validation", _by_name("loss", loss, self._streams))
        self.meter.note = f"validation loss {np.mean(loss):.3f}"

    def _read(self, next_up: _Dispatched | None) -> None:
        pending, self._pending = self._pending, next_up
        if pending is None:
            return
        values = jax.device_get(pending.metrics)
        if self._tracing and pending.step >= self._trace.steps[-1]:
            self._stop_trace()
        self._check(pending, values)
        row = {"loss_tokens": float(np.sum(values.pop("tokens")))}
        row |= self._speed(row["loss_tokens"]) | _memory()
        for key, value in values.items():
            names = self._domains if key.startswith("gates") else self._streams
            row |= _by_name(key, value, names)
        self._write(pending.step, "train", row)

    def _check(self, pending: _Dispatched, values: dict[str, np.ndarray]) -> None:
        # A gradient that overflows spoils the weights while the loss before it is still finite.
        if all(np.all(np.isfinite(values[key])) for key in ("loss", "gradient_norm")):
            return
        rows = sorted({int(i) for i in pending.example_ids.ravel() if i >= 0})
        good = self._checkpoints.latest_step
        raise Diverged(
            f"loss of {self._stage} is {values['loss']} with gradient norm "
            f"{values['gradient_norm']} at step {pending.step}; its rows (example ids): "
            f"{rows}; last good checkpoint: "
            f"{f'step {good}' if good else 'none'}; lower optimizer.*.learning_rate, or look "
            "at these rows with `safemoe data --show`"
        )

    def _speed(self, loss_tokens: float) -> dict[str, float]:
        """Seconds since the last row, by what they went to, and what was trained in them."""
        now = time.monotonic()
        seconds = now - self._last_read
        self._seconds["compute"] = seconds - sum(self._seconds.values())  # what is left
        training = max(self._seconds["data"] + self._seconds["compute"], 1e-9)
        row = {"seconds": seconds}
        for part in PARTS:
            row[f"seconds/{part}"] = self._seconds[part]
        row["loss_tokens_per_second"] = loss_tokens / training
        row["tokens_per_second"] = self._work.tokens / training
        if self._work.peak:
            row["mfu"] = self._work.flops / (training * self._work.peak)
        self._last_read, self._seconds = now, dict.fromkeys(PARTS, 0.0)
        return row

    def _stop_trace(self) -> None:
        jax.profiler.stop_trace()
        self._tracing = False
        console.print(f"profile: a trace of {self._stage} is in {self._trace.directory}")

    def _write(self, step: int, split: Literal["train", "validation"], row: dict) -> None:
        for writer in self._writers:
            writer.write(step, split, **row)


def _memory() -> dict[str, float]:
    """Peak bytes so far: of this host's process, and of its fullest device where that tells."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {"memory/host_peak": float(peak * (1 if sys.platform == "darwin" else 1024))}
    stats = [device.memory_stats() for device in jax.local_devices()]
    if peaks := [one["peak_bytes_in_use"] for one in stats if one]:
        row["memory/device_peak"] = float(max(peaks))
    return row


def _by_name(key: str, values: Any, names: Sequence[str]) -> dict[str, float]:
    """{key: mean, key/name: value}, of what is finite: JSON has no other numbers."""
    values = np.atleast_1d(np.asarray(values, np.float64))
    row = {key: float(np.mean(values))}
    if len(names) > 1:
        row |= {f"{key}/{name}": float(v) for name, v in zip(names, values, strict=True)}
    return {name: value for name, value in row.items() if math.isfinite(value)}
