import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from experiments import pyrit
from safemoe_jax.config import freeze, to_dict
from safemoe_jax.errors import UserError
from safemoe_jax.evaluation import ledger
from safemoe_jax.workdir import Workdir, code_commit, write_json


def config(**changes):
    values = pyrit.get_config()
    values.update_from_flattened_dict(changes)
    return freeze(values)


def visit(root, **changes):
    """One run that does nothing."""
    with Workdir(root, config(**changes)):
        pass


def mode(path):
    return path.stat().st_mode & 0o777


def test_says_what_the_run_is_and_lets_only_the_owner_in(tmp_path, monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_of_a_tpu=true")
    monkeypatch.setenv("SAFEMOE_BUNDLE_KEY", "a secret")
    root = tmp_path / "runs" / "one"
    visit(root)
    assert mode(root) == 0o700
    stored = json.loads((root / "config.json").read_text())
    assert stored == json.loads(json.dumps(to_dict(config())))
    (environment,) = json.loads((root / "run.json").read_text())["commands"]
    assert environment["versions"]["jax"]
    assert environment["device_kind"] == "cpu"
    assert len(environment["devices"]) == 8
    assert environment["flags"]["LIBTPU_INIT_ARGS"] == "--xla_of_a_tpu=true"
    assert environment["flags"].keys() >= {"XLA_FLAGS", "JAX_PLATFORMS"}
    assert "a secret" not in (root / "run.json").read_text()
    assert re.match(r"[0-9a-f]{40}( with changes)?$|unknown$", environment["commit"])
    assert {path.name for path in root.iterdir()} == {"config.json", "lock", "run.json"}


def test_a_directory_has_an_identity_that_it_keeps(tmp_path):
    def identity(name):
        with Workdir(tmp_path / name, config()) as workdir:
            assert workdir.name == name
            return workdir.identity

    first = identity("one")
    assert identity("one") == first
    run = json.loads((tmp_path / "one" / "run.json").read_text())
    run["commands"][0]["started"] = "2026-01-01T00:00:00+0000"
    (tmp_path / "one" / "run.json").write_text(json.dumps(run))
    assert identity("one") != first


def test_run_json_tells_of_every_command(tmp_path):
    visit(tmp_path / "run")
    visit(tmp_path / "run")
    assert len(json.loads((tmp_path / "run" / "run.json").read_text())["commands"]) == 2


def test_code_says_which_commit_it_is(tmp_path):
    def git(*arguments):
        about = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *about, *arguments], check=True)

    assert code_commit(tmp_path) == "unknown"
    (tmp_path / "STAMP").write_text("0123abc with changes, 456def\n")
    assert code_commit(tmp_path) == "0123abc with changes, 456def"  # what a launcher ships
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    commit = code_commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "new.py").write_text("")
    assert code_commit(tmp_path) == f"{commit} with changes"


def test_an_open_directory_is_closed_when_adopted(tmp_path):
    tmp_path.chmod(0o755)
    visit(tmp_path)
    assert mode(tmp_path) == 0o700


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "thesis.tex").write_text("")
    message = f"--workdir {tmp_path} holds 'thesis.tex' and no config.json, so it is no run's; give"
    with pytest.raises(UserError, match=re.escape(message)):
        visit(tmp_path)
    assert mode(tmp_path) == 0o755
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_killed_as_it_began_is_taken_up(tmp_path):
    (tmp_path / "lock").write_text("")
    (tmp_path / ".config.json.k1ll3d.new").write_text('{"seed"')
    visit(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "lock", "run.json"}


def test_what_kills_have_left_goes_and_what_stepped_aside_comes_back(tmp_path):
    """Copies of hazardous weights and answers are among it."""
    root, other = tmp_path / "run", tmp_path / "other"
    visit(root)
    files = {
        "evaluation/.answers.jsonl.k1ll3d_8.new": "cut",
        ".bundle.k1ll3d_8.new/experts.safetensors": "cut",
        "controls/.experts_safe.k1ll3d_8.new/weights.safetensors": "cut",
        "controls/.safe_lora.k1ll3d_8.old/weights.safetensors": "whole",
        ".bundle.k1ll3d_8.old/experts.safetensors": "old",
        "bundle/experts.safetensors": "new",
        "evaluation/.hidden.old": "of the user",
        "runs/another/.bundle.at_w0rk_.new/experts.safetensors": "growing",
        "runs/another/lock": "",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    other.mkdir()
    (other / "kept").write_text("kept")
    for name in (".link.k1ll3d_8.new", ".link.k1ll3d_8.old"):
        (root / name).symlink_to(other)
    visit(root)
    left = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert left == {
        *("config.json", "lock", "run.json", "bundle/experts.safetensors"),
        *("controls/safe_lora/weights.safetensors", "evaluation/.hidden.old"),
        *("runs/another/.bundle.at_w0rk_.new/experts.safetensors", "runs/another/lock"),
    }
    assert (root / "bundle" / "experts.safetensors").read_text() == "new"
    assert [path for path in root.iterdir() if path.is_symlink()] == []
    assert (other / "kept").read_text() == "kept"


def test_another_host_may_begin_the_run_meanwhile(tmp_path, monkeypatch):
    root, listing = tmp_path / "run", Path.iterdir

    def begun_meanwhile(path):
        if path == root:
            monkeypatch.undo()
            visit(root)
        return listing(path)

    root.mkdir()
    monkeypatch.setattr(Path, "iterdir", begun_meanwhile)
    visit(root)
    assert len(json.loads((root / "run.json").read_text())["commands"]) == 2


def test_one_process_at_a_time(tmp_path):
    message = f"another process is working in {tmp_path}; wait for it, or give another --workdir"
    with Workdir(tmp_path, config()), pytest.raises(UserError, match=re.escape(message)):
        visit(tmp_path)
    visit(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    message = f"the file system of --workdir {tmp_path} has no locks ({os.strerror(number)}); give"
    with pytest.raises(UserError, match=re.escape(message)):
        visit(tmp_path)
    with pytest.raises(
        UserError, match=f"of SAFEMOE_CACHE {re.escape(str(tmp_path))} has no locks"
    ):
        ledger.record(tmp_path / "test_evaluations.jsonl", "a", {})


def test_another_config_is_refused_and_named(tmp_path):
    visit(tmp_path)
    message = (
        f"{tmp_path} holds a run with config.train.router.steps = "
        f"{config().train.router.steps}, this one has 70; give another --workdir"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        visit(tmp_path, **{"train.router.steps": 70})
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["train"]["router"]["steps"] == config().train.router.steps
    visit(tmp_path)


def test_evaluation_and_mesh_may_change(tmp_path):
    visit(tmp_path)
    visit(tmp_path, **{"evaluation.max_new_tokens": 5, "mesh.fsdp": 2})
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["evaluation"]["max_new_tokens"] == 5
    commands = json.loads((tmp_path / "run.json").read_text())["commands"]
    assert [command["mesh"]["fsdp"] for command in commands] == [config().mesh.fsdp, 2]


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        message = rf"cannot write to --workdir {re.escape(str(root))} \(.+\); give another"
        with pytest.raises(UserError, match=message):
            visit(root)


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(UserError, match=r"config\.json is not JSON \(.+\); put it back, or delete"):
        visit(tmp_path)


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "values.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["config.json", "run.json"])
@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff"])
def test_a_damaged_file_of_the_directory_is_named_and_its_remedy_helps(tmp_path, name, content):
    root = tmp_path / "run"
    visit(root)
    (root / name).write_bytes(content)
    remedy = {"config.json": f"put it back, or delete {root}", "run.json": "delete it"}[name]
    with pytest.raises(UserError, match=rf"{root / name} .*; {remedy}"):
        visit(root)
    shutil.rmtree(root) if name == "config.json" else (root / name).unlink()
    visit(root)
