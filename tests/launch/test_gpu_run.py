"""gpu_run.sh against fakes of ssh, scp and Slurm's commands."""

import os
import signal

import pytest

from .conftest import git, until

JOB = ["--", "--config", "experiments/pyrit.py", "--workdir", "/shared/run", "--config.seed=1"]
CALL = "run --config experiments/pyrit.py --workdir /shared/run --config.seed=1"
LAUNCHER = "launch/gpu_run.sh"
HOSTS = ["--hosts=me@node0,node1", "--gpus=8", "--poll=0"]


@pytest.fixture
def hosts(pod):
    """Two hosts, whose home directories are below `pod.home`."""
    pod.environment["FAKE_HOSTS"] = str(pod.home)
    for host in ("me@node0", "node1"):
        (pod.home / host).mkdir()
    return pod


def run(hosts, *options):
    return hosts.call(LAUNCHER, "run", "mine", *HOSTS, *options, *JOB)


def test_by_ssh_all_hosts_are_set_up_joined_and_started_again(hosts):
    hosts.plays(jobs="75\n1,134\n0", ssh_fails=1)
    code, output = run(hosts, "--max-interruptions=1", "--max-failures=1")
    assert code == 0, output
    assert "the job was interrupted and has saved (interruptions: 1, at most 1)" in output
    assert "the job has failed: see" in output
    commit = git(hosts.repo, "rev-parse", "HEAD").strip()
    for number, host in enumerate(("me@node0", "node1")):
        assert hosts.runs(number) == [CALL] * 3
        home = hosts.home / host / "safemoe" / "mine"
        assert (home / "code" / "STAMP").read_text().strip() == commit
        lock = (hosts.repo / "launch" / "requirements-gpu.txt").read_text()
        assert (home / "synced").read_text() == lock
        starts = [
            line
            for line in (hosts.home / "calls").read_text().splitlines()
            if line.startswith(host) and " start " in line
        ]
        assert len(starts) == 3
        joined = f"JAX_COORDINATOR_ADDRESS=node0:8476 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={number};"
        assert joined in starts[0]
        log = hosts.repo / "runs" / "launch" / "mine" / "logs" / "1" / f"worker-{number}.log"
        assert log.read_text().count(f"worker {number} runs {CALL}") == 3


def test_by_ssh_budgets_mistakes_and_stop(hosts):
    hosts.plays(jobs="1\n2\nforever")
    code, output = run(hosts, "--max-failures=0")
    assert (code, "giving up: more failures than --max-failures=0" in output) == (1, True), output
    code, output = run(hosts)
    assert (code, "the job ended with 2, a mistake" in output) == (2, True), output
    process = hosts.start(LAUNCHER, "run", "mine", *HOSTS, *JOB)
    log = hosts.repo / "runs" / "launch" / "mine" / "logs" / "3" / "worker-1.log"
    until(log.exists)
    os.killpg(process.pid, signal.SIGKILL)  # the job goes on
    process.communicate()
    code, output = hosts.call(LAUNCHER, "status", "mine", *HOSTS)
    assert output == "worker 0: job: running\nworker 1: job: running\n"
    code, output = hosts.call(LAUNCHER, "stop", "mine", *HOSTS)
    assert code == 0
    code, output = hosts.call(LAUNCHER, "status", "mine", *HOSTS)
    assert output == "worker 0: job: exited 75\nworker 1: job: exited 75\n"


def test_by_ssh_a_deadline_that_passes_in_set_up_is_no_failure(hosts):
    code, output = run(hosts, "--deadline=0s", "--max-failures=0")
    assert (code, hosts.runs()) == (75, []), output
    assert "--deadline=0s is over; the same command goes on from the last checkpoint" in output


def test_by_ssh_a_dry_run_does_nothing(hosts):
    code, output = run(hosts, "--dry-run")
    assert code == 0
    assert not (hosts.home / "calls").exists()
    assert not (hosts.repo / "runs").exists()
    assert "ssh -oBatchMode=yes -oServerAliveInterval=15 node1 'export JAX_COORD" in output
    assert "scp -q -oBatchMode=yes" in output


@pytest.fixture
def slurm(pod):
    jobs = pod.home / "jobs.d"
    jobs.mkdir()
    tools = pod.environment["PATH"].split(":")[0] + "/tpu_worker"
    pod.environment |= {
        "FAKE_SLURM": str(jobs),
        "FAKE_SLURM_FIRST": "41",
        "FAKE_WORKER": "0",
        "HOME": str(pod.home),
        "PATH": f"{tools}:{pod.environment['PATH']}",
    }
    yield pod
    pod.plays(go="")


def submit(slurm, *options):
    """-> the number of the job, once it has ended."""
    code, output = slurm.call(LAUNCHER, "run", "mine", "--slurm", "--gpus=4", *options, *JOB)
    assert code == 0, output
    number = output.split()[-1]
    assert output == f"Submitted batch job {number}\n"
    status = [LAUNCHER, "status", "mine", "--slurm"]
    until(lambda: f"{number}|RUNNING" not in slurm.call(*status)[1])
    return number


def test_slurm_queues_again_what_has_saved_until_it_is_stopped(slurm):
    slurm.plays(jobs="75\n75\n0")
    number = submit(slurm, "--nodes=2", "--sbatch=--partition=long")
    assert slurm.runs() == [CALL] * 3
    flags = (slurm.home / "jobs.d" / f"{number}.flags").read_text().split()
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--partition=long"} <= set(
        flags
    )
    assert {"--requeue", "--signal=TERM@300", "--time=24:00:00"} <= set(flags)
    _, output = slurm.call(LAUNCHER, "logs", "mine", "--slurm")
    assert str(slurm.home / "safemoe" / "mine" / "logs" / "0.log") in output

    slurm.call(LAUNCHER, "stop", "mine", "--slurm")
    cancelled = (slurm.home / "jobs.d" / "cancelled").read_text().splitlines()
    assert cancelled == [f"--state=PENDING {number}", f"--signal=TERM {number}"]
    assert (slurm.home / "safemoe" / "mine" / "stop").exists()


def test_slurm_takes_no_second_job_of_a_name_whose_code_the_first_one_needs(slurm):
    slurm.plays(jobs="forever\n0")
    command = [LAUNCHER, "run", "mine", "--slurm", *JOB]
    assert slurm.call(*command) == (0, "Submitted batch job 41\n")
    until(slurm.runs)
    first = (slurm.home / "safemoe" / "mine" / "code" / "STAMP").stat()
    said = "mine is queued or runs already; end it first by: launch/gpu_run.sh stop mine --slurm\n"
    assert slurm.call(*command) == (2, said)
    assert (slurm.home / "safemoe" / "mine" / "code" / "STAMP").stat() == first
    slurm.plays(go="")
    until(lambda: "|RUNNING" not in slurm.call(LAUNCHER, "status", "mine", "--slurm")[1])
    assert slurm.call(*command) == (0, "Submitted batch job 42\n")


@pytest.mark.parametrize("jobs, options, runs", [("75\n75", ["--max-requeues=1"], 2), ("1", [], 1)])
def test_slurm_does_not_queue_without_end_nor_what_has_failed(slurm, jobs, options, runs):
    slurm.plays(jobs=jobs + "\n0")
    submit(slurm, *options)
    assert slurm.runs() == [CALL] * runs


def test_slurm_needs_all_gpus(slurm):
    slurm.plays(devices=3)
    submit(slurm)
    assert slurm.runs() == []


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["go", "mine", *HOSTS], "'go' is no verb; give run, status, logs, attach or stop"),
        (["run", "mine", *JOB], "no machines; give --hosts=HOST,HOST,... or --slurm"),
        (["run", "mine", *HOSTS, "--slurm", *JOB], "--hosts and --slurm exclude each other"),
        (["run", "mine", *HOSTS, "--gpus=all", *JOB], "'all' is no whole number"),
        (["run", "mine", *HOSTS, "--gpus=08", *JOB], "'08' is no whole number like 8"),
        (["run", "mine", *HOSTS, "--poll=08", *JOB], "--poll=08 is no number of seconds"),
        (["run", "mine", *HOSTS, *JOB[:4], "runs/x"], "--workdir is 'runs/x'; give a URL"),
        (["stop", "mine", "--slurm"], "nothing named mine has been submitted from here"),
    ],
)
def test_a_mistake_is_said_in_one_line(pod, arguments, said):
    code, output = pod.call(LAUNCHER, *arguments)
    assert (code, output.count("\n")) == (2, 1), output
    assert said in output
