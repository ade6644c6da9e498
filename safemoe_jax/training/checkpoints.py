"""Checkpoints by Orbax: what is trained, its optimizer, the data position; never the base.

The base is named by the hash of its weight files, so that a checkpoint stays small and belongs to
one base. A checkpoint holds a checksum of its state and data position: a bit that flipped on the
disk would else make the run end otherwise without a word.
"""

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from safemoe_jax.errors import UserError, refused_by_the_machine
from safemoe_jax.training.state import TrainState

_DIGEST = "digest"
# What Orbax, tensorstore and the JSON parser raise where files are not as they were written.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError)


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
            identity=ocp.args.JsonSave({**self._identity, _DIGEST: _digest(state, data_state)}),
        )
        with _told_of_timeouts():
            self._manager.save(step, args=items)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest state, laid out like `like`, and its data position.

        Raises:
          UserError: where the checkpoint was made by a run with another base, data or settings, or
            is not as it was written.
        """
        step = self._manager.latest_step()
        shape = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        state, data = ocp.args.StandardRestore(shape), ocp.args.JsonRestore()
        try:
            identity = self._read(step, identity=ocp.args.JsonRestore())["identity"]
            self._check_identity(step, identity)
            found = self._read(step, state=state, data=data)
        except UserError:
            raise
        except _UNREADABLE as error:
            if refused_by_the_machine(error):
                raise  # it may be whole
            raise self._damaged(step, f"{type(error).__name__} in reading it") from error
        if identity[_DIGEST] != _digest(found["state"], found["data"]):
            raise self._damaged(step, "its checksum is another")
        return found["state"], found["data"]

    def _read(self, step: int, **items: ocp.args.CheckpointArgs) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**items))

    def _check_identity(self, step: int, identity: dict[str, Any]) -> None:
        if missing := sorted({*self._identity, _DIGEST} - set(identity)):
            raise self._damaged(step, f"it does not say its {missing[0]}")
        for key, value in self._identity.items():
            if identity[key] != value:
                raise UserError(
                    f"{self._directory} holds a run with {key} {identity[key]!r}, this one has "
                    f"{value!r}; give another --workdir, or delete that directory"
                )

    def _damaged(self, step: int, reason: str) -> UserError:
        before = [other for other in self._manager.all_steps() if other < step]
        return UserError(
            f"checkpoint {self._directory / str(step)} is damaged ({reason}); delete it, and the "
            f"same command goes on from {f'step {max(before)}' if before else 'the beginning'}"
        )

    def wait(self) -> None:
        """Until all saves are on disk."""
        with _told_of_timeouts():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with _told_of_timeouts():
            self._manager.close()


@contextlib.contextmanager
def _told_of_timeouts() -> Iterator[None]:
    """Orbax measures its patience by the wall clock, which may jump."""
    try:
        yield
    except TimeoutError as error:
        raise UserError(
            f"a checkpoint was not written in time ({error}): the disk is slow, or the clock was "
            "set; the same command goes on from the checkpoint before"
        ) from error


def _digest(state: TrainState, data_state: dict[str, Any]) -> str:
    """Of every bit of the state and of the data position, whatever the layout; hex."""
    sums = [int(value) for value in jax.device_get(jax.jit(_sums)(state))]
    return hashlib.sha256(json.dumps([sums, data_state], sort_keys=True).encode()).hexdigest()


def _sums(state: TrainState) -> list[jax.Array]:
    """A uint32 for each leaf: its words, each times an odd number that tells its place.

    One changed bit always changes the sum, and sums of integers are the same in any order.
    """
    return [_sum(leaf) for leaf in jax.tree.leaves(state)]


def _sum(leaf: jax.Array) -> jax.Array:
    width = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
    places = [
        jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        * jnp.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
        for axis in range(words.ndim)
    ]
    place = functools.reduce(jnp.add, places, jnp.zeros(words.shape, jnp.uint32))
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)
