"""A run's directory: whose it is, what it was made with, and that nobody else is writing to it.

config.json run.json lock metrics.jsonl tensorboard/ wandb/ data/ experts/ router/ bundle/
unfinished/ controls/ evaluation/ report.json report.html report.md report.tex
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from etils import epath

from safemoe_jax.config import Config, to_dict
from safemoe_jax.errors import UserError
from safemoe_jax.fetch import cache_dir
from safemoe_jax.parallel.hosts import all_agree, first_says, is_first, wait_for_all
from safemoe_jax.private_files import LOCK, clear_unfinished, is_unfinished, lock, replacing
from safemoe_jax.remote import Mirror, is_remote

# What may differ between two commands in one directory. A mesh decides where numbers are computed,
# and in which order sums are added; a checkpoint is of no mesh.
_FREE = ("evaluation", "mesh")
# Of a remote directory: what hosts have a copy of. Data is built anew, checkpoints are not copied.
_MIRRORED = (
    *("config.json", "run.json", "metrics.jsonl", "tensorboard", "wandb", "bundle", "controls"),
    *("evaluation", "report.json", "report.html", "report.md", "report.tex"),
)


class Workdir:
    """Paths of one run, readable by its owner alone; a context that holds it for one command.

    A command on several hosts holds it by its first process.
    """

    def __init__(self, place: Path | str, config: Config) -> None:
        """Touches nothing yet.

        Args:
          place: the directory; of a URL (gs://bucket/run) each host has a copy in its cache,
            checkpoints go there directly, and a lock holds on one host only.
          config: the run's.
        """
        self._place, self._config = str(place), config
        self._mirror: Mirror | None = None
        self.root = Path(place).expanduser()  # no shell does in --workdir=~/run
        if is_remote(self._place):
            name = hashlib.sha256(self._place.encode()).hexdigest()[:16]
            self.root = cache_dir() / "workdirs" / f"{name}-{jax.process_index()}"
            self._mirror = Mirror(self._place, self.root, _MIRRORED)

    def __enter__(self) -> "Workdir":
        """Creates or adopts `root`, takes its lock, and writes config.json and run.json.

        Raises:
          UserError: where another process holds it, it cannot be written to, or it holds a run of
            another config or something else than a run.
        """
        try:
            if self._mirror is None:
                self._refuse_what_is_no_run()
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.root.chmod(0o700)
            self._lock = (self.root / LOCK).open("a")
        except OSError as error:
            raise UserError(
                f"cannot write to --workdir {self.root} ({error.strerror}); give another --workdir"
            ) from error
        try:
            if self._mirror is not None:
                self._mirror.pull()
            if is_first():
                self._take()
            if self._mirror is None:
                self._check_shared()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if self._mirror is not None and is_first():
                self._mirror.push()
        finally:
            self._lock.close()  # gives the lock back

    def publish(self) -> None:
        """Lets all hosts see what the first has written; every process calls it."""
        if self._mirror is not None and is_first():
            self._mirror.push()
        wait_for_all("published")
        if self._mirror is not None and not is_first():
            self._mirror.pull()

    def send_evaluation(self) -> None:
        """Sends what the first process has evaluated so far; no other process is waited for.

        What was not sent when a process is killed is lost: the remote is what counts.
        """
        if self._mirror is not None and is_first():
            self._mirror.push(self.evaluation.name)

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def bundle(self) -> Path:
        return self.root / "bundle"

    @property
    def controls(self) -> Path:
        return self.root / "controls"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files and traces of the profiler, by stage."""
        return self.root / "tensorboard"

    @property
    def url(self) -> str:
        """Of a remote directory; "" where it is a local one."""
        return self._place if self._mirror else ""

    @property
    def name(self) -> str:
        return self._place.rstrip("/").rpartition("/")[2]

    @property
    def identity(self) -> str:
        """What tells this directory from any other, of its name and config too."""
        commands = json.loads((self.root / "run.json").read_text(encoding="utf-8"))["commands"]
        return hashlib.sha256(json.dumps(commands[0]).encode()).hexdigest()

    def checkpoints(self, stage: str) -> epath.Path:
        """Where a stage's checkpoints are, in a directory that holds nothing else."""
        if self._mirror is not None:
            return self._mirror.path(stage, "checkpoints")
        return epath.Path(self.root.absolute()) / stage / "checkpoints"

    def _check_shared(self) -> None:
        """Several hosts work in one directory, not in several of one name."""
        if jax.process_count() == 1:
            return
        token = first_says(time.time_ns())
        probe = self.root / f".{token}"
        if is_first():
            probe.touch()
        wait_for_all("workdir")
        shared = all_agree(probe.exists())
        if is_first():
            probe.unlink()
        if not shared:
            raise UserError(
                f"--workdir {self.root} is not the same directory on all hosts; give one on a file "
                "system that they share"
            )

    def _refuse_what_is_no_run(self) -> None:
        """Not every directory with files in it is ours to close to others and to write to."""
        if not self.root.exists():
            return
        # First what is there, then of what kind it is: another host may begin the run meanwhile.
        listed = set(self.root.iterdir())
        # Where a run was killed as it began there is the lock, and perhaps half a config.json.
        names = {path.name for path in listed} - {LOCK}
        others = sorted(name for name in names if not is_unfinished(name))
        if others and not (self.root / "config.json").exists():
            raise UserError(
                f"--workdir {self.root} holds {others[0]!r} and no config.json, so it is no run's; "
                "give a new or an empty directory"
            )

    def _take(self) -> None:
        try:
            lock(self._lock, f"--workdir {self.root}", wait=False)
        except BlockingIOError:
            raise UserError(
                f"another process is working in {self.root}; wait for it, or give another --workdir"
            ) from None
        clear_unfinished(self.root)
        values = json.loads(json.dumps(to_dict(self._config)))
        path = self.root / "config.json"
        if path.exists():
            stored = read_object(path, f"put it back, or delete {self.root} and begin anew")
            for key, old, new in _differences(stored, values, "config"):
                if key.split(".")[1] not in _FREE:
                    raise UserError(
                        f"{self.root} holds a run with {key} = {old!r}, this one has {new!r}; give "
                        "another --workdir, or delete that directory"
                    )
        write_json(path, values)
        self._note_command()

    def _note_command(self) -> None:
        """run.json tells of every command that worked here, the newest last."""
        path = self.root / "run.json"
        before = read_object(path, "delete it").get("commands", []) if path.exists() else []
        if not isinstance(before, list):
            raise UserError(f"{path} is damaged (commands is {before!r}); delete it")
        write_json(path, {"commands": [*before, _environment(self._config)]})


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """What a file of JSON holds; a UserError that ends with `remedy` where it is no object."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # a UnicodeDecodeError is one
        raise UserError(f"{path} is not JSON ({error}); {remedy}") from error
    if not isinstance(stored, dict):
        raise UserError(f"{path} holds no JSON object; {remedy}")
    return stored


def write_json(path: Path, values: Any) -> None:
    """Replaces a JSON file in one step."""
    with replacing(path) as file:
        file.write(json.dumps(values, indent=2) + "\n")


def own_commit() -> str:
    """`code_commit` of this package."""
    return code_commit(Path(__file__).resolve().parents[1])


def code_commit(root: Path) -> str:
    """The commit of the code in `root`, with a word on changes since.

    Launchers ship code without its history, and write into the file STAMP what it is. "unknown"
    where there is neither.
    """
    stamp = root / "STAMP"
    if not (root / ".git").exists():
        return stamp.read_text(encoding="utf-8").strip() if stamp.is_file() else "unknown"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):  # no git here, or one that does not trust it
        return "unknown"
    return f"{commit} with changes" if changes else commit


def _differences(old: Any, new: Any, path: str):
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}")
    elif old != new:
        yield path, old, new


def _environment(config: Config) -> dict[str, Any]:
    needed = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")
    versions = {name: metadata.version(name) for name in ("safemoe-jax", *needed)}
    if importlib.util.find_spec("libtpu"):
        versions["libtpu"] = metadata.version("libtpu")
    return {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": own_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "devices": [str(device) for device in jax.devices()],
        "device_kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "mesh": dataclasses.asdict(config.mesh),
        # What changes the compiled programs, and no other variable: some hold secrets.
        "flags": {
            name: value
            for name, value in sorted(os.environ.items())
            if name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") or name.startswith("JAX_")
        },
        "versions": versions,
    }
