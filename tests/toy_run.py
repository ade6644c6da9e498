"""Stage one on a toy: what tests run, disturb and run again, on one host or on several.

    python toy_run.py WORKDIR MESH [SIGNAL PROCESS STEP]

MESH is as in data=2,fsdp=2. The named process sends itself the signal, TERM or KILL, just before
the step. Exits 75 where it was interrupted and has saved.
"""

import dataclasses
import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    from safemoe_jax.parallel.hosts import connect

    connect()

import jax
import optax
from etils import epath
from toys import ADAMW, SPEC, initial, toy_corpus, toy_model, toy_variables

from safemoe_jax.config import ExpertsConfig, MeshConfig, TrainConfig
from safemoe_jax.data.pipeline import train_iterator
from safemoe_jax.parallel.mesh import make_mesh
from safemoe_jax.parallel.sharding import local_rows, replicated, shardings
from safemoe_jax.training.checkpoints import Checkpoints
from safemoe_jax.training.interruption import Interrupted
from safemoe_jax.training.loop import Stage, train
from safemoe_jax.training.metrics import MetricsWriter, Writer
from safemoe_jax.training.observer import Observer, Trace, Work
from safemoe_jax.training.state import (
    TrainState,
    init_expert_state,
    make_optimizer,
    state_shardings,
)
from safemoe_jax.training.steps import expert_train_step
from safemoe_jax.training.validation import expert_validation

DOMAINS = ("apples", "pears")
CONFIG = TrainConfig(steps=12, rows=2, accumulation=1, validate_every=3, save_every=4, keep=2)
MODEL = toy_model(
    spec=dataclasses.replace(SPEC, vocab_size=64),
    num_experts=2,
    experts=ExpertsConfig(("v", "down"), rank=2, alpha=3.0),
)
TX: optax.GradientTransformation = make_optimizer(
    dataclasses.replace(ADAMW, schedule="cosine", warmup_steps=2), CONFIG.steps
)
WORK = Work(tokens=48, flops=1e6, peak=None)
ONE = MeshConfig(data=1, fsdp=1, tensor=1, context=1)


def batches(places=None):
    corpus = toy_corpus(DOMAINS, per_stream=9, length=12)
    return train_iterator(corpus, CONFIG.rows, seed=0, places=places)


class Noted:
    """Batches whose example ids are written to a file, a line a step."""

    def __init__(self, iterator, path: Path) -> None:
        self._iterator, self._path = iterator, path
        self.get_state, self.set_state = iterator.get_state, iterator.set_state

    def __next__(self):
        batch = next(self._iterator)
        ids = batch["example_ids_BS"]
        with self._path.open("a") as file:
            file.write(json.dumps(ids[ids >= 0].tolist()) + "\n")
        return batch


@functools.cache
def compiled(mesh_config: MeshConfig):
    """Mesh, frozen base, initial state's shardings, train step and validation."""
    mesh = make_mesh(mesh_config)
    boxed = jax.eval_shape(lambda: initial(MODEL, unbox=False))
    base, experts = (toy_variables(MODEL)[name] for name in ("params", "experts"))
    frozen = {"params": jax.device_put(base, shardings(mesh, boxed["params"]))}
    state = jax.eval_shape(lambda: init_expert_state(experts, TX))
    placed = state_shardings(mesh, boxed["experts"], state, TX)
    step = functools.partial(expert_train_step, model=MODEL, tx=TX, accumulation=1)
    step = jax.jit(step, donate_argnums=0, out_shardings=(placed, replicated(mesh)))
    held_out = toy_corpus(DOMAINS, per_stream=3, length=12, seed=1)
    validate = expert_validation(MODEL, frozen, held_out, 4, mesh)
    return mesh, frozen, placed, step, validate


def run(
    workdir: Path,
    before: Callable[[int, TrainState], TrainState] = lambda step, state: state,
    after: Callable[[int, dict], dict] = lambda step, metrics: metrics,
    mesh: MeshConfig = ONE,
    writers: Callable[[int], list[Writer]] = lambda first: [],
    profile: range = range(0),
    work: Work = WORK,
) -> TrainState:
    """Trains to the end, from the workdir's newest checkpoint.

    Args:
      workdir: of checkpoints, metrics.jsonl and what each process has read, ids-<process>.jsonl.
      before: given the number of the step to come, from 1, and the state; may change it.
      after: given the step's number and its metrics; may change them.
      mesh: where.
      writers: step that training goes on from -> where rows go besides metrics.jsonl.
      profile: steps that are traced, into the workdir.
      work: what a step is said to do.
    """
    mesh, frozen, placed, step, validate = compiled(mesh)

    def disturbed(state, frozen, batch):
        number = int(state.step) + 1
        state, metrics = step(before(number, state), frozen, batch)
        return state, after(number, metrics)

    places = local_rows(mesh, CONFIG.rows * len(DOMAINS))
    drawn = Noted(batches(places), workdir / f"ids-{jax.process_index()}.jsonl")
    stage = Stage("experts", disturbed, frozen, drawn, validate)
    observer = Observer(
        "experts",
        streams=DOMAINS,
        domains=DOMAINS,
        work=work,
        open_writers=lambda first: [
            MetricsWriter(workdir / "metrics.jsonl", "experts", first),
            *writers(first),
        ],
        trace=Trace(profile, workdir / "trace"),
    )
    experts = toy_variables(MODEL)["experts"]
    state = jax.jit(lambda: init_expert_state(experts, TX), out_shardings=placed)()
    checkpoints = Checkpoints(
        epath.Path(workdir) / "checkpoints", keep=CONFIG.keep, identity={"base": "toy"}
    )
    try:
        return train(stage, state, CONFIG, mesh, checkpoints, observer, publish=lambda: None)
    finally:
        checkpoints.close()


def main(workdir: str, mesh: str, name: str = "", process: str = "0", step: str = "0") -> int:
    def send(number, state):
        if name and (jax.process_index(), number) == (int(process), int(step)):
            os.kill(os.getpid(), signal.Signals[f"SIG{name}"])
        return state

    axes = dict(axis.split("=") for axis in mesh.split(","))
    axes = {axis: int(size) for axis, size in axes.items()}
    try:
        run(Path(workdir), before=send, mesh=dataclasses.replace(ONE, **axes))
    except Interrupted as error:
        print(error)
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
