"""Llama-3.1-8B-Instruct with eight domains on a v5e-16 or a v6e-16: planned, never run.

    safemoe plan --config experiments/llama31_8b.py --topology v5e:4x4
    safemoe plan --config experiments/llama31_8b.py --topology v6e:4x4

Hardware: TPU v5e-16 or v6e-16, 16 chips. Data: as llama32_1b.py.

Planned on 2026-11-27 by jax 0.10.2 and libtpu 0.0.42.1: 8,030,261,248 parameters of the base,
109,051,904 of the experts, 1,048,832 of the router; it fits. How to read it: docs/plans.md.

    topology  function       HBM GiB  TFLOPs  sent GB  compute s   HBM s   ICI s    MFU  tokens/s
    v5e:4x4   train-experts     3.95   90.28    27.64     0.4583  0.1072  0.1382  71.9%    71,505
    v5e:4x4   train-gate        3.42   91.41    27.55     0.4640  0.0958  0.1385  71.9%    70,621
    v5e:4x4   prefill           3.69   30.42    14.23     0.1544  0.0346  0.0719  99.1%   212,187
    v5e:4x4   decode            3.43    0.07    14.20     0.0003  0.0209  0.0710   0.5%       901
    v6e:4x4   train-experts     3.95   90.28    27.64     0.0983  0.0556  0.0691  71.9%   333,204
    v6e:4x4   train-gate        3.40   91.41    27.55     0.0996  0.0567  0.0692  71.9%   329,088
    v6e:4x4   prefill           3.69   30.42    14.23     0.0331  0.0197  0.0359  91.3%   911,694
    v6e:4x4   decode            3.43    0.07    14.20     0.0001  0.0107  0.0355   0.2%     1,803

Hours at least: v5e:4x4 train-experts 0.06, train-gate 0.06, answers 0.27; v6e:4x4 train-experts
0.01, train-gate 0.01, answers 0.13.
"""

from ml_collections import ConfigDict

from experiments import llama32_1b


def get_config() -> ConfigDict:
    config = llama32_1b.get_config()
    config.model.source = "meta-llama/Llama-3.1-8B-Instruct"
    config.mesh.fsdp = 16
    return config
