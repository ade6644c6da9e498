"""TPU chips by their public figures.

Figures: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, read in November 2026; v4's links:
Jouppi et al., "TPU v4", arXiv 2304.01433, table 4. They are the maker's, not measured here.
"""

import dataclasses
from collections.abc import Iterable

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip can do at most.

    Attributes:
      flops: bfloat16 matmul FLOP/s.
      hbm_bytes: memory.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s of one inter-chip link in one direction.
      dimensions: of the torus; a chip has two links along each.
      pod: chips of the largest slice.
      kinds: what JAX calls a device of it.
    """

    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    dimensions: int
    pod: int
    kinds: tuple[str, ...]


GB, GIB = 1e9, 2**30  # memories are sold as GB, and are GiB

CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1200 * GB, 50 * GB, 3, 4096, ("TPU v4",)),
    "v5e": Chip(197e12, 16 * GIB, 819 * GB, 50 * GB, 2, 256, ("TPU v5 lite", "TPU v5e")),
    "v5p": Chip(459e12, 95 * GIB, 2765 * GB, 100 * GB, 3, 6144, ("TPU v5", "TPU v5p")),
    "v6e": Chip(918e12, 32 * GIB, 1638 * GB, 100 * GB, 2, 256, ("TPU v6 lite", "TPU v6e")),
    "tpu7x": Chip(2307e12, 192 * GIB, 7380 * GB, 100 * GB, 3, 9216, ("TPU7x",)),
}


def peak_flops(devices: Iterable[jax.Device]) -> float | None:
    """FLOP/s at most of all chips that `devices` lie on; None where their kind is not in the table.

    Some chips are one device and some, by the runtime's choice, two: chips are told by their place.
    """
    devices = list(devices)
    by_kind = {kind: chip for chip in CHIPS.values() for kind in chip.kinds}
    if any(device.device_kind not in by_kind for device in devices):
        return None
    places = {
        (getattr(device, "slice_index", None), *device.coords): by_kind[device.device_kind].flops
        for device in devices
    }
    return sum(places.values())
