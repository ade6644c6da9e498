"""Plans shipped experiments and writes what was found to where they are described.

    python -m benchmarks.plans llama32_1b llama31_8b llama31_70b llama31_70b_int8

An experiment's docstring holds the commands that plan it: they name the slices. From its line that
begins with "Planned" to its end it is written anew, and so are the experiment's rows in
docs/plans.md. What does not fit ends the program with nothing written. Printed with each plan: how
long it took, and the largest memory of this process until then.
"""

import datetime
import importlib
import re
import resource
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from safemoe_jax.config import freeze
from safemoe_jax.planning import report
from safemoe_jax.planning.plan import Plan, plan
from safemoe_jax.planning.topologies import get_topology
from safemoe_jax.weights.base import read_spec

DOCS = Path("docs") / "plans.md"


def planned(name: str) -> list[Plan]:
    """An experiment's plans on the slices that its docstring names, each of which it fits."""
    module = importlib.import_module(f"experiments.{name}")
    config = freeze(module.get_config())
    plans = []
    for topology in re.findall(r"safemoe plan .*--topology (\S+)", module.__doc__ or ""):
        began, cpu = time.perf_counter(), time.process_time()
        found = plan(config, read_spec(config.model.source), get_topology(topology))
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        report.show(found)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{name} on {topology}: {wall:.0f} s, {cpu:.0f} s of CPU; {memory:.2f} GiB at most")
        found.check()
        plans.append(found)
    return plans


def described(text: str, plans: Sequence[Plan]) -> str:
    """An experiment file's text with these plans at the end of its docstring."""
    first = plans[0]
    counts = [f"{count:,}" for count in first.parameters.values()]
    said = (
        f"Planned on {datetime.date.today()} by jax {jax.__version__} and libtpu "
        f"{first.topology.libtpu}: {counts[0]} parameters of the base, {counts[1]} of the experts, "
        f"{counts[2]} of the router; it fits. How to read it: docs/plans.md."
    )
    rows = [["topology", *report.COLUMNS]]
    rows += [[one.topology.name, *report.cells(one, of)] for one in plans for of in one.figures]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    hours = "; ".join(
        f"{one.topology.name} "
        + ", ".join(f"{what} {hours:.2f}" for what, hours in one.hours.items())
        for one in plans
    )
    end = "\n\n".join(
        [
            textwrap.fill(said, 100),
            textwrap.indent("\n".join(lines), "    "),
            textwrap.fill(f"Hours at least: {hours}.", 100),
        ]
    )
    before, _, after = re.split(r'^(Planned.*?)(?=^""")', text, maxsplit=1, flags=re.M | re.S)
    return f"{before}{end}\n{after}"


def tabled(text: str, name: str, plans: Sequence[Plan]) -> str:
    """docs/plans.md with these plans of an experiment in its place."""
    rows = [
        f"| {' | '.join([name, one.topology.name, *report.cells(one, of)])} |\n"
        for one in plans
        for of in one.figures
    ]
    lines = text.splitlines(keepends=True)
    own = [line.startswith(f"| {name} ") for line in lines]
    at = own.index(True) if any(own) else len(lines)
    kept = [line for line, mine in zip(lines, own, strict=True) if not mine]
    return "".join(kept[:at] + rows + kept[at:])


def main() -> None:
    for name in sys.argv[1:]:
        plans = planned(name)
        experiment = Path("experiments") / f"{name}.py"
        experiment.write_text(described(experiment.read_text(), plans))
        DOCS.write_text(tabled(DOCS.read_text(), name, plans))


if __name__ == "__main__":
    main()
