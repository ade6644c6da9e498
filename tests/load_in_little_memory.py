"""Prints as JSON what loading a base onto two devices took, in bytes.

    python tests/load_in_little_memory.py DIRECTORY

Writes a base of some 120 MB in seven files there, and loads it cut in two. The peak is of this
process's resident memory, mapped files included, above what it was just before.
"""

import json
import os
import re
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
from families import tokenizer
from toys import initial, toy_model

from safemoe_jax.config import MeshConfig
from safemoe_jax.parallel.mesh import make_mesh
from safemoe_jax.parallel.sharding import shardings
from safemoe_jax.weights.base import load_base

WIDTH, LAYERS, VOCABULARY = 768, 6, 8192


def write(directory: Path) -> None:
    """A random Llama in bfloat16, one layer a file."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    files = [shapes]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        attention = {f"{at}self_attn.{x}_proj.weight": (WIDTH, WIDTH) for x in "qkvo"}
        wide = {f"{at}mlp.{x}_proj.weight": (4 * WIDTH, WIDTH) for x in ("gate", "up")}
        norms = {
            f"{at}{x}.weight": (WIDTH,) for x in ("input_layernorm", "post_attention_layernorm")
        }
        files.append(
            {**attention, **wide, f"{at}mlp.down_proj.weight": (WIDTH, 4 * WIDTH), **norms}
        )
    weight_map = {}
    for index, of_file in enumerate(files):
        name = f"model-{index:05}.safetensors"
        values = {key: np.ones(shape, ml_dtypes.bfloat16) for key, shape in of_file.items()}
        safetensors.numpy.save_file(values, directory / name)
        weight_map |= dict.fromkeys(of_file, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer(8).save_pretrained(directory)


def memory(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def main() -> None:
    directory = Path(sys.argv[1])
    write(directory)
    base = load_base(str(directory), "bfloat16")
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=1, context=1))
    boxed = jax.eval_shape(lambda: initial(toy_model(spec=base.spec), unbox=False))["params"]
    where = shardings(mesh, boxed)
    jax.block_until_ready(jax.device_put(np.ones(8), jax.devices()[1]))

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    placed = jax.block_until_ready(base.placed(where))
    sizes = [file.stat().st_size for file in directory.glob("*.safetensors")]
    result = {
        "weights": sum(leaf.nbytes for leaf in jax.tree.leaves(placed)),
        "files": len(sizes),
        "largest_file": max(sizes),
        "peak": memory("VmHWM") - before,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
