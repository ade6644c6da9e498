import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tiny

from experiments import pyrit
from safemoe_jax import cli, queues, sweep
from safemoe_jax.config import call_of, freeze, read_config
from safemoe_jax.errors import UserError
from safemoe_jax.queues import Unfinished
from safemoe_jax.sweep import RESULT, grid, read_points
from safemoe_jax.training.observer import Diverged

ROOT = Path(__file__).parent.parent
ROUTER = ROOT / "experiments" / "sweeps" / "router.py"


def points(*changes):
    return read_points(pyrit.get_config(), list(changes))


def test_a_grid_is_every_combination():
    assert grid({"router.top_k": (0, 1), "seed": (5,)}) == [
        {"router.top_k": 0, "seed": 5},
        {"router.top_k": 1, "seed": 5},
    ]
    assert grid({}) == [{}]


def test_points_share_experts_where_the_router_alone_differs():
    same = points(
        {},
        {"router.top_k": 1},
        {"optimizer.router.learning_rate": 0.5},
        {"train.router.steps": 70},
    )
    assert len({point.name for point in same}) == 4
    assert len({point.experts for point in same}) == 1
    others = points({"seed": 1}, {"experts.rank": 2}, {"train.experts.steps": 70})
    assert len({point.experts for point in [*same, *others]}) == 4
    assert others[1].experts_config == others[1].config
    assert same[1].experts_config == freeze(pyrit.get_config())


def test_the_same_point_twice_is_one():
    assert len(points({}, {"router.top_k": 0}, {"router.activation": "signed"})) == 1
    again = pyrit.get_config()
    again.evaluation.max_new_tokens = 5
    assert read_points(again, [{}])[0].name == points({})[0].name


@pytest.mark.parametrize(
    "changes, message",
    [
        ([], "get_points() returns []; it must be a list of points, each a dict of dotted config"),
        (["seed"], "get_points() returns ['seed']; it must be a list of points"),
        ([{"seed": 1}, {3: 1}], "get_points() returns [{'seed': 1}, {3: 1}]; it must be a list"),
        ([{"seed.x": 1}], "a point changes config.seed.x, which is no value of the config; there"),
        ([{"router": {}}], "a point changes config.router, which is no value of the config; there"),
        ([{"router.top_k": "1"}], "config.router.top_k is '1' (str); it must be a whole number"),
        ([{}, {"router.top_k": 9}], "config.router.top_k is 9; with 7 experts it must be"),
        ([{"data.sequence_length": 9}], "a point changes config.data.sequence_length; points are"),
        ([{"model.source": "x"}], "a point changes config.model.source; points are compared by"),
        ([{"evaluation.top_p": 0.5}], "a point changes config.evaluation.top_p; points are"),
    ],
)
def test_a_wrong_point_is_named_before_any_is_run(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        points(*changes)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--only", "point-x"], "the sweep has no 'point-x'; it has experts-"),
        (["--backend", "slurm", "--slurm", "time"], "--slurm time is no KEY=VALUE; give one, like"),
        (["--config.router.top_k=x"], "--config.router.top_k=x does not fit"),
        (["--workdir", "gs://bucket/x"], "--workdir gs://bucket/x is remote; a sweep needs a dir"),
    ],
)
def test_a_mistake_on_the_command_line(tmp_path, capsys, argv, message):
    assert cli.main(["sweep", str(ROUTER), "--workdir", str(tmp_path / "s"), *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"safemoe: {message}")
    assert err.count("\n") == 1


def test_a_file_where_a_directory_has_to_be_is_no_traceback(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    assert cli.main(["sweep", str(ROUTER), "--workdir", str(file)]) == 1
    line = f"safemoe: File exists ({file}); name another path, or move away what is there"
    assert capsys.readouterr().err.startswith(line)
    assert file.read_text() == "mine"


def test_the_queues_are_given_commands_that_run_one_directory(tmp_path, monkeypatch):
    asked = {}

    def slurm(names, arguments_of, root, settings):
        asked.update({name: arguments_of(name) for name in names}, settings=settings)
        return Queue(root, {})(names)

    monkeypatch.setattr(queues, "slurm", slurm)
    settings = ["--backend", "slurm", "--slurm", "time=240", "--slurm", "partition=long"]
    override = "--config.router.temperature=3"
    argv = ["sweep", str(ROUTER), "--workdir", str(tmp_path), *settings, override, "--keep-experts"]
    assert cli.main(argv) == 0
    assert asked.pop("settings") == {"time": 240, "partition": "long"}
    assert len(asked) == 8  # the experts and seven points
    monkeypatch.setattr(sweep, "run_one", lambda *args, **settings: ran.append((args, settings)))
    ran = []
    for name, arguments in asked.items():
        assert cli.main(arguments) == 0
        (points, root, only), settings = ran.pop()
        assert (root, only, settings) == (tmp_path, name, {"keep_experts": True})
        assert name in {points[0].experts, *(point.name for point in points)}


class Queue:
    """A backend that finishes what it is given, at losses that are told, and writes down what."""

    def __init__(self, root, losses, fails=()):
        self.root, self.losses, self.fails, self.asked = root, losses, fails, []

    def __call__(self, names):
        self.asked.append(list(names))
        for name in names:
            if name not in self.fails:
                (self.root / name).mkdir()
                result = {"stage": "router", "step": 4, "loss": self.losses.get(name, 1.0)}
                (self.root / name / RESULT).write_text(json.dumps(result))
        return {name: "it rained" for name in names if name in self.fails}


def run(points, root, backend, keep_experts=False):
    source = ["--config", "experiments/pyrit.py", "--config.seed=0"]
    sweep.sweep(points, root, backend, keep_experts=keep_experts, source=source)


def test_experts_first_then_points_then_table_and_plot(tmp_path, capsys):
    three = points({"router.scope": "layer"}, {"router.scope": "shared"}, {"seed": 1})
    losses = dict(zip([point.name for point in three], (2.5, 2.25, 3.0), strict=True))
    queue = Queue(tmp_path / "s", losses)
    run(three, tmp_path / "s", queue)
    assert queue.asked == [
        sorted({point.experts for point in three}),
        [point.name for point in three],
    ]
    with (tmp_path / "s" / "sweep.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["directory", "validation_loss", "step", "router.scope", "seed"],
        [three[1].name, "2.25", "4", "shared", "0"],
        [three[0].name, "2.5", "4", "layer", "0"],
        [three[2].name, "3.0", "4", "layer", "1"],
    ]
    html = (tmp_path / "s" / "sweep.html").read_text()
    assert "router.scope=shared" in html
    assert 'src="http' not in html
    out = capsys.readouterr().out
    assert re.search(r"2\.2500 +4 +router\.scope=shared +" + three[1].name, out)
    assert out.index("2.2500") < out.index("2.5000") < out.index("3.0000")
    (command,) = re.findall("the best, evaluated: safemoe (.+)", out)
    assert shlex.split(command) == [
        "run", "--config", "experiments/pyrit.py", "--config.seed=0",
        "--config.router.scope=shared", "--workdir", str(tmp_path / "s" / three[1].name),
    ]  # fmt: skip


def test_a_torn_line_of_metrics_costs_that_line_alone(tmp_path):
    (point,) = points({"seed": 1})

    def trains(experiment):
        row = {"stage": "router", "split": "validation", "step": 2, "loss": 1.5}
        experiment.workdir.metrics.write_text(json.dumps(row) + '\n{"stage": "rou')

    sweep._train(point.config, tmp_path / "run", "router", trains)
    assert json.loads((tmp_path / "run" / RESULT).read_text())["loss"] == 1.5


def test_what_is_finished_is_not_asked_for_again(tmp_path):
    two = points({"router.top_k": 1}, {"router.top_k": 2})
    queue = Queue(tmp_path, {})
    run(two[:1], tmp_path, queue, keep_experts=True)
    run(two, tmp_path, queue, keep_experts=True)
    run(two, tmp_path, queue, keep_experts=True)
    assert queue.asked == [[two[0].experts], [two[0].name], [two[1].name]]
    assert (tmp_path / two[0].experts).exists()
    run(two, tmp_path, queue)
    assert not (tmp_path / two[0].experts).exists()
    assert len(queue.asked) == 3


def test_imported_experts_are_not_trained_first(tmp_path):
    two = points({"experts.source": "/set"}, {"seed": 1})
    queue = Queue(tmp_path, {})
    run(two, tmp_path, queue)
    assert queue.asked == [[two[1].experts], [point.name for point in two]]


def test_what_failed_is_said_and_the_rest_is_shown(tmp_path, capsys):
    three = points({"router.top_k": 1}, {"router.top_k": 2}, {"seed": 1})
    queue = Queue(tmp_path, {}, fails=(three[1].name, three[2].experts))
    message = (
        rf"^2 of 3 points have no result \({three[2].experts}: it rained; {three[1].name}: it "
        r"rained\); the same command tries them again$"
    )
    with pytest.raises(Unfinished, match=message):
        run(three, tmp_path, queue)
    assert queue.asked[1] == [three[0].name, three[1].name]  # no point without its experts
    assert re.search(f"router.top_k=1 +{three[0].name}", capsys.readouterr().out)
    assert (tmp_path / three[0].experts).exists()  # still needed
    queue.fails = ()
    run(three, tmp_path, queue)
    assert queue.asked[2:] == [[three[2].experts], [three[1].name, three[2].name]]


def test_points_of_several_seeds_are_one_line_of_the_plot(tmp_path):
    four = points(*grid({"router.top_k": (1, 2), "seed": (0, 1)}))
    for number, point in enumerate(four):
        (tmp_path / point.name).mkdir()
        result = {"stage": "router", "step": 1, "loss": float(number)}
        (tmp_path / point.name / RESULT).write_text(json.dumps(result))
    (dots,) = sweep._figure(four, tmp_path).data
    assert dots.y == ("router.top_k=1",) * 2 + ("router.top_k=2",) * 2
    assert dots.x == (0.0, 1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    "error", [Diverged, UserError, lambda text: jax.errors.JaxRuntimeError(f"{text}\nat 0x1")]
)
def test_a_point_that_fails_does_not_stop_the_others(error):
    ran = []

    def run_one(name):
        ran.append(name)
        if name == "b":
            raise error("too much")

    assert sweep.one_after_another(run_one, ["a", "b", "c"]) == {"b": "too much"}
    assert ran == ["a", "b", "c"]


def test_several_hosts_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep.jax, "process_count", lambda: 4)
    (point,) = points({})
    with pytest.raises(UserError, match=f"4 processes run {point.name} together; a sweep's points"):
        sweep.run_one([point], tmp_path, point.name, keep_experts=False)
    assert not list(tmp_path.iterdir())


def test_a_result_is_read_from_a_log(tmp_path):
    result = {"stage": "router", "step": 4, "loss": 2.5}
    log = f"(x, pid=3) {RESULT} point-a {{}}\n(x, pid=3) {RESULT} point-a {json.dumps(result)}\n"
    assert not sweep.take_result(tmp_path, "point-b", log)
    assert not (tmp_path / "point-b").exists()
    assert sweep.take_result(tmp_path, "point-a", log)
    assert json.loads((tmp_path / "point-a" / RESULT).read_text()) == result


def test_the_shipped_sweep_moves_the_routers_axes():
    shipped = read_points(read_config(ROUTER, []), call_of(ROUTER, "get_points"))
    assert len({point.experts for point in shipped}) == 1
    axes = {key for point in shipped for key in point.changes}
    # A temperature is but another learning rate to a linear router that starts at zero.
    assert axes == {f"router.{key}" for key in pyrit.get_config().router} - {"router.temperature"}
    activations = {point.config.router.activation for point in shipped}
    assert activations == {"signed", "softmax", "softmax_null", "sigmoid"}


# The shipped sweep itself, on a tiny base: killed in the middle, and run again.

STEPS, KILLED_AT = 4, 3


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The finished sweep in home/sweep; home/killed is what the first, killed process left."""
    home = tmp_path_factory.mktemp("sweep")
    tiny.write_base(home / "base")
    tiny.write_corpus(home / "corpus.jsonl")
    tiny.write_experiment(home / "tiny.py", home / "base", home / "corpus.jsonl")
    killed = [str(ROOT / "tests" / "killed_run.py"), _points(home)[1].name, str(KILLED_AT)]
    first = _python(home / "compiled", *killed, *_argv(home))
    assert first.returncode == -signal.SIGKILL, first.stderr
    shutil.copytree(home / "sweep", home / "killed")
    second = _python(home / "compiled", "-m", "safemoe_jax.cli", *_argv(home))
    assert second.returncode == 0, second.stderr
    return home


def _python(cache, *argv):
    # To compile is nearly all that a tiny run costs: do it in a hurry, and nothing twice.
    faster = {
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, *argv]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | faster, capture_output=True, text=True
    )


def _overrides():
    loop = {"steps": STEPS, "save_every": 1, "validate_every": 2}
    changes = [f"--config.train.router.{key}={value}" for key, value in loop.items()]
    return [*changes, "--config.experts.targets=('q',)"]


def _argv(home):
    files = ["--config", str(home / "tiny.py"), "--workdir", str(home / "sweep")]
    return ["sweep", str(ROUTER), *files, *_overrides()]


def _points(home):
    changes = call_of(ROUTER, "get_points")
    return read_points(read_config(home / "tiny.py", _overrides()), changes)


def metrics(directory, stage):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == stage]


def test_a_killed_sweep_repeats_nothing_that_finished(home):
    first, second, third, *_ = (point.name for point in _points(home))
    for name in (RESULT, "metrics.jsonl", "run.json", "bundle/manifest.json"):
        old, new = (home / root / first / name for root in ("killed", "sweep"))
        assert old.read_bytes() == new.read_bytes()
    assert not (home / "killed" / second / RESULT).exists()
    assert not (home / "killed" / third).exists()


def test_an_unfinished_point_goes_on_from_its_checkpoint(home):
    second = _points(home)[1].name
    old, new = (metrics(home / root / second, "router") for root in ("killed", "sweep"))
    trained = [row["step"] for row in new if row["split"] == "train"]
    assert trained == list(range(1, STEPS + 1))
    kept = [row for row in new if row in old]
    # Step 3 was never written; 2 was perhaps not saved yet.
    assert {row["step"] for row in kept} in ({1}, {1, 2})


def test_all_points_stand_on_one_training_of_the_experts(home):
    names = [point.name for point in _points(home)]
    assert {path.name for path in (home / "sweep").iterdir()} == {
        *names, "sweep.csv", "sweep.html"
    }  # fmt: skip
    # The times are in the rows: stage one ran once.
    once = metrics(home / "killed" / _points(home)[0].experts, "experts")
    manifests = []
    for name in names:
        directory = home / "sweep" / name
        assert metrics(directory, "experts") == once
        assert not (directory / "experts").exists()
        assert not (directory / "router").exists()
        manifests.append(json.loads((directory / "bundle" / "manifest.json").read_text()))
    assert len({manifest["files"]["experts.safetensors"] for manifest in manifests}) == 1
    assert len({manifest["files"]["router.safetensors"] for manifest in manifests}) == len(names)


def test_points_are_ranked_by_their_best_validation(home):
    with (home / "sweep" / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(_points(home))
    losses = [float(row["validation_loss"]) for row in rows]
    assert losses == sorted(losses)
    for row in rows:
        directory = home / "sweep" / row["directory"]
        validated = [r for r in metrics(directory, "router") if r["split"] == "validation"]
        assert float(row["validation_loss"]) == min(r["loss"] for r in validated)
        manifest = json.loads((directory / "bundle" / "manifest.json").read_text())
        assert int(row["step"]) == manifest["provenance"]["router_step"]
        assert row["router.scope"] == manifest["config"]["router"]["scope"]


def test_once_more_shows_the_table_and_trains_nothing(home, monkeypatch, capsys):
    def never(*args, **kwargs):
        raise AssertionError("done once is enough")

    monkeypatch.setattr(sweep, "run_one", never)
    assert cli.main(_argv(home)) == 0
    out = capsys.readouterr().out
    assert "7 points, 7 of them done" in out
    assert all(point.name in out for point in _points(home))
