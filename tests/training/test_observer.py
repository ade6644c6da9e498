"""What a stage tells while it trains, on the toy run: files read back by those that show them."""

import json
import sys

import jax
import numpy as np
import pytest
import toy_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from safemoe_jax.errors import UserError
from safemoe_jax.training import metrics
from safemoe_jax.training.metrics import Recording, TensorBoardWriter, WandbWriter
from safemoe_jax.training.observer import PARTS, Work

WORK = Work(tokens=48, flops=3e6, peak=2e9)


def rows(workdir, split="train"):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The workdir of a run that tells all; steps 5 to 7 are traced."""
    workdir = tmp_path_factory.mktemp("told")

    def writers(first):
        config = {"experts": {"rank": 2}}
        return [
            TensorBoardWriter(workdir / "tensorboard", first),
            WandbWriter(workdir, "toy", "experts", "one of a kind", config),
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        toy_run.run(workdir, writers=writers, profile=range(5, 8), work=WORK)
    return workdir


def test_the_parts_of_a_steps_seconds_are_all_of_them(told):
    found = rows(told)
    assert [row["step"] for row in found] == list(range(1, 13))
    for row in found:
        assert row["seconds"] == pytest.approx(sum(row[f"seconds/{part}"] for part in PARTS))
        assert all(row[f"seconds/{part}"] >= 0 for part in PARTS)
    # What followed step 3 is of the row after it, and so on; saves are after 4, 8 and 12.
    validated = {row["step"] for row in found if row["seconds/validation"] > 0}
    saved = {row["step"] for row in found if row["seconds/checkpoint"] > 0}
    assert (validated, saved) == ({4, 7, 10}, {5, 9})


def test_speed_is_of_the_seconds_in_which_it_trained(told):
    for row in rows(told):
        training = row["seconds/data"] + row["seconds/compute"]
        assert row["tokens_per_second"] == pytest.approx(WORK.tokens / training)
        assert row["loss_tokens_per_second"] == pytest.approx(row["loss_tokens"] / training)
        assert row["mfu"] == pytest.approx(WORK.flops / training / WORK.peak)
        assert 2**26 < row["memory/host_peak"] < 2**40  # bytes
        assert "memory/device_peak" not in row  # CPUs do not tell


def test_without_a_known_peak_there_is_no_mfu(tmp_path):
    toy_run.run(tmp_path)
    assert not [row for row in rows(tmp_path) if "mfu" in row]


def test_a_steps_metrics_are_read_once_the_next_step_is_dispatched(tmp_path, monkeypatch):
    """Else the devices would wait for the host; where training stops anyway, all are read."""
    order = []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: order.append("read") or get(tree))
    toy_run.run(tmp_path, before=lambda step, state: order.append(step) or state)
    # Validation is after 3, 6, 9 and 12, saves are after 4, 8 and 12; a save reads the
    # state for its checksum.
    # fmt: off
    assert order == [
        1, 2, "read", 3, "read", "read", 4, "read", "read", 5, 6, "read", "read",
        7, 8, "read", "read", "read", 9, "read", 10, 11, "read", 12, "read", "read", "read",
    ]
    # fmt: on


def test_tensorboard_shows_what_metrics_jsonl_has(told):
    shown = EventAccumulator(str(told / "tensorboard"))
    shown.Reload()
    for split in ("train", "validation"):
        mine = rows(told, split)
        for name in ("loss", "loss/apples", "loss/pears"):
            events = shown.Scalars(f"{split}/{name}")
            assert [event.step for event in events] == [row["step"] for row in mine]
            values = [event.value for event in events]
            np.testing.assert_allclose(values, [row[name] for row in mine], rtol=1e-6)
    assert len(shown.Scalars("train/seconds/compute")) == 12


def test_of_a_run_that_goes_on_tensorboard_shows_each_step_once(tmp_path):
    for first, value in ((0, 1.0), (2, 2.0)):  # killed after step 4, its checkpoint is of step 2
        writer = TensorBoardWriter(tmp_path, first)
        for step in range(first + 1, 5):
            writer.write(step, "train", loss=value)
        writer.close()
    shown = EventAccumulator(str(tmp_path))
    shown.Reload()
    events = [(event.step, event.value) for event in shown.Scalars("train/loss")]
    assert events == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_wandb_offline_has_numbers_and_config_and_nothing_of_the_terminal(told):
    (run,) = (told / "wandb").glob("offline-run-*")
    (file,) = run.glob("*.wandb")
    data = file.read_bytes()
    for text in ("safemoe", "toy/experts", "validation/loss/pears", "train/mfu", '{"rank":2}'):
        assert text.encode() in data
    for row in rows(told) + rows(told, "validation"):
        assert json.dumps(row["loss/pears"]).encode() in data
    sent = {path.name for path in (run / "files").rglob("*")}
    assert sent == {"requirements.txt"}  # neither what the terminal showed nor code


# jaxlib makes a type as Python 3.12 deprecates it, and aborts where that warning is an error.
@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__:DeprecationWarning")
def test_the_chosen_steps_are_traced_and_no_others(told):
    (trace,) = (told / "trace").glob("plugins/profile/*/*.xplane.pb")
    steps = {
        value
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
        for name, value in event.stats
        if name == "step_num"
    }
    # Step 8 is under way before step 7 is known to be done.
    assert {5, 6, 7} <= steps <= {5, 6, 7, 8}


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_package_that_is_not_there_is_named(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda found: None)
    message = rf"--log {name} needs the package {package}; pip install -e '\.\[{name}\]'"
    with pytest.raises(UserError, match=message):
        Recording((name,), range(0))
