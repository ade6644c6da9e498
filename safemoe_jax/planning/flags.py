"""The arguments of `safemoe plan`; JAX is imported once they are read."""

import argparse
from pathlib import Path


def add_plan(sub: argparse.ArgumentParser) -> None:
    sub.usage = (
        "safemoe plan --config FILE --topology CHIP:SHAPE [--config.KEY=VALUE ...] [--search] "
        "[--json FILE] [--picture FILE]"
    )
    sub.epilog = (
        "Compiles the experiment's own train steps, prefill and decode step for the slice, from "
        "shapes, and prints what each needs of a device: memory (with 'fits: yes' or 'fits: no'), "
        "FLOPs, what it sends, and the least seconds that these take. Exit code 0 where all fit, "
        "2 where one does not. Example: safemoe plan --config experiments/llama31_8b.py "
        "--topology v5e:4x4 --config.model.remat=dots. How to read it: docs/plans.md."
    )
    sub.add_argument("--config", type=Path, required=True, help="experiment file")
    sub.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:SHAPE",
        help="v5e:4x4, v6e:4x4, v5p:4x4x4, tpu7x:2x2x1; or v5litepod-16, v5p-128, v6e-16, v4-32",
    )
    sub.add_argument(
        "--search",
        action="store_true",
        help="rank meshes, remat policies and rows by hours; compiles some twenty times",
    )
    sub.add_argument("--json", type=Path, metavar="FILE", help="the plan in numbers")
    sub.add_argument("--picture", type=Path, metavar="FILE", help="the plan as a page, .html")
