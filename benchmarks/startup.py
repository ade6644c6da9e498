"""From the command to its first train step: with nothing cached, and once more.

    python benchmarks/startup.py

`safemoe train-experts` on the real run's configuration. The step's own time is taken off: what is
measured is when the first step could begin (the moment that it ended, less the time of the second).
Both are new runs, which read and pack the corpus; the first also compiles, and may write Python's
bytecode. The bar for the second is 8 seconds. Where torch is installed, `transformers` imports it:
that is over a second of both, so run it in an environment without.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import table
from inputs import EXPERIMENTS, base_file

from safemoe_jax.fetch import cache_dir

STEPS = 3


def start(directory: Path, name: str) -> float:
    """Seconds from the command to the first step of a new run."""
    workdir = directory / name
    command = [sys.executable, "-m", "safemoe_jax.cli", "train-experts"]
    command += ["--config", str(EXPERIMENTS / "pyrit.py"), "--workdir", str(workdir)]
    command += [f"--config.train.experts.steps={STEPS}"]
    command += ["--config.optimizer.experts.warmup_steps=1"]
    environment = os.environ | {"SAFEMOE_CACHE": str(directory)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # a second start finds bytecode, too
    began = time.time()
    subprocess.run(command, check=True, env=environment)
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    first, second, *_ = (row["time"] for row in rows if row["split"] == "train")
    return 2 * first - second - began


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        shared = Path(directory)
        base_file()  # the download is no part of a start
        (shared / "wheels").symlink_to(cache_dir() / "wheels")
        first, second = start(shared, "first"), start(shared, "second")
    lines = [(f"{first:.1f}", f"{second:.1f}", f"{second / first:.2f}")]
    table("Start to first step", ("first, s", "second, s", "second / first"), lines)


if __name__ == "__main__":
    main()
