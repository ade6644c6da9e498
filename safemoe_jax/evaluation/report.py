"""The report: report.html, one file that opens offline; its tables as report.md and report.tex.

Both are drawn from report.json (`summary.summarize`) and from nothing else.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from safemoe_jax.errors import UserError
from safemoe_jax.evaluation import figures, views
from safemoe_jax.evaluation.comparisons import ALL, METRICS, signed, verdict
from safemoe_jax.evaluation.prompt_sets import (
    AFTER_PREFIX,
    AFTER_TWO_SHOT,
    ATTACKS,
    HARMLESS,
    HELD_OUT,
    LEFT_OUT,
)
from safemoe_jax.evaluation.summary import (
    ANSWER_CHARACTERS,
    PROMPT_CHARACTERS,
    Texts,
    read_summary,
    summarize,
)
from safemoe_jax.evaluation.validity import side
from safemoe_jax.private_files import replacing

Row = Mapping[str, Any]

SHORT = {
    HELD_OUT: "held out",
    LEFT_OUT: "left out",
    AFTER_PREFIX: "after a prefix",
    AFTER_TWO_SHOT: "after examples",
}
STAGES = {
    "experts": "Stage one: the experts, on harmful text of their own domain",
    "router": "Stage two: the router, on safe and informative answers",
    "safe_lora": "Control: one LoRA on the same safe set",
}
# Of a judge's reliability what the table of agreement, or a plot, has.
_AGREEMENT = ("n", "kappa", "table", "missing", "Brier", "calibration")


def write_report(
    workdirs: Sequence[Path], out: Path | None = None, *, texts: Texts = "cut", place: str = ""
) -> Path:
    """Writes the report of evaluated runs of one experiment, a seed each.

    Args:
      workdirs: of the runs; what a work directory holds is in `summary.summarize`.
      out: the directory to write to; default: the first work directory.
      texts: "whole" shows every text whole, those judged unsafe included, in report_full.html
        alone; "none" shows no prompt and no answer.
      place: the URL that the one work directory is a copy of.

    Returns:
      the page; beside it are report.json, report.md and report.tex. Only their owner can read them.

    Raises:
      UserError: where a file that the report is made of is not there, or the runs do not belong
        together.
    """
    out = out or workdirs[0]
    summary = summarize(workdirs, texts=texts, place=place)
    _make(out)
    if texts == "whole":
        return _write(out / "report_full.html", html(summary))
    _write(out / "report.json", json.dumps(summary))
    return draw(out / "report.json", out)


def draw(path: Path, out: Path) -> Path:
    """Draws report.html, report.md and report.tex again from a report.json -> the page.

    Raises:
      UserError: where `path` is no report.json.
    """
    summary = read_summary(path)
    _make(out)
    _write(out / "report.tex", latex(summary))
    _write(out / "report.md", markdown(summary))
    return _write(out / "report.html", html(summary))


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--out {out} is a file, or lies in one; give a directory") from error


def html(summary: Row) -> str:
    """The page of a summary."""
    blocks = views.blocks(summary)
    drawn = figures.all_figures(summary)
    return (
        _environment(autoescape=True)
        .get_template("report.html")
        .render(
            summary=summary,
            pages=views.pages(summary),
            systems=summary["systems"],
            metric_names={name: metric.title for name, metric in METRICS.items()},
            benchmark_name=views.benchmark_name,
            blocks=blocks,
            headline=views.headline(summary),
            failed=[row for row in summary["judges"]["validity"] if not row["passed"]],
            domains=views.by_domain(summary),
            attacks=[block for block in blocks if block.name in ATTACKS],
            likelihoods=views.likelihoods(summary),
            named=[name for name in views.NAMED if name in summary["systems"]],
            routers=views.routers(summary),
            router_benchmarks=views.router_benchmarks(summary),
            stages=[
                (stage, STAGES.get(stage, stage.replace("_", " ")), stage in STAGES)
                for stage in figures.stages(summary)
            ],
            figures=drawn.keys(),
            data={
                "figures": {name: json.loads(figure.to_json()) for name, figure in drawn.items()},
                "answers": summary["answers"],
                "systems": {name: about["title"] for name, about in summary["systems"].items()},
                "benchmarks": SHORT,
                "gates": {"limit": _limit(summary), "domains": summary["domains"]},
            },
            limit=_limit(summary),
            counts=views.test_counts(summary),
            readable=readable,
            side=side,
            signed=signed,
            flat=lambda values: list(_flatten(values)),
            reliability=[
                (key, text)
                for key, text in readable(summary["judges"]["reliability"], digits=3)
                if key.rsplit(", ", 1)[-1] not in _AGREEMENT
            ],
            answer_characters=ANSWER_CHARACTERS,
            prompt_characters=PROMPT_CHARACTERS,
            # Plotly's own script holds no closing script tag; it is written as it is.
            plotly=Markup(get_plotlyjs()),
        )
    )


def latex(summary: Row) -> str:
    """The main table of a summary, for the package booktabs."""
    benchmark = summary["primary"]["benchmark"]
    places = [("isr", benchmark), ("srr", benchmark), ("over_refusal_rate", HARMLESS)]
    if summary["primary"]["metric"] != "isr":
        places.remove(("isr", benchmark))
    shares, differences = (
        {
            (row["metric"], row["benchmark"], row[whose]): row
            for row in summary[rows]
            if row["split"] == ALL
        }
        for rows, whose in (("shares", "system"), ("differences", "second"))
    )
    places = [place for place in places if any(key[:2] == place for key in shares)]
    rows = [
        (
            about["title"],
            [
                (shares.get((*place, name)), differences.get((*place, name)), verdict)
                for place in places
            ],
        )
        for name, about in summary["systems"].items()
    ]
    return (
        _environment(autoescape=False)
        .get_template("report.tex")
        .render(
            summary=summary,
            headings=[(METRICS[name].title, views.benchmark_name(where)) for name, where in places],
            rows=rows,
            tex=_tex,
        )
    )


def markdown(summary: Row) -> str:
    """Every table of a summary, for a README or an issue."""
    blocks = views.blocks(summary)
    return (
        _environment(autoescape=False)
        .get_template("report.md")
        .render(
            summary=summary,
            systems=summary["systems"],
            blocks=blocks,
            likelihoods=views.likelihoods(summary),
            failed=[row for row in summary["judges"]["validity"] if not row["passed"]],
            heading=lambda name: METRICS[name].title if name in METRICS else "harmful - safe",
            share=lambda cell: cell.text + (f" ({cell.interval})" if cell.interval else ""),
            difference=lambda cell: f"{cell.text} ({cell.interval}) {cell.verdict}",
            cell=lambda text: text.replace("|", "\\|"),
        )
    )


def _environment(*, autoescape: bool) -> Environment:
    return Environment(
        loader=PackageLoader("safemoe_jax.evaluation", "templates"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _write(path: Path, text: str) -> Path:
    with replacing(path) as file:
        file.write(text)
    return path


def _flatten(values: Any, path: str = "", digits: int = 6) -> Iterable[tuple[str, str]]:
    """Yields the leaves of nested JSON as (dotted key, text)."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flatten(value, f"{path}.{key}" if path else str(key), digits)
    elif isinstance(values, float):
        yield path, f"{values:.{digits}g}"
    elif isinstance(values, list):
        yield path, ", ".join(text for value in values for _, text in _flatten(value, "", digits))
    else:
        yield path, str(values)


def readable(values: Row, digits: int = 6) -> list[tuple[str, str]]:
    """`_flatten` for those who did not write the keys: spaces, and digits in groups of three."""
    return [
        (key.replace("_", " ").replace(".", ", "), f"{int(text):,}" if text.isdigit() else text)
        for key, text in _flatten(values, digits=digits)
    ]


_TEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


def _tex(text: str) -> str:
    return text.translate(_TEX)


def _limit(summary: Row) -> float:
    """The gate at which a token's colour is full."""
    gates = [values for answer in summary["gated"] for values in answer["gates"]]
    # The last hundredth would wash out the colours of all others.
    return max(float(np.quantile(np.abs(gates), 0.99)), 1e-6) if gates else 1.0
