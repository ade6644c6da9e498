"""The headline of one run for a terminal of 80 columns."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from safemoe_jax.evaluation import panel
from safemoe_jax.evaluation.comparisons import ALL, METRICS

Row = Mapping[str, Any]

# Headings and labels are broken so that the table fits.
_COLUMNS = {
    "srr": "safe\n%",
    "isr": "informative\n%",
    "refusal_rate": "refusals\n%",
    "nll_safe": "NLL\nsafe",
    "nll_unsafe": "NLL\nharmful",
    "nll_difference": "harmful\n- safe",
}


def terminal_table(results: Mapping[str, Any]) -> Table:
    """The headline for a terminal: systems by rates, with held-out NLL in nats per token.

    Args:
      results: the contents of results.json, of one run.
    """
    groups = _groups(results["rows"])
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
    likelihoods = _groups(results["nll"])
    table.add_column("system", overflow="fold")
    for heading in ("n", *_COLUMNS.values()):
        table.add_column(heading, justify="right", overflow="fold")
    for benchmark, systems in groups.items():
        if len(groups) > 1:
            table.add_row(Text(benchmark.replace("_", " "), style="bold"))
        for system, rows in systems.items():
            known = {**likelihoods.get(benchmark, {}).get(system, {}), **rows}
            if over := known.get("over_refusal_rate"):
                known["refusal_rate"] = over  # in one column: a benchmark has one or the other
            n = max(row["n"] for row in rows.values())
            texts = [_cell(known.get(metric), metric, valid) for metric in _COLUMNS]
            table.add_row(results["systems"][system]["title"], str(n), *texts)
        table.add_section()
    return table


def _groups(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Row]]]:
    """Rows over all domains: benchmark -> system -> metric -> row, in order of appearance."""
    groups: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row["split"] == ALL and row["metric"] in (*_COLUMNS, "over_refusal_rate"):
            systems = groups.setdefault(row["benchmark"], {})
            systems.setdefault(row["system"], {})[row["metric"]] = row
    return groups


def _cell(row: Row | None, metric: str, valid: bool) -> str:
    if row is None:
        return ""
    if metric == "isr" and not valid:
        return "not valid"
    if metric.startswith("nll"):
        return f"{row['value']:.3f}"
    return f"{100 * row['value']:.1f}\n{100 * row['low']:.0f} to {100 * row['high']:.0f}"


def _caption(results: Mapping[str, Any]) -> str:
    lines = [
        "95 % intervals: Wilson's, as if prompts were independent. NLL: nats per token.",
        panel.names(results),
    ]
    if results["demonstration"]:
        lines.insert(0, "A demonstration: too short a run to judge the claim.")
    for row in results["validity"]:
        if not row["passed"]:
            title, scores = METRICS["isr"].title, f"{100 * row['value']:.1f} %"
            lines.append(f"{title} is not valid: {row['name']} scores {scores}.")
    return "\n".join(lines)
