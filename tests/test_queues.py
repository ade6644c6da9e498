"""Jobs go through fakes of Slurm's and SkyPilot's commands, which are in tests/fakes."""

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import submitit

from safemoe_jax import queues
from safemoe_jax.errors import UserError

ROOT = Path(__file__).parent.parent
FAKES = Path(__file__).parent / "fakes"


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Runs a program, by the fake Slurm, for each name: a shell line in which $1 is the name."""
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    monkeypatch.setenv("PATH", f"{FAKES}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the job's own process imports the package
    monkeypatch.setenv("FAKE_SLURM", str(jobs))
    # submitit remembers the jobs of one process by their numbers.
    monkeypatch.setenv("FAKE_SLURM_FIRST", str(time.time_ns() % 10**9))

    def slurm(program, *names, settings=(("time", 5),)):
        monkeypatch.setattr(queues, "PROGRAM", ("bash", "-c", program, "job"))
        return queues.slurm(names, lambda name: [name], tmp_path, dict(settings))

    slurm.root, slurm.jobs = tmp_path, jobs
    return slurm


def test_slurm_waits_for_all_and_says_which_failed(slurm):
    program = f"echo $1; echo $1 >> {slurm.root}/ran; test $1 != bad"
    failed = slurm(program, "good", "bad", settings={"time": 5, "partition": "long"})
    assert sorted((slurm.root / "ran").read_text().split()) == ["bad", "good"]
    assert failed.keys() == {"bad"}
    log = re.fullmatch(r"job (\d+) failed, see (.+)", failed["bad"])
    assert "returned non-zero exit status 1" in Path(log[2]).read_text()
    (out,) = (slurm.root / "slurm" / "good").glob("*_log.out")
    assert "good" in out.read_text().split()
    script = min(slurm.jobs.glob("*.script")).read_text()
    for line in ("--job-name=good", "--partition=long", "--time=5"):
        assert f"#SBATCH {line}\n" in script

    # A job that failed is submitted again.
    assert slurm(f"echo again >> {slurm.root}/ran", "bad") == {}
    assert (slurm.root / "ran").read_text().endswith("again\n")


def test_a_second_call_finds_what_the_first_left_in_the_queue(slurm):
    program = f"until test -e {slurm.root}/go; do sleep 0.05; done; echo $1 >> {slurm.root}/ran"
    first = threading.Thread(target=slurm, args=(program, "one"), daemon=True)
    first.start()
    until(lambda: list((slurm.root / "slurm").glob("one/*_submitted.pkl")))
    threading.Timer(1.0, (slurm.root / "go").touch).start()
    assert slurm(program, "one") == {}
    first.join()
    assert len(list(slurm.jobs.glob("*.script"))) == 1
    assert (slurm.root / "ran").read_text() == "one\n"


def test_a_preempted_command_is_submitted_again_as_it_was(tmp_path):
    program = f"echo $PPID >> {tmp_path}/ran; test $(wc -l < {tmp_path}/ran) = 2 || sleep 60"
    executor = submitit.LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(timeout_min=5)
    job = executor.submit(queues._Command(("bash", "-c", program)))
    ran = tmp_path / "ran"
    until(lambda: ran.exists() and ran.read_text())
    os.kill(int(ran.read_text()), signal.SIGUSR2)
    assert job.exception() is None
    assert len(ran.read_text().split()) == 2


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "--slurm time=MINUTES is missing; a job without it gets 5 minutes"),
        (
            {"time": 5, "colour": 3},
            r"submitit: Unavailable parameter\(s\): \['colour'\].*--backend",
        ),
    ],
)
def test_a_wrong_setting_of_slurm(slurm, settings, message):
    with pytest.raises(UserError, match=message) as error:
        slurm("true", "one", settings=settings)
    assert "\n" not in str(error.value)


def test_where_there_is_no_slurm(slurm, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r'submitit: Could not detect "srun".*another --backend'):
        slurm("true", "one")
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="--backend slurm needs submitit; pip install"):
        slurm("true", "one")


@pytest.fixture
def sky(tmp_path, monkeypatch):
    """Runs names by the fake `sky` -> failures; `taken` holds each name's log."""
    monkeypatch.setenv("PATH", f"{FAKES}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SKY", str(tmp_path))
    monkeypatch.setattr(queues, "POLL_SECONDS", 0.0)
    task = tmp_path / "task.yaml"
    task.write_text("run: safemoe $SAFEMOE_ARGS\n")

    def sky(*names, take=lambda name, log: True):
        def taken(name, log):
            sky.taken[name] = log
            return take(name, log)

        arguments = lambda name: ["sweep", "a b.py", "--only", name]  # noqa: E731
        return queues.skypilot(names, arguments, tmp_path, task, taken)

    sky.taken, sky.root = {}, tmp_path
    sky.jobs = lambda: [
        job
        for job in json.loads((tmp_path / "jobs.json").read_text())
        if job["job_name"] != "other"
    ]
    return sky


def test_skypilot_launches_waits_and_reads_the_logs(sky):
    assert sky("one", "two") == {}
    assert [job["job_name"] for job in sky.jobs()] == ["safemoe-one", "safemoe-two"]
    assert sky.jobs()[0]["argv"] == ["sweep", "a b.py", "--only", "one"]
    assert sky.jobs()[0]["task"] == (sky.root / "task.yaml").read_text()
    assert sky.taken.keys() == {"one", "two"}
    assert "validation.json one {" in sky.taken["one"]


def test_skypilot_repeats_only_what_failed(sky):
    (sky.root / "fails").write_text("safemoe-two")
    assert sky("one", "two") == {"two": "FAILED, see `sky jobs logs 3`"}
    (sky.root / "fails").unlink()
    sky.taken.clear()
    assert sky("one", "two") == {}
    assert [job["job_name"] for job in sky.jobs()] == ["safemoe-one", "safemoe-two", "safemoe-two"]
    assert sky.taken.keys() == {"one", "two"}  # read once more, not run once more


def test_skypilot_finds_what_an_earlier_call_left_in_the_queue(sky, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(queues.time, "sleep", interrupted)
        sky("one")
    assert sky("one") == {}
    assert len(sky.jobs()) == 1


def test_a_job_without_a_result_has_failed(sky):
    failed = sky("one", take=lambda name, log: False)
    assert failed == {"one": "job 1 succeeded, and its log holds no result"}


def test_where_sky_is_missing_or_fails(sky, monkeypatch, tmp_path):
    (tmp_path / "jobs.json").write_text("no JSON")
    with pytest.raises(UserError, match=r"`sky jobs queue .*` failed: .*Error.*; correct that"):
        sky("one")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="--backend skypilot needs the `sky` command"):
        sky("one")
    (tmp_path / "task.yaml").unlink()
    with pytest.raises(UserError, match=r"--task .*task\.yaml is no file; launch/skypilot_sweep"):
        sky("one")
