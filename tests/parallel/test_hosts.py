"""Real processes on this machine's loopback: each one is a host of the run."""

import collections
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import toy_run

from safemoe_jax import cli
from safemoe_jax.config import MeshConfig
from safemoe_jax.errors import UserError
from safemoe_jax.parallel import hosts
from safemoe_jax.weights.bundle import read_bundle

TESTS = Path(toy_run.__file__).parent
SECONDS = 240  # no process may take longer on a busy machine


def start(command, *, processes, devices, log, only=None):
    """The processes of one run, each with its own devices; their output goes to files of `log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    log.mkdir(parents=True, exist_ok=True)
    started = []
    for index in range(processes) if only is None else [only]:
        with (log / f"{index}.log").open("w") as file:
            environment = common | {"JAX_PROCESS_ID": str(index)}
            started.append(
                subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
            )
    return started


def finish(started, log):
    """Their exit codes and what they said."""
    try:
        codes = [process.wait(SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    return codes, [path.read_text() for path in sorted(log.glob("*.log"))]


def toy(workdir, *arguments):
    return [sys.executable, toy_run.__file__, str(workdir), *arguments]


def losses(workdir):
    """{(step, split): the losses of each expert}, each there once."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {
        (row["step"], row["split"]): [row[f"loss/{d}"] for d in toy_run.DOMAINS] for row in rows
    }
    assert len(found) == len(rows)
    return found


def ids(workdir, steps=slice(None)):
    """How often each example was read in these steps, by all processes together."""
    counted = collections.Counter()
    for path in workdir.glob("ids-*.jsonl"):
        for line in path.read_text().splitlines()[steps]:
            counted.update(json.loads(line))
    return counted


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run on one device that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("alone")
    toy_run.run(workdir)
    return workdir


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Two runs at once: while one waits for a heartbeat, the other computes."""
    found = {}
    for name, processes, devices, disturbance in (
        ("preempted", 2, 2, ["TERM", "1", "6"]),
        ("killed", 4, 1, ["KILL", "3", "8"]),  # the newest checkpoint is of step 4
    ):
        workdir = tmp_path_factory.mktemp(name)
        command, log = toy(workdir, "fsdp=4", *disturbance), workdir / "log"
        found[name] = workdir, start(command, processes=processes, devices=devices, log=log)
    yield found
    for _, processes in found.values():  # where only some of the tests were run
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def preempted(started):
    """Two hosts of two devices each; one was told to stop before step 6."""
    workdir, processes = started["preempted"]
    return workdir, *finish(processes, workdir / "log")


@pytest.fixture(scope="module")
def killed(started):
    """Four hosts of one device each; one was killed before step 8."""
    workdir, processes = started["killed"]
    return workdir, *finish(processes, workdir / "log")


def test_a_signal_to_one_host_saves_on_all_at_one_step(preempted, alone):
    workdir, codes, said = preempted
    assert codes == [75, 75], said
    (steps,) = {re.search(r"after step (\d+) of 12; saved", text)[1] for text in said}
    # Known to all a step after the step in which the signal came.
    assert steps == "7"
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"4", "7"}
    found, expected = losses(workdir), losses(alone)
    assert found.keys() == {key for key in expected if key[0] <= 7}
    for key, values in found.items():
        np.testing.assert_allclose(values, expected[key], rtol=1e-4)


def test_the_others_end_when_one_host_is_killed(killed, alone):
    workdir, codes, said = killed
    assert codes[3] == -9
    assert all(code not in (0, 75, None) for code in codes[:3]), said
    # What a process wrote last, and what the killed one did before its last step.
    ended = max(path.stat().st_mtime for path in (workdir / "log").iterdir())
    assert ended - (workdir / "ids-3.jsonl").stat().st_mtime < 60
    for text in said[:3]:
        assert re.search(r"host \d of 4; if one ends, .* on all hosts again", text), text
        assert "another task died" in text or "Task 3 heartbeat timeout" in text
    found, expected = losses(workdir), losses(alone)
    assert (7, "train") in expected and (6, "train") in found
    for key, values in found.items():
        np.testing.assert_allclose(values, expected[key], rtol=1e-4)


@pytest.mark.parametrize(
    ("of", "mesh"),
    [
        ("killed", toy_run.ONE),
        ("killed", MeshConfig(data=1, fsdp=1, tensor=1, context=2)),
        ("killed", MeshConfig(data=2, fsdp=2, tensor=2, context=1)),
        ("preempted", MeshConfig(data=1, fsdp=4, tensor=2, context=1)),
    ],
)
def test_a_checkpoint_goes_on_in_another_layout_with_every_example_as_often_as_planned(
    request, tmp_path, alone, of, mesh
):
    stopped = request.getfixturevalue(of)[0]
    shutil.copytree(stopped / "checkpoints", tmp_path / "checkpoints")
    shutil.copy(stopped / "metrics.jsonl", tmp_path)
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    toy_run.run(tmp_path, mesh=mesh)
    found, expected = losses(tmp_path), losses(alone)
    assert found.keys() == expected.keys()
    for key, values in found.items():
        np.testing.assert_allclose(values, expected[key], rtol=1e-4)
    assert ids(stopped, slice(saved)) + ids(tmp_path) == ids(alone)


def test_the_same_command_goes_on_from_its_checkpoint_on_another_mesh(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEMOE_CACHE", str(tmp_path / "cache"))
    tiny.write_base(tmp_path / "base")
    tiny.write_corpus(tmp_path / "corpus.jsonl")
    tiny.write_experiment(tmp_path / "tiny.py", tmp_path / "base", tmp_path / "corpus.jsonl")
    command = ["train-experts", "--config", str(tmp_path / "tiny.py")]
    command += ["--workdir", str(tmp_path / "run")]

    def by_step():
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        return {(r["step"], r["split"]): r["loss"] for r in map(json.loads, lines)}

    assert cli.main(command) == 0
    alone, checkpoints = by_step(), tmp_path / "run" / "experts" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"2", "4"}
    shutil.rmtree(checkpoints / "4")
    assert cli.main([*command, "--config.mesh.fsdp=2"]) == 0
    found = by_step()
    assert found.keys() == alone.keys()
    np.testing.assert_allclose(list(found.values()), [alone[key] for key in found], rtol=1e-4)


def test_a_run_started_on_one_host_of_several_says_what_to_do(tmp_path):
    call = "from safemoe_jax.parallel.hosts import connect; connect(timeout_seconds=3)"
    for index in range(2):
        log = tmp_path / str(index)
        started = start([sys.executable, "-c", call], processes=2, devices=1, log=log, only=index)
        codes, (said,) = finish(started, log)
        assert codes[0] not in (0, None)
        assert "if this times out, start the same command on every host" in said, said
        assert "DEADLINE_EXCEEDED" in said


@pytest.mark.parametrize(
    ("set_to", "message"),
    [
        ({"JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID is set and JAX_COORDINATOR_ADDRESS is not"),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "a:1",
                "JAX_NUM_PROCESSES": "two",
                "JAX_PROCESS_ID": "0",
            },
            "JAX_NUM_PROCESSES or JAX_PROCESS_ID is no number .*'two'",
        ),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "a:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "2",
            },
            "JAX_PROCESS_ID is 2 and JAX_NUM_PROCESSES 2; ids go from 0 to 1",
        ),
    ],
)
def test_an_environment_that_contradicts_itself_is_named(monkeypatch, set_to, message):
    for name, value in set_to.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        hosts.connect()


def test_a_process_on_its_own_has_nobody_to_join():
    hosts.connect()
    assert jax.process_count() == 1 and hosts.is_first()
    assert hosts.to_host({"x": jax.numpy.arange(2)})["x"].tolist() == [0, 1]


def test_two_hosts_run_all_stages_as_one_does_and_write_one_bundle(tmp_path, monkeypatch):
    """Through the command line, from a corpus that both build at once in one directory."""
    tiny.write_base(tmp_path / "base")
    tiny.write_corpus(tmp_path / "corpus.jsonl")
    tiny.write_experiment(tmp_path / "tiny.py", tmp_path / "base", tmp_path / "corpus.jsonl")
    monkeypatch.setenv("SAFEMOE_CACHE", str(tmp_path / "cache"))
    arguments = ["run", "--config", str(tmp_path / "tiny.py"), "--workdir"]
    assert cli.main([*arguments, str(tmp_path / "one")]) == 0
    command = [sys.executable, "-m", "safemoe_jax.cli", *arguments, str(tmp_path / "two")]
    log = tmp_path / "log"
    started = start([*command, "--config.mesh.fsdp=2"], processes=2, devices=1, log=log)
    codes, said = finish(started, log)
    assert codes == [0, 0], said
    assert "train router: 4/4" in said[0] and "train router" not in said[1]

    def found(workdir):
        lines = (tmp_path / workdir / "metrics.jsonl").read_text().splitlines()
        return {(r["stage"], r["step"], r["split"]): r["loss"] for r in map(json.loads, lines)}

    one, two = found("one"), found("two")
    assert len(one) == 12 and one.keys() == two.keys()
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-4)
    bundle = read_bundle(tmp_path / "two" / "bundle", None)
    assert bundle.config.mesh.fsdp == 2
    assert not (tmp_path / "two" / "experts").exists()
    assert not list((tmp_path / "two" / "data").rglob("*incomplete*"))
