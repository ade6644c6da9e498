"""One experiment at many points, and which of them validates best.

A sweep file has `get_config()`, as an experiment has, and `get_points()`: what each point changes
of it. Experts do not depend on the router, so points that differ only there share them:

    ROOT/experts-HASH/   a work directory where stage one alone is run, for all such points
    ROOT/point-HASH/     a work directory that begins as a copy of it and ends with the bundle

What is compared is the router's loss on the validation split. No point sees a test prompt: the one
that is chosen is evaluated afterwards, in its own directory.
"""

import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import plotly.graph_objects as go
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from rich.box import SIMPLE_HEAD
from rich.table import Table

from safemoe_jax import stages
from safemoe_jax.config import Config, freeze, to_dict
from safemoe_jax.errors import UserError
from safemoe_jax.evaluation.figures import PALETTE
from safemoe_jax.experiment import Experiment
from safemoe_jax.private_files import read_json_lines
from safemoe_jax.progress import console
from safemoe_jax.queues import Unfinished
from safemoe_jax.training.observer import Diverged
from safemoe_jax.workdir import Workdir, write_json

RESULT = "validation.json"  # is there once a directory's stage is trained
# Points are compared by their loss on one validation text of one base, before any evaluation.
_FIXED = ("data.", "model.source", "evaluation.")

Failures = dict[str, str]
Backend = Callable[[Sequence[str]], Failures]


@dataclasses.dataclass(frozen=True)
class Point:
    """One point.

    Attributes:
      changes: dotted keys of the config and the values that they have here.
      config: the experiment with them.
      experts_config: the same with the sweep's own router, which the experts do not depend on.
    """

    changes: Mapping[str, Any]
    config: Config
    experts_config: Config

    @functools.cached_property
    def name(self) -> str:
        return f"point-{_digest(self.config)}"

    @functools.cached_property
    def experts(self) -> str:
        return f"experts-{_digest(self.experts_config)}"

    def label(self, *, seed: bool = True) -> str:
        shown = {key: value for key, value in self.changes.items() if seed or key != "seed"}
        return ", ".join(f"{key}={value}" for key, value in shown.items()) or "as it is"


def grid(axes: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """Every combination of the axes' values, as points; lists of points may be added up.

    >>> grid({"router.scope": ["layer"], "seed": [0, 1]})
    [{'router.scope': 'layer', 'seed': 0}, {'router.scope': 'layer', 'seed': 1}]
    """
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def read_points(base: ConfigDict, changes: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Checks all points before any is run; points that come to the same config are one.

    Raises:
      UserError: where there is none, or one changes what is unknown, wrong or has to stay the same.
    """
    if not changes or not all(
        isinstance(change, Mapping) and all(isinstance(key, str) for key in change)
        for change in changes
    ):
        raise UserError(
            f"get_points() returns {changes!r}; it must be a list of points, each a dict of dotted "
            'config keys, like {"router.top_k": 1}'
        )
    whole = freeze(base)
    values = flatten_dict(to_dict(whole), sep=".")
    points: dict[str, Point] = {}
    for change in changes:
        for key in change:
            if key.startswith(_FIXED):
                raise UserError(
                    f"a point changes config.{key}; points are compared by their loss on one "
                    "validation text of one base, so make it an experiment of its own"
                )
            if key not in values:
                raise UserError(
                    f"a point changes config.{key}, which is no value of the config; there are "
                    f"{', '.join(values)}"
                )
        config = freeze(unflatten_dict({**values, **change}, sep="."))
        experts_config = dataclasses.replace(
            config,
            router=whole.router,
            optimizer=dataclasses.replace(config.optimizer, router=whole.optimizer.router),
            train=dataclasses.replace(config.train, router=whole.train.router),
        )
        point = Point(dict(change), config, experts_config)
        points.setdefault(point.name, point)
    return list(points.values())


def sweep(
    points: Sequence[Point], root: Path, backend: Backend, *, keep_experts: bool, source: list[str]
) -> None:
    """Runs what is not finished, then prints the table and writes sweep.csv and sweep.html.

    Args:
      points: as `read_points` gives them.
      root: the sweep's directory.
      backend: runs the directories that it is given by name (`run_one`) and waits for them;
        returns why some failed.
      keep_experts: leaves the experts' checkpoints in their directories.
      source: the arguments that name the experiment, for the command that evaluates the best.

    Raises:
      Unfinished: where points failed; the others are in the table.
    """
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    waiting = [point for point in points if not _is_done(root / point.name)]
    experts = {
        point.experts
        for point in waiting
        if not (root / point.name).exists() and not point.config.experts.source
    }
    missing = sorted(name for name in experts if not _is_done(root / name))
    console.print(
        f"{len(points)} points, {len(points) - len(waiting)} of them done; experts to train first: "
        f"{len(missing)}"
    )
    failed = backend(missing) if missing else {}
    ready = [point.name for point in waiting if point.experts not in failed]
    failed |= backend(ready) if ready else {}
    _drop_experts(points, root, keep_experts)

    done = [point for point in points if _is_done(root / point.name)]
    if done:
        done.sort(key=lambda point: _result(root, point)["loss"])
        console.print(_table(done, root))
        _write_csv(done, root)
        _figure(done, root).write_html(root / "sweep.html")
        console.print(f"table and plot: {root / 'sweep.csv'}, {root / 'sweep.html'}")
        console.print(f"the best, evaluated: {_command(done[0], root, source)}", soft_wrap=True)
    if len(done) < len(points):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise Unfinished(
            f"{len(points) - len(done)} of {len(points)} points have no result ({reasons}); the "
            "same command tries them again"
        )


def run_one(points: Sequence[Point], root: Path, name: str, *, keep_experts: bool) -> None:
    """Trains what belongs into ROOT/NAME, from where it was left, and writes its result there.

    Raises:
      UserError: where no point has that name, or several hosts run it.
    """
    if (hosts := jax.process_count()) > 1:
        raise UserError(
            f"{hosts} processes run {name} together; a sweep's points are for one host each, so "
            "run larger ones by `safemoe train-gate`"
        )
    by_name = {point.name: point for point in points}
    by_experts = {point.experts: point for point in points}
    if name in by_experts:
        _train(by_experts[name].experts_config, root / name, "experts", stages.train_experts)
    elif name in by_name:
        point = by_name[name]
        if _is_done(root / point.experts) and not (root / name).exists():
            _fork(root / point.experts, root / name, point.config)
        _train(point.config, root / name, "router", stages.train_gate)
        _drop_experts(points, root, keep_experts)
    else:
        raise UserError(f"the sweep has no {name!r}; it has {', '.join([*by_experts, *by_name])}")


def one_after_another(run_one: Callable[[str], None], names: Sequence[str]) -> Failures:
    """The backend that runs in this process."""
    failed = {}
    for number, name in enumerate(names, start=1):
        console.print(f"{number} of {len(names)}: {name}")
        try:
            run_one(name)
        except (Diverged, UserError, jax.errors.JaxRuntimeError) as error:
            failed[name] = str(error).partition("\n")[0]  # the other points may do better
    return failed


def _train(config: Config, root: Path, stage: str, verb: Callable[[Experiment], Any]) -> None:
    with Workdir(root, config) as workdir:
        verb(Experiment(config, workdir))
        rows = read_json_lines(workdir.metrics)
    mine = [row for row in rows if (row["stage"], row["split"]) == (stage, "validation")]
    validated = [row for row in mine if "loss" in row]  # a loss that is no number is not written
    if not validated:
        raise Diverged(f"no validation of {stage} in {root} gave a finite loss")
    best = min(validated, key=lambda row: row["loss"])
    result = {key: best[key] for key in ("stage", "step", "loss")}
    write_json(root / RESULT, result)
    # `take_result` reads it where the one who asks shares no files with the one who trains.
    print(f"{RESULT} {root.name} {json.dumps(result)}", flush=True)


def _fork(experts: Path, point: Path, config: Config) -> None:
    """Begins a point's directory as a copy of its experts', whole or not at all.

    Data and checkpoints are replaced and never changed in place: they may be hard links.
    """
    scratch = point.with_name(f".{point.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(mode=0o700)
    for part in ("data", "experts"):
        shutil.copytree(experts / part, scratch / part, copy_function=_link)
    shutil.copy(experts / "metrics.jsonl", scratch)
    write_json(scratch / "config.json", to_dict(config))
    os.replace(scratch, point)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _drop_experts(points: Sequence[Point], root: Path, keep_experts: bool) -> None:
    """Experts are hazardous: they go once all points that begin with them have their bundles."""
    needed = {point.experts for point in points if not _is_done(root / point.name)}
    for name in {point.experts for point in points} - needed if not keep_experts else ():
        shutil.rmtree(root / name, ignore_errors=True)


def take_result(root: Path, name: str, log: str) -> bool:
    """Writes NAME's result as its log has it; whether there was one."""
    found = re.findall(rf"{RESULT} {name} (\{{.*?\}})", log)
    if found:
        (root / name).mkdir(exist_ok=True, mode=0o700)
        write_json(root / name / RESULT, json.loads(found[-1]))
    return bool(found)


def _is_done(directory: Path) -> bool:
    return (directory / RESULT).exists()


def _result(root: Path, point: Point) -> dict[str, Any]:
    return json.loads((root / point.name / RESULT).read_text())


def _digest(config: Config) -> str:
    values = to_dict(config)
    del values["evaluation"]  # decides nothing that is trained
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


def _table(points: Sequence[Point], root: Path) -> Table:
    table = Table(
        title="Points by validation loss, nats per token",
        caption="Lower is better. The validation split selects; the test split is not touched.",
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("loss", justify="right")
    table.add_column("step", justify="right")
    table.add_column("point", overflow="fold")
    table.add_column("directory", no_wrap=True)
    for point in points:
        result = _result(root, point)
        table.add_row(f"{result['loss']:.4f}", str(result["step"]), point.label(), point.name)
    return table


def _write_csv(points: Sequence[Point], root: Path) -> None:
    keys = list(dict.fromkeys(key for point in points for key in point.changes))
    with (root / "sweep.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["directory", "validation_loss", "step", *keys])
        for point in points:
            result, values = _result(root, point), flatten_dict(to_dict(point.config), sep=".")
            row = [point.name, result["loss"], result["step"], *(values[key] for key in keys)]
            writer.writerow(row)


def _figure(points: Sequence[Point], root: Path) -> go.Figure:
    """Validation losses, one line for points that differ only in their seed."""
    figure = go.Figure()
    figure.add_scatter(
        x=[_result(root, point)["loss"] for point in points],
        y=[point.label(seed=False) for point in points],
        text=[point.name for point in points],
        mode="markers",
        marker={"size": 10, "color": PALETTE[0]},
        hovertemplate="%{y}<br>%{x:.4f} nats per token<br>%{text}<extra></extra>",
    )
    figure.update_layout(
        template="plotly_white",
        xaxis_title="router's validation loss, nats per token",
        yaxis={"type": "category", "autorange": "reversed", "automargin": True},
    )
    return figure


def _command(point: Point, root: Path, source: list[str]) -> str:
    changes = [f"--config.{key}={value}" for key, value in point.changes.items()]
    return shlex.join(["safemoe", "run", *source, *changes, "--workdir", str(root / point.name)])
