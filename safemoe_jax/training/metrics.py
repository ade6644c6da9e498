"""Where a stage's numbers go: metrics.jsonl always, TensorBoard and W&B where a command says so.

Numbers only, never text of a corpus. Process 0 alone writes.
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from safemoe_jax.errors import UserError
from safemoe_jax.private_files import replacing
from safemoe_jax.progress import console

Split = Literal["train", "validation"]

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # values of --log, by what writes them


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a command records of training beside metrics.jsonl; it decides nothing that is trained.

    Attributes:
      log: keys of `PACKAGES`.
      profile: the steps of each stage, from 1, that the profiler traces.
    """

    log: Sequence[str]
    profile: range

    def __post_init__(self) -> None:
        for name in self.log:
            if importlib.util.find_spec(PACKAGES[name]) is None:
                raise UserError(
                    f"--log {name} needs the package {PACKAGES[name]}; pip install -e "
                    f"'.[{name}]' in the checkout"
                )


NOTHING_MORE = Recording(log=(), profile=range(0))


class Writer(Protocol):
    """One place that rows go to."""

    def write(self, step: int, split: Split, **values: float) -> None:
        """Adds a row.

        Args:
          step: steps done.
          split: what the numbers are of.
          **values: numbers by name; a name may have a part after a slash.
        """

    def close(self) -> None:
        """Nothing more comes."""


class MetricsWriter:
    """metrics.jsonl: a line per row, appended as training goes."""

    def __init__(self, path: Path, stage: str, from_step: int) -> None:
        """Opens the file and drops the stage's rows after `from_step`, which a killed run left.

        What is missing of the steps before is said, and stays missing.
        """
        self._path, self._stage = path, stage
        rows = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        kept = [row for row in rows if not self._is_stale(row, from_step)]
        if len(kept) < len(rows):
            with replacing(path) as file:  # a kill in between loses no row
                file.writelines(kept)
        there = {row["step"] for row in map(json.loads, kept) if self._is_of_a_step(row)}
        if missing := from_step - len(there):
            console.print(
                f"{path.name} has lost {missing} of the {from_step} train steps of {stage} so far; "
                "what is trained is the same"
            )

    def write(self, step: int, split: Split, **values: float) -> None:
        row = {"stage": self._stage, "step": step, "split": split, "time": time.time(), **values}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        pass

    def _is_of_a_step(self, row: Mapping[str, Any]) -> bool:
        return row["stage"] == self._stage and row.get("split") == "train"

    def _is_stale(self, line: str, from_step: int) -> bool:
        try:
            row = json.loads(line)
            stale = row["stage"] == self._stage and row["step"] > from_step
        except (ValueError, TypeError, KeyError):
            return True  # cut short by a kill or a full disk
        return stale or not line.endswith("\n")


class TensorBoardWriter:
    """A stage's event file."""

    def __init__(self, directory: Path, from_step: int) -> None:
        """Opens a new file; what older ones have of later steps is no longer shown."""
        from tensorboardX import SummaryWriter

        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        # It purges from the step named on, and there is no train step 0.
        suffix = f".{from_step}"  # files are else told apart by the second of their making alone
        self._writer = SummaryWriter(
            str(directory), purge_step=from_step + 1, filename_suffix=suffix
        )

    def write(self, step: int, split: Split, **values: float) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """A stage's run at Weights & Biases; WANDB_MODE, WANDB_PROJECT and the like are W&B's own."""

    def __init__(
        self, directory: Path, run: str, stage: str, identity: str, config: Mapping[str, Any]
    ) -> None:
        """Begins the run, or goes on with it.

        Args:
          directory: its files go into wandb/ there.
          run: name of the group that the stages' runs form.
          stage: name of the stage.
          identity: what the same work directory always has and no other.
          config: shown with the run.

        Raises:
          UserError: where W&B refuses.
        """
        import wandb

        # Neither what the terminal shows nor code or its repository's address is sent.
        settings = wandb.Settings(console="off", save_code=False, disable_git=True)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "safemoe"),
                dir=directory,
                id=hashlib.sha256(f"{identity} {stage}".encode()).hexdigest()[:16],
                name=f"{run}/{stage}",
                group=run,
                job_type=stage,
                config=dict(config),
                resume="allow",
                settings=settings,
            )
        except wandb.Error as error:
            raise UserError(
                f"W&B refused: {str(error).splitlines()[0]}; `wandb login`, or WANDB_MODE=offline"
            ) from error

    def write(self, step: int, split: Split, **values: float) -> None:
        # Of a run that was killed W&B has later steps than the checkpoint: it keeps the first row
        # of a step, and the second one's losses would be the same.
        self._run.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()
