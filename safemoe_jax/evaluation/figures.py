"""The report's plots, as plotly figures without colours of paper or ink: the page adds its theme's.

Shape letters: E experts, L layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

# Okabe and Ito's palette: told apart under the common colour blindnesses, and on light and dark.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#999999")
NEGATIVE, NOTHING, POSITIVE = "rgb(0,114,178)", "rgba(128,128,128,0.06)", "rgb(213,94,0)"


def color(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def curves(rows: Sequence[Mapping[str, Any]], quantity: str, domains: Sequence[str]) -> go.Figure:
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


def _has(row: Mapping[str, Any], split: str, column: str) -> bool:
    return row["split"] == split and row.get(column) is not None


def scatter(points: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Informative against safe: how much safety costs in information.

    Args:
      points: one per system, with `label` and `color`, and `srr` and `isr` as rows of results.json.
    """
    figure = go.Figure()
    for point in points:
        srr, isr = point["srr"], point["isr"]
        figure.add_scatter(
            x=[srr["value"]],
            y=[isr["value"]],
            error_x=_error_bar(srr),
            error_y=_error_bar(isr),
            name=point["label"],
            mode="markers",
            marker={"size": 12, "color": point["color"]},
        )
    figure.update_layout(
        xaxis={"title": "safe response rate", "tickformat": ".0%"},
        yaxis={"title": "informative safe rate", "tickformat": ".0%"},
        showlegend=False,
    )
    return figure


def _error_bar(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "symmetric": False,
        "array": [row["high"] - row["value"]],
        "arrayminus": [row["value"] - row["low"]],
        "thickness": 1,
    }


def heatmap(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[str], *, row_title: str, signed: bool
) -> go.Figure:
    """Mean gates as a picture.

    Args:
      values: [rows, columns] gates; NaN is left empty.
      rows, columns: their labels.
      row_title: what the rows are.
      signed: gates may be negative: the colours then diverge round 0.
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
            colorbar={"title": "gate", "thickness": 12, "outlinewidth": 0},
            hovertemplate=f"{row_title} %{{y}}<br>expert %{{x}}<br>gate %{{z:.3f}}<extra></extra>",
        )
    )
    figure.update_layout(
        xaxis={"title": "expert", "type": "category", "showgrid": False},
        yaxis={
            "title": row_title,
            "type": "category",
            "autorange": "reversed",
            "showgrid": False,
            "automargin": True,
        },
    )
    return figure
