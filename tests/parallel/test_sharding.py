import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from safemoe_jax.config import ExpertsConfig, MeshConfig, RouterConfig
from safemoe_jax.model import lora
from safemoe_jax.model import transformer as transformer_module
from safemoe_jax.model.spec import ModelSpec
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.parallel.mesh import make_mesh
from safemoe_jax.parallel.sharding import (
    RULES,
    constrain,
    extent,
    local_rows,
    put_batch,
    replicated,
    shardings,
    whole_rows,
)

TABLE = dict(RULES)
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


def transformer(scope: str, *, tied: bool) -> Transformer:
    spec = ModelSpec(
        vocab_size=32,
        embed_dim=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        mlp_dim=24,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=tied,
        max_positions=64,
    )
    experts = ExpertsConfig(targets=TARGETS, rank=2, alpha=4.0)
    router = RouterConfig(scope, "token", "signed", top_k=0, temperature=1.0)
    return Transformer(spec, experts, router, num_experts=3)


def init(model: Transformer):
    """The three collections, their leaves boxed with logical axis names."""
    return model.initial(jax.random.key(0))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, context=1))


@pytest.mark.parametrize("scope, tied", [("layer", True), ("shared", False)])
def test_every_logical_axis_of_the_model_is_in_the_table(scope, tied, monkeypatch):
    """Flax leaves an axis that no rule names unsharded, and says nothing."""
    used = set()

    def note(x, *axes):
        used.update(axis for axis in axes if axis)
        return x

    monkeypatch.setattr(transformer_module, "constrain", note)
    monkeypatch.setattr(lora, "constrain", note)
    boxed = jax.eval_shape(lambda: init(transformer(scope, tied=tied)))
    model = transformer(scope, tied=tied)
    jax.eval_shape(lambda: model.empty_cache(1, 8))
    assert used >= {"batch", "length", "activation", "kv_heads", "cache"}

    for path, spec in jax.tree_util.tree_leaves_with_path(
        nn.get_partition_spec(boxed), is_leaf=lambda x: isinstance(x, PartitionSpec)
    ):
        array = nn.unbox(boxed)
        for key in path:
            array = array[key.key]
        assert len(spec) == array.ndim, f"{path} has unnamed axes"
        used.update(spec)
    assert used - TABLE.keys() == set()
    assert TABLE.keys() - used <= {"parts"}  # the loss uses it; the rest is no dead entry


def test_every_mesh_axis_of_the_table_exists(mesh):
    named = {axis for value in TABLE.values() for axis in np.atleast_1d(value or ())}
    assert named <= set(mesh.axis_names)


def test_the_base_is_cut_over_fsdp_and_tensor(mesh):
    found = shardings(mesh, jax.eval_shape(lambda: init(transformer("layer", tied=False))))
    base, experts = found["params"], found["experts"]
    layers = base["layers"]
    expected = {
        ("embed", "embedding"): (base["embed"]["embedding"], ("tensor", "fsdp")),
        ("q",): (layers["attention"]["q"]["kernel"], (None, "tensor", "fsdp")),
        ("o",): (layers["attention"]["o"]["kernel"], (None, "fsdp", "tensor")),
        ("down",): (layers["mlp"]["down"]["kernel"], (None, "fsdp", "tensor")),
        ("norm",): (layers["mlp_norm"]["scale"], ()),
        ("head",): (base["head"]["kernel"], ("tensor", "fsdp")),
        ("q a",): (experts["layers"]["attention"]["q"]["a"], (None, None, "fsdp")),
        ("q b",): (experts["layers"]["attention"]["q"]["b"], (None, None, None, "tensor")),
    }
    for name, (sharding, axes) in expected.items():
        spec = tuple(sharding.spec)
        while spec and spec[-1] is None:
            spec = spec[:-1]
        assert spec == axes, name


def test_rows_go_over_the_batch_axes_and_example_ids_stay(mesh):
    batch = {
        "tokens_BT": np.arange(32).reshape(8, 4),
        "expert_ids_B": np.arange(8),
        "example_ids_BS": np.zeros((8, 2)),
    }
    put = put_batch(mesh, batch)
    assert put.keys() == {"tokens_BT", "expert_ids_B"}
    assert {shard.data.shape for shard in put["tokens_BT"].addressable_shards} == {(2, 4)}
    np.testing.assert_array_equal(put["tokens_BT"], batch["tokens_BT"])


def test_a_process_reads_the_rows_that_its_devices_hold(mesh):
    np.testing.assert_array_equal(local_rows(mesh, 8), np.arange(8))


def test_what_the_mesh_cannot_cut_stays_whole(mesh):
    with jax.set_mesh(mesh):
        assert extent("batch") == 4 and extent("batch", "mlp") == 8 and whole_rows(5) == 8
        found = jax.jit(lambda x: constrain(x, "batch", "mlp"))(np.zeros((8, 3)))
    assert found.sharding.spec == PartitionSpec(("data", "fsdp"))
    assert extent("batch") == 1 and whole_rows(5) == 5
    assert constrain(found, "mlp", None) is found


def test_replicated_is_whole_everywhere(mesh):
    x = jax.device_put(np.arange(3), replicated(mesh))
    assert [shard.data.shape for shard in x.addressable_shards] == [(3,)] * 8
