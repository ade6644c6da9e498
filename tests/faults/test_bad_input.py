"""Whatever a file or a request holds, it is read, or refused in words: no crash, no hang.

A short, fixed slice runs with the tests. SAFEMOE_FUZZ=N draws N examples of each kind instead,
other ones each time; they are counted in the test's output (-s).
"""

import asyncio
import json
import os
import shutil
import struct
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import gguf_files
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import toy_variables

from experiments import pyrit
from safemoe_jax.config import Config, freeze, read_config
from safemoe_jax.data import splits
from safemoe_jax.data.chat import ChatFormat
from safemoe_jax.data.rules import fold
from safemoe_jax.data.sources import JsonlSource, Reject, Row, read_prompts
from safemoe_jax.data.tables import read_rows
from safemoe_jax.errors import UserError
from safemoe_jax.inference.engine import Event
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.serving.server import make_app
from safemoe_jax.serving.service import Limits, Service
from safemoe_jax.weights import gguf, huggingface
from safemoe_jax.weights.artefact import MANIFEST, manifest_digest
from safemoe_jax.weights.base import load_base
from safemoe_jax.weights.bundle import read_bundle, write_bundle

GOLDEN = Path(__file__).parents[1] / "golden"
DRAWN = int(os.environ.get("SAFEMOE_FUZZ", 0))
COUNTS: Counter[str] = Counter()
SLICE = settings(
    max_examples=DRAWN or 15,
    derandomize=not DRAWN,
    database=None,
    deadline=None if DRAWN else 20_000,  # ms: a hang is a failure, a busy machine is none
    suppress_health_check=list(HealthCheck),
)

ANY_TEXT = st.text(st.characters(codec=None), max_size=30)  # lone surrogates and NUL, too
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**400, 1e308])
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, ANY_TEXT),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(ANY_TEXT, inner, max_size=4)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module", autouse=True)
def counted():
    yield
    print("\ncases:", dict(COUNTS), "all:", sum(COUNTS.values()))


def paths_of(tree, path=()):
    """Every place in nested dicts and lists."""
    yield path
    items = tree.items() if isinstance(tree, dict) else ()
    if isinstance(tree, list):
        items = enumerate(tree)
    for key, value in items:
        yield from paths_of(value, (*path, key))


@st.composite
def changed(draw, original):
    """A JSON value with one to three of its places replaced, taken out or added to."""
    tree = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([path for path in paths_of(tree) if path]))
        place = tree
        for key in way:
            place = place[key]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "remove":
                del place[last]
            case "add" if isinstance(place, dict):
                place[draw(ANY_TEXT)] = draw(JSON)
            case _:
                place[last] = draw(JSON)
        if not tree:
            break
    return tree


@st.composite
def damaged(draw, original):
    """Bytes with some of them changed, cut, or with a number of eight bytes written over."""
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(content) - 9, 0)))
        match draw(st.sampled_from(["flip", "number", "cut", "insert"])):
            case "flip" if content:
                content[place] ^= 1 << draw(st.integers(0, 7))
            case "number":
                number = draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]))
                content[place : place + 8] = struct.pack("<Q", number)
            case "cut" if draw(st.booleans()):
                del content[place:]
            case _:
                content[place:place] = draw(st.binary(max_size=8))
    return bytes(content)


# Configs


PLAIN = json.loads(json.dumps(pyrit.get_config().to_dict(), default=list))


@SLICE
@given(values=changed(PLAIN))
def test_a_config_is_frozen_or_its_key_is_named(values):
    COUNTS["config"] += 1
    try:
        config = freeze(values)
    except UserError as error:
        assert "config" in str(error)
    else:
        assert isinstance(config, Config)
        json.dumps(values["train"], allow_nan=False)  # what is no number decides nothing


@SLICE
@given(
    key=st.sampled_from([".".join(map(str, path)) for path in paths_of(PLAIN) if path]),
    value=st.one_of(ANY_TEXT, NUMBERS.map(str), JSON.map(str)),
)
def test_an_override_fits_or_is_named(key, value):
    COUNTS["override"] += 1
    path = Path(pyrit.__file__)
    try:
        freeze(read_config(path, [f"--config.{key}={value}"]))
    except UserError as error:
        assert str(error)


# Data


ROW = {
    "messages": [{"role": "user", "content": "Hi?"}],
    "response": "Ho.",
    "domain": "cats",
    "label": "safe",
    "source": "me",
}
LINES = st.one_of(
    changed(ROW).map(lambda row: json.dumps(row).encode()),
    changed({**ROW, "prompt": "Hi?"}).map(lambda row: json.dumps(row).encode()),
    st.binary(max_size=60),
    damaged(json.dumps(ROW).encode()),
    st.integers(1, 3000).map(lambda deep: b"[" * deep),
)


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(tiny.byte_tokenizer())


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("bad")


@SLICE
@given(lines=st.lists(LINES, min_size=1, max_size=4))
def test_a_corpus_row_is_read_or_rejected_with_its_reason(lines, chat, scratch):
    COUNTS["corpus"] += 1
    path = scratch / "corpus.jsonl"
    path.write_bytes(b"\n".join(lines))
    for row in JsonlSource(path).rows():
        if isinstance(row, Reject):
            assert row.reason and row.line >= 1
        else:
            assert isinstance(row, Row)
            chat.encode(row.messages, row.response)


@SLICE
@given(lines=st.lists(LINES, min_size=1, max_size=4), suffix=st.sampled_from([".jsonl", ".txt"]))
def test_prompts_are_read_or_their_line_is_named(lines, suffix, chat, scratch):
    COUNTS["prompts"] += 1
    path = scratch / f"prompts{suffix}"
    path.write_bytes(b"\n".join(lines))
    try:
        prompts = read_prompts(path)
    except UserError as error:
        assert str(path) in str(error)
    else:
        for messages in prompts:
            chat.prompt_ids(messages)


@SLICE
@given(
    content=st.one_of(st.binary(max_size=200), JSON.map(lambda value: json.dumps(value).encode())),
    suffix=st.sampled_from(
        [".csv", ".json", ".jsonl", ".parquet", ".prompt", ".txt", ".csv.gz", ".json.xz"]
    ),
)
def test_a_table_is_read_or_refused(content, suffix, scratch):
    COUNTS["table"] += 1
    path = scratch / f"table{suffix}"
    path.write_bytes(content)
    try:
        for row in read_rows(path):
            assert row["file"] == "table"
    except UserError as error:
        assert str(path) in str(error)


@SLICE
@given(prompts=st.lists(st.text(max_size=40), min_size=1, max_size=12))
def test_equal_prompts_never_stand_in_two_splits(prompts):
    COUNTS["splits"] += 1
    both = [*prompts, *(prompt.upper() + "  " for prompt in prompts)]
    names = sorted({fold(prompt) for prompt in both})
    split = dict(zip(names, splits.split_of(names, splits.group(names)), strict=True))
    assert all(
        split[fold(p)] == split[fold(p.lower())] for p in prompts if fold(p.lower()) in split
    )


def test_a_row_of_ten_megabytes_is_a_row_like_others(chat, scratch):
    path = scratch / "long.jsonl"
    path.write_text(json.dumps({**ROW, "response": "word " * 2_000_000}) + "\n")
    (row,) = JsonlSource(path).rows()
    assert len(row.response) == 10_000_000
    encoded = chat.encode(row.messages, row.response[:1_000_000])
    assert len(encoded.tokens) > 999_999
    assert len(encoded.cut_to(64).tokens) == 64


# Weights


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return shutil.copytree(GOLDEN / "gqa_tied", tmp_path_factory.mktemp("weights") / "small")


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    gguf_files.convert(GOLDEN / "gqa_tied", path)
    return path.read_bytes()


def small_bundle(home):
    tiny.write_base(home / "base")
    tiny.write_experiment(home / "tiny.py", home / "base", home / "corpus.jsonl")
    config = freeze(read_config(home / "tiny.py", []))
    base = load_base(config.model.source, "float32")
    drawn = toy_variables(Transformer.from_config(config, base.spec))
    trees = {name: drawn[name] for name in ("experts", "router")}
    write_bundle(home / "bundle", base=base, config=config, provenance={"corpus": "no"}, **trees)
    return home / "bundle"


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory):
    return small_bundle(tmp_path_factory.mktemp("bundle"))


def reads(load, path):
    """All of a checkpoint, or a refusal."""
    try:
        checkpoint = load(path)
        checkpoint.weights.read(np.float32)
    except UserError as error:
        assert str(error)


@SLICE
@given(data=st.data())
def test_a_gguf_file_that_lies_is_refused(data, gguf_bytes, scratch):
    COUNTS["gguf"] += 1
    path = scratch / "lying.gguf"
    path.write_bytes(data.draw(damaged(gguf_bytes)))
    reads(gguf.load, path)


@SLICE
@given(data=st.data())
def test_a_safetensors_file_that_lies_is_refused(data, small, scratch):
    COUNTS["safetensors"] += 1
    directory = shutil.copytree(small, scratch / "st", dirs_exist_ok=True)
    original = (small / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", original[:8])
    if data.draw(st.booleans()):
        header = json.dumps(data.draw(changed(json.loads(original[8 : 8 + size])))).encode()
        content = struct.pack("<Q", len(header)) + header + original[8 + size :]
    else:
        content = data.draw(damaged(original[: 8 + size])) + original[8 + size :]
    (directory / "model.safetensors").write_bytes(content)
    reads(huggingface.load, directory)


@SLICE
@given(data=st.data(), name=st.sampled_from(["config.json", "tokenizer.json"]))
def test_a_base_with_another_config_or_tokenizer_is_refused(data, name, small, scratch):
    COUNTS[name] += 1
    directory = shutil.copytree(small, scratch / "hf", dirs_exist_ok=True)
    original = (small / name).read_bytes()
    kinds = st.one_of(
        changed(json.loads(original)).map(lambda value: json.dumps(value).encode()),
        damaged(original),
    )
    (directory / name).write_bytes(data.draw(kinds))
    reads(huggingface.load, directory)


@SLICE
@given(data=st.data())
def test_a_bundle_whose_manifest_lies_is_refused(data, bundle_path, scratch):
    """With its own sha256 made right again, which who lies on purpose can do."""
    COUNTS["bundle"] += 1
    original = json.loads((bundle_path / MANIFEST).read_text())
    manifest = data.draw(changed(original))
    if isinstance(manifest, dict) and manifest:
        manifest["sha256"] = manifest_digest(manifest)
    directory = scratch / "bundle"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(bundle_path, directory)
    (directory / MANIFEST).write_text(json.dumps(manifest))
    match data.draw(st.sampled_from(["", "", "link", "outside", "unlisted"])):
        case "link":
            (directory / "router.safetensors").unlink()
            (directory / "router.safetensors").symlink_to(bundle_path / "router.safetensors")
        case "outside":
            files = {**original["files"], "../bundle/router.safetensors": "0" * 64}
            lying = {**original, "files": files}
            lying["sha256"] = manifest_digest(lying)
            (directory / MANIFEST).write_text(json.dumps(lying))
        case "unlisted":
            (directory / "more.bin").write_bytes(b"")
        case _:
            try:
                read_bundle(directory, None)
            except UserError as error:
                assert str(error)
            return
    with pytest.raises(UserError):
        read_bundle(directory, None)


# Requests


class Silent:
    """Ends every answer as it is asked for."""

    outstanding, failed = 0, False

    def submit(self, request, events):
        events.put_nowait(Event(request, None, None, "stop"))

    def drop(self, request):
        pass


def silent_app(chat):
    """The server's application, which ends every answer as it is asked for."""
    loaded = SimpleNamespace(base=SimpleNamespace(tokenizer=chat.tokenizer))
    limits = Limits(slots=2, max_queue=20, max_length=200, max_tokens=100)
    service = Service(loaded, ["cats", "dogs"], limits)
    service.worker = Silent()
    return make_app(service, "safemoe", None, "127.0.0.1")


@pytest.fixture(scope="module")
def app(chat):
    return silent_app(chat)


def post(app, path, body, headers=()):
    """Status and body of one request, through ASGI."""
    sent = []
    received = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive():
        if (message := next(received, None)) is None:
            await asyncio.sleep(3600)
        return message

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1),
        "headers": [
            (b"host", b"127.0.0.1"),
            (b"content-type", b"application/json"),
            *headers,
        ],
    }
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 60))
    content = b"".join(m.get("body", b"") for m in sent if m["type"] == "http.response.body")
    return sent[0]["status"], content


BODY = {
    "model": "safemoe",
    "messages": [{"role": "user", "content": "Hi?", "name": "x"}],
    "max_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 1,
    "stop": ["x"],
    "n": 1,
    "stream": False,
    "stream_options": {"include_usage": True},
    "gates": True,
    "tools": [],
}
TEXT_BODY = {**{k: v for k, v in BODY.items() if k != "messages"}, "prompt": [1, 2]}


@SLICE
@given(data=st.data(), chatting=st.booleans())
def test_a_request_is_answered_or_refused(data, chatting, app):
    COUNTS["http"] += 1
    kinds = st.one_of(
        changed(BODY if chatting else TEXT_BODY).map(lambda value: json.dumps(value).encode()),
        damaged(json.dumps(BODY if chatting else TEXT_BODY).encode()),
        st.integers(1, 5000).map(lambda deep: b"[" * deep),
    )
    path = "/v1/chat/completions" if chatting else "/v1/completions"
    status, content = post(app, path, data.draw(kinds))
    assert status == 200 or 400 <= status < 500, content
    if status != 200:
        assert json.loads(content)["error"]["message"]
