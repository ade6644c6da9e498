"""The base's parameter tree, and how a checkpoint's tensors fill it.

Kernels lie [L, D_out, D_in], as checkpoints hold them, one tensor per layer. Shape letters: D
model, N query heads, K key/value heads, H head dim, F mlp, V vocabulary, L layers.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from flax.traverse_util import unflatten_dict
from transformers import PreTrainedTokenizerFast

from safemoe_jax.errors import UserError
from safemoe_jax.model.spec import ModelSpec

PARAM_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

# What a model card says that names no licence.
UNKNOWN_LICENSE = "unknown"


class Checkpoint(NamedTuple):
    """A base as its files give it: `params` as `assemble` returns them, `files` the weights'."""

    spec: ModelSpec
    params: dict[str, Any]
    tokenizer: PreTrainedTokenizerFast
    license: str
    files: tuple[Path, ...]


def leaf_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf of the base, by its path joined with "/"."""
    layers, width, mlp = spec.num_layers, spec.embed_dim, spec.mlp_dim
    query, key = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes = {
        "embed/embedding": (spec.vocab_size, width),
        "layers/attention_norm/scale": (layers, width),
        "layers/attention/q/kernel": (layers, query, width),
        "layers/attention/k/kernel": (layers, key, width),
        "layers/attention/v/kernel": (layers, key, width),
        "layers/attention/o/kernel": (layers, width, query),
        "layers/mlp_norm/scale": (layers, width),
        "layers/mlp/gate/kernel": (layers, mlp, width),
        "layers/mlp/up/kernel": (layers, mlp, width),
        "layers/mlp/down/kernel": (layers, width, mlp),
        "final_norm/scale": (width,),
    }
    if not spec.tie_embeddings:
        shapes["head/kernel"] = (spec.vocab_size, width)
    return shapes


def assemble(
    spec: ModelSpec,
    names: Mapping[str, str],
    present: Iterable[str],
    read: Callable[[str], np.ndarray],
    param_dtype: str,
) -> dict[str, Any]:
    """Fills the base's tree, one tensor in memory at a time beside it.

    Args:
      spec: the base's shape.
      names: leaf path -> the checkpoint's tensor name, "{}" standing for the layer.
      present: names of all tensors of the checkpoint that the base must use.
      read: gives a tensor by name.
      param_dtype: a key of `PARAM_DTYPES`.

    Returns:
      Nested dict of numpy arrays.

    Raises:
      UserError: naming the tensor that is missing, has no place, or has another shape.
    """
    shapes = leaf_shapes(spec)
    wanted = {
        leaf: [names[leaf].format(i) for i in range(shape[0])]
        if leaf.startswith("layers/")
        else [names[leaf]]
        for leaf, shape in shapes.items()
    }
    expected, present = {name for group in wanted.values() for name in group}, set(present)
    if missing := sorted(expected - present):
        raise UserError(
            f"the checkpoint lacks tensor {missing[0]} ({len(missing)} in all are missing)"
        )
    if unmapped := sorted(present - expected):
        raise UserError(
            f"tensor {unmapped[0]} has no place in a Llama base ({len(unmapped)} in all); this is "
            "another architecture, or its config does not match its weights"
        )

    leaves = {}
    for leaf, group in wanted.items():
        stacked = np.empty(shapes[leaf], PARAM_DTYPES[param_dtype])
        slots = stacked if leaf.startswith("layers/") else [stacked]
        for name, slot in zip(group, slots, strict=True):
            tensor = read(name)
            if tensor.shape != slot.shape:
                raise UserError(
                    f"tensor {name} gives {leaf} the shape {tensor.shape}; the config says "
                    f"{slot.shape}: config and weights are of different models"
                )
            slot[...] = tensor
        leaves[leaf] = stacked
    return unflatten_dict(leaves, sep="/")
