"""Experts folded into the base by gates that no longer depend on anything.

Shape letters: D input width, O output width, E experts, R rank, L layers.
"""

from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from safemoe_jax.config import ExpertsConfig
from safemoe_jax.weights.peft import PATHS


def merge(
    params: dict[str, Any], experts: dict[str, Any], config: ExpertsConfig, gates_LE: np.ndarray
) -> dict[str, Any]:
    """W + scale * sum_e gates[l, e] A[l, e] B[l, e], summed in float64 and rounded once.

    Args:
      params: the base, numpy leaves.
      experts: collection `experts`, numpy leaves.
      config: its targets and scale.
      gates_LE: each expert's gate in each layer.

    Returns:
      Float32 `params`, whatever the base's dtype: bfloat16 would round most of the experts away.
    """
    base, leaves = flatten_dict(params, sep="/"), flatten_dict(experts, sep="/")
    merged = {leaf: values.astype(np.float32) for leaf, values in base.items()}
    for target in config.targets:
        path = PATHS[target]
        kernel_LOD = merged[f"{path}/kernel"]
        for layer, gates_E in enumerate(gates_LE.astype(np.float64)):
            a_EDR, b_ERO = (leaves[f"{path}/{x}"][layer].astype(np.float64) for x in "ab")
            delta_OD = np.tensordot(b_ERO, a_EDR * gates_E[:, None, None], axes=([0, 1], [0, 2]))
            kernel_LOD[layer] = base[f"{path}/kernel"][layer] + config.scale * delta_OD
    return unflatten_dict(merged, sep="/")
