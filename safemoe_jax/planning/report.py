"""A plan as lines and a table, as JSON, and as a picture."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from rich.box import SIMPLE_HEAD
from rich.table import Table

from safemoe_jax.evaluation.figures import PALETTE
from safemoe_jax.planning.plan import PARTS, Figures, Plan
from safemoe_jax.planning.search import Candidate
from safemoe_jax.progress import console

COLUMNS = (
    "function",
    "HBM GiB",
    "TFLOPs",
    "sent GB",
    "compute s",
    "HBM s",
    "ICI s",
    "MFU",
    "tokens/s",
)
_TIMES = {"compute": "compute", "hbm": "HBM", "ici": "ICI"}
NOTES = (
    "HBM, FLOPs and bytes sent are a device's, tokens/s the slice's. Seconds are bounds, each at "
    "the chip's public peak; MFU and tokens/s take the largest of the three, the others hidden "
    "behind it. FLOPs are the compiled program's, times the loops' trips, and splash attention's "
    "by arithmetic, since XLA does not count it. Rows are full, every token with loss."
)


def show(plan: Plan) -> None:
    """Prints a plan."""
    topology, mesh = plan.topology, plan.config.mesh
    each = "" if topology.share == 1 else f", a device being {topology.share:g} of a chip"
    console.print(
        f"{plan.config.model.source} on {topology.name}: {topology.num_chips} chips"
        f"{each}; data {mesh.data}, fsdp {mesh.fsdp}, tensor {mesh.tensor}, context {mesh.context}"
    )
    counts = ", ".join(f"{name} {count:,}" for name, count in plan.parameters.items())
    console.print(f"parameters: {counts}")
    for one in plan.figures:
        parts = ", ".join(f"{part} {gib(size)}" for part, size in one.hbm.items())
        console.print(
            f"{one.name}: fits: {'yes' if one.fits else 'no'}; {gib(one.needed)} of "
            f"{gib(topology.room)} GiB a device: {parts}"
        )
        if one.sent:
            kinds = ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in one.sent.items())
            console.print(f"{one.name}: a device sends {kinds}")
    # 80 columns are all that there is in a log.
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "function" else "right", no_wrap=True)
    for one in plan.figures:
        if one.fits:
            table.add_row(*cells(plan, one))
    if any(one.fits for one in plan.figures):
        console.print(table)
    console.print(NOTES)
    for what, hours in plan.hours.items():
        console.print(f"{what}: {hours:.3g} hours at least")


def cells(plan: Plan, one: Figures) -> tuple[str, ...]:
    """One function's row of the table, by `COLUMNS`."""
    return (
        one.name,
        gib(one.needed),
        f"{one.flops / 1e12:.2f}",
        f"{sum(one.sent.values()) / 1e9:.2f}",
        *(f"{one.seconds[what]:.4f}" for what in ("compute", "hbm", "ici")),
        f"{one.mfu(plan.topology):.1%}",
        f"{one.tokens_per_second:,.0f}",
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """All of a plan in numbers: bytes, FLOPs, seconds and hours."""
    return {
        "base": plan.config.model.source,
        "topology": plan.topology.name,
        "chips": plan.topology.num_chips,
        "devices": len(plan.topology.devices),
        "mesh": dataclasses.asdict(plan.config.mesh),
        "jax": jax.__version__,
        "libtpu": plan.topology.libtpu,
        "parameters": plan.parameters,
        "fits": plan.fits,
        "functions": [_function(plan, one) for one in plan.figures],
        "hours": plan.hours,
    }


def _function(plan: Plan, one: Figures) -> dict[str, Any]:
    values = {
        "name": one.name,
        "fits": one.fits,
        "hbm": one.hbm,
        "hbm_needed": one.needed,
        "hbm_of_a_device": plan.topology.room,
        "rows": one.rows,
        "tokens": one.tokens,
        "useful_flops": one.useful_flops,
    }
    if one.fits:
        values |= {
            "flops": one.flops,
            "hbm_traffic": one.hbm_traffic,
            "sent": one.sent,
            "seconds": one.seconds,
            "mfu": one.mfu(plan.topology),
            "tokens_per_second": one.tokens_per_second,
        }
    return values


def write_picture(plan: Plan, path: Path) -> None:
    """A page with each function's memory by part, its three times, and the table."""
    room = plan.topology.room / 2**30
    figure = make_subplots(
        rows=2,
        cols=2,
        row_heights=(0.65, 0.35),
        horizontal_spacing=0.22,
        vertical_spacing=0.14,
        specs=[[{}, {}], [{"type": "table", "colspan": 2}, None]],
        subplot_titles=(
            f"HBM of a device; it has {room:g} GiB",
            "Seconds at the chip's public peak; orange: the largest, the bound",
        ),
    )
    for bar in _memory_bars(plan):
        figure.add_trace(bar, row=1, col=1)
    figure.add_vline(room, line_dash="dash", row=1, col=1)
    figure.add_trace(_times(plan), row=1, col=2)
    columns = list(zip(*(cells(plan, one) for one in plan.figures if one.fits), strict=True))
    figure.add_table(
        header={"values": COLUMNS, "align": ["left", "right"]},
        cells={"values": columns, "align": ["left", "right"]},
        row=2,
        col=1,
    )
    figure.update_xaxes(title="GiB", row=1, col=1)
    figure.update_xaxes(title="seconds", type="log", dtick=1, exponentformat="power", row=1, col=2)
    figure.update_yaxes(autorange="reversed", row=1)
    figure.update_layout(
        template="plotly_white",
        barmode="stack",
        height=700,
        title=f"{plan.config.model.source} on {plan.topology.name}, planned and not measured",
        title_y=0.96,
        legend={"orientation": "h", "x": 0, "y": 1.07, "yanchor": "bottom", "traceorder": "normal"},
        margin_t=130,
        margin_b=20,
    )
    figure.write_html(path)


def _memory_bars(plan: Plan) -> Iterator[go.Bar]:
    """Of each part one trace, a bar for each function."""
    for part, color in zip(PARTS, PALETTE, strict=True):
        sizes = [one.hbm.get(part, 0) / 2**30 for one in plan.figures]
        if any(sizes):
            yield go.Bar(
                x=sizes,
                y=[one.name for one in plan.figures],
                orientation="h",
                name=part,
                marker_color=color,
                hovertemplate="%{y}, %{fullData.name}: %{x:.3g} GiB<extra></extra>",
            )


def _times(plan: Plan) -> go.Scatter:
    """A point for each function's every time; the bound has another colour."""
    times = [(one, what) for one in plan.figures if one.fits for what in one.seconds]
    seconds = [one.seconds[what] for one, what in times]
    return go.Scatter(
        x=seconds,
        y=[[one.name for one, _ in times], [_TIMES[what] for _, what in times]],
        mode="markers+text",
        marker={
            "size": 11,
            "color": [
                PALETTE[1] if value == one.bound else PALETTE[-1]
                for value, (one, _) in zip(seconds, times, strict=True)
            ],
        },
        texttemplate="%{x:.3g}",
        textposition="middle right",
        hovertemplate="%{y}: %{x:.3g} s<extra></extra>",
        cliponaxis=False,
        showlegend=False,
    )


def candidate_as_json(candidate: Candidate) -> dict[str, Any]:
    """One of a search's candidates: what it changes, its hours, and its plan."""
    return {
        "changes": candidate.changes,
        "hours": candidate.hours,
        "plan": candidate.plan and as_json(candidate.plan),
    }


def show_search(candidates: Sequence[Candidate]) -> None:
    """Prints what was tried, best first."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("hours", justify="right")
    table.add_column("HBM, GiB", justify="right")
    table.add_column("changes", overflow="fold")
    for one in candidates:
        if one.plan is not None and one.hours is not None:
            needed = max(figures.needed for figures in one.plan.figures)
            table.add_row(f"{one.hours:.3g}", gib(needed), one.label)
    console.print(table)
    refused = sum(one.hours is None for one in candidates)
    console.print(f"{len(candidates)} tried, {refused} of them do not fit")
    flags = " ".join(f"--config.{key}={value}" for key, value in candidates[0].changes.items())
    console.print(f"the best: {flags or 'the experiment as it is'}", soft_wrap=True)


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
