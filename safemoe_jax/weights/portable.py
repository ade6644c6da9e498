"""A bundle and its base as one directory for torch, that `safemoe_torch.py` in it reads.

    base/                 the frozen base, as `transformers` loads it
    safemoe.safetensors   experts and router
    safemoe.json          domains, scale, and what kind of router it is
    safemoe_torch.py      all the code that there is

The base lies one level down: a directory that `transformers` could open by itself would give
whoever opens it so the base alone, without a word.

Shape letters: D input width, O output width, E experts, R rank, L layers, S router slots.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from safemoe_jax.weights import huggingface
from safemoe_jax.weights.base import BaseModel
from safemoe_jax.weights.bundle import Bundle
from safemoe_jax.weights.peft import projections

MODULE = Path(__file__).with_name("safemoe_torch.py")


def write_portable(directory: Path, bundle: Bundle, base: BaseModel, ends: Sequence[int]) -> None:
    """Writes what `safemoe_torch.load` reads, but for manifest.json.

    Args:
      directory: is there already, and empty.
      bundle: experts, router and settings.
      base: the bundle's; floats keep their type, and a quantized base is written as the float32
        numbers that it stands for.
      ends: ids of the tokens that end an answer.
    """
    config, spec = bundle.config, bundle.spec
    (directory / "base").mkdir()
    huggingface.save(directory / "base", spec, base.params, base.tokenizer, ends)
    each = [
        projections(bundle.experts, index, config.experts, spec)
        for index in range(len(config.data.domains))
    ]
    tensors: dict[str, np.ndarray] = {}
    for module in each[0]:
        a_ERD, b_EOR = (np.stack(leaf) for leaf in zip(*(own[module] for own in each), strict=True))
        tensors |= {f"{module}.lora_A": a_ERD, f"{module}.lora_B": b_EOR}
    # [L, D, S] and [L, S], without L where all layers share one router.
    for path, leaf in flatten_dict(bundle.router).items():
        tensors[f"router.{path[-1]}"] = leaf
    safetensors.numpy.save_file(
        tensors, directory / "safemoe.safetensors", metadata={"format": "pt"}
    )
    settings = {
        "domains": list(config.data.domains),
        "scale": config.experts.scale,
        "router": dataclasses.asdict(config.router),
    }
    path = directory / "safemoe.json"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(MODULE, directory / MODULE.name)
