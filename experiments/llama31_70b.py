"""Llama-3.1-70B-Instruct with eight domains, in bfloat16, on a v5p-128: planned, never run.

    safemoe plan --config experiments/llama31_70b.py --topology v5p:4x4x4

Hardware: TPU v5p-128, which counts cores: 64 chips. Data: as llama32_1b.py.

Planned: not yet.
"""

from ml_collections import ConfigDict

from experiments import llama32_1b


def get_config() -> ConfigDict:
    config = llama32_1b.get_config()
    config.model.source = "meta-llama/Llama-3.1-70B-Instruct"
    config.train.experts.rows = 8
    config.train.router.rows = 64
    config.mesh.fsdp = 64
    return config
