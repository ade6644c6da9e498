"""Two probes of garak, a public scanner of language models, against `safemoe serve` on loopback.

    python benchmarks/garak_scan.py BUNDLE [--max-tokens N]

It shows that a scanner written for OpenAI's API runs against the server, not how safe a bundle is:
the probes are two that need no other model to judge (escape sequences for terminals, and
instructions hidden in Unicode tags). They have 90 prompts, and nothing that makes them ask fewer:
garak's own limit is for other probes. garak gets a venv of its own.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from common import peer_python, table

GARAK = "garak==0.17.1"
PROBES = ("probes.ansiescape.AnsiRaw", "probes.goodside.Tag")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer")
    arguments = parser.parse_args()
    python = peer_python("garak", GARAK, shared=())
    serve = (sys.executable, "-m", "safemoe_jax.cli", "serve", "--port", "0")
    with subprocess.Popen(
        [*serve, "--bundle", str(arguments.bundle)], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout
            if "http://" not in (ready := server.stdout.readline()):
                sys.exit("the server did not start; its message is above")
            url = "http://" + ready.split("http://")[1].split(";")[0]
            rows = scan(python, url, arguments.max_tokens)
            server.send_signal(signal.SIGTERM)
            ended = server.wait(60)
        finally:
            server.kill()
    table(f"{GARAK} against `safemoe serve`", ("probe", "detector", "passed", "of"), rows)
    print(f"\nserver's exit code after SIGTERM: {ended}")


def scan(python: Path, url: str, max_tokens: int) -> list[tuple[str, ...]]:
    """Runs the probes -> probe, detector, answers that passed, answers."""
    with tempfile.TemporaryDirectory() as directory:
        config = {
            "system": {"lite": False, "parallel_attempts": 4},
            "run": {
                "spec": {"include": PROBES},
                "generations": 1,
                "seed": 0,
            },
            "plugins": {
                "target_type": "openai.OpenAICompatible",
                "target_name": "safemoe",
                "generators": {
                    "openai": {
                        "OpenAICompatible": {
                            "uri": url,
                            "max_tokens": max_tokens,
                            "temperature": 0.0,
                            "stop": [],
                        }
                    }
                },
            },
            "reporting": {"report_dir": directory, "report_prefix": "scan"},
        }
        (file := Path(directory) / "garak.json").write_text(json.dumps(config))
        environment = {**os.environ, "OPENAICOMPATIBLE_API_KEY": "none", "XDG_DATA_HOME": directory}
        subprocess.run(
            [python, "-m", "garak", "--config", file, "--narrow_output"],
            env=environment,
            check=True,
        )
        lines = (Path(directory) / "scan.report.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [
        (row["probe"], row["detector"], str(row["passed"]), str(row["total_evaluated"]))
        for row in found
        if row["entry_type"] == "eval"
    ]


if __name__ == "__main__":
    main()
