"""report.html: what a run measured, in one file that opens offline.

No answer that was judged unsafe stands in it in full, and no long prompt does: such answers are cut
to 80 characters beside their sha256 and verdict, prompts to 160. Only `full=True` writes whole
texts, into a file of another name.

Shape letters: E experts, L layers.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from safemoe_jax.errors import UserError
from safemoe_jax.evaluation import figures
from safemoe_jax.evaluation.benchmarks import HELD_OUT

ANSWER_CHARACTERS = 80
PROMPT_CHARACTERS = 160

Row = Mapping[str, Any]

SYSTEMS = {
    "base": "base",
    "safemoe": "SafeMoE",
    "uniform": "uniform mixture (ungated)",
    "safe_lora": "one LoRA on the safe set",
}
STAGES = {
    "experts": "Stage one: the experts, on harmful text of their own domain",
    "router": "Stage two: the router, on safe and informative answers",
    "safe_lora": "Control: one LoRA on the same safe set",
}
METRICS = {
    "srr": "safe response rate",
    "isr": "informative safe rate",
    "refusal_rate": "refusals",
    "over_refusal_rate": "over-refusals",
    "on_topic_rate": "on topic",
    "degenerate_rate": "degenerate",
    "nll_safe": "safe answers",
    "nll_unsafe": "harmful answers",
    "nll_difference": "harmful − safe",  # noqa: RUF001
}


# Headings and labels are broken so that the table fits 80 columns.
_TERMINAL = {
    "srr": "safe\n%",
    "isr": "informative\n%",
    "refusal_rate": "refusals\n%",
    "nll_safe": "NLL\nsafe",
    "nll_unsafe": "NLL\nharmful",
    "nll_difference": "harmful\n- safe",
}


class Cell(NamedTuple):
    """A number of one system: `low` and `high` are None where no interval was computed."""

    text: str
    interval: str
    value: float
    low: float | None
    high: float | None


class Group(NamedTuple):
    """One benchmark of one split, which is "all" answers or a domain's: systems by metrics."""

    split: str
    benchmark: str
    metrics: tuple[str, ...]
    systems: tuple[tuple[str, str, int, Mapping[str, Cell]], ...]  # system, label, n, cells


def write_report(workdir: Path, *, full: bool = False) -> Path:
    """Writes the report of a run that has been evaluated.

    Args:
      workdir: holds metrics.jsonl, run.json, config.json, evaluation/answers.jsonl and
        evaluation/results.json.
      full: shows every text whole, those judged unsafe included.

    Returns:
      workdir/report.html, or workdir/report_full.html when `full`; only its owner can read either.

    Raises:
      UserError: when a file that the report is made of is not there.
    """
    results = _json(workdir / "evaluation" / "results.json")
    answers = _json_lines(workdir / "evaluation" / "answers.jsonl")
    metrics = _json_lines(workdir / "metrics.jsonl")
    config, run = _json(workdir / "config.json"), _json(workdir / "run.json")

    groups, by_domain = _split(_groups(results["rows"]))
    likelihoods, likelihoods_by_domain = _split(_groups(results["nll"]))

    environment = Environment(
        loader=PackageLoader("safemoe_jax.evaluation", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html").render(
        name=workdir.name,
        color=figures.color,
        full=full,
        results=results,
        system_names=SYSTEMS,
        metric_names=METRICS,
        failed=[row for row in results["validity"] if not row["passed"]],
        groups=groups,
        by_domain=[group for group in by_domain if group.benchmark == HELD_OUT],
        held_out=HELD_OUT,
        likelihoods=likelihoods,
        likelihoods_by_domain=likelihoods_by_domain,
        stages=_stages(metrics, results["domains"]),
        tradeoffs={group.benchmark: _tradeoff(group) for group in groups},
        benchmarks={name: _readable(facts) for name, facts in results["benchmarks"].items()},
        prompts=_prompts(answers, full),
        gates=_gates(
            [answer for answer in answers if answer["benchmark"] == HELD_OUT],
            results["domains"],
            config["router"]["activation"],
            full,
        ),
        provenance={
            "results": list(_flatten(results["provenance"])),
            "run": list(_flatten(run)),
            "config": list(_flatten(config)),
        },
        budget=_readable(results["budget"]),
        judge=_readable(results["judge"]),
        answer_characters=ANSWER_CHARACTERS,
        prompt_characters=PROMPT_CHARACTERS,
        # Plotly's own script holds no closing script tag; it is written as it is.
        plotly=Markup(get_plotlyjs()),
    )
    return _write(workdir / ("report_full.html" if full else "report.html"), html)


def terminal_table(results: Mapping[str, Any]) -> Table:
    """The headline for a terminal: systems by rates, with held-out NLL in nats per token.

    Args:
      results: the contents of results.json.
    """
    groups, _ = _split(_groups(results["rows"]))
    table = Table(
        title="Held-out prompts" if len(groups) == 1 else "Held-out prompts and benchmarks",
        caption="\n" + _caption(results),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    valid = all(row["passed"] for row in results["validity"])
    whole, _ = _split(_groups(results["nll"]))
    likelihoods = {
        (group.benchmark, label): cells for group in whole for _, label, _, cells in group.systems
    }
    table.add_column("system", overflow="fold")
    for heading in ("n", *_TERMINAL.values()):
        table.add_column(heading, justify="right", overflow="fold")
    for group in groups:
        if len(groups) > 1:
            table.add_row(Text(group.benchmark.replace("_", " "), style="bold"))
        for _, label, n, cells in group.systems:
            known = {**likelihoods.get((group.benchmark, label), {}), **cells}
            if over := known.get("over_refusal_rate"):
                known["refusal_rate"] = over  # in one column: a benchmark has one or the other
            texts = [_terminal_text(known.get(metric), metric, valid) for metric in _TERMINAL]
            table.add_row(label, str(n), *texts)
        table.add_section()
    return table


def _terminal_text(cell: Cell | None, metric: str, valid: bool) -> str:
    if cell is None:
        return ""
    if metric == "isr" and not valid:
        return "not valid"
    if cell.low is None or metric.startswith("nll"):
        return cell.text
    return f"{cell.text}\n{100 * cell.low:.0f} to {100 * cell.high:.0f}"


def _caption(results: Mapping[str, Any]) -> str:
    lines = ["95 % intervals; NLL in nats per token. Embedded judge only."]
    if results["demonstration"]:
        lines.insert(0, "A demonstration: too short a run to judge the claim.")
    for row in results["validity"]:
        if not row["passed"]:
            lines.append(f"{METRICS['isr']} is not valid: {row['name']} scores {_percent(row)}.")
    return "\n".join(lines)


def _percent(row: Row) -> str:
    return f"{100 * row['value']:.1f} %"


def _json(path: Path) -> Any:
    return json.loads(_text(path))


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _text(path).splitlines() if line]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path} is not there; the report is made of an evaluated run: "
            "`safemoe run` makes all of it in this workdir"
        ) from None


def _write(path: Path, html: str) -> Path:
    """Replaces `path` in one step; a temporary file is its owner's alone from the start."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(html)
    os.replace(temporary, path)
    return path


def _groups(rows: Sequence[Row]) -> list[Group]:
    """Pivots rows of results.json, in order of appearance."""
    several_seeds = len({row["seed"] for row in rows}) > 1
    pivot: dict[tuple[str, str], dict[tuple[str, int], dict[str, Row]]] = {}
    for row in rows:
        systems = pivot.setdefault((row["split"], row["benchmark"]), {})
        systems.setdefault((row["system"], row["seed"]), {})[row["metric"]] = row
    groups = []
    for (split, benchmark), systems in pivot.items():
        groups.append(
            Group(
                split,
                benchmark,
                tuple(dict.fromkeys(metric for cells in systems.values() for metric in cells)),
                tuple(
                    (
                        system,
                        _label(system, seed, several_seeds),
                        max(row["n"] for row in cells.values()),
                        {metric: _cell(row) for metric, row in cells.items()},
                    )
                    for (system, seed), cells in systems.items()
                ),
            )
        )
    return groups


def _split(groups: list[Group]) -> tuple[list[Group], list[Group]]:
    """Parts groups over all answers from those of one domain."""
    whole = [group for group in groups if group.split == "all"]
    return whole, [group for group in groups if group.split != "all"]


def _label(system: str, seed: int, several_seeds: bool) -> str:
    name = SYSTEMS.get(system, system)
    return f"{name}, seed {seed}" if several_seeds else name


def _cell(row: Row) -> Cell:
    value, low, high = row["value"], row["low"], row["high"]
    if row["metric"].startswith("nll"):
        form, scale = "{:.3f}", 1.0
    else:
        form, scale = "{:.1f}", 100.0
    interval = ""
    if low is not None:
        interval = f"{form.format(scale * low)} to {form.format(scale * high)}"
    return Cell(form.format(scale * value), interval, value, low, high)


def _tradeoff(group: Group) -> str | None:
    """The figure of informative against safe rates, None where a group has only one of them."""
    points = [
        {
            "label": label,
            "color": figures.color(i),
            "srr": cells["srr"]._asdict(),
            "isr": cells["isr"]._asdict(),
        }
        for i, (_, label, _, cells) in enumerate(group.systems)
        if {"srr", "isr"} <= cells.keys()
    ]
    return figures.scatter(points).to_json() if points else None


def _stages(metrics: Sequence[Row], domains: Sequence[str]) -> list[dict[str, Any]]:
    stages = []
    for stage in dict.fromkeys(row["stage"] for row in metrics):
        rows = [row for row in metrics if row["stage"] == stage]
        plots = [figures.curves(rows, quantity, domains) for quantity in ("loss", "gates")]
        stages.append(
            {
                "title": STAGES.get(stage, stage),
                "plots": [plot.to_json() for plot in plots if plot.data],
            }
        )
    return stages


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[:characters].rstrip() + "…"


def _prompt_text(answer: Row, full: bool) -> str:
    prompt = answer["messages"][-1]["content"]
    return prompt if full else _cut(prompt, PROMPT_CHARACTERS)


def _prompts(answers: Sequence[Row], full: bool) -> list[dict[str, Any]]:
    """The answers side by side: one entry per prompt, each system's answer in it."""
    several_seeds = len({answer["seed"] for answer in answers}) > 1
    prompts: dict[tuple[str, str], dict[str, Any]] = {}
    for answer in answers:
        prompt = prompts.setdefault(
            (answer["benchmark"], answer["prompt_id"]),
            {"domain": _place(answer), "text": _prompt_text(answer, full), "answers": []},
        )
        hidden = not (full or answer["verdict"]["safe"])
        response = answer["response"]
        prompt["answers"].append(
            {
                "system": answer["system"],
                "label": _label(answer["system"], answer["seed"], several_seeds),
                "text": _cut(response, ANSWER_CHARACTERS) if hidden else response,
                "hidden": hidden,
                "sha256": answer["sha256"],
                "verdict": answer["verdict"],
                "tags": _tags(answer),
            }
        )
    return list(prompts.values())


def _place(answer: Row) -> str:
    """Where a prompt is from: its domain, and its benchmark where that has another name."""
    benchmark, domain = answer["benchmark"], answer["domain"]
    if benchmark == HELD_OUT:
        return domain
    return benchmark if domain in benchmark else f"{benchmark}: {domain}"


def _tags(answer: Row) -> list[str]:
    verdict = answer["verdict"]
    tags = ["refusal"] if verdict["refusal"] else []
    tags += [] if answer["harmful"] else ["benign prompt"]
    tags += ["judged by refusal alone"] if answer["refusal_only"] else []
    tags += [] if verdict["on_topic"] else ["off topic"]
    tags += ["degenerate"] if verdict["degenerate"] else []
    return tags if answer["finished"] else [*tags, "cut by length"]


def _gates(
    answers: Sequence[Row], domains: Sequence[str], activation: str, full: bool
) -> dict[str, Any] | None:
    """What the router did while it answered, None when no system of the run has a router."""
    gated = [answer for answer in answers if answer.get("gates")]
    if not gated:
        return None
    signed = activation == "signed"
    tokens_NE = np.concatenate([np.asarray(answer["gates"], float) for answer in gated])
    weights = [len(answer["gates"]) for answer in gated]
    layers_LE = np.average([answer["gates_layers"] for answer in gated], axis=0, weights=weights)

    own = {domain: [a["gates"] for a in gated if a["domain"] == domain] for domain in domains}
    asked = [domain for domain in domains if own[domain]]
    by_domain = np.array([np.concatenate(own[domain]).mean(axis=0) for domain in asked])

    layer_names = [str(layer) for layer in range(len(layers_LE))]
    plots = {
        "layers": figures.heatmap(
            layers_LE, layer_names, domains, row_title="layer", signed=signed
        ).to_json()
    }
    if asked:
        plots["domains"] = figures.heatmap(
            by_domain, asked, domains, row_title="prompt's domain", signed=signed
        ).to_json()
    return {
        "signed": signed,
        # The last hundredth would wash out the colours of all others.
        "limit": max(float(np.quantile(np.abs(tokens_NE), 0.99)), 1e-6),
        "domains": list(domains),
        "plots": plots,
        "answers": [
            {
                "domain": answer["domain"],
                "prompt": _prompt_text(answer, full),
                "safe": answer["verdict"]["safe"],
                "tokens": list(_token_spans(answer, full)),
            }
            for answer in gated
        ],
    }


def _token_spans(answer: Row, full: bool) -> Iterable[tuple[str, str]]:
    """Yields each token's text with its gates; an answer judged unsafe stops where it is cut."""
    left = len(answer["response"]) if full or answer["verdict"]["safe"] else ANSWER_CHARACTERS
    hidden = left < len(answer["response"])
    for token, gates in zip(answer["tokens"], answer["gates"], strict=True):
        if hidden and left <= 0:
            return
        yield token[:left] if hidden else token, " ".join(f"{gate:.3g}" for gate in gates)
        left -= len(token)


def _flatten(values: Any, path: str = "") -> Iterable[tuple[str, str]]:
    """Yields the leaves of nested JSON as (dotted key, text)."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flatten(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, float):
        yield path, f"{values:.6g}"
    elif isinstance(values, list):
        yield path, ", ".join(map(str, values))
    else:
        yield path, str(values)


def _readable(values: Row) -> list[tuple[str, str]]:
    """`_flatten` for those who did not write the keys: spaces, and digits in groups of three."""
    return [
        (key.replace("_", " ").replace(".", ", "), f"{int(text):,}" if text.isdigit() else text)
        for key, text in _flatten(values)
    ]
