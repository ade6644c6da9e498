"""Faults of the two stages' training loop, on toys, in a process that has compiled them once.

A restart costs some tenths of a second, so there can be many. SIGKILL is played by a copy of the
directory that is made while the process is stopped: it is what a kill at that moment leaves.
"""

import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import toy_run
from attempts import logged
from etils import epath
from toys import initial, leaves_equal, toy_corpus, toy_variables

from safemoe_jax.config import TrainConfig
from safemoe_jax.data.pipeline import train_iterator
from safemoe_jax.errors import UserError, refused_by_the_machine
from safemoe_jax.parallel.sharding import replicated, shardings
from safemoe_jax.training.checkpoints import Checkpoints
from safemoe_jax.training.interruption import Interrupted
from safemoe_jax.training.loop import Stage, train
from safemoe_jax.training.metrics import MetricsWriter
from safemoe_jax.training.observer import Observer, Trace
from safemoe_jax.training.state import init_expert_state, init_router_state, state_shardings
from safemoe_jax.training.steps import gate_train_step
from safemoe_jax.training.validation import gate_validation

STAGES = ("experts", "router")
CONFIG = TrainConfig(steps=8, rows=2, accumulation=1, validate_every=4, save_every=2, keep=2)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


class Broken(Exception):
    """What must not be: a trial's finding."""


class Loops:
    """Both stages, compiled; `run` trains them in a directory, from what is there."""

    def __init__(self) -> None:
        self._mesh, frozen, self._placed, self._expert_step, self._validate = toy_run.compiled(
            toy_run.ONE
        )
        model, tx = toy_run.MODEL, toy_run.TX
        boxed = jax.eval_shape(lambda: initial(model, unbox=False))
        variables = toy_variables(model)
        self._frozen = {
            "experts": frozen,
            "router": frozen
            | {
                "experts": jax.device_put(
                    variables["experts"], shardings(self._mesh, boxed["experts"])
                )
            },
        }
        state = jax.eval_shape(lambda: init_router_state(variables["router"], tx))
        placed = state_shardings(self._mesh, boxed["router"], state, tx)
        step = functools.partial(gate_train_step, model=model, tx=tx, accumulation=1)
        self._steps = {
            "experts": self._expert_step,
            "router": jax.jit(
                step, donate_argnums=0, out_shardings=(placed, replicated(self._mesh))
            ),
        }
        self._begin = {
            "experts": jax.jit(
                lambda: init_expert_state(variables["experts"], tx),
                out_shardings=self._placed,
            ),
            "router": jax.jit(
                lambda: init_router_state(variables["router"], tx), out_shardings=placed
            ),
        }
        held_out = toy_corpus(("all",), per_stream=4, length=12, seed=1)
        self._validates = {
            "experts": self._validate,
            "router": gate_validation(model, self._frozen["router"], held_out, 4, self._mesh),
        }
        self._text = {
            "experts": toy_corpus(toy_run.DOMAINS, per_stream=9, length=12),
            "router": toy_corpus(("all",), per_stream=9, length=12),
        }

    def run(self, root: Path, before: Callable[[str, int], None] = lambda stage, step: None) -> Any:
        """Final states by stage; `before` hears of each step that is made, from 1."""
        return {stage: self._run(root, stage, before) for stage in STAGES}

    def _run(self, root: Path, name: str, before: Callable[[str, int], None]) -> Any:
        def step(state, frozen, batch):
            before(name, int(state.step) + 1)
            return self._steps[name](state, frozen, batch)

        streams = self._text[name].streams
        batches = train_iterator(self._text[name], CONFIG.rows, seed=0)
        stage = Stage(name, step, self._frozen[name], batches, self._validates[name])
        observer = Observer(
            name,
            streams=streams,
            domains=toy_run.DOMAINS,
            work=toy_run.WORK,
            open_writers=lambda first: [MetricsWriter(root / "metrics.jsonl", name, first)],
            trace=Trace(range(0), root / "trace"),
        )
        place = epath.Path(root) / name / "checkpoints"
        checkpoints = Checkpoints(place, keep=CONFIG.keep, identity={"base": "toy"})
        try:
            state = self._begin[name]()
            return train(
                stage, state, CONFIG, self._mesh, checkpoints, observer, publish=lambda: None
            )
        finally:
            checkpoints.close()


@dataclasses.dataclass
class LoopTrial:
    """One directory, what is done to it, and how its runs have ended so far.

    Attributes:
      crashes: directories as a kill at random moments of a run would leave them.
    """

    loops: "Loops"
    whole: "Whole"
    root: Path
    crashes: list[Path]
    rng: random.Random
    starts: list[str] = dataclasses.field(default_factory=list)
    what: str = ""

    def did(self, what: str) -> None:
        self.what += f"; {what}" if self.what else what

    def begin(self) -> None:
        """From one of the crashes."""
        place = self.rng.randrange(len(self.crashes))
        self.did(f"from crash {place}")
        shutil.copytree(self.crashes[place], self.root, dirs_exist_ok=True)

    def start(self, before: Callable[[str, int], None] = lambda stage, step: None) -> str:
        """Runs to the end -> "", or the one line that it ends with, as the command line says it."""
        first: dict[str, int] = {}
        before_it = committed(self.root)

        def noted(stage: str, step: int) -> None:
            first.setdefault(stage, step)
            before(stage, step)

        try:
            states = self.loops.run(self.root, noted)
        except Exception as error:
            _until_quiet(self.root)
            message = explanation(error)
            self.starts.append(message or repr(error))
            if message is None:
                raise Broken(f"a traceback: {error!r}"[:3000]) from error
            return message
        self.starts.append("done")
        for stage, step in before_it.items():
            if first.get(stage, step + 1) != step + 1:
                raise Broken(f"{stage} went on before step {first[stage]}, {step} was committed")
        self.whole.compare(states, self.root)
        return ""

    def finish(self) -> str:
        """Runs until the outcome is there -> "identical", or "message" where it took one."""
        said = ""
        while message := self.start():
            if message == said:
                raise Broken(f"its remedy does not help: {said}")
            said = message
            if "the same command goes on" in message and "delete" not in message:
                continue
            paths = re.findall(rf"{re.escape(str(self.root))}/[\w./-]*\w", message)
            if "delete" not in message or not paths:
                raise Broken(f"a message without a remedy that can be followed: {message}")
            shutil.rmtree(paths[-1])
        return "message" if said else "identical"


def _until_quiet(root: Path) -> None:
    """Waits until nobody writes there: in a process of its own, a save that was given up would have
    ended with it."""
    seen, now = None, {}
    while now != seen:
        seen, now = now, {}
        time.sleep(0.1)
        for directory, _, names in os.walk(root):
            now[directory] = sorted(names)


def explanation(error: Exception) -> str | None:
    """What the command line says of it; None for a traceback."""
    if isinstance(error, (UserError, Interrupted)):
        return str(error)
    return refused_by_the_machine(error)


class Whole:
    """What a run that nobody disturbed comes to."""

    def __init__(self, loops: Loops, root: Path) -> None:
        root.mkdir(parents=True)
        self._states, self._metrics = jax.device_get(loops.run(root)), logged(root)

    def compare(self, states: Any, root: Path) -> None:
        if not leaves_equal(jax.device_get(states), self._states):
            raise Broken("the weights differ silently")
        if logged(root) != self._metrics:
            raise Broken("the metrics differ silently")


def committed(root: Path) -> dict[str, int]:
    """The newest whole checkpoint of each stage."""
    steps = {
        stage: [int(p.name) for p in root.glob(f"{stage}/checkpoints/*") if p.name.isdigit()]
        for stage in STAGES
    }
    return {stage: max(of) for stage, of in steps.items() if of}


_hooks: list[Callable[[], None]] = []


def _audit(event: str, arguments: tuple) -> None:
    if _hooks and (event in _CHANGES or (event == "open" and (arguments[2] or 0) & _WRITING)):
        _hooks[-1]()


sys.addaudithook(_audit)


def crashes(loops: Loops, root: Path, copies: Path, rng: random.Random, share: float) -> list[Path]:
    """Runs in `root`, and copies it at random changes of files and somewhat later ones."""
    copies.mkdir(parents=True)
    root.mkdir(exist_ok=True)
    lock = threading.Lock()
    made: list[subprocess.Popen] = []

    def copy() -> None:
        if rng.random() >= share or not lock.acquire(blocking=False):
            return
        try:
            target = copies / str(len(made))
            later = rng.choice([0.0, 0.0, rng.uniform(0, 0.02)])
            # Stopped, no thread of this process writes; not even tensorstore's.
            script = f"sleep {later}; kill -STOP $0; cp -a {root} {target}; kill -CONT $0"
            made.append(subprocess.Popen(["sh", "-c", script, str(os.getpid())]))
            if not later:
                made[-1].wait()
        finally:
            lock.release()

    _hooks.append(copy)
    try:
        loops.run(root)
    finally:
        _hooks.pop()
    for process in made:
        process.wait()
    return sorted((path for path in copies.iterdir()), key=lambda path: int(path.name))


# What is done.


def killed(trial: LoopTrial) -> None:
    trial.begin()


def killed_again(trial: LoopTrial) -> None:
    """The second run is killed, too."""
    trial.begin()
    again = crashes(trial.loops, trial.root, trial.root.with_name("again"), trial.rng, 0.1)
    if again:
        shutil.rmtree(trial.root)
        trial.rng.choice(again).rename(trial.root)
    trial.did(f"killed at one of {len(again)} moments of the next run")


def terminated(trial: LoopTrial) -> None:
    """SIGTERM before a random step."""
    if trial.rng.random() < 0.5:
        trial.begin()
    at = trial.rng.choice(STAGES), trial.rng.randint(1, CONFIG.steps)
    trial.did(f"SIGTERM at {at}")

    def send(stage: str, step: int) -> None:
        if (stage, step) == at:
            signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        trial.start(send)
    finally:
        signal.signal(signal.SIGTERM, before)


def damaged(trial: LoopTrial) -> None:
    """A file of the checkpoints is cut, or one of its bits flipped."""
    trial.begin()
    files = sorted(p for p in trial.root.glob("*/checkpoints/**/*") if p.is_file())
    files = [path for path in files if path.stat().st_size]
    if not files:
        return
    path = trial.rng.choice(files)
    trial.did(f"{damage(path, trial.rng)} in {path.relative_to(trial.root)}")


def damage(path: Path, rng: random.Random) -> str:
    """Cuts a file, or flips one of its bits; says what."""
    content = bytearray(path.read_bytes())
    if rng.random() < 0.4:
        length = rng.randrange(len(content))
        path.write_bytes(content[:length])
        return f"cut to {length} of {len(content)} bytes"
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} flipped"


def metrics_torn(trial: LoopTrial) -> None:
    """The last line of metrics.jsonl ends in the midst, as a full disk leaves it."""
    trial.begin()
    path = trial.root / "metrics.jsonl"
    if path.exists() and (content := path.read_bytes()):
        last = len(content.splitlines()[-1]) + 1
        cut = trial.rng.choice([1, trial.rng.randint(1, last)])
        saved = committed(trial.root)
        row = json.loads(content.splitlines()[-1])
        if row["step"] > saved.get(row["stage"], 0):  # what is logged is on disk before its save
            path.write_bytes(content[:-cut])
            trial.did(f"{cut} bytes cut from metrics.jsonl")


def full_disk(trial: LoopTrial) -> None:
    """A file system that is too small, and then is made larger."""
    size = trial.rng.randint(8, 400)
    with mounted(trial.root, f"size={size}k"):
        trial.did(f"{size} KiB of disk")
        trial.start()
        subprocess.run(["mount", "-o", "remount,size=64m", trial.root], check=True)
        shutil.copytree(trial.root, trial.root.with_name("kept"))
    trial.root.rmdir()
    trial.root.with_name("kept").rename(trial.root)


def read_only(trial: LoopTrial) -> None:
    """A file system that is mounted to be read alone for a while."""
    with mounted(trial.root, "size=64m"):
        trial.begin()
        subprocess.run(["mount", "-o", "remount,ro", trial.root], check=True)
        trial.did("mounted read-only")
        trial.start()
        shutil.copytree(trial.root, trial.root.with_name("kept"))
    trial.root.rmdir()
    trial.root.with_name("kept").rename(trial.root)


@contextmanager
def mounted(path: Path, options: str) -> Iterator[None]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def jumping_clock(trial: LoopTrial) -> None:
    """The clock jumps by up to thirty years, and files have dates of any time."""
    trial.begin()
    rng, tell, offset = trial.rng, time.time, 0.0
    for path in trial.root.rglob("*"):
        when = tell() + rng.uniform(-1, 1) * 10.0 ** rng.randint(0, 9)
        os.utime(path, (when, when))

    def now() -> float:
        nonlocal offset
        if rng.random() < 0.05:
            offset = rng.uniform(-1, 1) * 10.0 ** rng.randint(0, 9)
        return tell() + offset

    time.time = now
    try:
        trial.start()
    finally:
        time.time = tell


FAULTS: dict[str, tuple[str, Callable[[LoopTrial], None]]] = {
    "killed": ("SIGKILL at a random moment, within a checkpoint's write too", killed),
    "killed_again": ("SIGKILL, and SIGKILL of the next run", killed_again),
    "terminated": ("SIGTERM at a random step", terminated),
    "damaged": ("SIGKILL, and a checkpoint's file cut or a bit of it flipped", damaged),
    "metrics_torn": ("SIGKILL, and metrics.jsonl cut", metrics_torn),
    "full_disk": ("disk full (a tmpfs of 8 to 400 KiB)", full_disk),
    "read_only": ("SIGKILL, and a file system that is read-only for a while", read_only),
    "jumping_clock": ("SIGKILL, and the clock jumps", jumping_clock),
}
MOUNT = ("full_disk", "read_only")  # these need root
