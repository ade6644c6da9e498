"""A plan as lines and a table, as JSON, and as a picture."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
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
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
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
    """A page with each function's memory by part, and its three times."""
    figure = make_subplots(
        cols=2, subplot_titles=("HBM of a device, GiB", "Seconds at the chip's public peak")
    )
    names = [one.name for one in plan.figures]
    for part, color in zip(PARTS, PALETTE, strict=True):
        sizes = [one.hbm.get(part, 0) / 2**30 for one in plan.figures]
        if any(sizes):
            figure.add_bar(
                x=names, y=sizes, name=part, marker_color=color, legendgroup="hbm", col=1, row=1
            )
    figure.add_hline(plan.topology.room / 2**30, line_dash="dash", row=1, col=1)
    for what, color in zip(("compute", "hbm", "ici"), PALETTE, strict=False):
        figure.add_scatter(
            x=[one.name for one in plan.figures if one.fits],
            y=[one.seconds[what] for one in plan.figures if one.fits],
            name=f"{what}, s",
            mode="markers",
            marker={"size": 12, "color": color, "symbol": "diamond"},
            legendgroup="seconds",
            row=1,
            col=2,
        )
    figure.update_layout(
        template="plotly_white",
        barmode="stack",
        title=f"{plan.config.model.source} on {plan.topology.name}",
        yaxis2_type="log",
    )
    figure.write_html(path)


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
        if one.hours is not None:
            needed = max(figures.needed for figures in one.plan.figures)
            table.add_row(f"{one.hours:.3g}", gib(needed), one.label)
    console.print(table)
    refused = sum(one.hours is None for one in candidates)
    console.print(f"{len(candidates)} tried, {refused} of them do not fit")
    flags = " ".join(f"--config.{key}={value}" for key, value in candidates[0].changes.items())
    console.print(f"the best: {flags or 'the experiment as it is'}", soft_wrap=True)


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
