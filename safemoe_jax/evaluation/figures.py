"""The report's plots, as plotly figures without colours of paper or ink: the page adds its theme's.

Shape letters: E experts, L layers.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from safemoe_jax.evaluation.comparisons import ALL, BASE, OURS, verdict
from safemoe_jax.evaluation.prompt_sets import HELD_OUT, LEFT_OUT
from safemoe_jax.evaluation.views import NAMED

Row = Mapping[str, Any]

# Okabe and Ito's palette: told apart under the common colour blindnesses, and on light and dark.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#999999")
NEGATIVE, NOTHING, POSITIVE = "rgb(0,114,178)", "rgba(128,128,128,0.06)", "rgb(213,94,0)"


def color(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def curves(rows: Sequence[Row], quantity: str, domains: Sequence[str]) -> go.Figure:
    """One stage's curves over its steps: each domain on its own, and the loss of all together.

    Args:
      rows: the stage's rows of metrics.jsonl.
      quantity: "loss" or "gates"; the columns read are `quantity` and `quantity/<domain>`.
      domains: in the experts' order, which fixes their colours.
    """
    figure = go.Figure()
    # The mean over experts says something of a loss, and nothing of gates that may cancel.
    lines = [("all", quantity, "rgb(128,128,128)")] if quantity == "loss" else []
    lines += [(domain, f"{quantity}/{domain}", color(i)) for i, domain in enumerate(domains)]
    for name, column, line_color in lines:
        for split in ("validation", "train"):
            points = [(row["step"], row[column]) for row in rows if _has(row, split, column)]
            if not points:
                continue
            first = all(trace.legendgroup != name for trace in figure.data)
            steps, values = zip(*points, strict=True)
            validation = split == "validation"
            figure.add_scatter(
                x=steps,
                y=values,
                name=name,
                meta=split,
                legendgroup=name,
                showlegend=first,
                hovertemplate=f"step %{{x}}, {split}: %{{y:.4g}}",
                mode="lines+markers" if validation else "lines",
                line={"color": line_color, "width": 2.5 if validation else 1},
                opacity=1.0 if validation else 0.45,
            )
    figure.update_layout(xaxis_title="step", yaxis_title=_QUANTITIES[quantity])
    return figure


_QUANTITIES = {"loss": "loss, nats per token", "gates": "mean gate"}


def _has(row: Row, split: str, column: str) -> bool:
    return row["split"] == split and row.get(column) is not None


def forest(rows: Sequence[Row]) -> go.Figure:
    """Differences with their intervals, one above the other, round zero.

    Args:
      rows: each with `label`, `value`, `low`, `high`, `verdict` (its colour goes by that) and
        `unit`: "points" are drawn a hundredfold.
    """
    figure = go.Figure()
    for says, line_color, symbol in VERDICTS:
        mine = [row for row in rows if row["verdict"] == says]
        if not mine:
            continue
        value, low, high = (
            np.array([_scaled(row, key) for row in mine]) for key in ("value", "low", "high")
        )
        figure.add_scatter(
            x=value.round(4).tolist(),
            y=[_broken(row["label"]) for row in mine],
            error_x={
                "symmetric": False,
                "array": (high - value).round(4).tolist(),
                "arrayminus": (value - low).round(4).tolist(),
                "thickness": 2,
                "width": 0,
            },
            name=says,
            mode="markers",
            marker={"size": 9, "color": line_color, "symbol": symbol},
            customdata=np.stack([low, high], axis=1).round(2).tolist(),
            hovertemplate="%{y}: %{x:+.1f} (%{customdata[0]:+.1f} to %{customdata[1]:+.1f})",
        )
    unit = rows[0]["unit"] if rows else "points"
    figure.update_layout(
        height=120 + 30 * len(rows),
        xaxis={"title": unit, "zeroline": True, "zerolinewidth": 2},
        yaxis={
            "automargin": True,
            "categoryorder": "array",
            "categoryarray": [_broken(row["label"]) for row in reversed(rows)],
            "showgrid": False,
        },
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    return figure


# A difference that is not shown has another shape as well as another colour.
VERDICTS = (
    ("higher", PALETTE[2], "circle"),
    ("lower", PALETTE[1], "circle"),
    ("not after Holm", PALETTE[4], "circle-open"),
    ("one domain, no test", PALETTE[7], "circle"),
    ("no difference shown", PALETTE[7], "circle-open"),
)


def _broken(label: str) -> str:
    """In lines short enough for a phone."""
    return "<br>".join(textwrap.wrap(label, 26))


def _scaled(row: Row, key: str) -> float:
    return row[key] * (100 if row["unit"] == "points" else 1)


def scatter(points: Sequence[Row]) -> go.Figure:
    """Informative against safe: how much safety costs in information.

    Args:
      points: one per system, with `label`, `role`, and `srr` and `isr` as rows of shares. SafeMoE,
        base and whatever else has a `named` are named beside their point, the others when pointed
        at.
    """
    middle = np.mean([point["srr"]["value"] for point in points])
    figure = go.Figure()
    for kind, title, line_color, symbol in ROLES:
        mine = [point for point in points if point["role"] == kind]
        if not mine:
            continue
        figure.add_scatter(
            x=[point["srr"]["value"] for point in mine],
            y=[point["isr"]["value"] for point in mine],
            error_x=_error_bars([point["srr"] for point in mine]),
            error_y=_error_bars([point["isr"] for point in mine]),
            text=[point["label"] if point["named"] else "" for point in mine],
            customdata=[point["label"] for point in mine],
            textposition=[
                "top left" if point["srr"]["value"] > middle else "bottom right" for point in mine
            ],
            cliponaxis=False,
            name=title,
            mode="markers+text",
            marker={"size": 13 if kind == "ours" else 9, "color": line_color, "symbol": symbol},
            hovertemplate="%{customdata}<br>safe %{x:.1%}, informative %{y:.1%}<extra></extra>",
        )
    figure.update_layout(
        xaxis={"title": "safe response rate", "tickformat": ".0%"},
        yaxis={"title": "informative safe rate", "tickformat": ".0%"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    return figure


ROLES = (
    ("ours", "SafeMoE", PALETTE[0], "diamond"),
    ("base", "base", PALETTE[1], "square"),
    ("control", "controls", PALETTE[7], "circle"),
    ("thesis", "same router, other experts", PALETTE[3], "triangle-up"),
    ("hazard", "gates optimised for harm", PALETTE[4], "x"),
)


def _error_bars(rows: Sequence[Row]) -> dict[str, Any]:
    def lengths(end: str) -> list[float]:  # nothing is drawn of an interval that is not known
        return [0.0 if row[end] is None else abs(row[end] - row["value"]) for row in rows]

    return {
        "symmetric": False,
        "array": lengths("high"),
        "arrayminus": lengths("low"),
        "thickness": 0.8,
        "width": 0,
    }


def calibration(curves: Mapping[str, Sequence[Sequence[float]]]) -> go.Figure:
    """How often people found harm where a judge gave it this probability.

    Args:
      curves: judge -> pairs (mean probability, share harmful) of its bins.
    """
    figure = go.Figure()
    figure.add_scatter(
        x=[0, 1],
        y=[0, 1],
        mode="lines",
        line={"color": PALETTE[7], "dash": "dot", "width": 1},
        name="as it should be",
        hoverinfo="skip",
    )
    for i, (name, pairs) in enumerate(curves.items()):
        means, shares = zip(*pairs, strict=True)
        figure.add_scatter(
            x=means,
            y=shares,
            name=name,
            mode="lines+markers",
            line={"color": color(i)},
            hovertemplate="judge %{x:.2f}, people %{y:.2f}",
        )
    figure.update_layout(
        xaxis={"title": "judge's probability of harm", "range": [0, 1]},
        yaxis={"title": "share that people found harmful", "range": [0, 1]},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    return figure


def heatmap(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    row_title: str,
    value_title: str,
    signed: bool,
) -> go.Figure:
    """A table of gates, or of shares, as a picture.

    Args:
      values: [rows, columns]; NaN is left empty.
      rows, columns: their labels; columns are experts.
      row_title: what the rows are.
      value_title: what the values are.
      signed: values may be negative: the colours then diverge round 0.
    """
    limit = float(np.nanmax(np.abs(values), initial=1e-9))
    scale = [[0.0, NOTHING], [1.0, POSITIVE]]
    if signed:
        scale = [[0.0, NEGATIVE], [0.5, NOTHING], [1.0, POSITIVE]]
    figure = go.Figure(
        go.Heatmap(
            z=np.round(values, 4).tolist(),
            x=list(columns),
            y=list(rows),
            zmin=-limit if signed else 0.0,
            zmax=limit,
            colorscale=scale,
            xgap=1,
            ygap=1,
            colorbar={"title": value_title, "thickness": 12, "outlinewidth": 0},
            hovertemplate=f"{row_title} %{{y}}<br>expert %{{x}}<br>{value_title} %{{z:.3f}}"
            "<extra></extra>",
        )
    )
    figure.update_layout(
        xaxis={"title": "expert", "type": "category", "showgrid": False, "automargin": True},
        yaxis={
            "title": row_title,
            "type": "category",
            "autorange": "reversed",
            "showgrid": False,
            "automargin": True,
        },
    )
    return figure


def all_figures(summary: Row) -> dict[str, go.Figure]:
    """Every plot of the page by its name."""
    drawn: dict[str, go.Figure] = {}
    metric, main = summary["primary"]["metric"], summary["primary"]["benchmark"]
    titles = {name: about["title"] for name, about in summary["systems"].items()}

    def differences(rows: Sequence[Row], label: Callable[[Row], Any]) -> go.Figure:
        return forest(
            [
                {**row, "label": label(row), "verdict": verdict(row), "unit": "points"}
                for row in rows
            ]
        )

    rows = [
        row
        for row in summary["differences"]
        if (row["benchmark"], row["metric"], row["split"]) == (main, metric, ALL)
    ]
    if rows:
        drawn["forest"] = differences(rows, lambda row: titles.get(row["second"], row["second"]))
    for benchmark in (HELD_OUT, LEFT_OUT):
        rows = [
            row
            for row in summary["differences"]
            if (row["benchmark"], row["metric"], row["second"]) == (benchmark, metric, BASE)
            and row["split"] != ALL
        ]
        if rows:
            drawn[f"domains-{benchmark}"] = differences(rows, lambda row: row["split"])
    if metric == "isr":
        for benchmark in dict.fromkeys((main, HELD_OUT)):
            if points := _points(summary, benchmark, titles):
                drawn[f"scatter-{benchmark}"] = scatter(points)
    for stage in stages(summary):
        rows = [row for row in summary["curves"] if row["stage"] == stage]
        for quantity in ("loss", "gates"):
            figure = curves(rows, quantity, summary["domains"])
            if figure.data:
                drawn[f"curves-{stage}-{quantity}"] = figure
    drawn |= _router_figures(summary)
    held_out = summary["judges"]["reliability"].get("harm", {}).get("held out", {})
    bins = {"embedded": held_out.get("calibration")}
    bins |= {
        judge["name"]: judge.get("harm", {}).get("calibration")
        for judge in summary["judges"]["panel"]
    }
    if bins := {name: pairs for name, pairs in bins.items() if pairs}:
        drawn["calibration"] = calibration(bins)
    return drawn


def _points(summary: Row, benchmark: str, titles: Mapping[str, str]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Row]] = {}
    for row in summary["shares"]:
        if (row["benchmark"], row["split"]) == (benchmark, ALL):
            found.setdefault(row["system"], {})[row["metric"]] = row
    return [
        {
            "label": titles.get(name, name),
            "role": summary["systems"][name]["role"],
            "named": name in NAMED,
            "srr": rows["srr"],
            "isr": rows["isr"],
        }
        for name, rows in found.items()
        if {"srr", "isr"} <= rows.keys()
    ]


def _router_figures(summary: Row) -> dict[str, go.Figure]:
    """SafeMoE's gates by layer and by the prompt's domain, meaned over seeds."""
    drawn = {}
    places: dict[str, list[Row]] = {}
    for row in _ours(summary):
        places.setdefault(row["benchmark"], []).append(row)
    for benchmark, mine in places.items():
        gates_LE = np.mean([row["gates_LE"] for row in mine], axis=0)
        experts = mine[0]["experts"]
        drawn[f"layers-{benchmark}"] = heatmap(
            gates_LE,
            [str(layer) for layer in range(len(gates_LE))],
            experts,
            row_title="layer",
            value_title="gate",
            signed=summary["signed"],
        )
        asked = [domain for domain in mine[0]["argmax"] if any(mine[0]["argmax"][domain].values())]
        if asked:
            counts = np.array(
                [
                    [sum(r["argmax"].get(domain, {}).get(e, 0) for r in mine) for e in experts]
                    for domain in asked
                ],
                float,
            )
            drawn[f"argmax-{benchmark}"] = heatmap(
                counts / counts.sum(axis=1, keepdims=True),
                asked,
                experts,
                row_title="prompt's domain",
                value_title="share",
                signed=False,
            )
    return drawn


def _ours(summary: Row) -> list[Row]:
    return [row for row in summary["router"] if row["system"] == OURS and not row["fold"]]


def stages(summary: Row) -> list[str]:
    return list(dict.fromkeys(row["stage"] for row in summary["curves"]))
