"""What the trials of a campaign share: a tiny experiment, and work directories left at places."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import tiny
from attempts import Attempt, Ended, logged, on_writes, timed

from safemoe_jax.data.chat import ChatFormat
from safemoe_jax.fetch import file_digest
from safemoe_jax.training.metrics import MetricsWriter
from safemoe_jax.weights.base import load_base

# Two stages of six steps, a checkpoint at each.
_LOOP = {"steps": 6, "save_every": 1, "validate_every": 2, "keep": 3}
SNAPSHOTS = ("data", "experts", "router", "done")


class Home:
    """base/ corpus.jsonl tiny.py, snapshots/ of one run, and the outcome that all must have."""

    def __init__(self, root: Path) -> None:
        """Makes all of it anew, unless it is there."""
        self.root = root
        self.base, self.corpus = root / "base", root / "corpus.jsonl"
        self._facts = root / "facts.json"
        if not self._facts.exists():
            shutil.rmtree(root, ignore_errors=True)
            (root / "notes").mkdir(parents=True)
            self.restore_inputs()
            self._make()
        self.restore_inputs()
        facts = json.loads(self._facts.read_text())
        self.outcome: dict[str, Any] = facts["outcome"]
        self.seconds: float = facts["seconds"]
        self.writes: list[str] = facts["writes"]

    def restore_inputs(self) -> None:
        """Base, corpus and experiment as they were."""
        for path in (self.base, self.corpus):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        tiny.write_base(self.base)
        tiny.write_corpus(self.corpus)
        tiny.write_experiment(self.root / "tiny.py", self.base, self.corpus)
        # Before any fork: what the first use of a tokenizer imports.
        ChatFormat(load_base(str(self.base), "float32").tokenizer)

    def snapshot(self, name: str) -> Path:
        return self.root / "snapshots" / name

    def argv(self, workdir: Path, verb: str = "train-gate") -> list[str]:
        loops = [
            f"--config.train.{stage}.{key}={value}"
            for stage in ("experts", "router")
            for key, value in _LOOP.items()
        ]
        return [verb, "--config", str(self.root / "tiny.py"), "--workdir", str(workdir), *loops]

    def _make(self) -> None:
        """The undisturbed run, and the places on its way."""
        whole = self.snapshot("done")
        self._run(whole)  # compiles
        shutil.rmtree(whole)
        writes = self.root / "writes"

        def note(number: int, path: str) -> None:
            with writes.open("a") as file:
                file.write(path.removeprefix(str(whole)) + "\n")

        with timed() as passed:
            self._run(whole, on_writes(whole, note))
        facts = {
            "outcome": outcome(whole),
            "seconds": passed()[0],
            "writes": writes.read_text().splitlines(),
        }
        self._run(self.snapshot("data"), verb="data")
        for stage in ("experts", "router"):
            ended = self._run(self.snapshot(stage), lambda stage=stage: _stop_at(stage, 4))
            assert ended.code == 75, ended
        self._facts.write_text(json.dumps(facts))

    def _run(self, workdir: Path, prepare=None, verb: str = "train-gate") -> Ended:
        ended = Attempt(self.argv(workdir, verb), self.root / "notes", prepare).wait()
        assert ended.code in (0, 75), ended.error
        return ended


def outcome(workdir: Path) -> dict[str, Any]:
    """What a run has come to: its weights' sha256, what it is made of, and what it has logged."""
    manifest = json.loads((workdir / "bundle" / "manifest.json").read_text())
    return {
        "experts": file_digest(workdir / "bundle" / "experts.safetensors"),
        "router": file_digest(workdir / "bundle" / "router.safetensors"),
        "provenance": manifest["provenance"],
        "metrics": logged(workdir),
    }


def committed(workdir: Path) -> dict[str, int]:
    """The newest whole checkpoint of each stage."""
    found = {}
    for stage in ("experts", "router"):
        steps = [int(p.name) for p in workdir.glob(f"{stage}/checkpoints/*") if p.name.isdigit()]
        if steps:
            found[stage] = max(steps)
    return found


def _stop_at(stage: str, step: int) -> None:
    """SIGTERM to this process where the stage has logged the step."""
    write = MetricsWriter.write

    def writing(self, at, split, **values):
        write(self, at, split, **values)
        if (self._stage, at, split) == (stage, step, "train"):
            signal.raise_signal(signal.SIGTERM)

    MetricsWriter.write = writing
