"""Work directories and data behind URLs: a directory as file://, and an emulated gs:// bucket."""

import contextlib
import errno
import http.server
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import jax.numpy as jnp
import pytest
from fsspec.implementations.local import LocalFileSystem
from toys import leaves_equal

from experiments import pyrit
from safemoe_jax import run
from safemoe_jax.config import freeze
from safemoe_jax.errors import Unreachable, UserError, refused_by_the_machine
from safemoe_jax.experiment import Experiment
from safemoe_jax.remote import Mirror, is_loopback, local_copy
from safemoe_jax.training.checkpoints import Checkpoints
from safemoe_jax.training.state import Best, TrainState
from safemoe_jax.workdir import Workdir

NAMES = ("metrics.jsonl", "bundle")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEMOE_CACHE", str(tmp_path / "cache"))


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def read(root):
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_text() for path in files}


def test_a_mirror_carries_files_both_ways_and_forgets_what_is_gone(tmp_path):
    here, there, remote = tmp_path / "here", tmp_path / "there", tmp_path / "remote"
    first, second = (Mirror(f"file://{remote}", local, NAMES) for local in (here, there))
    write(here, {"metrics.jsonl": "1", "bundle/a": "a", "bundle/b": "b", "data/rows": "large"})
    first.push()
    assert read(remote) == {"metrics.jsonl": "1", "bundle/a": "a", "bundle/b": "b"}
    (here / "bundle" / "b").unlink()
    write(here, {"metrics.jsonl": "12"})
    (remote / "bundle" / "a").write_text("not sent again")
    first.push()
    assert read(remote) == {"metrics.jsonl": "12", "bundle/a": "not sent again"}
    write(there, {"bundle/old": "x"})
    second.pull()
    assert read(there) == read(remote)
    assert str(first.path("experts", "checkpoints")) == f"{remote}/experts/checkpoints"


def test_a_mirror_reads_again_what_has_changed_alone(tmp_path, monkeypatch):
    here, remote, read_files = tmp_path / "here", tmp_path / "remote", []
    get_file = LocalFileSystem.get_file

    def noting(self, source, target, **rest):
        read_files.append(str(Path(source).relative_to(remote)))
        get_file(self, source, target, **rest)

    monkeypatch.setattr(LocalFileSystem, "get_file", noting)
    write(remote, {"metrics.jsonl": "1", "bundle/a": "a", "bundle/b": "b"})
    mirror = Mirror(f"file://{remote}", here, NAMES)
    mirror.pull()
    assert sorted(read_files) == ["bundle/a", "bundle/b", "metrics.jsonl"]
    write(remote, {"metrics.jsonl": "12"})
    (here / "bundle" / "a").unlink()
    write(here, {"bundle/b": "of this host"})
    for expected in (["bundle/a", "bundle/b", "metrics.jsonl"], []):
        read_files.clear()
        mirror.pull()
        assert sorted(read_files) == expected
        assert read(here) == read(remote)
    write(remote, {"bundle/b": "bb"})
    mirror.pull()
    assert read_files == ["bundle/b"]


def test_a_mirror_never_carries_what_is_not_whole(tmp_path):
    here, there, remote = tmp_path / "here", tmp_path / "there", tmp_path / "remote"
    unfinished = {"bundle/.card.k1ll3d_8.new": "x", "bundle/.a.k1ll3d_8.old/weights": "x"}
    write(here, {"bundle/a": "a", **unfinished})
    write(remote, unfinished)  # as it was pushed once
    Mirror(f"file://{remote}", there, NAMES).pull()
    assert not there.exists()
    Mirror(f"file://{remote}", here, NAMES).push()
    assert read(remote) == {"bundle/a": "a"}


@pytest.mark.parametrize(
    ("host", "here"),
    [
        *(("localhost", True), ("127.0.0.1", True), ("127.1.2.3", True), ("::1", True)),
        *(("0.0.0.0", False), ("10.0.0.1", False), ("::", False), ("", False)),
        *(("localhost.example.org", False), ("127.0.0.1.example.org", False)),
    ],
)
def test_only_a_loopback_address_is_this_machine_alone(host, here):
    assert is_loopback(host) is here


def test_data_behind_a_url_is_copied_once_and_again_when_it_changes(tmp_path):
    write(tmp_path / "corpus", {"a.jsonl": "1", "b.jsonl": "2"})
    copy = local_copy(f"file://{tmp_path}/corpus")
    assert read(copy) == {"a.jsonl": "1", "b.jsonl": "2"}
    assert local_copy(f"file://{tmp_path}/corpus") == copy
    single = local_copy(f"file://{tmp_path}/corpus/b.jsonl")
    assert single.name == "b.jsonl" and single.read_text() == "2"
    write(tmp_path / "corpus", {"b.jsonl": "23"})
    assert read(local_copy(f"file://{tmp_path}/corpus")) == {"a.jsonl": "1", "b.jsonl": "23"}
    assert local_copy(str(tmp_path / "corpus")) == tmp_path / "corpus"
    with pytest.raises(UserError, match=r"cannot read file://.*/nothing .*; check the URL"):
        local_copy(f"file://{tmp_path}/nothing")
    with pytest.raises(
        UserError, match=r"cannot open nowhere://x \(Protocol not known: nowhere\); check"
    ):
        local_copy("nowhere://x")


@contextlib.contextmanager
def served(files):
    """The URL of a server of {name: (headers, content)}."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            headers, content = files[self.path[1:]]
            self.send_response(200)
            for name, value in {"Content-Type": "text/plain", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"ETag": "a"}, {"ETag": "b"}),
        ({"Last-Modified": "then"}, {"Last-Modified": "now"}),
        ({}, {}),
    ],
)
def test_data_behind_http_is_read_again_when_it_changes(before, after):
    files = {"rows.jsonl": (before, b"1")}
    with served(files) as url:
        first = local_copy(f"{url}/rows.jsonl")
        assert local_copy(f"{url}/rows.jsonl") == first
        assert (first.name, first.read_text()) == ("rows.jsonl", "1")
        files["rows.jsonl"] = (after, b"2")
        assert local_copy(f"{url}/rows.jsonl").read_text() == "2"
        assert first.read_text() == "1"


class CloudError(Exception):
    """As gcsfs' HttpError, which is no OSError."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CloudError("Anonymous caller\nhas no access, 401"), "Anonymous caller has no access, 401"),
        (ValueError("Bad Request: b/x"), "Bad Request: b/x"),
        (OSError("Forbidden: b/x"), "Forbidden: b/x"),
        (PermissionError(errno.EACCES, "Access Denied"), "Access Denied"),
        (CloudError(), "CloudError"),
    ],
)
def test_what_a_bucket_refuses_names_the_url(tmp_path, error, said):
    class Bucket(fsspec.AbstractFileSystem):
        protocol = "refusing"
        cachable = False

        def refuse(self, *_, **__):
            raise error

        find = info = put_file = makedirs = refuse

    fsspec.register_implementation("refusing", Bucket, clobber=True)
    write(tmp_path, {"metrics.jsonl": "1"})
    mirror = Mirror("refusing://b/x", tmp_path, NAMES)
    for kind, doing, act in (
        (UserError, "read", lambda: local_copy("refusing://b/x")),
        (UserError, "read", mirror.pull),
        (Unreachable, "write to", mirror.push),
    ):
        with pytest.raises(kind) as raised:
            act()
        assert type(raised.value) is kind
        assert re.match(rf"cannot {doing} refusing://b/x \(.*{said}\); check", str(raised.value))
        assert "\n" not in str(raised.value)


def test_a_full_disk_is_no_fault_of_the_bucket(tmp_path, monkeypatch):
    write(tmp_path, {"corpus/a.jsonl": "1"})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LocalFileSystem, "get_file", full)
    with pytest.raises(OSError, match="No space left") as raised:
        local_copy(f"file://{tmp_path}/corpus")
    assert refused_by_the_machine(raised.value)


def test_what_was_evaluated_survives_a_kill(tmp_path, monkeypatch):
    url, config = f"file://{tmp_path}/runs/one", freeze(pyrit.get_config())
    with Workdir(url, config) as killed:
        write(killed.root, {"evaluation/generated.jsonl": "1\n", "metrics.jsonl": "not sent"})
        killed.send_evaluation()
        write(killed.root, {"evaluation/generated.jsonl": "1\n2\n"})
        # Another machine sees what there would be after a kill.
        monkeypatch.setenv("SAFEMOE_CACHE", str(tmp_path / "another machine"))
        with Workdir(url, config) as workdir:
            assert (workdir.evaluation / "generated.jsonl").read_text() == "1\n"
            assert not workdir.metrics.exists()


def test_a_local_work_directory_has_nothing_to_send(tmp_path):
    with Workdir(tmp_path / "run", freeze(pyrit.get_config())) as workdir:
        workdir.send_evaluation()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json",
        "lock",
        "run.json",
    }


def test_what_wandb_keeps_is_carried_but_for_its_links(tmp_path):
    config = freeze(pyrit.get_config())
    with Workdir(f"file://{tmp_path}/runs/one", config) as workdir:
        write(workdir.root, {"wandb/offline-run-1/run-1.wandb": "1"})
        (workdir.root / "wandb" / "latest-run").symlink_to("offline-run-1")
        (workdir.root / "wandb" / "debug.log").symlink_to("offline-run-1/run-1.wandb")
    assert read(tmp_path / "runs" / "one" / "wandb") == {"offline-run-1/run-1.wandb": "1"}


def test_the_report_of_a_remote_run_is_named_by_its_url(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "write_report", lambda *_, place, **__: asked.append(place))
    url, config = f"file://{tmp_path}/runs/one", freeze(pyrit.get_config())
    for place in (url, str(tmp_path / "local")):
        run.report(Experiment(config, Workdir(place, config)))
    assert asked == [url, ""]


def test_a_remote_work_directory_is_the_same_on_another_machine(tmp_path, monkeypatch):
    url, config = f"file://{tmp_path}/runs/one", freeze(pyrit.get_config())
    with Workdir(url, config) as workdir:
        write(workdir.root, {"metrics.jsonl": "1\n", "data/rows": "large"})
        workdir.publish()
        assert (tmp_path / "runs" / "one" / "metrics.jsonl").read_text() == "1\n"
        write(workdir.root, {"report.html": "<p>"})
    monkeypatch.setenv("SAFEMOE_CACHE", str(tmp_path / "another machine"))
    with Workdir(url, config) as workdir:
        assert workdir.metrics.read_text() == "1\n"
        assert (workdir.root / "report.html").read_text() == "<p>"
        assert not workdir.data.exists()
    values = pyrit.get_config()
    values.seed = 1
    with (
        pytest.raises(UserError, match=r"holds a run with config\.seed = 0"),
        Workdir(url, freeze(values)),
    ):
        pass


@pytest.fixture
def bucket(monkeypatch):
    """The URL of an empty bucket of an emulator of Google's storage."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(Path(__file__).with_name("bucket_emulator.py")), str(port)]
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)  # gcsfs
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)  # what writes Orbax's arrays
    emulator = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield "gs://bucket"
    finally:
        emulator.kill()
        emulator.wait()


def test_checkpoints_and_files_of_a_run_on_a_bucket(bucket, tmp_path, monkeypatch):
    config, url, identity = freeze(pyrit.get_config()), f"{bucket}/runs/one", {"base": "b"}

    def state(value):
        leaf = jnp.full((2, 3), float(value))
        best = Best({"a": leaf}, jnp.zeros(()), jnp.zeros((), jnp.int32))
        return TrainState(jnp.int32(value), {"a": leaf}, {"m": leaf}, best)

    def checkpoints(workdir):
        return Checkpoints(workdir.checkpoints("experts"), keep=1, identity=identity)

    with Workdir(url, config) as workdir:
        opened = checkpoints(workdir)
        for step in (1, 2):
            opened.save(step, state(step), {"next_index": step})
        opened.wait()
        opened.close()
        write(workdir.root, {"metrics.jsonl": "1\n"})
        workdir.publish()
    monkeypatch.setenv("SAFEMOE_CACHE", str(tmp_path / "another machine"))
    with Workdir(url, config) as workdir:
        opened = checkpoints(workdir)
        assert opened.latest_step == 2
        restored, position = opened.restore(state(0))
        opened.close()
        assert leaves_equal(restored, state(2)) and position == {"next_index": 2}
        assert workdir.metrics.read_text() == "1\n"
        workdir.checkpoints("experts").parent.rmtree(missing_ok=True)
        assert not workdir.checkpoints("experts").exists()
    assert local_copy(f"{url}/metrics.jsonl").read_text() == "1\n"
