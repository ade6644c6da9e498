"""SIGTERM, Ctrl-C and the cloud's notices become one answer that all processes read alike."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
import requests
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from safemoe_jax.parallel.sharding import replicated

SIGNALS = (signal.SIGTERM, signal.SIGINT)

# What Google's VMs are told of their end. Polling is what makes the notice come early.
# https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice
_NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
_SECONDS_BETWEEN_POLLS = 5.0


class Interrupted(Exception):
    """The run was asked to stop and has saved; the same command goes on from there."""


class Interruption:
    """Whether the run was asked to stop, through whichever of its processes."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._noted = False
        self._asked: jax.Array | None = None

    def note(self) -> None:
        """This process was asked."""
        self._noted = True

    def agreed(self) -> bool:
        """Whether to stop now; every process calls it once a step and gets the same answer.

        Several processes sum what they know on their devices, and read the sum a step later, when
        it is there anyway.
        """
        if jax.process_count() == 1:
            return self._noted
        asked, self._asked = self._asked, self._any()
        return asked is not None and bool(asked)

    def agreed_at_last(self) -> bool:
        """The same once no step follows, of all that was noted until then."""
        return self._noted if jax.process_count() == 1 else bool(self._any())

    def _any(self) -> jax.Array:
        mesh = self._mesh
        noted = jax.make_array_from_process_local_data(
            NamedSharding(mesh, PartitionSpec(mesh.axis_names)),
            np.full(len(mesh.local_devices), self._noted),
            (mesh.size,),
        )
        return jax.jit(jnp.any, out_shardings=replicated(mesh))(noted)


@contextmanager
def interruption_noted(mesh: Mesh) -> Iterator[Interruption]:
    """Within the context the first signal is noted; a second one acts as it always does.

    On Google's cloud a notice of preemption or of maintenance that ends the machine is noted, too.
    """
    interruption = Interruption(mesh)
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        interruption.note()
        signal.signal(number, before[signal.Signals(number)])

    for number in SIGNALS:
        signal.signal(number, note)
    over = threading.Event()
    if server := _metadata_server():
        threading.Thread(target=_poll, args=(server, interruption.note, over), daemon=True).start()
    try:
        yield interruption
    finally:
        over.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def _metadata_server() -> str | None:
    """Where a Google VM asks about itself; None elsewhere."""
    if host := os.environ.get("GCE_METADATA_HOST"):  # as Google's own libraries have it
        return host
    product = Path("/sys/class/dmi/id/product_name")
    on_google = product.exists() and product.read_text().strip().startswith("Google")
    return "metadata.google.internal" if on_google else None


def _poll(server: str, note: Callable[[], None], over: threading.Event) -> None:
    with requests.Session() as session:
        session.trust_env = False  # the server is on this machine: no proxy knows it
        session.headers["Metadata-Flavor"] = "Google"
        while not over.wait(_SECONDS_BETWEEN_POLLS):
            for key, ending in _NOTICES.items():
                url = f"http://{server}/computeMetadata/v1/instance/{key}"
                try:
                    found = session.get(url, timeout=5).text.strip()
                except requests.RequestException:
                    continue  # the server is away for moments; the next poll asks again
                if found == ending:
                    note()
                    return
