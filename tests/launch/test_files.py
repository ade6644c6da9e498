"""What no fake can run, against its own checker: scripts, manifests, image, lock files."""

import re
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from packaging.requirements import Requirement

from .conftest import ROOT, git

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
BIN = Path(sys.executable).parent


def test_shellcheck_finds_nothing():
    command = [BIN / "shellcheck", "--external-sources", *SCRIPTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_pre_commit_runs_what_ci_lints_with():
    ci = re.findall(
        r'^"\$VENV/bin/python" -m (ruff .*|mypy)$', (LAUNCH / "test.sh").read_text(), re.M
    )
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert ci == ["ruff check", "ruff format --check", "mypy"]
    assert [hook["entry"] for hook in local["hooks"]] == [f".venv/bin/python -m {c}" for c in ci]


def test_hadolint_finds_nothing():
    command = [BIN / "hadolint", LAUNCH / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_an_image_knows_its_commit(pod):
    said = "".join(re.findall(r"^#   +(.*)$", (LAUNCH / "Dockerfile").read_text(), re.M))
    archive, _, build = said.partition("|")
    assert build.split()[:2] == ["docker", "build"]
    code, output = pod.call("bash", "-c", f"set -o pipefail; {archive} | tar --extract -O STAMP")
    assert (code, output) == (0, git(pod.repo, "rev-parse", "HEAD").strip())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_short_and_says_how_it_is_called(path):
    text = path.read_text()
    assert len(text.splitlines()) < 500
    if text.startswith("#!") and path.name != "_slurm_job.sh":
        done = subprocess.run([path, "--help"], capture_output=True, text=True)
        assert done.returncode == 0
        assert f"{path.name} " in done.stdout or f"{path.name}\n" in done.stdout


@pytest.mark.parametrize(
    "name",
    ["tpu_run.sh", "gpu_run.sh", "xpk_run.sh", "jobset.yaml", "skypilot_run.yaml", "Dockerfile"],
)
def test_a_launcher_says_whether_it_ever_ran(name):
    head = (LAUNCH / name).read_text()[:3500]
    assert re.search(r"^# NEVER (BUILT OR )?RUN", head, re.MULTILINE)


def manifest():
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def unknown(given, known, path=""):
    """Fields of `given` that its model has dropped, or changed."""
    if isinstance(given, dict) and isinstance(known, dict):
        for key, value in given.items():
            yield from unknown(value, known.get(key), f"{path}.{key}")
    elif isinstance(given, list) and isinstance(known, list):
        for index, (one, other) in enumerate(zip(given, known, strict=True)):
            yield from unknown(one, other, f"{path}[{index}]")
    elif given != known:
        yield path


def test_the_jobset_fits_its_api():
    given = manifest()
    assert list(unknown(given, JobsetV1alpha2JobSet.from_dict(given).to_dict())) == []
    given["spec"]["failurePolicy"]["maxRestart"] = 1  # as a typing mistake would
    dropped = unknown(given, JobsetV1alpha2JobSet.from_dict(given).to_dict())
    assert list(dropped) == [".spec.failurePolicy.maxRestart"]


def test_the_jobset_has_a_pod_for_each_host_and_knows_the_exit_codes():
    spec = manifest()["spec"]
    (slice_,) = spec["replicatedJobs"]
    job = slice_["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = int(container["resources"]["limits"]["google.com/tpu"])
    assert job["parallelism"] == job["completions"] == int(rows) * int(columns) // chips
    on_code = job["podFailurePolicy"]["rules"][1]["onExitCodes"]
    assert (on_code["containerName"], on_code["values"]) == (container["name"], [2, 75])
    # What Kubernetes says of a pod that ended with a code of a rule.
    message = (
        "Container safemoe for pod x/y failed with exit code {} matching FailJob rule at index 1"
    )
    mistake, interrupted = spec["failurePolicy"]["rules"]
    (pattern,) = mistake["onJobFailureMessagePatterns"]
    assert [bool(re.search(pattern, message.format(code))) for code in (2, 75)] == [True, False]
    assert interrupted["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert container["args"][0] == "run"


def test_the_skypilot_task_recovers_and_takes_its_arguments():
    task = yaml.safe_load((LAUNCH / "skypilot_run.yaml").read_text())
    sweep = yaml.safe_load((LAUNCH / "skypilot_sweep.yaml").read_text())
    recovery = task["resources"]["job_recovery"]
    assert recovery == sweep["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [75]
    assert task["setup"] == sweep["setup"]
    assert "pip sync --python .venv/bin/python launch/requirements-tpu.txt" in task["setup"]
    assert task["envs"] == {"SAFEMOE_ARGS": None}
    assert task["run"].strip() == 'eval ".venv/bin/safemoe run $SAFEMOE_ARGS"'


def test_xpk_is_called_with_what_a_job_needs(pod):
    command = ["launch/xpk_run.sh", "pod", "--cluster=c", "--zone=z", "--tpu-type=v6e-16"]
    job = ["--", "--config", "experiments/pyrit.py", "--workdir", "gs://bucket/a b"]
    code, output = pod.call(*command, "--docker-image=i", "--dry-run", *job)
    assert code == 0
    assert output.startswith("xpk workload create --workload=pod --cluster=c --zone=z")
    assert "--restart-on-exit-codes=75 --max-restarts=20" in output
    inner = "safemoe run --config experiments/pyrit.py --workdir '\\''gs://bucket/a b'\\''"
    assert output.endswith(f"'--command={inner}'\n")
    assert pod.call(*command, *job) == (2, "no --docker-image; see launch/xpk_run.sh --help\n")


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_a_lock_file_holds_what_the_package_asks_for(kind):
    lines = (LAUNCH / f"requirements-{kind}.txt").read_text().splitlines()
    assert lines[1].startswith(f"#    uv pip compile setup.py --extra {kind} --extra gcs")
    pins = dict(line.split("==") for line in lines if "==" in line)
    asked = [Requirement(line) for line in metadata.requires("safemoe-jax")]
    asked = [
        requirement
        for requirement in asked
        if requirement.marker is None
        or any(requirement.marker.evaluate({"extra": extra}) for extra in (kind, "gcs"))
    ]
    assert {"jax", "gcsfs"} <= {requirement.name for requirement in asked}
    for requirement in asked:
        name = requirement.name.lower().replace("_", "-")
        assert requirement.specifier.contains(pins[name]), requirement
    assert {"tpu": "libtpu", "gpu": "jax-cuda13-plugin"}[kind] in pins


def test_what_is_no_code_is_in_the_wheel_too(monkeypatch):
    """An editable install finds it anyway. launch/test_packages.sh builds wheels and tries them."""
    said = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **settings: said.update(settings))
    runpy.run_path("setup.py")
    package = ROOT / "safemoe_jax"
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    globs = said["package_data"]["safemoe_jax"]
    packed = {path for glob in globs for path in package.glob(glob)} | set(package.rglob("*.py"))
    assert {path.name for path in files - packed} == set()
