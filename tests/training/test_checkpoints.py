import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from toys import ADAMW, SPEC, leaves_equal, shapes, toy_model, toy_variables

from safemoe_jax.config import MeshConfig
from safemoe_jax.errors import UserError
from safemoe_jax.parallel.mesh import make_mesh
from safemoe_jax.training import checkpoints as checkpoints_module
from safemoe_jax.training.checkpoints import Checkpoints
from safemoe_jax.training.state import TrainState, init_expert_state, make_optimizer

IDENTITY = {"base": "b" * 64, "corpus": "c" * 16}
TX = make_optimizer(ADAMW, 10)


def filled(state: TrainState, seed: int) -> TrainState:
    """A state with a different number in every place."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        values = rng.integers(1, 99, leaf.shape) + (0.25 if leaf.dtype == jnp.float32 else 0)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(draw, state)


@pytest.fixture
def state():
    return filled(init_expert_state(toy_variables(toy_model())["experts"], TX), seed=1)


@pytest.fixture
def open_checkpoints(tmp_path):
    opened = []

    def make(*, keep=2, identity=IDENTITY):
        opened.append(
            Checkpoints(epath.Path(tmp_path / "checkpoints"), keep=keep, identity=identity)
        )
        return opened[-1]

    yield make
    for checkpoints in opened:
        checkpoints.close()


def num_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_restore_is_bit_identical_and_knows_the_data_position(open_checkpoints, state):
    first = open_checkpoints()
    assert first.latest_step == 0
    first.save(3, state, {"next_index": 42})
    first.wait()
    again = open_checkpoints()
    assert again.latest_step == 3
    restored, position = again.restore(filled(state, seed=2))
    assert leaves_equal(restored, state)
    assert position == {"next_index": 42}


def test_restore_keeps_the_layout_of_what_it_is_given(open_checkpoints, state):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2, context=1))

    def spread(leaf):
        axes = ["fsdp" if size % 4 == 0 else None for size in leaf.shape]
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

    sharded = jax.tree.map(spread, state)
    checkpoints = open_checkpoints()
    checkpoints.save(1, sharded, {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(filled(sharded, seed=2))
    assert leaves_equal(restored, state)
    for found, given in zip(jax.tree.leaves(restored), jax.tree.leaves(sharded), strict=True):
        assert found.sharding == given.sharding
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(restored)} == {8}


def test_the_newest_are_kept_and_a_step_is_saved_once(open_checkpoints, tmp_path, state):
    checkpoints = open_checkpoints(keep=2)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, state, {"next_index": step})
    checkpoints.save(4, filled(state, seed=3), {"next_index": 99})
    checkpoints.wait()
    assert checkpoints.latest_step == 4
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"3", "4"}
    restored, position = checkpoints.restore(state)
    assert position == {"next_index": 4} and leaves_equal(restored, state)


@pytest.mark.parametrize("key", ["base", "corpus"])
def test_a_run_of_another_identity_is_not_continued(open_checkpoints, state, key):
    first = open_checkpoints()
    first.save(1, state, {})
    first.wait()
    other = open_checkpoints(identity=IDENTITY | {key: "other"})
    with pytest.raises(UserError, match=f"holds a run with {key} '{IDENTITY[key]}', .*'other'"):
        other.restore(state)


@pytest.mark.parametrize("key", ["corpus", "digest"])
def test_a_checkpoint_that_does_not_say_whose_it_is_is_not_continued(
    open_checkpoints, tmp_path, state, key
):
    checkpoints = open_checkpoints()
    checkpoints.save(1, state, {})
    checkpoints.wait()
    path = tmp_path / "checkpoints" / "1" / "identity" / "metadata"
    said = json.loads(path.read_text())
    del said[key]
    path.write_text(json.dumps(said))
    message = rf"checkpoints/1 is damaged \(it does not say its {key}\); delete it, and the same"
    with pytest.raises(UserError, match=message):
        open_checkpoints().restore(state)


@pytest.mark.parametrize("damage", ["position", "cut"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_there(
    open_checkpoints, tmp_path, state, damage
):
    first = open_checkpoints()
    for step in (1, 2):
        first.save(step, state, {"next_index": step})
    first.wait()
    # Not the numbers' files: what this process wrote, tensorstore may still have in memory.
    newest = tmp_path / "checkpoints" / "2"
    path = newest / ("data/metadata" if damage == "position" else "state/_METADATA")
    content = path.read_bytes()
    changed = content.replace(b"2", b"3") if damage == "position" else content[: len(content) // 2]
    path.write_bytes(changed)
    with pytest.raises(UserError, match=rf"{newest} is damaged .*; delete it, .* from step 1$"):
        open_checkpoints().restore(state)
    shutil.rmtree(newest)
    restored, position = open_checkpoints().restore(filled(state, seed=2))
    assert position == {"next_index": 1} and leaves_equal(restored, state)


@pytest.mark.parametrize("dtype", [np.float32, np.int32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_one_bit_anywhere_changes_the_checksum(dtype, shape):
    words = np.dtype({2: np.uint16, 4: np.uint32}[np.dtype(dtype).itemsize])
    values = np.arange(1, 1 + np.prod(shape, dtype=int)).astype(words)

    def checksum(changed):
        return int(checkpoints_module._sum(jnp.asarray(changed.view(dtype).reshape(shape))))

    for bit in (0, 8 * words.itemsize - 1):
        for place in range(values.size):
            changed = values.copy()
            changed[place] ^= words.type(1 << bit)
            assert checksum(changed) != checksum(values)
    assert (checksum(values[::-1].copy()) == checksum(values)) == (values.size == 1)


def test_a_checkpoint_holds_what_is_trained_and_never_the_base(open_checkpoints, tmp_path):
    spec = dataclasses.replace(SPEC, vocab_size=30_000)
    model = toy_model(spec=spec)
    leaves = shapes(model)
    experts = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), leaves["experts"])
    state = filled(init_expert_state(experts, TX), seed=1)
    checkpoints = open_checkpoints()
    checkpoints.save(1, state, {"next_index": 1})
    checkpoints.wait()
    files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    on_disk = sum(path.stat().st_size for path in files)
    # Weights, two moments and the best weights; the rest is what Orbax says of them.
    assert num_bytes(state) < 4.01 * num_bytes(experts)
    assert on_disk < 4 * num_bytes(experts) + 200_000
    assert on_disk < num_bytes(leaves["params"]) / 5
