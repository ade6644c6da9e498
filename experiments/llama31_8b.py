"""Llama-3.1-8B-Instruct with eight domains on a v5e-16 or a v6e-16: planned, never run.

    safemoe plan --config experiments/llama31_8b.py --topology v5e:4x4
    safemoe plan --config experiments/llama31_8b.py --topology v6e:4x4

Hardware: TPU v5e-16 or v6e-16, 16 chips. Data: as llama32_1b.py.

Planned on 2026-11-26 by jax 0.10.2 and libtpu 0.0.42.1: 8,030,261,248 parameters of the base,
109,051,904 of the experts, 1,048,832 of the router; it fits. How to read it: docs/plans.md.

    topology  function       HBM GiB  TFLOPs  sent GB  compute s   HBM s   ICI s    MFU  tokens/s
    v5e:4x4   train-experts     3.95   90.30    31.36     0.4584  0.4962  0.2509  66.4%    66,037
    v5e:4x4   train-gate        3.44   91.43    31.27     0.4641  0.4542  0.2512  71.8%    70,601
    v5e:4x4   prefill           4.32   30.44    15.98     0.1545  0.1499  0.1548  98.9%   211,730
    v5e:4x4   decode            3.34    0.07    14.20     0.0003  0.0876  0.0710   0.4%       731
    v6e:4x4   train-experts     3.95   90.30    31.36     0.0984  0.2900  0.1255  24.4%   113,007
    v6e:4x4   train-gate        3.41   91.43    31.27     0.0996  0.2745  0.1256  26.1%   119,384
    v6e:4x4   prefill           3.60   30.44    15.98     0.0332  0.1040  0.0774  31.6%   315,112
    v6e:4x4   decode            3.34    0.07    14.20     0.0001  0.0456  0.0355   0.2%     1,403

Hours at least: v5e:4x4 train-experts 0.07, train-gate 0.06, answers 0.33; v6e:4x4 train-experts
0.04, train-gate 0.04, answers 0.17.
"""

from ml_collections import ConfigDict

from experiments import llama32_1b


def get_config() -> ConfigDict:
    config = llama32_1b.get_config()
    config.model.source = "meta-llama/Llama-3.1-8B-Instruct"
    config.mesh.fsdp = 16
    return config
