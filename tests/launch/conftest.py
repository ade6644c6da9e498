"""A small repository whose launchers are called, with the fakes of tests/fakes on the PATH."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAKES = ROOT / "tests" / "fakes"
PATIENCE = 600  # seconds, for what takes some on a machine of its own
NOBODY = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def git(repo: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repo), *NOBODY, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def make_repo(repo: Path, *folders: str) -> None:
    """A repository with the named folders of this one, all committed."""
    for folder in folders:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, repo / folder, ignore=ignore)
    shutil.copy(ROOT / ".gitignore", repo)
    for file in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / file, repo)
    git(repo, "init", "--quiet")
    git(repo, "add", "--all")
    git(repo, "commit", "--quiet", "--message", "all of it")


@pytest.fixture(scope="session")
def _template(tmp_path_factory):
    repo = tmp_path_factory.mktemp("template") / "repo"
    make_repo(repo, "launch", "experiments")
    return repo


@pytest.fixture
def repo(_template, tmp_path):
    return shutil.copytree(_template, tmp_path / "repo", symlinks=True)


class Pod:
    """The fake cloud and the launcher that uses it."""

    def __init__(self, home: Path, repo: Path) -> None:
        self.home, self.repo = home, repo
        self._started: list[subprocess.Popen] = []
        self.environment = os.environ | {
            "FAKE_GCLOUD": str(home),
            "PATH": f"{FAKES}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SAFEMOE_RETRY_SECONDS": "0",
        }

    def plays(self, **files: object) -> None:
        """Sets what is to happen: see tests/fakes/gcloud."""
        for name, text in files.items():
            (self.home / name).write_text(str(text))

    def start(self, *command: str) -> subprocess.Popen:
        process = subprocess.Popen(
            command,
            cwd=self.repo,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def call(self, *command: str) -> tuple[int, str]:
        """-> the exit code, and what was printed."""
        process = self.start(*command)
        output, _ = process.communicate(timeout=PATIENCE)
        return process.returncode, output

    def calls(self, verb: str | None = None) -> list[list[str]]:
        """The arguments of gcloud's calls, or of those with one verb."""
        path = self.home / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        calls = [json.loads(line) for line in lines]
        return [call for call in calls if verb is None or call[3] == verb]

    def runs(self, worker: int = 0) -> list[str]:
        """The arguments that safemoe was started with on one worker, each time."""
        path = self.home / f"runs-{worker}"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def is_up(self) -> bool:
        return (self.home / "slice").exists()

    def end(self) -> None:
        """Kills what runs on, here and on fake slices, hosts and the rehearsal's workers."""
        for process in self._started:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        for pid in self.home.parent.glob("*/**/safemoe/*/pid"):
            group = int(pid.read_text())
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


@pytest.fixture
def pod(tmp_path, repo):
    home = tmp_path / "cloud"
    home.mkdir()
    pod = Pod(home, repo)
    yield pod
    pod.end()
