import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from safemoe_jax.config import ExpertsConfig, MeshConfig, RouterConfig
from safemoe_jax.model.lora import Routed
from safemoe_jax.model.spec import ModelSpec
from safemoe_jax.model.transformer import Transformer, logits
from safemoe_jax.parallel.mesh import make_mesh
from safemoe_jax.parallel.sharding import RULES, put_batch, replicated, shardings

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
    one_BT = jnp.ones((1, 1), jnp.int32)
    names = ("params", "experts", "router")
    keys = dict(zip(names, jax.random.split(jax.random.key(0), 3), strict=True))
    return model.init(keys, one_BT, one_BT, one_BT, one_BT, Routed())


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, context=1))


@pytest.mark.parametrize("scope, tied", [("layer", True), ("shared", False)])
def test_every_logical_axis_of_the_model_is_in_the_table(scope, tied, monkeypatch):
    """Flax leaves an axis that no rule names unsharded, and says nothing."""
    used = set()
    constrain = nn.with_logical_constraint

    def note(x, axes, **options):
        used.update(axes)
        return constrain(x, axes, **options)

    monkeypatch.setattr(nn, "with_logical_constraint", note)
    boxed = jax.eval_shape(lambda: init(transformer(scope, tied=tied)))
    assert used == {"batch", "length", "activation"}

    for path, spec in jax.tree_util.tree_leaves_with_path(
        nn.get_partition_spec(boxed), is_leaf=lambda x: isinstance(x, PartitionSpec)
    ):
        array = nn.unbox(boxed)
        for key in path:
            array = array[key.key]
        assert len(spec) == array.ndim, f"{path} has unnamed axes"
        used.update(spec)
    assert used - TABLE.keys() == set()
    assert TABLE.keys() - used <= {"layers", "norm", "rank", "slot"}  # the rest is no dead entry


def test_every_mesh_axis_of_the_table_exists(mesh):
    named = {axis for value in TABLE.values() for axis in np.atleast_1d(value or ())}
    assert named <= set(mesh.axis_names)


def test_the_base_is_cut_over_fsdp_and_tensor(mesh):
    found = shardings(mesh, jax.eval_shape(lambda: init(transformer("layer", tied=False))))
    base, experts = found["params"], found["experts"]
    layers = base["layers"]
    expected = {
        ("embed", "embedding"): (base["embed"]["embedding"], ("tensor", "fsdp")),
        ("q",): (layers["attention"]["q"]["kernel"], (None, "fsdp", "tensor")),
        ("o",): (layers["attention"]["o"]["kernel"], (None, "tensor", "fsdp")),
        ("down",): (layers["mlp"]["down"]["kernel"], (None, "tensor", "fsdp")),
        ("norm",): (layers["mlp_norm"]["scale"], ()),
        ("head",): (base["head"]["kernel"], ("fsdp", "tensor")),
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


def test_a_sharded_forward_pass_equals_that_of_one_device(mesh):
    model = transformer("layer", tied=False)
    boxed = jax.eval_shape(lambda: init(model))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: rng.normal(0.0, 0.3, x.shape).astype(np.float32), nn.unbox(boxed)
    )
    batch = {
        "tokens_BT": rng.integers(32, size=(4, 8)).astype(np.int32),
        "positions_BT": np.tile(np.arange(8, dtype=np.int32), (4, 1)),
        "segment_ids_BT": np.ones((4, 8), np.int32),
        "prompt_mask_BT": np.tile(np.arange(8) < 3, (4, 1)),
    }

    @jax.jit
    def forward(variables, batch):
        out = model.apply(variables, *batch.values(), Routed())
        return logits(out.hidden_BTD, out.head_VD)

    alone = forward(variables, batch)
    shared = forward(jax.device_put(variables, shardings(mesh, boxed)), put_batch(mesh, batch))
    assert len(shared.sharding.device_set) == 8
    assert float(np.ptp(alone)) > 1.0
    np.testing.assert_allclose(np.asarray(shared), np.asarray(alone), rtol=0, atol=1e-5)


def test_replicated_is_whole_everywhere(mesh):
    x = jax.device_put(np.arange(3), replicated(mesh))
    assert [shard.data.shape for shard in x.addressable_shards] == [(3,)] * 8
