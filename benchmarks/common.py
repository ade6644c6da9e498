"""What the benchmarks share: a venv for each peer, two sides run in turn, one table.

Each side runs in a process of its own, so that neither inherits the other's memory or threads. A
side prints one JSON object as its last line. Sides take turns, `rounds` times, and the table shows
the median: a machine that slows down in the middle then slows both.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rich
import rich.table

from safemoe_jax.fetch import cache_dir

HERE = Path(__file__).parent
PEERS = HERE / "peers"
# One set for all peers: each needs torch, and torch is most of what they install.
REQUIREMENTS = (
    "torch==2.13.0",
    "transformers==5.24.0",
    "accelerate==1.15.0",
    "gguf==0.19.0",
)

Result = dict[str, Any]


def peer_python(name: str, *requirements: str, shared: Sequence[str] = REQUIREMENTS) -> Path:
    """The interpreter of a venv that holds torch and `requirements`; made at the first call."""
    directory = cache_dir() / "benchmarks" / name
    python, stamp = directory / "bin" / "python", directory / "installed"
    wanted = "\n".join((*shared, *requirements))
    if not stamp.exists() or stamp.read_text() != wanted:
        rich.print(f"installing {name}: {', '.join(requirements) or 'transformers'}")
        venv.create(directory, clear=True, with_pip=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *shared, *requirements], check=True
        )
        stamp.write_text(wanted)
    return python


def side(python: str | Path, script: Path, *arguments: object) -> Callable[[], Result]:
    """A side: runs `script` in a fresh process and returns the JSON object that it prints last."""

    def run() -> Result:
        command = [str(python), str(script), *map(str, arguments)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment())
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed with {done.returncode}; its messages are above")
        return json.loads(done.stdout.splitlines()[-1])

    return run


def in_turn(sides: dict[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """Runs all sides once, then all again, `rounds` times."""
    results: dict[str, list[Result]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name, run in sides.items():
            results[name].append(run())
            rich.print(f"round {turn + 1} of {rounds}, {name}: {results[name][-1]}")
    return results


def median(results: Sequence[Result], key: str) -> float:
    return statistics.median(result[key] for result in results)


def report(result: Result) -> None:
    """What a side prints last; peak resident memory is added."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**result, "peak_bytes": peak}))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table in Markdown, as benchmarks/RESULTS.md holds it, with machine and commit."""
    print(f"\n### {title}\n\n{machine()}\n")
    print("| " + " | ".join(columns) + " |")
    print("| " + " | ".join("---" for _ in columns) + " |")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def machine() -> str:
    """Processor, cores and commit, in a line."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True
    ).stdout.strip()
    cores = len(os.sched_getaffinity(0))
    return f"{names[0]}, {cores} cores, Python {platform.python_version()}, commit {commit}"


def rounds_argument(description: str | None, default: int = 3) -> argparse.ArgumentParser:
    """The arguments that every comparison takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=default, help="turns that each side takes")
    return parser


def environment() -> dict[str, str]:
    """Of a side's process: no network but loopback, no forks of tokenizers."""
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
