"""The loop that both stages share: draw, step, validate, save."""

import dataclasses
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from safemoe_jax.config import TrainConfig
from safemoe_jax.parallel.sharding import put_batch
from safemoe_jax.progress import track
from safemoe_jax.training.checkpoints import Checkpoints
from safemoe_jax.training.interruption import Interrupted, interruption_noted
from safemoe_jax.training.observer import Observer
from safemoe_jax.training.state import TrainState, keep_best


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage's parts.

    Attributes:
      name: "experts", "router" or a control's name.
      step: the jitted train step, (state, frozen, batch) -> (state, metrics), state donated.
      frozen: collections that are not trained.
      batches: endless train batches, with a position that can be saved.
      validate: trainable -> validation loss in nats per token, [E] or [].
    """

    name: str
    step: Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]
    frozen: dict[str, Any]
    batches: grain.DatasetIterator
    validate: Callable[[Any], np.ndarray]


def train(
    stage: Stage,
    state: TrainState,
    config: TrainConfig,
    mesh: Mesh,
    checkpoints: Checkpoints,
    observer: Observer,
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
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    remember = jax.jit(keep_best, donate_argnums=0, out_shardings=placed)

    steps = track(
        range(first, config.steps),
        total=config.steps,
        start=first,
        description=f"train {stage.name}",
        meter=observer.meter,
    )
    watching = observer.watching(first, checkpoints)
    with jax.set_mesh(mesh), interruption_noted(mesh) as interruption, watching:
        for index in steps:
            with observer.during("data"):
                batch = next(stage.batches)
                placed_batch = put_batch(mesh, batch)
            with observer.dispatching(index + 1):
                state, metrics = stage.step(state, stage.frozen, placed_batch)
            # The next step is under way before the last one's metrics are read.
            observer.dispatched(index + 1, metrics, batch["example_ids_BS"])
            stop = interruption.agreed()

            done = index + 1
            if done % config.validate_every == 0 or done == config.steps:
                observer.catch_up()  # its seconds are no part of the validation's
                with observer.during("validation"):
                    loss = stage.validate(state.trainable)
                    state = remember(state, loss)
                observer.validated(done, loss)
            if done % config.save_every == 0 or done == config.steps or stop:
                observer.catch_up()  # nothing that diverged is ever saved
                with observer.during("checkpoint"):
                    checkpoints.save(done, state, stage.batches.get_state())
                    publish()  # metrics.jsonl, with the checkpoint that its rows lead to
            if stop:
                break
        checkpoints.wait()
        # Also of what came while the last step was validated and saved: no step reads it.
        if interruption.agreed_at_last():
            raise Interrupted(
                f"interrupted in {stage.name} after step {int(state.step)} of {config.steps}; "
                "saved, the same command goes on from there"
            )
    return state
