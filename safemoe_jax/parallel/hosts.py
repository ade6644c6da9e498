"""One run on several hosts: every host starts the same command, and they find one another.

Everything is computed by all processes together; files that are one for the whole run are written
by process 0, in a directory that all can see.
"""

import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging as absl_logging
from jax.experimental import multihost_utils

from safemoe_jax.errors import UserError
from safemoe_jax.fetch import cache_dir
from safemoe_jax.progress import console

_HEARTBEAT_SECONDS = 30  # after which a host that died ends the others
_JAX_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def set_up_jax() -> None:
    """Joins the run's other hosts, if there are any; compiled programs are kept between runs.

    Raises:
      UserError: see `connect`.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Orbax logs the traceback of every error that it then raises.
    absl_logging.set_verbosity(absl_logging.FATAL)
    if not has_tpu():
        use_compiler_alone()  # where libtpu is installed for `plan`
    connect()
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def connect(timeout_seconds: int = 300) -> None:
    """Joins the run's other processes, where the environment says that there are any.

    That is the case with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, in a Slurm
    step of several tasks, and on a TPU slice of several hosts. To be called before JAX is used.

    Where a host does not come, or ends later, JAX ends the others by an abort that nothing in
    Python sees. So what to do then is said beforehand.

    Args:
      timeout_seconds: how long to wait for the others.

    Raises:
      UserError: where the environment contradicts itself.
    """
    if jax.distributed.is_initialized() or (said := _environment()) is None:
        return
    _say(
        f"waiting up to {timeout_seconds} s for the run's other hosts; if this times out, start "
        "the same command on every host, and see that each reaches the first one"
    )
    # It would take SIGTERM away from training.interruption, which owns it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **said,
            initialization_timeout=timeout_seconds,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        if said:
            raise UserError(
                f"{' '.join(_JAX_VARIABLES)} do not fit: {error}; correct them"
            ) from error
        return  # what looked like a cluster is a machine on its own
    console.quiet = not is_first()
    if jax.process_count() > 1:
        _say(
            f"host {jax.process_index()} of {jax.process_count()}; if one ends, JAX ends the "
            f"others within {2 * _HEARTBEAT_SECONDS} s: start the same command on all hosts again, "
            "it goes on from the last checkpoint"
        )


def _say(message: str) -> None:
    print(f"safemoe: {message}", file=sys.stderr, flush=True)


def _environment() -> dict[str, Any] | None:
    """What to tell `jax.distributed.initialize`; None for a process on its own."""
    given = [name for name in _JAX_VARIABLES if os.environ.get(name)]
    if given:
        if missing := [name for name in _JAX_VARIABLES if name not in given]:
            raise UserError(f"{given[0]} is set and {missing[0]} is not; set all three, or none")
        try:
            count, index = (int(os.environ[name]) for name in _JAX_VARIABLES[1:])
        except ValueError as error:
            raise UserError(
                f"JAX_NUM_PROCESSES or JAX_PROCESS_ID is no number ({error})"
            ) from error
        if not 0 <= index < count:
            raise UserError(
                f"JAX_PROCESS_ID is {index} and JAX_NUM_PROCESSES {count}; ids go from 0 to "
                f"{count - 1}"
            )
        address = os.environ["JAX_COORDINATOR_ADDRESS"]
        return dict(coordinator_address=address, num_processes=count, process_id=index)
    slurm = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
    return {} if slurm or has_tpu() else None  # JAX reads the rest from Slurm or the TPU's metadata


def has_tpu() -> bool:
    """Whether this machine has one."""
    return any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def use_compiler_alone() -> None:
    """Lets libtpu compile without a TPU: it would ask Google's metadata server which machine this
    is, complain, and end a second process that compiles at the first one's lock file."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")  # any will do
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def first_says(value: int) -> int:
    """Process 0's `value`, on every process."""
    return int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def all_agree(here: bool) -> bool:
    """Whether `here` is true on every process."""
    return bool(np.all(multihost_utils.process_allgather(np.bool_(here))))


def wait_for_all(what: str) -> None:
    """Until every process has come to the same place."""
    multihost_utils.sync_global_devices(what)


def to_host(tree: Any) -> Any:
    """A tree of arrays as numpy arrays, whole on every process; all of them must call it."""

    def whole(leaf: jax.Array) -> np.ndarray:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)
