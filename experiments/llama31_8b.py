"""Llama-3.1-8B-Instruct with eight domains on a v5e-16 or a v6e-16: planned, never run.

    safemoe plan --config experiments/llama31_8b.py --topology v5e:4x4
    safemoe plan --config experiments/llama31_8b.py --topology v6e:4x4

Hardware: TPU v5e-16 or v6e-16, 16 chips. Data: as llama32_1b.py.

Planned: not yet.
"""

from ml_collections import ConfigDict

from experiments import llama32_1b


def get_config() -> ConfigDict:
    config = llama32_1b.get_config()
    config.model.source = "meta-llama/Llama-3.1-8B-Instruct"
    config.mesh.fsdp = 16
    return config
