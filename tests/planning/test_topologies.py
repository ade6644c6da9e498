"""What of a slice's chips a group of devices has."""

from types import SimpleNamespace

import pytest

from safemoe_jax.errors import UserError
from safemoe_jax.parallel.chips import CHIPS
from safemoe_jax.planning.topologies import Topology, get_topology

from .conftest import needs_compiler


def device(*coords):
    return SimpleNamespace(coords=coords)


def test_links_lead_along_the_axes_that_a_group_spans():
    slice_ = Topology("v5e:4x4", CHIPS["v5e"], (4, 4), [None] * 16, "")
    assert slice_.share == 1
    assert slice_.bandwidth([device(0, 0, 0), device(0, 1, 0)]) == 2 * 50e9
    assert slice_.bandwidth([device(0, 0, 0), device(1, 1, 0)]) == 4 * 50e9


def test_two_devices_of_a_chip_share_what_it_has():
    slice_ = Topology("v4:2x2x1", CHIPS["v4"], (2, 2, 1), [None] * 8, "")
    assert slice_.share == 0.5
    assert slice_.room == 16 * 2**30
    assert slice_.bandwidth([device(0, 0, 0), device(1, 0, 0)]) == 50e9
    assert slice_.bandwidth([device(0, 0, 0), device(0, 0, 0)]) == 600e9


@needs_compiler
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-16", "topology 'v5e-16' is unknown; give CHIP:SHAPE .* v6e, tpu7x, like"),
        ("v5p-9", "topology 'v5p-9' is unknown"),
        ("v6e-12", "topology 'v6e-12' is unknown"),
        ("h100:4x4", "topology 'h100:4x4' is unknown"),
        ("v5e:3x5", "v5e:3x5 is no slice that can be had .*not divisible"),
    ],
)
def test_a_slice_that_there_is_not(name, message):
    with pytest.raises(UserError, match=message):
        get_topology(name)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "shape", "devices"),
    [
        ("v5e:4x4", "v5e:4x4", 16),
        ("v4:2x2x1", "v4:2x2x1", 8),
        ("v5p:2x2x1", "v5p:2x2x1", 4),
        ("v5litepod-8", "v5e:2x4", 8),  # as Google Cloud names them
        ("v6e-64", "v6e:8x8", 64),
        ("v4-8", "v4:2x2x1", 8),
        ("v5p-64", "v5p:2x4x4", 32),
        ("v5p-128", "v5p:4x4x4", 64),
    ],
)
def test_devices_of_a_slice(name, shape, devices):
    found = get_topology(name)
    assert (found.name, len(found.devices)) == (shape, devices)
