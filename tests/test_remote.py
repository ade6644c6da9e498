"""Work directories and data behind URLs: a directory as file://, and an emulated gs:// bucket."""

import contextlib
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import pytest
from toys import leaves_equal

from experiments import pyrit
from safemoe_jax.config import freeze
from safemoe_jax.errors import UserError
from safemoe_jax.remote import Mirror, local_copy
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
    with pytest.raises(UserError, match="nowhere://x cannot be opened"):
        local_copy("nowhere://x")


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
