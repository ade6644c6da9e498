"""`safemoe serve` with 64 clients at once that ask, leave and send garbage, for 20 minutes.

    python benchmarks/soak.py [--minutes N] [--clients N] [--slots N] [--bundle DIR] [--sides ...]

Questions of mixed lengths are drawn and answered offline, greedily, through the public API. The
clients (`load.py`) then ask them in random order, without a pause, in one piece or as streams; some
go before the answer has ended, some send what is no request. Each whole answer is compared with the
offline one (`offline.py`), and resident memory is sampled. Without --bundle, random experts and a
random router on the embedded base are served, in float32: in bfloat16 a batch of another size may
decide a tie otherwise, which then counts as another answer.

The same clients ask the same of `transformers serve`, in a venv of its own, by one request after
the other (its default) and by its continuous batching. It has the bare base in the same dtype,
without experts and router. Its answers are compared with its own to the same questions asked alone.
"""

import argparse
import asyncio
import contextlib
import math
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from common import HERE, PEERS, environment, peer_python, side, table
from load import Answer, Load, Question, ask_all, ask_alone, put_load

LENGTH = 512  # tokens of a prompt and its answer, at most
PAGE = 32  # of them in one block of the peer's cache
SERVE = "transformers[serving]==5.24.0"


@contextlib.contextmanager
def serving(command: Callable[[int], Sequence[str | Path]]) -> Iterator[tuple[str, Any, Any]]:
    """Starts a server on a free port; gives its URL, its process and its log, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    started = [*map(str, command(port))]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(started, stdout=log, stderr=log, env=environment()) as process,
    ):
        try:
            while not _is_up(url):
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(f"the server ended with {process.returncode}: {log.read()[-4000:]}")
                time.sleep(0.2)
            yield url, process, log
        finally:
            process.kill()


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def run_ours(arguments: Any, bundle: Path, asked: list[Question], said: list[Answer]) -> list[str]:
    """The load on `safemoe serve` -> the table's row."""

    def command(port: int) -> list[str | Path]:
        program: list[str | Path] = [
            sys.executable,
            "-m",
            "safemoe_jax.cli",
            "serve",
            "--bundle",
            bundle,
        ]
        limits = {"slots": arguments.slots, "max-queue": 2 * arguments.clients}
        numbers = {"port": port, "max-length": LENGTH, **limits}
        return [*program, *(f"--{name}={value}" for name, value in numbers.items())]

    with serving(command) as (url, process, log):
        load = _load(url, process, "safemoe", asked, arguments)
        left = httpx.get(f"{url}/health", trust_env=False).json()["outstanding"]
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        log.seek(0)
        lines = Counter(log.read().splitlines())
    print(
        f"afterwards: {left} answers outstanding, exit code {code} on SIGTERM; the server's words:"
    )
    print(*(f"{count} times: {line}" for line, count in lines.most_common(10)), sep="\n")
    return row("safemoe serve, gated", load, said)


def run_peer(
    arguments: Any, base: Path, dtype: str, asked: list[Question], *options: str
) -> list[str]:
    """The load on `transformers serve` -> the table's row."""
    python = peer_python("serve", SERVE)
    with tempfile.TemporaryDirectory() as scratch:
        if base.is_file():
            side(python, PEERS / "plain.py", base, scratch, dtype)()
            base = Path(scratch)

        def command(port: int) -> list[str | Path]:
            where = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
            program: list[str | Path] = [python.with_name("transformers"), "serve", base]
            return [*program, *where, "--dtype", dtype, "--log-level", "error", *options]

        with serving(command) as (url, process, _):
            alone = asyncio.run(ask_alone(url, str(base), asked))
            load = _load(url, process, str(base), asked, arguments)
    return row(" ".join(["transformers serve", *options[:1], "bare base"]), load, alone)


def batching(slots: int) -> list[str]:
    """Options for as many answers at once as ours has; without them its cache takes nine tenths of
    the memory that is free."""
    blocks = slots * LENGTH // PAGE
    options = {"block-size": PAGE, "num-blocks": blocks, "max-batch-tokens": 1024}
    return ["--continuous-batching", *(f"--cb-{name}={value}" for name, value in options.items())]


def _load(url: str, process: Any, model: str, asked: list[Question], arguments: Any) -> Load:
    asyncio.run(ask_all(url, model, asked, arguments.clients))
    load = put_load(
        url,
        process.pid,
        model,
        asked,
        clients=arguments.clients,
        seconds=60 * arguments.minutes,
    )
    return asyncio.run(load)


def row(name: str, load: Load, expected: Sequence[Answer]) -> list[str]:
    """What came of a load: an answer is another one than expected, perhaps that of another
    question; a stream's text must be that of the answer in one piece, too."""
    answered = [one for one in load.records if one.kind in ("whole", "stream")]
    whole = [one for one in answered if one.said]
    wrong = [one for one in whole if one.said != expected[one.question][:2]]
    texts = {answer.text for answer in expected}
    crossed = [
        one for one in wrong if one.said and one.said[0] in texts - {expected[one.question].text}
    ]
    garbage = [one.status for one in load.records if one.kind == "garbage"]
    refused = sum(400 <= status < 500 for status in garbage)
    tokens = sum(expected[one.question].tokens for one in whole)
    if wrong:
        print(f"{name}: questions answered otherwise: {sorted({one.question for one in wrong})}")
    if failed := Counter(one.status for one in answered if not one.said):
        print(f"{name}: statuses of what was not answered, 0 for a broken connection: {failed}")
    seconds, first = [one.seconds for one in whole], [one.first for one in whole]
    counts = (len(whole), len(wrong), len(crossed), failed.total())
    left = sum(one.kind == "leave" for one in load.records)
    start, end, slope = memory(load.memory)
    return [
        name,
        *map(str, counts),
        f"{refused} of {len(garbage)}",
        str(left),
        *(f"{value:.2f}" for value in (*percentiles(seconds), *percentiles(first))),
        f"{tokens / load.seconds:.1f}",
        f"{start:.0f}",
        f"{end:.0f}",
        f"{slope:+.2f}",
    ]


def percentiles(seconds: Sequence[float]) -> Sequence[float]:
    known = [value for value in seconds if not math.isnan(value)]
    return np.percentile(known, (50, 99)).tolist() if known else (math.nan, math.nan)


def memory(samples: Sequence[tuple[float, int]]) -> tuple[float, float, float]:
    """MiB after the first quarter and at the end, and the slope between them in MiB a minute, by
    least squares."""
    seconds, size = np.array(samples[len(samples) // 4 :]).T
    return size[0] / 2**20, size[-1] / 2**20, 60 * np.polyfit(seconds, size / 2**20, 1)[0]


COLUMNS = (
    "side",
    "answers",
    "other than expected",
    "of another question",
    "failed",
    "garbage refused",
    "left early",
    "p50, s",
    "p99, s",
    "first text p50, s",
    "p99, s",
    "new tokens/s",
    "MiB after a quarter",
    "MiB at the end",
    "MiB/min",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="of each side; default: 20")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--slots", type=int, default=32, help="of safemoe serve; default: 32")
    parser.add_argument("--bundle", type=Path, help="default: a random one")
    sides = ("ours", "sequential", "batching")
    parser.add_argument("--sides", nargs="+", choices=sides, default=sides)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        bundle = arguments.bundle or Path(directory) / "bundle"
        model = side(sys.executable, HERE / "offline.py", bundle, str(LENGTH), str(arguments.slots))
        done = model()
        asked = [Question(*one) for one in done["questions"]]
        said = [Answer(*one) for one in done["answers"]]
        for name in arguments.sides:
            if name == "ours":
                rows.append(run_ours(arguments, bundle, asked, said))
            else:
                options = batching(arguments.slots) if name == "batching" else []
                rows.append(run_peer(arguments, Path(done["base"]), done["dtype"], asked, *options))
            print(rows[-1], flush=True)  # a later side may fail
    title = f"{arguments.clients} clients, {arguments.minutes:g} minutes each"
    table(title, COLUMNS, rows)


if __name__ == "__main__":
    main()
