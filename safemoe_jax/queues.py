"""Commands by a queue: Slurm through submitit, clouds through SkyPilot's managed jobs.

Each function is given names and waits until all of their jobs have ended. What it submitted is
remembered below ROOT, so that a second call finds what the first one left in the queue.
"""

import dataclasses
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safemoe_jax.errors import UserError
from safemoe_jax.progress import console

PROGRAM = (sys.executable, "-m", "safemoe_jax.cli")
POLL_SECONDS = 20.0


class Unfinished(Exception):
    """Some of what was to be run has no result."""


@dataclasses.dataclass(frozen=True)
class _Command:
    """A command as submitit wants it: preempted or out of time it is queued again, and goes on."""

    argv: tuple[str, ...]

    def __call__(self) -> None:
        subprocess.run(self.argv, check=True)

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def slurm(
    names: Sequence[str],
    arguments_of: Callable[[str], list[str]],
    root: Path,
    settings: Mapping[str, Any],
) -> dict[str, str]:
    """Runs `safemoe ARGUMENTS` for each name, as Slurm jobs.

    Args:
      names: what to run.
      arguments_of: name -> the command's arguments.
      root: on a file system that the nodes share; logs are in ROOT/slurm/NAME.
      settings: of submitit's SlurmExecutor, like time (in minutes), partition or gpus_per_node.

    Returns:
      For each name whose job failed, where to look.

    Raises:
      UserError: where submitit or Slurm is missing, or a setting is wrong.
    """
    try:
        import submitit
    except ImportError:
        raise UserError(
            "--backend slurm needs submitit; pip install -e '.[slurm]' in the checkout"
        ) from None
    if "time" not in settings:
        raise UserError("--slurm time=MINUTES is missing; a job without it gets 5 minutes")
    jobs = {}
    for name in names:
        folder = (root / "slurm" / name).absolute()
        try:
            executor = submitit.SlurmExecutor(folder)
            executor.update_parameters(job_name=name, **settings)
            command = _Command((*PROGRAM, *arguments_of(name)))
            jobs[name] = _queued(folder) or executor.submit(command)
        except (RuntimeError, ValueError) as error:  # no Slurm, a wrong setting, refused by sbatch
            raise UserError(
                f"submitit: {' '.join(str(error).split())}; correct --slurm, or take another "
                "--backend"
            ) from error
        console.print(f"{name}: job {jobs[name].job_id}; logs in {folder}")
    failed = {}
    for name, job in jobs.items():
        if job.exception() is not None:
            failed[name] = f"job {job.job_id} failed, see {job.paths.stderr}"
    return failed


def _queued(folder: Path) -> Any:
    """The job that an earlier call submitted, where it has not ended yet."""
    import submitit

    submitted = sorted(folder.glob("*_submitted.pkl"), key=lambda path: path.stat().st_mtime)
    for path in submitted[-1:]:
        name = path.name.removesuffix("_submitted.pkl")
        job: submitit.SlurmJob[Any] = submitit.SlurmJob(folder, name)
        if not job.done(force_check=True) and job.state != "UNKNOWN":
            return job
    return None


# Of SkyPilot's ManagedJobStatus the final ones, and one for a job that it no longer lists.
_SKY_FAILED = (
    "GONE",
    "CANCELLED",
    "FAILED",
    "FAILED_SETUP",
    "FAILED_PRECHECKS",
    "FAILED_NO_RESOURCE",
    "FAILED_CONTROLLER",
)


def skypilot(
    names: Sequence[str],
    arguments_of: Callable[[str], list[str]],
    root: Path,
    task: Path,
    take: Callable[[str, str], bool],
) -> dict[str, str]:
    """Runs `safemoe ARGUMENTS --workdir ...` for each name, as SkyPilot's managed jobs.

    Args:
      names: what to run.
      arguments_of: name -> the command's arguments, without --workdir.
      root: where the jobs' ids are kept, in ROOT/skypilot.
      task: SkyPilot's file; it runs `safemoe $SAFEMOE_ARGS --workdir DIR`, DIR in a bucket.
      take: (name, log of its job) -> whether the result was in it; keeps the result.

    Returns:
      For each name whose job failed, where to look.

    Raises:
      UserError: where `sky` is missing or fails.
    """
    if not task.is_file():
        raise UserError(
            f"--task {task} is no file; launch/skypilot_sweep.yaml is one to begin with"
        )
    (root / "skypilot").mkdir(parents=True, exist_ok=True)
    ids = {name: root / "skypilot" / name for name in names}
    status = _sky_status()
    for name, path in ids.items():
        if path.exists() and status.get(int(path.read_text()), "GONE") not in _SKY_FAILED:
            continue
        arguments = f"SAFEMOE_ARGS={shlex.join(arguments_of(name))}"
        options = ["--name", f"safemoe-{name}", "--env", arguments, "--detach-run", "--yes"]
        _sky("jobs", "launch", *options, str(task))
        path.write_text(str(max(_sky_status(f"safemoe-{name}"))))
        console.print(f"{name}: managed job {path.read_text()}")
    failed, waiting = {}, {name: int(path.read_text()) for name, path in ids.items()}
    while waiting:
        status = _sky_status()
        for name, number in list(waiting.items()):
            state = status.get(number, "GONE")
            if state in _SKY_FAILED:
                failed[name] = f"{state}, see `sky jobs logs {number}`"
            elif state != "SUCCEEDED":
                continue
            elif not take(name, _sky("jobs", "logs", "--no-follow", str(number))):
                failed[name] = f"job {number} succeeded, and its log holds no result"
            del waiting[name]
        if waiting:
            time.sleep(POLL_SECONDS)
    return failed


def _sky_status(name: str | None = None) -> dict[int, str]:
    """Managed jobs, or those of one name: id -> status."""
    jobs = json.loads(_sky("jobs", "queue", "--all", "--refresh", "--output", "json"))
    return {job["job_id"]: job["status"] for job in jobs if name in (None, job["job_name"])}


def _sky(*arguments: str) -> str:
    command = ["sky", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise UserError(
            "--backend skypilot needs the `sky` command; install SkyPilot and let `sky check` pass"
        ) from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or error.stdout).strip().splitlines() or ["no message"]
        raise UserError(
            f"`{shlex.join(command)}` failed: {reason[-1]}; correct that and repeat this command"
        ) from error
    return done.stdout
