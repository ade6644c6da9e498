"""tpu_run.sh against tests/fakes/gcloud: what a slice and its workers may do, and what it does."""

import os
import re
import shlex
import signal
import subprocess
import tarfile

import pytest

from .conftest import FAKES, PATIENCE, ROOT, git, until

WHERE = ["--zone=us-west4-a"]
SLICE = [*WHERE, "--accelerator=v5litepod-16", "--poll=0"]
JOB = ["--", "--config", "experiments/pyrit.py", "--workdir", "gs://bucket/run", "--config.seed=1"]
CALL = "run --config experiments/pyrit.py --workdir gs://bucket/run --config.seed=1"
LAUNCHER = "launch/tpu_run.sh"


def run(pod, *options):
    return pod.call(LAUNCHER, "run", "pod", *SLICE, *options, *JOB)


def planner(pod, answer):
    """A fake of `safemoe plan` that says what it was asked."""
    path = pod.repo.parent / "venv" / "bin" / "safemoe"
    path.parent.mkdir(parents=True)
    path.write_text(f'#!/bin/sh\necho "asked: $*"\n{answer}\n')
    path.chmod(0o755)
    pod.environment["PYTHON"] = str(path.with_name("python"))


def test_a_run_waits_sets_up_all_workers_and_leaves_only_logs(pod):
    pod.plays(states="WAITING_FOR_RESOURCES PROVISIONING ACTIVE", pip_fails=1)
    secrets = pod.repo.parent / "secrets.env"
    secrets.write_text("# a comment\nSECRET=to be or not\n")
    secrets.chmod(0o600)
    planner(pod, "exit 0")
    code, output = run(pod, "--capacity=spot", "--plan", f"--env-file={secrets}")
    assert code == 0, output
    asked = "--topology v5litepod-16 --config experiments/pyrit.py --config.seed=1"
    assert output.count("asked: ") == output.count(f"asked: plan {asked}\n") == 1

    (create,) = pod.calls("create")
    assert {"--spot", "--labels=safemoe=pod", "--accelerator-type=v5litepod-16"} <= set(create)
    assert "--runtime-version=v2-alpha-tpuv5-lite" in create
    lock = (pod.repo / "launch" / "requirements-tpu.txt").read_text()
    commit = git(pod.repo, "rev-parse", "HEAD").strip()
    for worker in (0, 1):
        home = pod.home / "slices" / "1" / f"worker-{worker}" / "safemoe" / "pod"
        assert pod.runs(worker) == [CALL]
        assert (home / "synced").read_text() == lock  # at the second try
        assert (home / "code" / "STAMP").read_text().strip() == commit
        assert not (home / "secrets").exists()
        assert (pod.home / f"secrets-{worker}").read_text() == "to be or not\n"
        log = pod.repo / "runs" / "launch" / "pod" / "logs" / "1" / f"worker-{worker}.log"
        assert f"worker {worker} runs {CALL}" in log.read_text()
        assert f"commit {commit}" in log.read_text()
    assert not pod.is_up
    assert "to be or not" not in f"{pod.calls()}{output}"


def test_a_dry_run_prints_what_a_run_calls_and_does_nothing(pod):
    code, output = run(pod, "--dry-run", "--capacity=reserved")
    assert code == 0
    assert pod.calls() == []
    assert not (pod.repo / "runs").exists()
    printed = [shlex.split(line) for line in output.splitlines()]
    printed = [words[1:] for words in printed if words[0] == "gcloud"]

    code, output = run(pod, "--capacity=reserved")
    assert code == 0, output

    def steps(calls):
        """Without seconds that have passed, and what is repeated until the job has ended."""
        text = [shlex.join(call) for call in calls]
        text = [re.sub(r"-duration=\d+s", "", line) for line in text]
        text = [line.partition("_worker.sh start")[0] for line in text]
        return list(dict.fromkeys(text))

    assert steps(printed) == steps(pod.calls())
    assert printed[-1][2:4] == pod.calls()[-1][2:4] == ["queued-resources", "delete"]


@pytest.mark.parametrize(
    "mode, states", [("qr", "ACTIVE ACTIVE/PREEMPTED SUSPENDED"), ("vm", "READY PREEMPTED")]
)
def test_what_is_taken_away_is_made_anew_and_goes_on(pod, mode, states):
    pod.plays(states=states, jobs="forever\n0", workers=1)
    code, output = run(pod, f"--mode={mode}", "--max-preemptions=1", "--max-failures=0")
    assert code == 0, output
    assert "pod was taken away and is made anew (preemptions: 1, at most 1)" in output
    assert pod.runs() == [CALL] * 2
    kind = {"qr": "queued-resources", "vm": "tpu-vm"}[mode]
    assert [call[2:4] for call in pod.calls() if call[3] in ("create", "delete")] == [
        [kind, "create"],
        [kind, "delete"],
    ] * 2
    logs = pod.repo / "runs" / "launch" / "pod" / "logs"
    assert {path.name for path in logs.iterdir()} == {"1", "2"}


def test_each_budget_has_its_end(pod):
    pod.plays(states="FAILED\nREFUSED\nSUSPENDED\nACTIVE", jobs="75\n1,134\n0")
    code, output = run(pod, "--max-preemptions=2", "--max-failures=3")
    assert code == 0, output
    for said in (
        "pod failed and is made anew (failures: 1, at most 3)",
        "pod could not be created (failures: 2, at most 3)",
        "pod was taken away and is made anew (preemptions: 1, at most 2)",
        "the job was interrupted and has saved (preemptions: 2, at most 2)",
        "the job has failed: see",
        "(failures: 3, at most 3)",
    ):
        assert said in output
    assert pod.runs() == [CALL] * 3


@pytest.mark.parametrize(
    "states, jobs, code, said",
    [
        ("FAILED", "", 1, "giving up: more failures than --max-failures=0"),
        ("SUSPENDED", "", 1, "giving up: more preemptions than --max-preemptions=0"),
        ("ACTIVE", "2,1", 2, "the job ended with 2, a mistake in its command"),
    ],
)
def test_a_run_that_ends_otherwise_leaves_nothing_either(pod, states, jobs, code, said):
    pod.plays(states=states, jobs=jobs, workers=1)
    got, output = run(pod, "--max-preemptions=0", "--max-failures=0")
    assert (got, pod.is_up) == (code, False), output
    assert said in output


def test_ssh_may_fail_for_a_while(pod):
    pod.plays(ssh_fails=2, jobs="forever")
    process = pod.start(LAUNCHER, "run", "pod", *SLICE, "--max-failures=0", *JOB)
    until(pod.runs)
    pod.plays(ssh_fails=3)
    until(lambda: (pod.home / "ssh_fails").read_text() == "0")
    pod.plays(outage="the network of this machine")
    calls = len(pod.calls())
    until(lambda: len(pod.calls()) > calls + 8)
    (pod.home / "outage").unlink()
    pod.plays(go="")
    output, _ = process.communicate(timeout=PATIENCE)
    assert (process.returncode, pod.is_up) == (0, False), output
    assert pod.runs() == [CALL]
    log = pod.repo / "runs" / "launch" / "pod" / "logs" / "1" / "worker-1.log"
    assert log.read_text().splitlines()[-1].endswith("ended with 0")


def test_the_deadline_holds_for_waiting_too(pod):
    pod.plays(states="WAITING_FOR_RESOURCES")
    code, output = run(pod, "--deadline=1s")
    assert (code, pod.is_up) == (75, False)
    assert "--deadline=1s is over; the same command goes on from the last checkpoint" in output


def test_a_deadline_that_passes_in_set_up_is_no_failure(pod):
    pod.plays(workers=1)
    assert pod.call(LAUNCHER, "create", "pod", *SLICE)[0] == 0
    code, output = run(pod, "--deadline=0s", "--max-failures=0")
    assert (code, pod.runs(), pod.is_up) == (75, [], False), output
    assert "--deadline=0s is over; the same command goes on from the last checkpoint" in output


@pytest.mark.parametrize("text, seconds", [("08h", 28800), ("09m", 540), ("010s", 10)])
def test_a_duration_is_decimal_whatever_its_first_digit(text, seconds):
    script = f"source launch/_common.sh\nseconds {text}\n"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{seconds}\n", "")


def test_at_its_limit_a_job_saves(pod):
    worker = pod.repo / "launch" / "_worker.sh"
    home = pod.home / "slices" / "1" / "worker-0" / "safemoe" / "pod"
    (home / "venv" / "bin").mkdir(parents=True)
    (home / "venv" / "bin" / "safemoe").symlink_to(FAKES / "tpu_worker" / "safemoe")
    (home / "code").symlink_to(pod.repo)
    (pod.repo / "STAMP").write_text("a commit")
    pod.environment |= {"HOME": str(home), "FAKE_WORKER": "0"}
    pod.plays(jobs="forever")
    assert pod.call("env", "-C", str(home), "bash", str(worker), "start", "1", "x") == (0, "")
    until((home / "exit_code").exists)
    assert (home / "exit_code").read_text() == "75\n"
    assert (home / "job.log").read_text().splitlines()[1:3] == ["worker 0 runs run x", "saved"]


def test_a_lost_launcher_does_no_harm_and_ctrl_c_saves_and_deletes(pod):
    pod.plays(jobs="forever")
    command = [LAUNCHER, "run", "pod", *SLICE, *JOB]
    process = pod.start(*command)
    until(lambda: (pod.repo / "runs/launch/pod/logs/1/worker-1.log").exists())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()

    _, output = pod.call(LAUNCHER, "status", "pod", *WHERE)
    assert output == "pod: READY\nworker 0: job: running\nworker 1: job: running\n"
    process = pod.start(*command)
    until(lambda: len(pod.calls("ssh")) > 12)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, output
    assert "pod runs the job already" in output
    assert pod.runs() == [CALL]  # nothing was started twice
    assert not pod.is_up
    assert "saved" in (pod.repo / "runs/launch/pod/logs/1/worker-1.log").read_text()


@pytest.mark.parametrize("moment", ["kill -TERM $$", ': "$(kill -TERM $$)$(echo x)"'])
def test_a_signal_is_heard_at_any_moment(moment):
    script = f"source launch/_common.sh\non_signal 'exit 75' TERM\n{moment}\necho missed\n"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (75, "", "")


def test_a_slice_of_somebody_else_is_not_touched(pod):
    name = ["--accelerator-type=v4-8", "--runtime-version=x", "--node-id=pod", *WHERE]
    pod.call("gcloud", "compute", "tpus", "queued-resources", "create", "pod", *name)
    for verb, options in (("run", JOB), ("delete", [])):
        code, output = pod.call(LAUNCHER, verb, "pod", *SLICE, *options)
        assert code == 2
        assert "pod is there without the label safemoe=pod: not this launcher's" in output
    assert {call[3] for call in pod.calls()[1:]} == {"list"}


def test_create_keeps_and_delete_deletes(pod):
    pod.plays(workers=1)
    for _ in range(2):  # the second finds the first one's
        code, output = pod.call(LAUNCHER, "create", "pod", *SLICE)
        assert (code, pod.is_up) == (0, True), output
    assert len(pod.calls("create")) == 1
    code, output = run(pod, "--keep")
    assert (code, pod.is_up) == (0, True), output
    assert f"delete it by: {LAUNCHER} delete pod --mode=qr --zone=us-west4-a" in output
    assert pod.call(LAUNCHER, "delete", "pod", *WHERE)[0] == 0
    assert not pod.is_up
    assert pod.call(LAUNCHER, "delete", "pod", *WHERE) == (0, "pod is not there\n")


def test_without_all_devices_no_job_is_started(pod):
    pod.plays(devices=12, workers=1)
    code, output = run(pod, "--max-failures=0")
    assert (code, pod.runs(), pod.is_up) == (1, [], False), output


def test_what_does_not_fit_is_refused_before_anything_is_rented(pod):
    planner(pod, "echo train-experts needs 20 GiB; exit 2")
    code, output = run(pod, "--plan")
    assert (code, pod.calls("create")) == (2, []), output
    assert output.endswith("train-experts needs 20 GiB\n")


def test_what_is_not_committed_is_refused_or_said(pod):
    changed = pod.repo / "experiments" / "pyrit.py"
    changed.write_text("# changed\n" + changed.read_text())
    (pod.repo / "notes.txt").write_text("mine")
    code, output = run(pod)
    assert code == 2
    assert "not committed: experiments/pyrit.py notes.txt; commit, or ship tracked" in output
    code, output = run(pod, "--allow-dirty")
    assert code == 0, output
    assert "shipping tracked files with their changes, and no untracked file" in output
    with tarfile.open(pod.repo / "runs" / "launch" / "pod" / "code.tar.gz") as archive:
        assert archive.extractfile("experiments/pyrit.py").readline() == b"# changed\n"
        assert b" with changes, " in archive.extractfile("STAMP").read()
        assert "notes.txt" not in archive.getnames()
    assert git(pod.repo, "stash", "list") == ""


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["walk", "pod"], "'walk' is no verb; give create, run, status, logs, attach or delete"),
        (["run", "Pod", *SLICE, *JOB], "NAME is 'Pod'; give 1 to 40 small letters"),
        (["run", "pod", "x", *SLICE, *JOB], "unexpected 'x'; options of safemoe run stand behind"),
        (["run", "pod", "--zones=a", *JOB], "unknown option --zones=a; see"),
        (["run", "pod", *JOB], "no --zone; give the one that has your quota"),
        (["run", "pod", *WHERE, *JOB], "--accelerator is ''; give v4-N, v5litepod-N"),
        (["run", "pod", *SLICE, "--accelerator=tpu7x-8", *JOB], "tpu7x is had through GKE only"),
        (["run", "pod", *SLICE, "--capacity=cheap", *JOB], "--capacity=cheap is unknown"),
        (["run", "pod", *SLICE, "--mode=gke", *JOB], "--mode=gke is unknown; give qr, vm or local"),
        (["run", "pod", *SLICE, "--deadline=1d", *JOB], "1d is no duration; give one like 90s"),
        (["run", "pod", *SLICE, "--max-failures=x", *JOB], "'x' is no whole number"),
        (["run", "pod", *SLICE, "--devices=08", *JOB], "'08' is no whole number like 8"),
        (["run", "pod", *SLICE], "no --config; end the command with -- --config"),
        (["run", "pod", *SLICE, *JOB[:3]], "--workdir is ''"),
        (["run", "pod", *SLICE, *JOB[:4], "/tmp/x"], "which goes with the slice; give gs://"),
        (
            ["run", "pod", *SLICE, "--", "--config=mine.py", "--workdir=gs://b/x"],
            "--config mine.py is not in commit",
        ),
        (["run", "pod", *SLICE, "--env-file=none", *JOB], "--env-file=none is no file"),
        (["run", "pod", "--mode=local", "--fake-workers=3", *JOB], "cannot be shared by"),
        (["create", "pod", *SLICE, "--plan"], "leave it out of create --mode=qr"),
    ],
)
def test_a_mistake_is_said_in_one_line_before_anything_is_done(pod, arguments, said):
    code, output = pod.call(LAUNCHER, *arguments)
    assert (code, output.count("\n")) == (2, 1), output
    assert said in output
    assert pod.calls() == []


def test_secrets_that_others_can_read_are_refused(pod):
    secrets = pod.repo.parent / "secrets.env"
    secrets.write_text("SECRET=1\nno assignment\n")
    secrets.chmod(0o644)
    assert "others can read" in run(pod, f"--env-file={secrets}")[1]
    secrets.chmod(0o600)
    assert "line 2 of" in run(pod, f"--env-file={secrets}")[1]
    assert pod.calls() == []


def test_a_slice_that_somebody_deletes_is_made_anew_once(pod):
    pod.plays(jobs="forever\n0", workers=1)
    process = pod.start(LAUNCHER, "run", "pod", *SLICE, "--max-preemptions=1", *JOB)
    until(pod.runs)
    code, output = pod.call(LAUNCHER, "delete", "pod", *WHERE)
    assert code == 0, output
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert "pod is gone and is made anew (preemptions: 1, at most 1)" in output
    assert pod.runs() == [CALL] * 2


def test_a_rehearsal_on_several_workers_joins_them(pod):
    local = ["--mode=local", "--fake-devices=16", "--fake-workers=4", "--dry-run"]
    code, output = pod.call(LAUNCHER, "run", "pod", *local, *JOB)
    assert code == 0
    (last,) = (
        line for line in output.splitlines() if "JAX_PROCESS_ID=3" in line and "check" in line
    )
    assert "--xla_force_host_platform_device_count=4 JAX_COORDINATOR_ADDRESS=localhost:8476" in last
    assert last.endswith("_worker.sh check 16'")
