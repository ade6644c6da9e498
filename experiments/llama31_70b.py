"""Llama-3.1-70B-Instruct with eight domains, in bfloat16, on a v5p-128: planned, never run.

    safemoe plan --config experiments/llama31_70b.py --topology v5p:4x4x4

Hardware: TPU v5p-128, which counts cores: 64 chips. Data: as llama32_1b.py.

Planned on 2026-11-27 by jax 0.10.2 and libtpu 0.0.42.1: 70,553,706,496 parameters of the base,
524,288,000 of the experts, 5,243,520 of the router; it fits. How to read it: docs/plans.md.

    topology   function       HBM GiB  TFLOPs  sent GB  compute s   HBM s   ICI s    MFU  tokens/s
    v5p:4x4x4  train-experts    15.81  812.01   547.56     1.7691  0.4707  0.9126  72.2%    74,090
    v5p:4x4x4  train-gate       13.63  817.46   546.96     1.7810  0.4803  0.9116  72.2%    73,596
    v5p:4x4x4  prefill          10.50  289.48   275.04     0.6307  0.2014  0.4584  99.5%   207,830
    v5p:4x4x4  decode           10.59    0.15   275.03     0.0003  0.2257  0.4584   0.1%       140

Hours at least: v5p:4x4x4 train-experts 0.25, train-gate 0.25, answers 1.70.
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
