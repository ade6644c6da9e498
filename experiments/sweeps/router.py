"""The router's axes, one at a time: what each choice of experiments/pyrit.py's router is worth.

    safemoe sweep experiments/sweeps/router.py

Seven points with one set of experts between them. The paper's own router is not public, so every
axis is open; a full grid is `grid({...})` with several axes. Temperature is left out: to a linear
router that starts at zero it is another learning rate. Hardware: 2 CPU cores, 8 GiB of memory. So
far it was run on a tiny model only; numbers of the real one are still to come.
"""

from typing import Any

from experiments.pyrit import get_config  # noqa: F401 - the experiment that is swept
from safemoe_jax.sweep import grid


def get_points() -> list[dict[str, Any]]:
    return [
        *grid({"router.activation": ("signed", "softmax", "softmax_null", "sigmoid")}),
        *grid({"router.scope": ("shared",)}),
        *grid({"router.granularity": ("sequence",)}),
        *grid({"router.top_k": (1,)}),
    ]
