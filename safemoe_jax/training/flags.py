"""The arguments that say what is recorded of training; nothing here imports JAX."""

import argparse
from typing import TYPE_CHECKING

from safemoe_jax.errors import UserError
from safemoe_jax.training.metrics import NOTHING_MORE, PACKAGES, Recording

if TYPE_CHECKING:
    from safemoe_jax.config import Config


def add_recording(sub: argparse.ArgumentParser) -> None:
    sub.usage = f"{sub.usage} [--log tensorboard|wandb ...] [--profile FIRST:LAST]"
    sub.add_argument(
        "--log",
        nargs="+",
        choices=tuple(PACKAGES),
        default=(),
        help="where training's numbers go besides metrics.jsonl; wandb sends them to W&B, with the "
        "config and what the machine is, unless WANDB_MODE=offline",
    )
    sub.add_argument(
        "--profile",
        type=_steps,
        default=range(0),
        metavar="FIRST:LAST",
        help="steps of each stage, from 1, that jax.profiler traces",
    )


def recording_of(arguments: argparse.Namespace, config: "Config") -> Recording:
    """What a command records; of one that does not train, nothing more.

    Raises:
      UserError: where a package is missing, or no stage has the steps to trace.
    """
    if "profile" not in arguments:
        return NOTHING_MORE
    steps = (config.train.experts.steps, config.train.router.steps)
    if arguments.profile and arguments.profile[0] > max(steps):
        raise UserError(
            f"--profile begins at step {arguments.profile[0]}, and the stages have {steps[0]} and "
            f"{steps[1]} steps; choose earlier ones"
        )
    return Recording(arguments.log, arguments.profile)


def _steps(text: str) -> range:
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is no FIRST:LAST with 1 <= FIRST <= LAST")
    return range(int(first), int(last) + 1)
