"""The base's parameter tree, and how a checkpoint's tensors fill it.

Kernels lie [L, D_out, D_in], as checkpoints hold them, one tensor per layer. Nothing is read before
it is asked for, and then no more than one leaf's slice at a time. Shape letters: D model, N query
heads, K key/value heads, H head dim, F mlp, V vocabulary, L layers.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import PreTrainedTokenizerFast

from safemoe_jax.errors import UserError
from safemoe_jax.model.quantization import (
    Blocks,
    Format,
    LeafDtype,
    ParamDtype,
    Quantized,
    common,
    dequantized,
    of_matrix,
    of_vectors,
    quantize,
    repacked,
    zeros,
)
from safemoe_jax.model.spec import ModelSpec

# Leaves that are no matrices end so.
_VECTORS = ("/scale", "/bias")

# Rows of a table that are quantized at once.
_TABLE_ROWS = 8192

# What a model card says that names no licence.
UNKNOWN_LICENSE = "unknown"

Index = tuple[slice, ...]


class Tensor(NamedTuple):
    """A tensor of a checkpoint, unread.

    Attributes:
      shape: its shape.
      read: reads a slice of it.
      rests: how a file of blocks holds it.
      blocks: reads rows of one that rests in blocks: in these blocks, but a code a byte.
    """

    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]
    rests: np.dtype | Blocks | None = None
    blocks: Callable[[slice], Quantized] | None = None


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
    if spec.traits.qkv_bias:
        for name, features in (("q", query), ("k", key), ("v", key)):
            shapes[f"layers/attention/{name}/bias"] = (layers, features)
    if spec.traits.qk_norm:
        for name in ("q_norm", "k_norm"):
            shapes[f"layers/attention/{name}/scale"] = (layers, spec.head_dim)
    if spec.traits.post_norms:
        for name in ("attention_post_norm", "mlp_post_norm"):
            shapes[f"layers/{name}/scale"] = (layers, width)
    if not spec.tie_embeddings:
        shapes["head/kernel"] = (spec.vocab_size, width)
    return shapes


class Weights:
    """The base's leaves as a checkpoint's tensors hold them: checked, and not read yet."""

    def __init__(
        self, spec: ModelSpec, names: Mapping[str, str], tensors: Mapping[str, Tensor]
    ) -> None:
        """Finds every leaf's tensors.

        Args:
          spec: the base's shape.
          names: leaf path -> the checkpoint's tensor name, "{}" standing for the layer. Leaves that
            share a tensor lie in it one after the other, by rows, in the order of `leaf_shapes`.
          tensors: all tensors of the checkpoint that the base must use, by name.

        Raises:
          UserError: naming the tensor that is missing, has no place, or has another shape.
        """
        self._shapes, self._names, self._tensors = leaf_shapes(spec), names, tensors
        sharing: dict[str, list[str]] = {}
        self._first_row = {}
        rows: Counter[str] = Counter()
        for leaf, shape in self._shapes.items():
            own, name = shape[_is_layered(leaf) :], names[leaf]
            sharing.setdefault(name, []).append(leaf)
            self._first_row[leaf] = rows[name]
            rows[name] += own[0]

        wanted = {}
        for name, leaves in sharing.items():
            own = self._shapes[leaves[0]][_is_layered(leaves[0]) :]
            for layer in range(spec.num_layers if _is_layered(leaves[0]) else 1):
                wanted[name.format(layer)] = leaves, (rows[name], *own[1:])
        if missing := sorted(wanted.keys() - tensors.keys()):
            raise UserError(
                f"the checkpoint lacks tensor {missing[0]} ({len(missing)} in all are missing)"
            )
        if unmapped := sorted(tensors.keys() - wanted.keys()):
            raise UserError(
                f"tensor {unmapped[0]} has no place in a {spec.family} base ({len(unmapped)} in "
                "all); this is another architecture, or its config does not match its weights"
            )
        for name, (leaves, shape) in wanted.items():
            if (found := tensors[name].shape) != shape:
                raise UserError(
                    f"tensor {name} gives {' and '.join(leaves)} the shape {found}; the config "
                    f"says {shape}: config and weights are of different models"
                )

    def in_blocks(self) -> FrozenDict[str, LeafDtype]:
        """How each matrix rests that stays as its file holds it.

        A leaf's layers rest alike, in blocks in which all of theirs can be said; in float32, if a
        layer has none.

        Raises:
          UserError: where the checkpoint is no file of blocks.
        """
        rests: dict[str, LeafDtype] = {}
        for leaf, shape in self._shapes.items():
            if leaf.endswith(_VECTORS):
                continue
            layers = range(shape[0]) if _is_layered(leaf) else (0,)
            kinds = {self._tensors[self._names[leaf].format(layer)].rests for layer in layers}
            if None in kinds:
                raise UserError(
                    "config.model.param_dtype is 'gguf', which keeps a GGUF file's own blocks, and "
                    "this base is no GGUF file; set 'int8', 'nf4', 'bfloat16' or 'float32'"
                )
            if all(isinstance(kind, Blocks) for kind in kinds):
                by_row = not _is_layered(leaf) or shape[-2] % 2  # two rows in a byte would not do
                blocks = common(kinds)
                rests[leaf] = dataclasses.replace(blocks, bits=8) if by_row else blocks
            elif len(kinds) == 1:
                rests[leaf] = kinds.pop()
        return FrozenDict(rests)

    def read(self, param_dtype: ParamDtype) -> dict[str, Any]:
        """All leaves in host memory, nested, as numpy arrays of one type: `param_dtype`, if that is
        one; else float32, and what it quantizes is quantized and back."""
        leaves = {}
        for leaf, shape in self._shapes.items():
            index = tuple(slice(0, size) for size in shape)
            dtype = _rests(leaf, param_dtype)
            if isinstance(dtype, str | Blocks):
                leaves[leaf] = dequantized(self._quantized(leaf, index[:-1], dtype), np.float32)
            else:
                leaves[leaf] = self._slice(leaf, index, of_vectors(param_dtype))
        return unflatten_dict(leaves, sep="/")

    def place(self, param_dtype: ParamDtype, shardings: Mapping[str, Any]) -> dict[str, Any]:
        """All leaves as arrays that live where `shardings`, a tree of the same form, says.

        Each process reads what its devices hold, one leaf's slice at a time. The largest leaves
        come first, while the host's memory is still free. On CPUs layers of bfloat16 lie as their
        bits (`model.precision.bits` says why).
        """
        placed, shardings = {}, flatten_dict(dict(shardings), sep="/")
        for leaf, shape in sorted(self._shapes.items(), key=lambda item: -math.prod(item[1])):
            dtype = _rests(leaf, param_dtype)
            if isinstance(dtype, str | Blocks):
                placed[leaf] = self._placed_quantized(leaf, dtype, shardings[leaf])
                continue
            where, shards = shardings[leaf].addressable_devices_indices_map(shape), []
            for bounds, devices in _holders(where, shape).items():
                values = self._slice(leaf, tuple(slice(*both) for both in bounds), dtype)
                on_cpus = all(device.platform == "cpu" for device in devices)
                if on_cpus and _is_layered(leaf) and dtype == ml_dtypes.bfloat16:
                    values = values.view(np.uint16)
                shards += [jax.device_put(values, device) for device in devices]
                del values
                jax.block_until_ready(shards)  # else copies of several slices may wait at once
            placed[leaf] = jax.make_array_from_single_device_arrays(shape, shardings[leaf], shards)
        return unflatten_dict(placed, sep="/")

    def _placed_quantized(
        self, leaf: str, format: Format | Blocks, shardings: Quantized
    ) -> Quantized:
        """A leaf of `place`, quantized by whole rows, of which each device gets its columns."""
        matrix = jax.eval_shape(functools.partial(zeros, self._shapes[leaf], format))
        like, structure = jax.tree.flatten(matrix)
        where = structure.flatten_up_to(shardings)
        cuts = [
            sharding.addressable_devices_indices_map(part.shape)
            for sharding, part in zip(where, like, strict=True)
        ]
        of_scale = cuts[1]  # codes may have half of the rows
        rows = {device: index[:-1] for device, index in of_scale.items()}
        shards: list[list[jax.Array]] = [[] for _ in like]
        for bounds, devices in _holders(rows, matrix.shape[:-1]).items():
            whole = self._quantized(leaf, tuple(slice(*both) for both in bounds), format)
            for part, cut, placed in zip(jax.tree.leaves(whole), cuts, shards, strict=True):
                placed += [jax.device_put(part[..., cut[device][-1]], device) for device in devices]
            del whole, part
            jax.block_until_ready(shards)
        shapes = [part.shape for part in like]
        arrays = map(jax.make_array_from_single_device_arrays, shapes, where, shards)
        return jax.tree.unflatten(structure, arrays)

    def _quantized(self, leaf: str, rows: Index, format: Format | Blocks) -> Quantized:
        """Whole rows of a leaf, quantized a layer, or some rows of a table, at a time."""
        first, *rest = rows
        step = 1 if _is_layered(leaf) else _TABLE_ROWS
        pieces = []
        for start in range(first.start, first.stop, step):
            piece = (slice(start, min(start + step, first.stop)), *rest)
            if isinstance(format, Blocks):
                pieces.append(repacked(self._blocks(leaf, piece), format))
            else:
                index = (*piece, slice(0, self._shapes[leaf][-1]))
                pieces.append(quantize(self._slice(leaf, index, np.dtype(np.float32)), format))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)

    def _blocks(self, leaf: str, rows: Index) -> Quantized:
        """Whole rows of a table, or of a leaf's one layer, in their file's blocks."""
        *layer, own = rows
        name = self._names[leaf].format(*(one.start for one in layer))
        first = self._first_row[leaf]
        read = self._tensors[name].blocks
        assert read  # else it would not rest in blocks
        found = read(slice(first + own.start, first + own.stop))
        return jax.tree.map(lambda part: part[None], found) if layer else found

    def _slice(self, leaf: str, index: Index, dtype: np.dtype) -> np.ndarray:
        """A slice, with starts and stops, of a leaf."""
        if not _is_layered(leaf):
            return self._tensors[self._names[leaf]].read(index).astype(dtype, copy=False)
        layers, rows, *rest = index
        first = self._first_row[leaf]
        own = (slice(first + rows.start, first + rows.stop), *rest)
        values = np.empty([one.stop - one.start for one in index], dtype)
        for place, layer in enumerate(range(layers.start, layers.stop)):
            values[place] = self._tensors[self._names[leaf].format(layer)].read(own)
        return values


class Checkpoint(NamedTuple):
    """A base as its files give it; `files` are the weights'."""

    spec: ModelSpec
    weights: Weights
    tokenizer: PreTrainedTokenizerFast
    license: str
    files: tuple[Path, ...]


def _rests(leaf: str, param_dtype: ParamDtype) -> LeafDtype:
    return of_vectors(param_dtype) if leaf.endswith(_VECTORS) else of_matrix(leaf, param_dtype)


def _holders(
    where: Mapping[jax.Device, Index], shape: tuple[int, ...]
) -> dict[tuple[tuple[int, int], ...], list[jax.Device]]:
    """Which devices hold the same slice, by its starts and stops."""
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in where.items():
        bounds = tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    return holders


def _is_layered(leaf: str) -> bool:
    return leaf.startswith("layers/")
