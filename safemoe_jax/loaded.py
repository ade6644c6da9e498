"""A bundle on its base, where it runs: for what answers, serves or exports it."""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from safemoe_jax.config import MeshConfig
from safemoe_jax.experiment import boxed_shapes
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.parallel.mesh import make_mesh
from safemoe_jax.parallel.sharding import shardings
from safemoe_jax.weights.base import BaseModel, load_base
from safemoe_jax.weights.bundle import Bundle, check_base
from safemoe_jax.weights.huggingface import read_tokenizer


class Loaded(NamedTuple):
    """A bundle on its base, on this machine's devices; `variables` are all three collections."""

    base: BaseModel
    model: Transformer
    mesh: Mesh
    variables: dict[str, Any]


def on_devices(directory: Path, bundle: Bundle) -> Loaded:
    """Puts a bundle and its base where they run.

    Raises:
      UserError: as `checked_base`.
    """
    base = checked_base(directory, bundle)
    # It may have been trained on devices of another kind.
    model = Transformer.from_config(bundle.config, base.spec, rests=base.rests, attention="auto")
    mesh = _mesh(bundle.config.mesh)
    where = shardings(mesh, boxed_shapes(model))
    trained = {"experts": bundle.experts, "router": bundle.router}
    placed = jax.device_put(trained, {name: where[name] for name in trained})
    placed["params"] = base.placed(where["params"])
    return Loaded(base, model, mesh, placed)


def checked_base(directory: Path, bundle: Bundle) -> BaseModel:
    """A bundle's base, with the bundle's own tokenizer.

    Of the base only the weights are used: their sha256 says nothing of the config and the template
    that lie beside them, so shape and tokenizer are the bundle's own.

    Raises:
      UserError: where the base that is there is not the bundle's.
    """
    base = load_base(bundle.base.source, bundle.config.model.param_dtype)
    check_base(directory, bundle, base)
    return dataclasses.replace(base, tokenizer=read_tokenizer(directory))


def _mesh(trained_on: MeshConfig) -> Mesh:
    """The mesh of the training run where this machine has it, else one device."""
    if math.prod(dataclasses.astuple(trained_on)) <= len(jax.devices()):
        return make_mesh(trained_on)
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=1, context=1))
