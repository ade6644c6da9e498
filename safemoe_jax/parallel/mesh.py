"""The device mesh: one device unless the config says otherwise."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from safemoe_jax.config import MeshConfig
from safemoe_jax.errors import UserError
from safemoe_jax.parallel.sharding import RULES, as_tuple

AXES = ("data", "fsdp", "tensor", "context")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the first data * fsdp * tensor * context devices; on several hosts over all.

    Args:
      config: the sizes of its axes.
      devices: where not given, those of all processes.

    Raises:
      UserError: where there are fewer devices, or hosts would have none.
    """
    shape = tuple(getattr(config, axis) for axis in AXES)
    devices = jax.devices() if devices is None else devices
    axes = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
    if jax.process_count() > 1 and math.prod(shape) < len(devices):
        raise UserError(
            f"config.mesh asks for {axes} = {math.prod(shape)} devices of {len(devices)} on "
            f"{jax.process_count()} hosts; let its axes multiply to {len(devices)}"
        )
    if math.prod(shape) > len(devices):
        raise UserError(
            f"config.mesh asks for {axes} = {math.prod(shape)} devices and {len(devices)} "
            f"{devices[0].platform} devices are there; lower a mesh axis"
        )
    return jax.make_mesh(
        shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[: math.prod(shape)]
    )


def check_divides(config: MeshConfig, sizes: Iterable[tuple[str, str, int]]) -> None:
    """Refuses a mesh whose axes do not divide what they cut.

    Args:
      config: the mesh.
      sizes: what is cut, the logical axis by which it is cut, and its size.

    Raises:
      UserError: names the mesh axis, the size and what would divide it.
    """
    table = dict(RULES)
    for what, logical, size in sizes:
        axes = as_tuple(table[logical])
        parts = math.prod(getattr(config, axis) for axis in axes)
        if size % parts:
            divisors = [str(n) for n in range(1, size + 1) if size % n == 0]
            raise UserError(
                f"{' x '.join(f'config.mesh.{axis}' for axis in axes)} is {parts}, which does not "
                f"divide {what}, {size}; {', '.join(divisors)} would"
            )
