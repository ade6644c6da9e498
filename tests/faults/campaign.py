"""python tests/faults/campaign.py DIRECTORY [--trials N] [--seed N] [--only FAULT ...] [--table]

Disturbs `safemoe train-gate` on a tiny experiment in all the ways of `trials`, in turn. What each
trial came to is a line of DIRECTORY/trials.jsonl; a campaign that was ended goes on where it was.
Exits with 1 where a trial failed. --table writes docs/reliability.md's table instead.

Runs as root, a trial mounts file systems of its own. As another user, those are left out.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

# One thread: as many runs as there are cores fit beside each other, and forks are cheap.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- trials -->\n", "<!-- end of trials -->\n"
_NEED_ROOT = ("full_disk", "read_only_disk")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--trials", type=int, default=204)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="FAULT")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    path = arguments.directory / "trials.jsonl"
    if arguments.table:
        _write_table([json.loads(line) for line in path.read_text().splitlines()])
        return 0
    arguments.directory.mkdir(parents=True, exist_ok=True)
    os.environ["SAFEMOE_CACHE"] = str(arguments.directory.resolve() / "cache")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    return _campaign(arguments, path)


def _campaign(arguments: argparse.Namespace, path: Path) -> int:
    from home import Home
    from trials import FAULTS

    names = arguments.only or [
        name for name in FAULTS if os.geteuid() == 0 or name not in _NEED_ROOT
    ]
    home = Home(arguments.directory.resolve() / "home")
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    seen = {(row["seed"], row["trial"], row["fault"]) for row in done}
    failed = 0
    for number in range(arguments.trials):
        name = names[number % len(names)]
        if (arguments.seed, number, name) in seen:
            continue
        row = _trial(home, name, arguments.seed, number)
        failed += row["result"] == "failed"
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{number} {name}: {row['result']}; {row['what']}; {row['why'][:300]}", flush=True)
    return int(failed > 0)


def _trial(home, name: str, seed: int, number: int) -> dict:
    import numpy as np
    from attempts import timed
    from trials import FAULTS, Broken, Trial

    scratch = Path(tempfile.mkdtemp(dir=home.root.parent, prefix="trial-"))
    (scratch / "notes").mkdir()
    trial = Trial(home, scratch / "run", scratch / "notes", np.random.default_rng([seed, number]))
    result, why = "failed", ""
    with timed() as passed:
        try:
            FAULTS[name][1](trial)
            result = trial.result or trial.finish()
        except Broken as error:
            why = str(error)
    if result != "failed":
        shutil.rmtree(scratch)
    seconds, cpu = passed()
    return {
        "seed": seed,
        "trial": number,
        "fault": name,
        "what": trial.what,
        "starts": trial.starts,
        "result": result,
        "why": why,
        "seconds": seconds,
        "cpu_seconds": cpu,
    }


def _write_table(rows: list[dict]) -> None:
    """Counts by fault, into the document, between its marks."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from trials import FAULTS

    lines = [
        "| fault | trials | identical | after a message | failed |",
        "| --- " + "| ---: " * 4 + "|",
    ]
    total = [0, 0, 0, 0]
    for name, (title, _) in FAULTS.items():
        results = [row["result"] for row in rows if row["fault"] == name]
        counts = [len(results), *(results.count(k) for k in ("identical", "message", "failed"))]
        total = [a + b for a, b in zip(total, counts, strict=True)]
        lines.append(f"| {title} | " + " | ".join(map(str, counts)) + " |")
    lines.append("| all | " + " | ".join(map(str, total)) + " |")
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    table = "\n".join(lines) + "\n"
    DOCUMENT.write_text(f"{before}{BEGIN}{table}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
