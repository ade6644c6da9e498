"""Where arrays live: one table from logical axis names to mesh axes.

Every array of base, experts, router and batch carries logical names; another layout is another
table, never another model.
"""

from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES = (
    ("batch", ("data", "fsdp")),
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
)


def shardings(mesh: Mesh, boxed: Any) -> Any:
    """The shardings of a tree whose leaves carry logical axis names, as `model.init` makes it."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the batch axes; a row stays whole."""
    return NamedSharding(mesh, nn.logical_to_mesh_axes(("batch",), RULES))


def put_batch(mesh: Mesh, batch: dict[str, Any]) -> dict[str, jax.Array]:
    """A host batch as arrays on the mesh; example ids stay behind, no step reads them."""
    read = {key: value for key, value in batch.items() if key != "example_ids_BS"}
    return jax.device_put(read, batch_sharding(mesh))
