import jax
import pytest

from safemoe_jax.config import MeshConfig
from safemoe_jax.errors import UserError
from safemoe_jax.parallel.mesh import check_divides, make_mesh


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


def test_a_size_that_an_axis_does_not_divide_is_named_with_what_would():
    mesh = MeshConfig(data=2, fsdp=4, tensor=2, context=1)
    check_divides(mesh, [("the rows", "batch", 16), ("the heads", "heads", 6)])
    with pytest.raises(
        UserError,
        match=r"config\.mesh\.data x config\.mesh\.fsdp is 8, which does not divide the rows, 12; "
        "1, 2, 3, 4, 6, 12 would",
    ):
        check_divides(mesh, [("the heads", "heads", 6), ("the rows", "batch", 12)])


def test_several_hosts_use_all_of_their_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert make_mesh(MeshConfig(data=2, fsdp=4, tensor=1, context=1)).size == 8
    with pytest.raises(UserError, match=r"= 4 devices of 8 on 2 hosts; .* multiply to 8"):
        make_mesh(MeshConfig(data=1, fsdp=4, tensor=1, context=1))
