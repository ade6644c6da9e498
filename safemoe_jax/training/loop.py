"""The loop that both stages share: draw, step, validate, save."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from safemoe_jax.config import TrainConfig
from safemoe_jax.parallel.sharding import put_batch
from safemoe_jax.progress import Meter, track
from safemoe_jax.training.checkpoints import Checkpoints
from safemoe_jax.training.interruption import Interrupted, interruption_noted
from safemoe_jax.training.metrics import MetricsWriter
from safemoe_jax.training.state import TrainState, keep_best


class Diverged(Exception):
    """The loss or its gradient is no number any more."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage's parts.

    Attributes:
      name: "experts", "router" or a control's name; the rows of metrics.jsonl carry it.
      step: the jitted train step, (state, frozen, batch) -> (state, metrics), state donated.
      frozen: collections that are not trained.
      batches: endless train batches, with a position that can be saved.
      validate: trainable -> validation loss in nats per token, [E] or [].
      streams: names of the loss's entries: the domains in stage one, ("all",) else.
      domains: names of the entries of gates.
    """

    name: str
    step: Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]
    frozen: dict[str, Any]
    batches: grain.DatasetIterator
    validate: Callable[[Any], np.ndarray]
    streams: tuple[str, ...]
    domains: tuple[str, ...]


@dataclasses.dataclass
class _Dispatched:
    """A step whose metrics have not been read yet."""

    step: int
    metrics: dict[str, jax.Array]
    example_ids: np.ndarray


def train(
    stage: Stage,
    state: TrainState,
    config: TrainConfig,
    mesh: Mesh,
    checkpoints: Checkpoints,
    metrics_path: Path,
    publish: Callable[[], None],
) -> TrainState:
    """Trains to `config.steps`, from the newest checkpoint where there is one.

    Everything that decides the outcome (weights, optimizer, best weights, data position) is in the
    checkpoint, and validation falls on fixed steps: a run that was killed and started again ends
    bit-identical to one that was not.

    Returns:
      The final state; its `best` holds the best validated weights.

    Raises:
      Interrupted: after SIGTERM or Ctrl-C to any process, once the state is saved by all.
      Diverged: where a loss is not finite; names step, rows and the last good checkpoint.
    """
    # Order: 1. newest checkpoint  2. data position  3. metrics behind it are dropped  4. steps.
    if checkpoints.latest_step:
        state, position = checkpoints.restore(state)
        stage.batches.set_state(position)
    first = int(state.step)
    writer = MetricsWriter(metrics_path, stage.name, first)
    meter = Meter()
    log = _Log(stage, writer, meter, checkpoints)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    remember = jax.jit(keep_best, donate_argnums=0, out_shardings=placed)

    steps = track(
        range(first, config.steps),
        total=config.steps,
        start=first,
        description=f"train {stage.name}",
        meter=meter,
    )
    with jax.set_mesh(mesh), interruption_noted(mesh) as interruption:
        for index in steps:
            batch = next(stage.batches)
            state, metrics = stage.step(state, stage.frozen, put_batch(mesh, batch))
            # The next step is under way before the last one's metrics are read.
            log.read(next_up=_Dispatched(index + 1, metrics, batch["example_ids_BS"]))
            stop = interruption.agreed()

            done = index + 1
            if done % config.validate_every == 0 or done == config.steps:
                loss = stage.validate(state.trainable)
                state = remember(state, loss)
                writer.write(done, "validation", **_by_stream("loss", loss, stage.streams))
                meter.note = f"validation loss {np.mean(loss):.3f}"
            if done % config.save_every == 0 or done == config.steps or stop:
                log.read(next_up=None)  # nothing that diverged is ever saved
                checkpoints.save(done, state, stage.batches.get_state())
                publish()  # metrics.jsonl, with the checkpoint that its rows lead to
            if stop and done < config.steps:
                checkpoints.wait()
                raise Interrupted(
                    f"interrupted in {stage.name} after step {done} of {config.steps}; saved, the "
                    "same command goes on from there"
                )
    checkpoints.wait()
    return state


class _Log:
    """Reads a step's metrics once the next step is dispatched; finds a loss that is no number."""

    def __init__(self, stage, writer, meter, checkpoints) -> None:
        self._stage, self._writer, self._meter = stage, writer, meter
        self._checkpoints = checkpoints
        self._pending: _Dispatched | None = None
        self._last_read = time.monotonic()

    def read(self, next_up: _Dispatched | None) -> None:
        pending, self._pending = self._pending, next_up
        if pending is None:
            return
        values = jax.device_get(pending.metrics)
        # A gradient that overflows spoils the weights while the loss before it is still finite.
        if not all(np.all(np.isfinite(values[key])) for key in ("loss", "gradient_norm")):
            rows = sorted({int(i) for i in pending.example_ids.ravel() if i >= 0})
            good = self._checkpoints.latest_step
            raise Diverged(
                f"loss of {self._stage.name} is {values['loss']} with gradient norm "
                f"{values['gradient_norm']} at step {pending.step}; its rows (example ids): "
                f"{rows}; last good checkpoint: "
                f"{f'step {good}' if good else 'none'}; lower optimizer.*.learning_rate, or look "
                "at these rows with `safemoe data --show`"
            )
        now = time.monotonic()
        tokens = float(np.sum(values.pop("tokens")))
        row: dict[str, Any] = {"loss_tokens": tokens, "loss_tokens_per_second": 0.0}
        row["loss_tokens_per_second"] = tokens / max(now - self._last_read, 1e-9)
        self._last_read = now
        for key, value in values.items():
            names = self._stage.domains if key == "gates" else self._stage.streams
            row |= _by_stream(key, value, names)
        self._writer.write(pending.step, "train", **row)


def _by_stream(key: str, values: Any, names: tuple[str, ...]) -> dict[str, float]:
    """{key: mean, key/name: value}; an expert that saw nothing has no entry of its own."""
    values = np.atleast_1d(np.asarray(values, np.float64))
    row = {key: float(np.mean(values))}
    if len(names) > 1:
        row |= {f"{key}/{name}": float(v) for name, v in zip(names, values, strict=True)}
    return {name: value for name, value in row.items() if math.isfinite(value)}
