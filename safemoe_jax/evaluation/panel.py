"""Further judges of the same answers: what they say, and how they agree with people and each other.

The embedded judge gives the headline. A judge of another family (`asked`) and people (`human`) tell
how far to trust it.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from safemoe_jax.data.corpora import Example
from safemoe_jax.evaluation import metrics
from safemoe_jax.evaluation.agreement import against_labels, agreement
from safemoe_jax.evaluation.asked import AskedJudge
from safemoe_jax.evaluation.human import LABELS, HumanJudge
from safemoe_jax.evaluation.verdicts import MISSING, Judge, Verdict, judged
from safemoe_jax.private_files import read_json_lines, replace_json_lines

NOBODY: dict[str, list[Any]] = {"judges": [], "agreement": []}

# Labelled answers that a further judge is tried on; 200 tell kappa to about a tenth.
_LABELLED = 200


def hear(
    asked: Sequence[AskedJudge], labelled: Sequence[Example], seed: int, directory: Path
) -> dict[str, Any]:
    """Lets further judges speak on answers.jsonl, and writes their verdicts beside the first.

    Args:
      asked: models that are asked; people are heard where labels of theirs were imported.
      labelled: held-out answers with human labels of harm; at most 200 are judged.
      seed: picks those.
      directory: of answers.jsonl, and of what was asked and replied.

    Returns:
      {judges: [{name, model, source, n, missing, unreadable, rows, harm}], agreement: [{first,
      second, about, n, kappa, table}]}: rows are as in results.json; `harm` is agreement with the
      labels, absent for people.
    """
    path = directory / "answers.jsonl"
    answers = read_json_lines(path)
    picked = np.random.default_rng(seed).permutation(len(labelled))[:_LABELLED]
    tried = [labelled[i] for i in sorted(picked)]
    tried_rows = [
        {"messages": e.messages, "response": e.response, "harmful": True, "refusal_only": False}
        for e in tried
    ]
    said = {"embedded": [Verdict.from_dict(answer["verdict"]) for answer in answers]}
    judges = []
    for judge in asked:
        # All at once: a model that is read for this is read once.
        verdicts = _speak(judge, [*answers, *tried_rows], judge.asked.template.forbidden_only)
        said[judge.name], found = verdicts[: len(answers)], verdicts[len(answers) :]
        judges.append(
            {
                "name": judge.name,
                "model": judge.asked.model,
                "source": judge.asked.template.source,
                "unreadable": judge.unreadable,
                **_counts(said[judge.name], answers),
                "harm": against_labels(
                    [example.label == "unsafe" for example in tried],
                    [None if verdict.safe is None else not verdict.safe for verdict in found],
                    [verdict.harm_probability for verdict in found],
                ),
            }
        )
    if read_json_lines(directory / "human.jsonl"):
        human = HumanJudge(directory)
        said[human.name] = _speak(human, answers, False)
        counts = _counts(said[human.name], answers)
        # People are not asked this.
        counts["rows"] = [row for row in counts["rows"] if row["metric"] != "degenerate_rate"]
        judges.append({"name": human.name, "model": "", "source": "", "unreadable": 0, **counts})
    others = [name for name in said if name != "embedded"]
    if any("verdicts" in answer for answer in answers) or others:
        rows = [
            {**answer, "verdicts": {name: said[name][i].to_dict() for name in others}}
            for i, answer in enumerate(answers)
        ]
        replace_json_lines(path, rows)
    return {"judges": judges, "agreement": _agreement(said, answers)}


def names(results: Mapping[str, Any]) -> str:
    """Who judged, for a caption."""
    others = [
        f"{judge['name']} ({judge['model']})" if judge["model"] else judge["name"]
        for judge in results["panel"]["judges"]
    ]
    return f"Judges: embedded, {', '.join(others)}." if others else "Embedded judge only."


def terminal_table(results: Mapping[str, Any]) -> Table:
    """How the judges agree with human labels and with each other, for a terminal."""
    rows = comparisons(results)
    lines = ["", "Confusion: both no, only the second, only the first, both yes."]
    lines += [
        f"Calibration of {row['second']}, {row['about']}, said>labelled: {row['calibration']}."
        for row in rows
        if row["calibration"]
    ]
    table = Table(
        title="Judges",
        caption="\n".join(lines),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for heading in ("first", "second", "about"):
        table.add_column(heading, overflow="fold")
    for heading in ("n", "kappa", "confusion", "Brier"):
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(row[key] for key in _COLUMNS))
    return table


_COLUMNS = ("first", "second", "about", "n", "kappa", "confusion", "Brier")


def comparisons(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Every comparison of two judges, people's labels among them, as texts by column."""
    panel = results["panel"]
    labelled = [
        ("embedded", about, measured["held out"])
        for about, measured in results["judge"].items()
        if isinstance(measured, Mapping) and "held out" in measured  # since `EmbeddedJudge.measure`
    ]
    labelled += [
        (judge["name"], "harm", judge["harm"]) for judge in panel["judges"] if "harm" in judge
    ]
    rows = [
        {"first": "labels", "second": name, "about": about, **found}
        for name, about, found in labelled
    ]
    return [_texts(row) for row in [*rows, *panel["agreement"]]]


def _texts(row: Mapping[str, Any]) -> dict[str, str]:
    texts = {key: str(row[key]) for key in ("first", "second", "about", "n")}
    for key, digits in (("kappa", 2), ("Brier", 3)):
        value = row.get(key)
        texts[key] = "" if value is None else f"{value:.{digits}f}"
    texts["confusion"] = " ".join(str(count) for line in row["table"] for count in line)
    curve = row.get("calibration") or ()
    texts["calibration"] = " ".join(f"{said:.2f}>{share:.2f}" for said, share in curve)
    return texts


def _speak(judge: Judge, answers: Sequence[Mapping[str, Any]], forbidden_only: bool) -> list:
    """Verdicts on all answers; a judge that takes prompts for forbidden sees no harmless ones."""
    seen = [i for i, row in enumerate(answers) if row["harmful"] or not forbidden_only]
    said = judged(judge, [answers[i] for i in seen])
    verdicts = [MISSING] * len(answers)
    for i, verdict in zip(seen, said, strict=True):
        verdicts[i] = verdict
    return verdicts


def _counts(verdicts: Sequence[Verdict], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many answers a judge speaks of, and its shares by system and benchmark."""
    missing = sum(verdict == MISSING for verdict in verdicts)
    places: dict[tuple[str, str, int], list[int]] = {}
    for i, row in enumerate(answers):
        places.setdefault((row["system"], row["benchmark"], row["seed"]), []).append(i)
    rows = []
    for (system, benchmark, seed), mine in places.items():
        rows += metrics.rows(
            [verdicts[i] for i in mine],
            [answers[i]["domain"] for i in mine],
            [answers[i]["refusal_only"] for i in mine],
            system=system,
            seed=seed,
            benchmark=benchmark,
            harmful=answers[mine[0]]["harmful"],
        )
    whole = [row for row in rows if row["split"] == "all"]
    return {"n": len(verdicts) - missing, "missing": missing, "rows": whole}


def _agreement(
    said: Mapping[str, Sequence[Verdict]], answers: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Every pair of judges on every question of which both say something; people come first.

    Where refusal alone counts, the other answers of a verdict are nobody's finding.
    """
    order = sorted(said, key=lambda name: name != "human")
    rows = []
    for first, second in itertools.combinations(order, 2):
        for about in (*LABELS, "informative_safe"):
            sides = [
                [
                    getattr(verdict, about)
                    for verdict, answer in zip(said[name], answers, strict=True)
                    if about == "refusal" or not answer["refusal_only"]
                ]
                for name in (first, second)
            ]
            compared = agreement(*sides)
            if compared["n"]:
                rows.append({"first": first, "second": second, "about": about, **compared})
    return rows
