"""Fuzzing by atheris, guided by coverage, of what reads files and requests; launch/fuzz.sh runs it.

    python tests/faults/fuzz_targets.py DIRECTORY [--seconds N] [TARGET ...]

A target gets bytes, as somebody else's file or request would bring them. It may read them, or
refuse them by a UserError or a 4xx status; whatever else it raises is a crash. Bytes that crash are
kept in DIRECTORY/TARGET/crashes, once for each place of the code that raised, and those that
reached new code in DIRECTORY/TARGET/corpus, from where the next run goes on. Exits with 1 where
there was a crash, or where libFuzzer ended a target: 60 s for one case, or more than 4 GiB.
"""

import argparse
import json
import os
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import atheris  # noqa: E402 - what it instruments must be found first

with atheris.instrument_imports(
    include=[f"safemoe_jax.{room}" for room in ("config", "data", "serving", "weights")] + ["gguf"]
):
    import gguf
    import gguf_files
    import numpy as np
    import tiny
    from test_bad_input import (
        BODY,
        GOLDEN,
        PLAIN,
        ROW,
        TEXT_BODY,
        paths_of,
        post,
        silent_app,
        small_bundle,
    )

    from safemoe_jax.config import freeze
    from safemoe_jax.data.chat import ChatFormat
    from safemoe_jax.data.sources import JsonlSource, Row, read_prompts
    from safemoe_jax.errors import UserError
    from safemoe_jax.weights import gguf as gguf_base
    from safemoe_jax.weights import huggingface
    from safemoe_jax.weights.artefact import MANIFEST, manifest_digest
    from safemoe_jax.weights.bundle import read_bundle

LIBFUZZER = ("-timeout=60", "-rss_limit_mb=4096", "-max_len=8192")
Source = atheris.FuzzedDataProvider
Target = tuple[Callable[[bytes], object], list[bytes]]  # what reads, and what it begins with


def rows(home: Path) -> Target:
    """Lines of a corpus, and of a file of prompts."""
    chat, path = ChatFormat(tiny.byte_tokenizer()), home / "rows.jsonl"

    def read(data: bytes) -> None:
        path.write_bytes(lie(Source(data), ROW))
        for row in JsonlSource(path).rows():
            if isinstance(row, Row):
                chat.encode(row.messages, row.response)
        for messages in read_prompts(path):
            chat.prompt_ids(messages)

    return read, [seed(ROW)]


def configs(home: Path) -> Target:
    """The values of an experiment."""
    return lambda data: freeze(json_of(lie(Source(data), PLAIN))), [seed(PLAIN)]


def manifests(home: Path) -> Target:
    """A bundle's manifest, its own sha256 made right."""
    directory = small_bundle(home)
    original = json.loads((directory / MANIFEST).read_text())

    def read(data: bytes) -> None:
        manifest = json_of(lie(Source(data), original))
        if isinstance(manifest, dict):
            manifest["sha256"] = manifest_digest(manifest)
        (directory / MANIFEST).write_text(json.dumps(manifest))
        read_bundle(directory, None)

    return read, [seed(original)]


def safetensors(home: Path) -> Target:
    """The header of a base's weights, its length made right, before the weights of the original."""
    for file in (GOLDEN / "gqa_tied").iterdir():
        (home / file.name).write_bytes(file.read_bytes())
    whole = (home / "model.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    original = json.loads(whole[8:end])

    def read(data: bytes) -> None:
        header = lie(Source(data), original)
        content = struct.pack("<Q", len(header)) + header + whole[end:]
        (home / "model.safetensors").write_bytes(content)
        huggingface.load(home).weights.read(np.float32)

    return read, [seed(original)]


def ggufs(home: Path) -> Target:
    """The header of a GGUF base, before the weights of the original."""
    path = home / "base.gguf"
    gguf_files.convert(GOLDEN / "gqa_tied", path)
    whole = path.read_bytes()
    end = gguf.GGUFReader(path).data_offset

    def read(data: bytes) -> None:
        path.write_bytes(data + whole[end:])
        gguf_base.load(path).weights.read(np.float32)

    return read, [whole[:end]]


def requests(home: Path) -> Target:
    """Bodies of HTTP requests to both places that take them."""
    app = silent_app(ChatFormat(tiny.byte_tokenizer()))

    def read(data: bytes) -> None:
        source = Source(data)
        path, original = source.PickValueInList(
            [("/v1/chat/completions", BODY), ("/v1/completions", TEXT_BODY)]
        )
        status, content = post(app, path, lie(source, original))
        assert status == 200 or 400 <= status < 500, content

    return read, [seed(BODY) + b"\0", seed(TEXT_BODY) + b"\1"]


TARGETS = {
    target.__name__: target for target in (rows, configs, manifests, safetensors, ggufs, requests)
}


def lie(source: Source, original: object) -> bytes:
    """The bytes themselves, or the original as JSON with one to three of its places replaced, taken
    out or added to: bytes alone hardly ever are JSON."""
    if source.ConsumeBool():
        return source.ConsumeBytes(source.remaining_bytes())
    tree = json.loads(json.dumps(original))
    for _ in range(source.ConsumeIntInRange(1, 3)):
        if not (paths := [path for path in paths_of(tree) if path]):
            break
        *way, last = source.PickValueInList(paths)
        place = tree
        for key in way:
            place = place[key]
        match source.ConsumeIntInRange(0, 3):
            case 0:
                del place[last]
            case 1 if isinstance(place, dict):
                place[source.ConsumeUnicode(8)] = value(source)
            case _:
                place[last] = value(source)
    return json.dumps(tree).encode()


def value(source: Source) -> object:
    """Any JSON value, lone surrogates and numbers that are none among them."""
    match source.ConsumeIntInRange(0, 8):
        case 0:
            return source.ConsumeUnicode(source.ConsumeIntInRange(0, 40))
        case 1:
            return source.ConsumeInt(8)
        case 2:
            return source.ConsumeFloat()
        case 3:
            return [value(source) for _ in range(source.ConsumeIntInRange(0, 3))]
        case 4:
            return {source.ConsumeUnicode(8): value(source)}
        case _:
            return source.PickValueInList([None, True, 0, -1, 2**31, 2**63, 10**400, "", {}, []])


def seed(original: object) -> bytes:
    """Bytes of which `lie` makes the original; the first one is its first choice."""
    return b"\x01" + json.dumps(original).encode()


def json_of(data: bytes) -> object:
    """A value where the bytes are JSON; None where they are not."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


class Campaign:
    """What libFuzzer calls; counts, keeps crashes, and ends the process when its time is over."""

    def __init__(self, home: Path, read: Callable[[bytes], object], seconds: float) -> None:
        self._home, self._read = home, read
        self._cases, self._crashes = 0, set()
        self._began = time.monotonic()
        self._end = self._began + seconds

    def __call__(self, data: bytes) -> None:
        if time.monotonic() > self._end:
            seconds = time.monotonic() - self._began
            result = {"cases": self._cases, "seconds": seconds, "crashes": len(self._crashes)}
            (self._home / "result.json").write_text(json.dumps(result))
            # NOTE libFuzzer does not give control back, and an exception here would be a crash.
            os._exit(0)
        self._cases += 1
        try:
            self._read(data)
        except UserError as error:
            assert str(error)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = type(error).__name__, frame.filename, frame.lineno
            if place not in self._crashes:
                self._crashes.add(place)
                kept = self._home / "crashes" / f"{len(self._crashes)}"
                kept.write_bytes(data)
                kept.with_suffix(".txt").write_text("".join(traceback.format_exception(error)))


def fuzz(name: str, home: Path, seconds: float) -> None:
    """Runs one target; does not return."""
    for folder in ("scratch", "corpus", "crashes"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    (home / "result.json").unlink(missing_ok=True)
    read, seeds = TARGETS[name](home / "scratch")
    for number, content in enumerate(seeds):
        (home / "corpus" / f"seed-{number}").write_bytes(content)
    options = (*LIBFUZZER, f"-artifact_prefix={home}/crashes/libfuzzer-", str(home / "corpus"))
    log = os.open(home / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 2)  # libFuzzer's own words
    atheris.Setup([sys.argv[0], *options], Campaign(home, read, seconds))
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0, help="of each target")
    parser.add_argument("targets", nargs="*", metavar="TARGET", default=list(TARGETS))
    arguments = parser.parse_intermixed_args()
    directory = arguments.directory.resolve()
    os.environ["SAFEMOE_CACHE"] = str(directory / "cache")
    failed = False
    print("| what is read | cases | seconds | crashes |\n| --- | ---: | ---: | ---: |", flush=True)
    for name in arguments.targets:
        # A child for each: imports are done once, and JAX has not begun before they part.
        if not (child := os.fork()):
            fuzz(name, directory / name, arguments.seconds)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            print(f"libFuzzer ended {name}: see {directory / name / 'log.txt'}", file=sys.stderr)
            failed = True
            continue
        result = json.loads((directory / name / "result.json").read_text())
        failed |= result["crashes"] > 0
        counts = f"{result['cases']} | {result['seconds']:.0f} | {result['crashes']}"
        print(f"| {name} | {counts} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
