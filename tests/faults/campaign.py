"""python tests/faults/campaign.py DIRECTORY [--part loops|commands] [--trials N] [--only FAULT ...]

Disturbs runs on toys in all the ways of `loops` (the training loop of both stages) or `commands`
(all of `safemoe train-gate`), in turn. What each trial came to is a line of DIRECTORY/trials.jsonl;
a campaign that was ended goes on where it was. Exits with 1 where a trial failed. --table writes
docs/reliability.md's table of it instead.

Some trials mount file systems of their own; where that is not allowed they are left out.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# One thread: forks are cheap, and nothing here is large.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- trials -->\n", "<!-- end of trials -->\n"
RESULTS = ("identical", "message", "failed")
_CRASHES_IN, _CRASHES_OF_CHANGES = 3, 0.15  # runs that are copied, and how often
# A directory, a random seed -> result, what was done, how the starts ended, and why it failed.
Run = Callable[[Path, str], tuple[str, str, list[str], str]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--part", choices=("loops", "commands"), default="loops")
    parser.add_argument("--trials", type=int, default=208)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="FAULT")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    directory = arguments.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    os.environ["SAFEMOE_CACHE"] = str(directory / "cache")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    path = directory / "trials.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if arguments.table:
        _write_table(done)
        return 0

    runs = {"loops": _loops, "commands": _commands}[arguments.part](directory)
    names = arguments.only or [
        name for name, mounts, _ in runs if not mounts or _can_mount(directory)
    ]
    by_name = {name: run for name, _, run in runs}
    seen = {(row["part"], row["seed"], row["trial"]) for row in done}
    failed = 0
    for number in range(arguments.trials):
        name = names[number % len(names)]
        if (arguments.part, arguments.seed, number) in seen:
            continue
        row = {"part": arguments.part, "seed": arguments.seed, "trial": number, "fault": name}
        row |= _trial(directory, by_name[name], f"{arguments.seed}/{number}")
        failed += row["result"] == "failed"
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        said = " / ".join(row["starts"])
        print(f"{number} {name}: {row['result']}; {row['what']}; {said} {row['why']}", flush=True)
    return int(failed > 0)


def _can_mount(directory: Path) -> bool:
    """Containers' root may not."""
    place = directory / "mount"
    place.mkdir(exist_ok=True)
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True
        ).returncode
    )
    if mounted:
        subprocess.run(["umount", place], check=True)
    return mounted


def _trial(directory: Path, run: Run, seed: str) -> dict:
    from attempts import timed

    scratch = Path(tempfile.mkdtemp(dir=directory, prefix="trial-"))
    with timed() as passed:
        result, what, starts, why = run(scratch, seed)
    seconds, cpu = passed()
    if result != "failed":
        shutil.rmtree(scratch)
    return {
        "result": result,
        "what": what,
        "starts": starts,
        "why": why,
        "seconds": seconds,
        "cpu_seconds": cpu,
    }


def _loops(directory: Path) -> list[tuple[str, bool, Run]]:
    """Faults of the training loop: names, whether they mount, and what does them."""
    import loops
    from absl import logging as absl_logging

    from safemoe_jax.progress import console

    absl_logging.set_verbosity(absl_logging.FATAL)  # as the command line has it
    console.quiet = True
    scratch = Path(tempfile.mkdtemp(dir=directory, prefix="crashes-"))
    both = loops.Loops()
    whole = loops.Whole(both, scratch / "whole")
    crashes = []
    for number in range(_CRASHES_IN):
        rng, place = random.Random(number), scratch / str(number)
        place.mkdir()
        crashes += loops.crashes(both, place / "run", place / "copies", rng, _CRASHES_OF_CHANGES)

    def runner(name: str) -> Run:
        def run(root: Path, seed: str):
            trial = loops.LoopTrial(both, whole, root / "run", crashes, random.Random(seed))
            try:
                loops.FAULTS[name][1](trial)
                return trial.finish(), trial.what, trial.starts, ""
            except loops.Broken as error:
                return "failed", trial.what, trial.starts, str(error)

        return run

    return [(name, name in loops.MOUNT, runner(name)) for name in loops.FAULTS]


def _commands(directory: Path) -> list[tuple[str, bool, Run]]:
    """The same of the whole command."""
    import commands
    import numpy as np
    from home import Home

    home = Home(directory / "home")

    def runner(name: str) -> Run:
        def run(root: Path, seed: str):
            (root / "notes").mkdir()
            rng = np.random.default_rng([int(part) for part in seed.split("/")])
            trial = commands.Trial(home, root / "run", root / "notes", rng)
            try:
                commands.FAULTS[name][1](trial)
                return trial.result or trial.finish(), trial.what, trial.starts, ""
            except commands.Broken as error:
                return "failed", trial.what, trial.starts, str(error)

        return run

    return [(name, name in commands.MOUNT, runner(name)) for name in commands.FAULTS]


def _write_table(rows: list[dict]) -> None:
    """Counts by fault, into the document, between its marks."""
    import commands
    import loops

    lines = [
        "| part | fault | trials | identical | after a message | failed |",
        "| --- | --- " + "| ---: " * 4 + "|",
    ]
    total = [0] * 4
    for part, faults in (("loops", loops.FAULTS), ("commands", commands.FAULTS)):
        for name, (title, _) in faults.items():
            found = [row["result"] for row in rows if (row["part"], row["fault"]) == (part, name)]
            if not found:
                continue
            counts = [len(found), *(found.count(result) for result in RESULTS)]
            total = [a + b for a, b in zip(total, counts, strict=True)]
            lines.append(f"| {part} | {title} | " + " | ".join(map(str, counts)) + " |")
    lines.append("| all | | " + " | ".join(map(str, total)) + " |")
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    table = "\n".join(lines) + "\n"
    DOCUMENT.write_text(f"{before}{BEGIN}{table}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # threads of saves that were given up would be waited for
