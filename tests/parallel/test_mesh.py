import jax
import pytest

from safemoe_jax.config import MeshConfig
from safemoe_jax.errors import UserError
from safemoe_jax.parallel.mesh import make_mesh


def test_axes_have_the_sizes_of_the_config():
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=4, context=1))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 4, "context": 1}
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))


def test_only_the_first_devices_are_used_where_fewer_are_asked_for():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=1, context=1))
    assert list(mesh.devices.flat) == jax.devices()[:2]


def test_more_devices_than_there_are_is_the_users_mistake():
    with pytest.raises(
        UserError,
        match=r"asks for data 2 x fsdp 8 x tensor 1 x context 1 = 16 devices and 8 cpu devices are "
        "there; lower a mesh axis",
    ):
        make_mesh(MeshConfig(data=2, fsdp=8, tensor=1, context=1))
