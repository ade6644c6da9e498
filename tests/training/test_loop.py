import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_run
from toys import leaves_equal

from safemoe_jax.parallel.mesh import make_mesh
from safemoe_jax.training import interruption as interruption_module
from safemoe_jax.training.checkpoints import Checkpoints
from safemoe_jax.training.interruption import SIGNALS, Interrupted, interruption_noted
from safemoe_jax.training.metrics import MetricsWriter
from safemoe_jax.training.observer import Diverged

MESH = make_mesh(toy_run.ONE)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    """{(stage, step, split): losses}; fails where one was written twice."""
    found = {}
    for row in rows(workdir):
        key = row["stage"], row["step"], row["split"]
        assert key not in found, f"{key} is there twice"
        found[key] = {name: value for name, value in row.items() if name.startswith("loss/")}
    return found


def saved_steps(workdir):
    """Steps of the checkpoints that are whole."""
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed, and its workdir."""
    workdir = tmp_path_factory.mktemp("whole")
    return toy_run.run(workdir), workdir


def same_run(state, workdir, whole):
    whole_state, whole_workdir = whole
    assert leaves_equal(state, whole_state)
    assert losses(workdir) == losses(whole_workdir)


def test_what_a_run_leaves_behind(whole):
    state, workdir = whole
    assert int(state.step) == 12
    assert saved_steps(workdir) == [8, 12]
    keys = {("experts", step, "train") for step in range(1, 13)}
    keys |= {("experts", step, "validation") for step in (3, 6, 9, 12)}
    assert losses(workdir).keys() == keys
    for row in rows(workdir):
        by_domain = [row["loss/apples"], row["loss/pears"]]
        np.testing.assert_allclose(row["loss"], np.mean(by_domain), rtol=1e-6)
        assert (row["split"] == "train") == ("loss_tokens_per_second" in row)
    validated = np.array(
        [
            [row["loss/apples"], row["loss/pears"]]
            for row in rows(workdir)
            if "loss_tokens" not in row
        ]
    )
    np.testing.assert_allclose(state.best.loss, validated.min(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(state.best.step, 3 * (1 + validated.argmin(axis=0)))


def test_a_killed_run_ends_bit_identical_to_one_that_was_not(whole, tmp_path):
    script = [sys.executable, toy_run.__file__, str(tmp_path), "data=1", "KILL", "0", "11"]
    tests = str(Path(toy_run.__file__).parent)
    killed = subprocess.run(
        script,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([tests, str(Path(tests).parent)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # The last save may not be whole: that is what a kill does.
    assert saved_steps(tmp_path) in ([4], [4, 8])
    assert ("experts", 9, "train") in losses(tmp_path)
    first_steps = []
    state = toy_run.run(tmp_path, before=lambda step, state: first_steps.append(step) or state)
    assert first_steps[0] in (5, 9)
    same_run(state, tmp_path, whole)


def test_sigterm_saves_and_the_next_run_goes_on(whole, tmp_path):
    def terminate(step, state):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return state

    with pytest.raises(Interrupted, match="in experts after step 6 of 12; saved"):
        toy_run.run(tmp_path, before=terminate)
    assert saved_steps(tmp_path) == [4, 6]
    first_steps = []
    state = toy_run.run(tmp_path, before=lambda step, state: first_steps.append(step) or state)
    assert first_steps[0] == 7
    same_run(state, tmp_path, whole)


@pytest.mark.parametrize("moment", ["step", "save"])
def test_a_signal_in_the_last_step_is_not_lost(whole, tmp_path, monkeypatch, moment):
    """The next stage must not begin as if nothing had been."""

    def terminate(step, given=None):
        if step == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return given

    def save(self, step, *of_step):
        terminate(step)
        return saves(self, step, *of_step)

    saves, disturbed = Checkpoints.save, {"before": terminate}
    if moment == "save":
        monkeypatch.setattr(Checkpoints, "save", save)
        disturbed = {}
    with pytest.raises(Interrupted, match="in experts after step 12 of 12; saved"):
        toy_run.run(tmp_path, **disturbed)
    monkeypatch.undo()
    same_run(toy_run.run(tmp_path), tmp_path, whole)


def test_a_second_signal_acts_as_it_always_does():
    with pytest.raises(KeyboardInterrupt), interruption_noted(MESH) as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.agreed()
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 0.1)


def test_signals_are_as_before_once_training_is_over():
    before = [signal.getsignal(number) for number in SIGNALS]
    with interruption_noted(MESH) as interruption:
        assert not any(signal.getsignal(number) in before for number in SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert not interruption.agreed()


def test_a_finished_run_is_left_as_it_is(whole):
    def never(step, state):
        raise AssertionError("a step was made")

    state = toy_run.run(whole[1], before=never)
    same_run(state, whole[1], whole)


def ids_of_step(step):
    iterator = toy_run.batches()
    for _ in range(step):
        batch = next(iterator)
    return sorted({int(number) for number in batch["example_ids_BS"].ravel() if number >= 0})


@pytest.mark.parametrize(("spoiled", "good"), [(1, "none"), (7, "step 4"), (8, "step 4")])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, spoiled, good):
    def spoil(step, state):
        if step == spoiled:
            trainable = jax.tree.map(lambda leaf: leaf.at[:, 1].set(jnp.nan), state.trainable)
            return state.replace(trainable=trainable)
        return state

    with pytest.raises(Diverged) as raised:
        toy_run.run(tmp_path, before=spoil)
    message = str(raised.value)
    assert re.search(rf"loss of experts is \[\S+ +nan\] .* at step {spoiled};", message), message
    assert f"(example ids): {ids_of_step(spoiled)};" in message
    assert f"last good checkpoint: {good};" in message
    assert saved_steps(tmp_path) == ([] if good == "none" else [4])


def test_a_gradient_that_is_no_number_is_not_saved_though_the_loss_is_one(tmp_path):
    def overflow(step, metrics):
        spoiled = jnp.array([1.0, jnp.inf]) if step == 8 else metrics["gradient_norm"]
        return metrics | {"gradient_norm": spoiled}

    with pytest.raises(Diverged, match=r"gradient norm \[ *1\. +inf\] at step 8"):
        toy_run.run(tmp_path, after=overflow)
    assert saved_steps(tmp_path) == [4]


def test_a_notice_from_the_cloud_is_as_good_as_a_signal(monkeypatch):
    """Against a server that plays Google's: it says NONE once, then that the machine will go."""
    answers = iter(["NONE", "TERMINATE_ON_HOST_MAINTENANCE"])
    asked = []

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            body = next(answers) if self.path.endswith("maintenance-event") else "FALSE"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args):
            pass

    monkeypatch.setattr(interruption_module, "_SECONDS_BETWEEN_POLLS", 0.05)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
        with interruption_noted(MESH) as interruption:
            assert not interruption.agreed()
            deadline = time.monotonic() + 20
            while not interruption.agreed() and time.monotonic() < deadline:
                time.sleep(0.02)
            assert interruption.agreed()
        server.shutdown()
    path = "/computeMetadata/v1/instance"
    assert set(asked) == {(f"{path}/preempted", "Google"), (f"{path}/maintenance-event", "Google")}
    assert next(answers, None) is None


@pytest.mark.parametrize("torn", ["{", "\n\x00", "[1]\n"])
def test_torn_metrics_are_dropped_and_no_other_row(tmp_path, torn, capsys):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, "experts", 0)
    for step in (1, 2, 3):
        writer.write(step, "train", loss=1.0)
    path.write_text(path.read_text() + torn)
    MetricsWriter(path, "experts", 2).write(3, "train", loss=2.0)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert capsys.readouterr().out == ""
    lines = path.read_text().splitlines(keepends=True)
    MetricsWriter(path, "experts", 3).write(3, "validation", loss=1.0)
    path.write_text("".join(lines[1:]))
    MetricsWriter(path, "experts", 3)
    assert "metrics.jsonl has lost 1 of the 3 train steps of experts" in capsys.readouterr().out
    path.write_text("".join(lines))
    path.write_text(path.read_text().rstrip("\n"))  # a whole row, but for its end
    MetricsWriter(path, "router", 0).write(1, "train", loss=3.0)
    assert [row["loss"] for row in rows(tmp_path)] == [1.0, 1.0, 3.0]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
