"""Llama-3.1-70B-Instruct with eight domains, its base in int8, on a v6e-64: planned, never run.

    safemoe plan --config experiments/llama31_70b_int8.py --topology v6e:8x8

Hardware: TPU v6e-64, 64 chips. Data: as llama32_1b.py.

Planned on 2026-11-27 by jax 0.10.2 and libtpu 0.0.42.1: 70,553,706,496 parameters of the base,
524,288,000 of the experts, 5,243,520 of the router; it fits. How to read it: docs/plans.md.

    topology  function       HBM GiB  TFLOPs  sent GB  compute s   HBM s   ICI s    MFU  tokens/s
    v6e:8x8   train-experts     9.57  812.21   140.85     0.8848  0.5405  0.3521  72.2%   148,144
    v6e:8x8   train-gate        7.06  817.67   142.23     0.8907  0.5379  0.3556  72.2%   147,155
    v6e:8x8   prefill           5.52  289.55    72.16     0.3154  0.1935  0.1804  99.5%   415,562
    v6e:8x8   decode            5.66    0.22    72.14     0.0002  0.1275  0.1804   0.1%       355

Hours at least: v6e:8x8 train-experts 0.12, train-gate 0.12, answers 0.67.
"""

from ml_collections import ConfigDict

from experiments import llama31_70b


def get_config() -> ConfigDict:
    config = llama31_70b.get_config()
    config.model.param_dtype = "int8"
    return config
