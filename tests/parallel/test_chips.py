"""The table of chips, and what devices do at most by it."""

from types import SimpleNamespace

import jax

from safemoe_jax.parallel.chips import CHIPS, peak_flops


def test_the_table_is_in_the_units_that_it_says():
    for name, chip in CHIPS.items():
        assert 1e14 < chip.flops < 1e16, name  # FLOP/s
        assert 2**33 < chip.hbm_bytes < 2**38, name
        assert 5e11 < chip.hbm_bandwidth < 1e13, name
        assert 1e10 < chip.link_bandwidth < 2e11, name
        # A matmul must reuse what it reads from memory some 200 to 600 times on any of them.
        assert 150 < chip.flops / chip.hbm_bandwidth < 600, name
        assert chip.dimensions == (2 if name in ("v5e", "v6e") else 3)


def device(kind, *coords):
    return SimpleNamespace(device_kind=kind, coords=coords)


def test_a_peak_counts_each_chip_once():
    line = [device("TPU v5 lite", x, 0, 0) for x in range(4)]
    assert peak_flops(line) == 4 * 197e12
    both_cores = [device("TPU v4", 0, 0, 0), device("TPU v4", 0, 0, 0), device("TPU v4", 1, 0, 0)]
    assert peak_flops(both_cores) == 2 * 275e12


def test_of_devices_outside_the_table_no_peak_is_known():
    assert peak_flops(jax.devices()) is None
    assert peak_flops([device("TPU v5 lite", 0, 0, 0), device("TPU v99", 1, 0, 0)]) is None
