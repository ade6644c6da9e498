"""Where arrays live: one table from logical axis names to mesh axes.

Every array of base, experts, router, cache and batch carries logical names; another layout is
another table, never another model. Nothing here needs an array: shapes do, on any mesh.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Mesh axes that cut an axis of an array, together; None leaves it whole.
MeshAxes = str | tuple[str, ...] | None

RULES: tuple[tuple[str, MeshAxes], ...] = (
    ("batch", ("data", "fsdp")),
    ("gathered_batch", "data"),
    ("parts", ("data", "fsdp", "context")),
    ("length", "context"),
    ("activation", None),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("norm", None),
    ("layers", None),
    ("expert", None),
    ("rank", None),
    ("slot", None),
    ("cache", None),
    ("head_dim", None),
)


def as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    """The mesh axes one by one."""
    return axes if isinstance(axes, tuple) else () if axes is None else (axes,)


def named_axes(*axes: str) -> Any:
    """The logical names of an array's axes, to stand in a tree where the array would."""
    return PartitionSpec(*axes)


def named_init(init: nn.initializers.Initializer, axes: Sequence[str]) -> Callable[..., Any]:
    """An initializer whose array comes in a box with the logical names of its axes.

    A module's `param` and `variable` give the array without its box.
    """
    return nn.with_logical_partitioning(init, tuple(axes))


def shardings(mesh: Mesh, named: Any) -> Any:
    """The shardings of a tree whose leaves carry logical axis names.

    Args:
      mesh: the mesh.
      named: leaves boxed with names, as `model.init` makes them, or `named_axes`.
    """
    specs = jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, PartitionSpec) else leaf.get_partition_spec(),
        named,
        is_leaf=lambda leaf: isinstance(leaf, (PartitionSpec, nn.Partitioned)),
    )
    return nn.logical_to_mesh_sharding(specs, mesh, RULES)


def with_shardings(shapes: Any, placed: Any) -> Any:
    """A tree of shapes that say where they live: what a program is compiled from."""
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        placed,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lays `x` out by the table on the mesh that `jax.set_mesh` has set; without one, nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, layout(x.shape, axes))


def layout(shape: Sequence[int], axes: Sequence[str | None]) -> PartitionSpec:
    """How the mesh that is set cuts an array of `shape` whose axes have these logical names.

    An axis that the mesh cannot cut evenly stays whole: the one token of a decoding step, the one
    row of an initialisation.
    """
    mesh = jax.sharding.get_abstract_mesh()
    named = zip(shape, _mesh_axes(axes), strict=True)
    return PartitionSpec(
        *(names if size % _extent(mesh.shape, names) == 0 else None for size, names in named)
    )


def extent(*axes: str) -> int:
    """Into how many parts the mesh that is set cuts arrays along logical axes, together."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = (_extent(mesh.shape, names) for names in _mesh_axes(axes))
    return 1 if mesh.empty else math.prod(parts)


def whole_rows(wanted: int) -> int:
    """The next number of rows that the mesh that is set can cut evenly."""
    return -(-wanted // extent("batch")) * extent("batch")


def batch_shardings(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """Rows over the batch axes, tokens over the context axis.

    Args:
      mesh: the mesh.
      batch: arrays or shapes [B] and [B, T], by name.
    """
    names = {1: named_axes("batch"), 2: named_axes("batch", "length")}
    return shardings(mesh, {key: names[len(value.shape)] for key, value in batch.items()})


def local_rows(mesh: Mesh, num_rows: int) -> list[int]:
    """Which rows of a batch of `num_rows` the devices of this process hold, in order."""
    (sharding,) = batch_shardings(mesh, {"": np.empty(num_rows)}).values()
    held = sharding.addressable_devices_indices_map((num_rows,)).values()
    return np.unique(np.concatenate([np.arange(num_rows)[index] for index in held])).tolist()


def put_batch(mesh: Mesh, batch: dict[str, Any]) -> dict[str, jax.Array]:
    """The rows that this process gives (see `local_rows`) as part of arrays on the mesh.

    Example ids stay behind; no step reads them.
    """
    read = {key: value for key, value in batch.items() if key != "example_ids_BS"}
    parts = _extent(mesh.shape, dict(RULES)["batch"])
    share = parts // len(local_rows(mesh, parts))  # the batch is this many times what is here
    return {
        key: jax.make_array_from_process_local_data(
            sharding, read[key], (share * read[key].shape[0], *read[key].shape[1:])
        )
        for key, sharding in batch_shardings(mesh, read).items()
    }


def _mesh_axes(axes: Sequence[str | None]) -> PartitionSpec:
    found = nn.logical_to_mesh_axes(axes, RULES)
    assert found is not None  # as `axes` is not
    return found


def _extent(shape: Mapping[str, int], axes: MeshAxes) -> int:
    return math.prod(shape[axis] for axis in as_tuple(axes))
