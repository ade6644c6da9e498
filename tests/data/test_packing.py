import numpy as np
import pytest

from safemoe_jax.data.packing import PackingPlan, plan

LENGTHS = np.random.default_rng(7).integers(1, 65, 500)
STREAMS = np.random.default_rng(8).integers(0, 3, 500)


def test_every_item_is_in_one_row_and_rows_hold_one_stream_and_do_not_overflow():
    packed = plan(LENGTHS, STREAMS, 64, seed=0)
    assert sorted(packed.members.tolist()) == list(range(500))
    for row in range(packed.num_rows):
        items = packed.row(row)
        assert 0 < LENGTHS[items].sum() <= 64
        assert set(STREAMS[items]) == {packed.row_streams[row]}
    assert packed.max_segments == max(len(packed.row(row)) for row in range(packed.num_rows))


def test_rows_are_those_of_plain_first_fit():
    packed = plan(LENGTHS, np.zeros(500, int), 64, seed=3)
    rows: list[list[int]] = []
    for item in np.random.default_rng(3).permutation(500):
        row = next((row for row in rows if LENGTHS[[*row, item]].sum() <= 64), None)
        if row is None:
            rows.append(row := [])
        row.append(int(item))
    assert [packed.row(row).tolist() for row in range(packed.num_rows)] == rows


def test_seed_fixes_the_plan_and_changes_it():
    first, same, other = (plan(LENGTHS, STREAMS, 64, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.members, same.members)
    assert not np.array_equal(first.members, other.members)


def test_rows_of_a_stream_do_not_depend_on_the_others():
    together = plan(LENGTHS, STREAMS, 64, seed=0)
    (own,) = np.nonzero(STREAMS == 1)
    alone = plan(LENGTHS[own], np.zeros(len(own), int), 64, seed=0)
    rows = [together.row(row).tolist() for row in together.rows_of(1)]
    assert rows == [own[alone.row(row)].tolist() for row in range(alone.num_rows)]


def test_plan_survives_disk(tmp_path):
    packed = plan(LENGTHS, STREAMS, 64, seed=0)
    packed.save(tmp_path / "plan.npz")
    loaded = PackingPlan.load(tmp_path / "plan.npz")
    for name in ("members", "row_starts", "row_streams"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(packed, name))


def test_too_long_an_item_is_an_error():
    with pytest.raises(ValueError, match=r"lengths span 3 to 65; cut items to 1\.\.64"):
        plan(np.array([3, 65]), np.array([0, 0]), 64, seed=0)
