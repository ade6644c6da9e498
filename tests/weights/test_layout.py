"""From a checkpoint's tensors to the base's leaves: whole, in slices, in little memory."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import families
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from gguf_files import convert
from toys import SPEC, initial, shapes, toy_model, toy_weights

from safemoe_jax.config import MeshConfig
from safemoe_jax.model.precision import floats
from safemoe_jax.model.quantization import dequantized
from safemoe_jax.model.spec import FAMILIES
from safemoe_jax.parallel.mesh import make_mesh
from safemoe_jax.parallel.sharding import shardings
from safemoe_jax.weights import layout
from safemoe_jax.weights.base import load_base
from safemoe_jax.weights.layout import leaf_shapes


@pytest.mark.parametrize("name", FAMILIES)
def test_the_models_own_leaves_are_the_layouts(name, tmp_path):
    base = load_base(str(families.write(name, tmp_path)), "bfloat16")
    params = flatten_dict(shapes(toy_model(spec=base.spec))["params"], sep="/")
    assert {leaf: x.shape for leaf, x in params.items()} == leaf_shapes(base.spec)


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "smollm3 from GGUF"])
def test_placed_weights_are_the_whole_ones_cut(name, tmp_path):
    source = families.write(name.split()[0], tmp_path / "base")
    if name.endswith("GGUF"):
        convert(source, source := tmp_path / "base.gguf")
    base = load_base(str(source), "bfloat16")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, context=1))
    boxed = jax.eval_shape(lambda: initial(toy_model(spec=base.spec), unbox=False))["params"]
    where = shardings(mesh, boxed)
    placed = base.placed(where)

    def check(found, expected, sharding):
        assert found.sharding == sharding
        found = floats(found)  # on CPUs layers lie as their bits
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(found), expected)

    jax.tree.map(check, placed, base.params, nn.unbox(where))
    down = placed["layers"]["mlp"]["down"]["kernel"]
    assert {shard.data.shape for shard in down.addressable_shards} == {(4, 16, 24)}


@pytest.mark.parametrize("format, rows, blocks", [("int8", 128, 1), ("nf4", 64, 1)])
def test_quantized_weights_are_placed_as_whole_rows_are_quantized(
    format, rows, blocks, monkeypatch
):
    monkeypatch.setattr(layout, "_TABLE_ROWS", 11)
    spec = dataclasses.replace(SPEC, vocab_size=48, embed_dim=128, head_dim=32, mlp_dim=128)
    weights, model = toy_weights(spec), toy_model(spec=spec, param_dtype=format)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, context=1))
    boxed = jax.eval_shape(lambda: initial(model, unbox=False))["params"]
    placed = weights.place(format, where := shardings(mesh, boxed))
    assert jax.tree.map(lambda leaf: leaf.sharding, placed) == where
    down = placed["layers"]["mlp"]["down"]["kernel"]
    assert {shard.data.shape for shard in down.codes.addressable_shards} == {(2, rows // 2, 64)}
    assert {shard.data.shape for shard in down.scale.addressable_shards} == {(2, 64, blocks)}

    whole, exact = weights.read(format), weights.read(np.float32)
    found = flatten_dict(jax.device_get(placed), sep="/")
    for leaf, values in flatten_dict(whole, sep="/").items():
        np.testing.assert_array_equal(dequantized(found[leaf], np.float32), values)
        if not leaf.endswith("/scale"):
            table = leaf == "embed/embedding"
            expected = flatten_dict(exact, sep="/")[leaf]
            step = np.abs(expected).max() * (0.5 / 127 if table or format == "int8" else 0.16)
            assert 0 < np.abs(values - expected).max() <= step


def test_a_sharded_checkpoint_needs_little_more_memory_than_its_weights(tmp_path):
    """Measured in a process of its own: peak of the resident memory, above that before the load."""
    script = Path(__file__).parent.parent / "load_in_little_memory.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=True
    )
    measured = json.loads(done.stdout)
    assert measured["files"] >= 4
    assert measured["peak"] <= measured["weights"] + 1.3 * measured["largest_file"], measured
