"""Stage one on a toy: what tests/training/test_loop.py runs, disturbs and runs again.

python toy_run.py WORKDIR KILL_AT     # SIGKILL just before step KILL_AT; 0: never
"""

import dataclasses
import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from toys import ADAMW, toy_corpus, toy_model, toy_variables

from safemoe_jax.config import ExpertsConfig, MeshConfig, TrainConfig
from safemoe_jax.data.pipeline import train_iterator
from safemoe_jax.parallel.mesh import make_mesh
from safemoe_jax.training.checkpoints import Checkpoints
from safemoe_jax.training.loop import Stage, train
from safemoe_jax.training.state import TrainState, init_expert_state, make_optimizer
from safemoe_jax.training.steps import expert_train_step
from safemoe_jax.training.validation import expert_validation

DOMAINS = ("apples", "pears")
CONFIG = TrainConfig(steps=12, rows=2, accumulation=1, validate_every=3, save_every=4, keep=2)
MODEL = toy_model(num_experts=2, experts=ExpertsConfig(("v", "down"), rank=2, alpha=3.0))
TX = make_optimizer(dataclasses.replace(ADAMW, schedule="cosine", warmup_steps=2), CONFIG.steps)
MESH = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1, context=1))


def batches():
    return train_iterator(toy_corpus(DOMAINS, per_stream=9, length=12), CONFIG.rows, seed=0)


@functools.cache
def compiled():
    """The frozen base, the train step and the validation."""
    frozen = {"params": toy_variables(MODEL)["params"]}
    step = functools.partial(expert_train_step, model=MODEL, tx=TX, accumulation=1)
    held_out = toy_corpus(DOMAINS, per_stream=3, length=12, seed=1)
    validate = expert_validation(MODEL, frozen, held_out, 4, MESH)
    return frozen, jax.jit(step, donate_argnums=0), validate


def run(
    workdir: Path,
    before: Callable[[int, TrainState], TrainState] = lambda step, state: state,
    after: Callable[[int, dict], dict] = lambda step, metrics: metrics,
) -> TrainState:
    """Trains to the end, from the workdir's newest checkpoint.

    Args:
      workdir: of checkpoints and metrics.jsonl.
      before: given the number of the step to come, from 1, and the state; may change it.
      after: given the step's number and its metrics; may change them.
    """
    frozen, step, validate = compiled()

    def disturbed(state, frozen, batch):
        number = int(state.step) + 1
        state, metrics = step(before(number, state), frozen, batch)
        return state, after(number, metrics)

    stage = Stage("experts", disturbed, frozen, batches(), validate, DOMAINS, DOMAINS)
    state = init_expert_state(toy_variables(MODEL)["experts"], TX)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=CONFIG.keep, identity={"base": "toy"})
    try:
        return train(stage, state, CONFIG, MESH, checkpoints, workdir / "metrics.jsonl")
    finally:
        checkpoints.close()


if __name__ == "__main__":

    def kill(number, state):
        if number == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return state

    run(Path(sys.argv[1]), before=kill)
