"""The device mesh: one device unless the config says otherwise."""

import math

import jax
from jax.sharding import AxisType, Mesh

from safemoe_jax.config import MeshConfig
from safemoe_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "context")


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh over the first data * fsdp * tensor * context devices.

    Raises:
      UserError: where there are fewer devices.
    """
    shape = tuple(getattr(config, axis) for axis in AXES)
    devices = jax.devices()
    if math.prod(shape) > len(devices):
        axes = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
        raise UserError(
            f"config.mesh asks for {axes} = {math.prod(shape)} devices and {len(devices)} "
            f"{devices[0].platform} devices are there; lower a mesh axis"
        )
    return jax.make_mesh(
        shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[: math.prod(shape)]
    )
