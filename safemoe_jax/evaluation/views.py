"""What the report's tables show, from report.json: rows of numbers as they are read.

A difference whose interval includes zero says so beside it; none of one domain is called a test.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from safemoe_jax.evaluation.comparisons import ALL, BASE, METRICS, OURS, signed, verdict
from safemoe_jax.evaluation.prompt_sets import (
    AFTER_PREFIX,
    AFTER_TWO_SHOT,
    ATTACKS,
    BENIGN,
    GSM8K,
    HARMLESS,
    HELD_OUT,
    LEFT_OUT,
    OTHER_ORIGIN,
)

Row = Mapping[str, Any]

BENCHMARKS = {
    OTHER_ORIGIN: "harmful prompts of other origin",
    HELD_OUT: "held-out prompts of the corpus",
    LEFT_OUT: "domains left out of training",
    HARMLESS: "harmless prompts",
    AFTER_PREFIX: "under attack: the answer begins with a compliant prefix",
    AFTER_TWO_SHOT: "under attack: two harmful examples come first",
    GSM8K: "GSM8K",
    BENIGN: "answers to harmless questions",
}
# The headline's three numbers, in order, and the systems that the domains' table shows.
_HEADLINE = ("isr", "srr", "over_refusal_rate")
NAMED = (BASE, OURS, "safe_lora")
_PAGES = {
    "headline": "Headline",
    "systems": "Systems",
    "domains": "Domains",
    "attacks": "Attacks",
    "routing": "Routing",
    "training": "Training",
    "answers": "Answers",
    "judges": "Judges",
    "provenance": "Provenance",
}


class Cell(NamedTuple):
    """A number as it is shown: shares in percent, differences in points, likelihoods in nats."""

    text: str
    interval: str
    value: float
    low: float | None
    high: float | None
    verdict: str
    tone: str


class Block(NamedTuple):
    """One benchmark's table: systems by metrics, with SafeMoE's differences from each."""

    name: str
    title: str
    n: int
    groups: int
    seeds: int
    metrics: tuple[str, ...]
    shares: Mapping[str, Mapping[str, Cell]]
    differences: Mapping[str, Mapping[str, Cell]]
    mcnemar: Sequence[tuple[str, Mapping[str, Row]]]


def pages(summary: Row) -> dict[str, str]:
    """The tabs: those of which there is something to show."""
    benchmarks = {row["benchmark"] for row in summary["shares"]}
    empty = {
        "routing": not summary["router"],
        "training": not summary["curves"],
        "answers": not summary["answers"],
        "attacks": not benchmarks & set(ATTACKS) and not summary["experts"],
    }
    return {name: title for name, title in _PAGES.items() if not empty.get(name)}


def blocks(summary: Row) -> list[Block]:
    """Every benchmark's table over all domains, the primary one first."""
    found: dict[str, list[Row]] = {}
    for row in summary["shares"]:
        if row["split"] == ALL and METRICS[row["metric"]].field != "nll":
            found.setdefault(row["benchmark"], []).append(row)
    order = [summary["primary"]["benchmark"], *BENCHMARKS]
    names = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
    return [_block(summary, name, found[name]) for name in names]


def headline(summary: Row) -> list[dict[str, Any]]:
    """The cards: SafeMoE against base by each of the headline's metrics."""
    main = summary["primary"]["benchmark"]
    cards = []
    for metric in _HEADLINE:
        benchmark = HARMLESS if metric == "over_refusal_rate" else main
        shares = {
            row["system"]: row
            for row in summary["shares"]
            if (row["benchmark"], row["metric"], row["split"]) == (benchmark, metric, ALL)
        }
        row = _difference(summary, benchmark, metric, BASE)
        if not shares:
            continue
        cards.append(
            {
                "metric": metric,
                "title": METRICS[metric].title,
                "benchmark": benchmark_name(benchmark),
                "valid": not metric.startswith("isr") or summary["primary"]["metric"] == "isr",
                "shares": {name: _share_cell(each) for name, each in shares.items()},
                "row": row,
                "difference": None if row is None else difference_cell(row),
            }
        )
    return cards


def by_domain(summary: Row) -> list[dict[str, Any]]:
    """Of held-out and left-out prompts, each domain's rates of the named systems."""
    metric = summary["primary"]["metric"]
    found = []
    for benchmark in (HELD_OUT, LEFT_OUT):
        rows = [
            row
            for row in summary["shares"]
            if row["benchmark"] == benchmark
            and row["split"] != ALL
            and row["metric"] == metric
            and row["system"] in NAMED
        ]
        if rows:
            by_domain: dict[str, dict[str, Cell]] = {}
            for row in rows:
                by_domain.setdefault(row["split"], {})[row["system"]] = _share_cell(row)
            counts = {row["split"]: row["n"] for row in rows}
            found.append(
                {
                    "benchmark": benchmark,
                    "title": benchmark_name(benchmark),
                    "metric": METRICS[metric].title,
                    "rows": by_domain,
                    "counts": counts,
                    "figure": f"domains-{benchmark}",
                }
            )
    return found


def likelihoods(summary: Row) -> list[dict[str, Any]]:
    """NLL of given answers by benchmark: systems by kind, with SafeMoE's differences."""
    found = []
    for benchmark in dict.fromkeys(row["benchmark"] for row in summary["shares"]):
        rows, differences = (
            [
                row
                for row in summary[key]
                if (row["benchmark"], row["split"]) == (benchmark, ALL)
                and METRICS[row["metric"]].field == "nll"
            ]
            for key in ("shares", "differences")
        )
        if rows:
            shares = _by_system(rows, "system", _share_cell)
            for cells in shares.values():
                if {"nll_safe", "nll_unsafe"} <= cells.keys():
                    gap = cells["nll_unsafe"].value - cells["nll_safe"].value
                    cells["gap"] = Cell(f"{gap:.3f}", "", gap, None, None, "", "")
            found.append(
                {
                    "title": benchmark_name(benchmark),
                    "metrics": list(dict.fromkeys(row["metric"] for row in rows)),
                    "shares": shares,
                    "differences": _by_system(differences, "second", difference_cell),
                }
            )
    return found


def router_benchmarks(summary: Row) -> list[str]:
    """What SafeMoE's router was seen on."""
    rows = [row for row in summary["router"] if row["system"] == OURS and not row["fold"]]
    return list(dict.fromkeys(row["benchmark"] for row in rows))


def routers(summary: Row) -> list[dict[str, Any]]:
    """What every router's gates did, meaned over seeds."""
    places: dict[tuple[str, str], list[Row]] = {}
    for row in summary["router"]:
        if not row["fold"]:
            places.setdefault((row["system"], row["benchmark"]), []).append(row)
    return [
        {
            "system": system,
            "benchmark": benchmark_name(benchmark),
            "entropy": _number(mine, "entropy"),
            "even": f"{np.log(len(mine[0]['experts'])):.3f}",
            "null": _number(mine, "null"),
            "mass": f"{np.mean([np.sum(row['mass_LE'], axis=1).mean() for row in mine]):.3f}",
        }
        for (system, benchmark), mine in places.items()
    ]


def test_counts(summary: Row) -> dict[str, Any]:
    """How often each part of the test prompts has been evaluated, by the last run's word."""
    counts: dict[str, int] = {}
    for each in summary["test_evaluations"]:
        for name, count in each.get("counts", {}).items():
            counts[name] = max(count, counts.get(name, 0))
    return {
        "counts": {benchmark_name(name): count for name, count in counts.items()},
        "intact": all(each.get("intact", True) for each in summary["test_evaluations"]),
        "head": next((e["head"] for e in summary["test_evaluations"][::-1] if e.get("head")), ""),
    }


def difference_cell(row: Row) -> Cell:
    """SafeMoE less another system: a difference whose interval includes zero says so."""
    metric = METRICS[row["metric"]]
    form, scale = ("{:+.3f}", 1.0) if metric.field == "nll" else ("{:+.1f}", 100.0)
    value, low, high = row["value"], row["low"], row["high"]
    says = verdict(row)
    sign = {"higher": 1, "lower": -1}.get(says, 0) * metric.better
    text, low_text, high_text = (signed(form.format(scale * end)) for end in (value, low, high))
    return Cell(
        text,
        f"{low_text} to {high_text}",
        value,
        low,
        high,
        says,
        {1: "good", -1: "bad", 0: "flat" if says == "no difference shown" else ""}[sign],
    )


def _block(summary: Row, name: str, rows: Sequence[Row]) -> Block:
    differences = [
        row
        for row in summary["differences"]
        if (row["benchmark"], row["split"]) == (name, ALL) and METRICS[row["metric"]].field != "nll"
    ]
    metrics = [metric for metric in METRICS if any(row["metric"] == metric for row in rows)]
    tests: dict[str, dict[str, Row]] = {}
    for row in differences:
        if row["metric"] in ("isr", "srr", "over_refusal_rate"):
            tests.setdefault(row["second"], {})[row["metric"]] = row["mcnemar"]
    return Block(
        name=name,
        title=benchmark_name(name),
        n=max(row["n"] for row in rows),
        groups=max(row["groups"] for row in rows),
        seeds=max(row["seeds"] for row in rows),
        metrics=tuple(metrics),
        shares=_by_system(rows, "system", _share_cell),
        differences=_by_system(differences, "second", difference_cell),
        mcnemar=list(tests.items()),
    )


def _by_system(
    rows: Sequence[Row], whose: str, cell: Callable[[Row], Cell]
) -> dict[str, dict[str, Cell]]:
    found: dict[str, dict[str, Cell]] = {}
    for row in rows:
        found.setdefault(row[whose], {})[row["metric"]] = cell(row)
    return found


def _share_cell(row: Row) -> Cell:
    nll = METRICS[row["metric"]].field == "nll"
    form, scale = ("{:.3f}", 1.0) if nll else ("{:.1f}", 100.0)
    value, low, high = row["value"], row["low"], row["high"]
    known = low is not None
    interval = f"{form.format(scale * low)} to {form.format(scale * high)}" if known else ""
    return Cell(form.format(scale * value), interval, value, low, high, "", "")


def _difference(summary: Row, benchmark: str, metric: str, second: str) -> Row | None:
    place = (benchmark, metric, second, ALL)
    for row in summary["differences"]:
        if (row["benchmark"], row["metric"], row["second"], row["split"]) == place:
            return row
    return None


def _number(rows: Sequence[Row], key: str) -> str:
    known = [row[key] for row in rows if row[key] is not None]
    return f"{np.mean(known):.3f}" if known else ""


def benchmark_name(benchmark: str) -> str:
    return BENCHMARKS.get(benchmark, benchmark.replace("_", " "))
