"""The TPU topologies that JAX's compiler knows without a chip."""

import dataclasses
import importlib.metadata
import importlib.util
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import topologies

from safemoe_jax.errors import UserError
from safemoe_jax.parallel.chips import CHIPS, Chip
from safemoe_jax.parallel.hosts import use_compiler_alone


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a pod.

    Attributes:
      name: as JAX takes it, "v5e:4x4".
      chip: its chips.
      shape: chips along each axis.
      devices: JAX's compile-only devices. A v4 or tpu7x chip is two of them.
      libtpu: the version of the compiler.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    devices: Sequence[Any]
    libtpu: str

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def share(self) -> float:
        """Of a chip, what one device is."""
        return self.num_chips / len(self.devices)

    @property
    def room(self) -> float:
        """Bytes of memory that a device has."""
        return self.chip.hbm_bytes * self.share

    def bandwidth(self, group: Sequence[Any]) -> float:
        """Bytes/s that a device can send to a group of devices, over all links that lead there.

        Along each axis on which the group's chips differ there are two links, which the devices of
        a chip share. An upper bound: a slice's edges may lack the wrapping link.
        """
        coords = np.array([device.coords for device in group])
        axes = int((coords != coords[:1]).any(axis=0).sum())
        if axes == 0:  # within a chip; counted as its memory's traffic
            return self.chip.hbm_bandwidth * self.share
        return 2 * axes * self.chip.link_bandwidth * self.share


def get_topology(name: str) -> Topology:
    """A topology and its compile-only devices; no TPU is touched, and none need be there.

    Args:
      name: CHIP:SHAPE, or an accelerator type as Google Cloud names it, in its default shape.

    Raises:
      UserError: on an unknown chip, a shape that it does not come in, or where libtpu is missing.
    """
    name = _default_shape(name)
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name)
    if not match or match[1] not in CHIPS:
        raise UserError(
            f"topology {name!r} is unknown; give CHIP:SHAPE with a chip of {', '.join(CHIPS)}, "
            "like v5e:4x4 (also v5litepod-16), v6e:4x4 or v5p:4x4x4 (also v5p-128: cores)"
        )
    chip, shape = CHIPS[match[1]], tuple(map(int, match[2].split("x")))
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is not here; pip install -e '.[tpu]' in the checkout")
    use_compiler_alone()
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except (RuntimeError, ValueError) as error:
        reason = str(error).removeprefix("INVALID_ARGUMENT: ").splitlines()[0]
        raise UserError(
            f"{name} is no slice that can be had ({reason}); a {match[1]} slice has "
            f"{chip.dimensions} axes and up to {chip.pod} chips"
        ) from error
    return Topology(name, chip, shape, found.devices, importlib.metadata.version("libtpu"))


def _default_shape(name: str) -> str:
    """CHIP:SHAPE of an accelerator type with a power of two of chips; any other name as it is.

    As near to a square or cube as it goes, the longest axis last; on one host of a chip with
    three axes, 2x2x1. Source: the pages that `parallel.chips`
    names.
    """
    match = re.fullmatch(r"(v4|v5litepod|v5p|v6e)-(\d+)", name)
    if not match:
        return name
    chip = {"v5litepod": "v5e"}.get(match[1], match[1])
    dimensions = CHIPS[chip].dimensions
    cores = 2 if dimensions == 3 else 1  # v4 and v5p count the two cores of a chip
    doublings = (int(match[2]) // cores).bit_length() - 1
    if int(match[2]) != cores * 2**doublings:
        return name
    shape = [2 ** ((doublings + axis) // dimensions) for axis in range(dimensions)]
    if shape == [1, 2, 2]:
        shape = [2, 2, 1]
    return f"{chip}:{'x'.join(map(str, shape))}"
