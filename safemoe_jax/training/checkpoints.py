"""Checkpoints by Orbax: what is trained, its optimizer, the data position; never the base.

The base is named by the hash of its weight files, so that a checkpoint stays small and belongs to
one base.
"""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from safemoe_jax.errors import UserError
from safemoe_jax.training.state import TrainState


class Checkpoints:
    """Asynchronous, atomic checkpoints of one stage; every process calls save and restore alike."""

    def __init__(self, directory: epath.Path, *, keep: int, identity: dict[str, Any]) -> None:
        """Opens or creates the directory.

        Args:
          directory: of this stage's checkpoints, absolute or a URL.
          keep: how many of the newest stay.
          identity: what must be equal for a checkpoint to be continued: base, data, settings.
        """
        self._directory, self._identity = directory, identity
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(directory, options=options)

    @property
    def latest_step(self) -> int:
        """Step of the newest whole checkpoint; 0 where there is none."""
        return self._manager.latest_step() or 0

    def save(self, step: int, state: TrainState, data_state: dict[str, Any]) -> None:
        """Starts a save; training goes on while it is written."""
        if step == self._manager.latest_step():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data_state),
            identity=ocp.args.JsonSave(self._identity),
        )
        self._manager.save(step, args=items)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest state, laid out like `like`, and its data position.

        Raises:
          UserError: where the checkpoint was made by a run with another base, data or settings.
        """
        step = self._manager.latest_step()
        identity = self._manager.restore(
            step, args=ocp.args.Composite(identity=ocp.args.JsonRestore())
        )["identity"]
        for key, value in self._identity.items():
            if identity.get(key) != value:
                raise UserError(
                    f"{self._directory} holds a run with {key} {identity.get(key)!r}, this one has "
                    f"{value!r}; give another --workdir, or delete that directory"
                )
        shape = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(shape), data=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=items)
        return restored["state"], restored["data"]

    def wait(self) -> None:
        """Until all saves are on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
