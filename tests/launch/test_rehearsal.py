"""--mode=local: all of tpu_run.sh but the cloud, and a tiny experiment that is really trained."""

import json
import runpy
import signal
import sys

import jax
import tiny

from safemoe_jax.fetch import cache_dir

from .conftest import PATIENCE, ROOT, git, make_repo, until

# A share of each batch for each device; so many steps that it has to be stopped.
OPTIONS = [
    "--config.mesh.data=16",
    "--config.train.experts.rows=8",
    "--config.train.router.rows=16",
    "--config.train.experts.steps=1000000",
    "--config.train.experts.validate_every=1000000",
    "--config.train.experts.save_every=1000000",
]


def test_sixteen_fake_devices_train_until_ctrl_c_and_save(pod, tmp_path):
    pod.repo = tmp_path / "whole"
    make_repo(pod.repo, "launch", "experiments", "safemoe_jax")
    base, corpus, workdir = (tmp_path / name for name in ("base", "corpus.jsonl", "run"))
    tiny.write_base(base)
    tiny.write_corpus(corpus)
    tiny.write_experiment(pod.repo / "experiments" / "tiny.py", base, corpus)
    git(pod.repo, "add", "--all")
    git(pod.repo, "commit", "--quiet", "--message", "a tiny experiment")
    (tmp_path / "cache").mkdir()
    (cache_dir() / "wheels").mkdir(exist_ok=True)
    (tmp_path / "cache" / "wheels").symlink_to(cache_dir() / "wheels")
    pod.environment |= {"PYTHON": sys.executable, "SAFEMOE_CACHE": str(tmp_path / "cache")}

    launcher = ["launch/tpu_run.sh", "run", "tiny", "--mode=local", "--fake-devices=16", "--poll=1"]
    job = ["--config", "experiments/tiny.py", "--workdir", str(workdir), *OPTIONS]
    process = pod.start(*launcher, "--", *job)
    metrics = workdir / "metrics.jsonl"
    until(lambda: (metrics.exists() and metrics.read_text()) or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE)

    logs = pod.repo / "runs" / "launch" / "tiny" / "logs" / "1" / "worker-0.log"
    log = logs.read_text() if logs.exists() else ""
    assert process.returncode == 75, output + log
    assert "devices: host 0 of 1 has 16 cpu; together 16, expected 16" in output
    assert f"commit {git(pod.repo, 'rev-parse', 'HEAD')}" in log
    assert log.splitlines()[-1].endswith("ended with 75")
    (command,) = json.loads((workdir / "run.json").read_text())["commands"]
    assert len(command["devices"]) == 16
    trained = [json.loads(line) for line in metrics.read_text().splitlines()]
    (saved,) = (workdir / "experts" / "checkpoints").glob("[0-9]*")
    assert int(saved.name) == max(row["step"] for row in trained) > 0
    assert not (pod.repo / "runs" / "launch" / "tiny" / "workers").exists()


def test_the_check_counts_the_devices_that_answer(capsys):
    main = runpy.run_path(str(ROOT / "launch" / "check_devices.py"))["main"]
    there = jax.device_count()
    assert (main(there), main(there + 1)) == (0, 1)
    assert f"together {there}, expected {there + 1}" in capsys.readouterr().out
