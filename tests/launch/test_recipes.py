"""Each launcher command of docs/recipes/run_on_a_pod.md is run as it stands there."""

import os
import re
import shlex
import signal

import pytest

from .conftest import PATIENCE, ROOT, git, until

RECIPE = (ROOT / "docs" / "recipes" / "run_on_a_pod.md").read_text().replace("\\\n", "")
COMMANDS = [shlex.split(line) for line in re.findall(r"^    (launch/.+)$", RECIPE, re.MULTILINE)]


def command(verb, *words):
    (found,) = [
        command
        for command in COMMANDS
        if command[1] == verb and all(word in command for word in words)
    ]
    return found


def test_the_recipe_as_a_reader_follows_it(pod):
    secrets = pod.repo / "secrets.env"
    secrets.write_text("SECRET=mine\n")
    secrets.chmod(0o600)
    (pod.repo / ".git" / "info" / "exclude").write_text("secrets.env\n")

    dry = [word for word in command("run", "--dry-run")]
    code, output = pod.call(*dry)
    assert (code, pod.calls()) == (0, []), output

    pod.plays(states="WAITING_FOR_RESOURCES ACTIVE", jobs="forever")
    run = command("run", "--deadline=12h")
    assert [word for word in dry if word != "--dry-run"] == [
        word for word in run if not word.startswith(("--deadline", "--env-file"))
    ]
    runner = pod.start(*run[:3], "--poll=0", *run[3:])
    until(lambda: pod.runs(1))
    code, output = pod.call(*command("status"))
    assert output == "pod: READY\nworker 0: job: running\nworker 1: job: running\n"
    assert pod.call(*command("logs"))[0] == 0
    log = pod.repo / "runs" / "launch" / "pod" / "logs" / "1" / "worker-1.log"
    expected = shlex.join(run[run.index("--") + 1 :])
    assert f"worker 1 runs run {expected}" in log.read_text()
    attached = pod.start(*command("attach"))
    assert "starts safemoe run" in attached.stdout.readline()
    os.killpg(attached.pid, signal.SIGTERM)
    attached.communicate()
    pod.plays(go="")
    output, _ = runner.communicate(timeout=PATIENCE)
    assert (runner.returncode, pod.is_up) == (0, False), output
    assert pod.call(*command("delete")) == (0, "pod is not there\n")
    assert (pod.home / "secrets-1").read_text() == "mine\n"


def test_no_command_of_the_recipe_is_left_out():
    verbs = [command[1] for command in COMMANDS]
    assert sorted(verbs) == ["attach", "delete", "logs", "run", "run", "run", "status"]
    assert command("run", "--mode=local")


@pytest.mark.parametrize("path", re.findall(r"`(launch/[^` ]+)`", RECIPE))
def test_what_the_recipe_names_is_there(path):
    assert git(ROOT, "ls-files", path)
