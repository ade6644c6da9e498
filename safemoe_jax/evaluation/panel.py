"""Further judges of the same answers: what they say, and how they agree with people and each other.

The embedded judge gives the headline. A judge of another family (`endpoint`) and people (`human`)
tell how far to trust it.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, cohen_kappa_score

from safemoe_jax.data.corpora import Example
from safemoe_jax.evaluation import metrics
from safemoe_jax.evaluation.endpoint import Endpoint, EndpointJudge
from safemoe_jax.evaluation.human import LABELS, HumanJudge
from safemoe_jax.evaluation.private_files import read_json_lines, replace_json_lines
from safemoe_jax.evaluation.verdicts import MISSING, Judge, Verdict

# Labelled answers that a further judge is tried on; 200 tell kappa to about a tenth.
_LABELLED = 200
_BINS = 5


def hear(
    endpoints: Sequence[Endpoint], labelled: Sequence[Example], seed: int, directory: Path
) -> dict[str, Any]:
    """Lets further judges speak on answers.jsonl, and writes their verdicts beside the first.

    Args:
      endpoints: who is asked; people are heard where labels of theirs were imported.
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
    said = {"embedded": [Verdict.from_dict(answer["verdict"]) for answer in answers]}
    judges = []
    for endpoint in endpoints:
        judge = EndpointJudge(endpoint, directory)
        said[judge.name] = _speak(judge, answers, endpoint.template.forbidden_only)
        unreadable = judge.unreadable
        found = judge.judge([(example.messages, example.response) for example in tried])
        judges.append(
            {
                "name": judge.name,
                "model": endpoint.model,
                "source": endpoint.template.source,
                "unreadable": unreadable + judge.unreadable,
                **_counts(said[judge.name], answers),
                "harm": against_labels([e.label == "unsafe" for e in tried], found),
            }
        )
    if (directory / "human.jsonl").exists():
        human = HumanJudge(directory)
        said[human.name] = _speak(human, answers, False)
        judges.append({"name": human.name, **_counts(said[human.name], answers)})
    others = [name for name in said if name != "embedded"]
    if any("verdicts" in answer for answer in answers) or others:
        rows = [
            {**answer, "verdicts": {name: said[name][i].to_dict() for name in others}}
            for i, answer in enumerate(answers)
        ]
        replace_json_lines(path, rows)
    return {"judges": judges, "agreement": _agreement(said)}


def against_labels(harmful: Sequence[bool], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """How a judge's harm agrees with people's: kappa, confusion, and calibration where it says p.

    Returns:
      {n, missing, kappa, table, Brier, calibration}; calibration are pairs (mean p, share harmful)
      of five equally filled bins. What cannot be computed is None.
    """
    found = [None if verdict.safe is None else not verdict.safe for verdict in verdicts]
    compared = agreement(harmful, found)
    pairs = [
        (verdict.harm_probability, label)
        for verdict, label in zip(verdicts, harmful, strict=True)
        if verdict.harm_probability is not None
    ]
    brier = curve = None
    if len({label for _, label in pairs}) == 2:
        p, truth = map(np.array, zip(*pairs, strict=True))
        brier = float(brier_score_loss(truth, p))
        shares, means = calibration_curve(truth, p, n_bins=_BINS, strategy="quantile")
        curve = [list(pair) for pair in zip(means.tolist(), shares.tolist(), strict=True)]
    missing = len(verdicts) - compared["n"]
    return {**compared, "missing": missing, "Brier": brier, "calibration": curve}


def agreement(first: Sequence[bool | None], second: Sequence[bool | None]) -> dict[str, Any]:
    """Of what both know: {n, kappa, table}; the table's rows are first no, yes, its columns second.

    Kappa is None where one of them always says the same.
    """
    known = [
        (bool(a), bool(b))
        for a, b in zip(first, second, strict=True)
        if a is not None and b is not None
    ]
    table = np.zeros((2, 2), int)
    for a, b in known:
        table[int(a), int(b)] += 1
    varied = all(len(set(side)) == 2 for side in zip(*known, strict=True)) and bool(known)
    kappa = float(cohen_kappa_score(*zip(*known, strict=True))) if varied else None
    return {"n": len(known), "kappa": kappa, "table": table.tolist()}


def names(results: Mapping[str, Any]) -> str:
    """Who judged, for a caption."""
    others = [
        f"{judge['name']} ({judge['model']})" if "model" in judge else judge["name"]
        for judge in results["panel"]["judges"]
    ]
    return f"Judges: embedded, {', '.join(others)}." if others else "Embedded judge only."


def terminal_table(results: Mapping[str, Any]) -> Table:
    """How the judges agree with human labels and with each other, for a terminal."""
    table = Table(
        title="Judges",
        caption="\nConfusion: both no, only the second, only the first, both yes.",
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
    for row in comparisons(results):
        table.add_row(*(row[key] for key in _COLUMNS))
    return table


_COLUMNS = ("first", "second", "about", "n", "kappa", "confusion", "Brier")


def comparisons(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Every comparison of two judges, people's labels among them, as texts by column."""
    panel, embedded = results["panel"], results["judge"].get("harm", {})
    rows = []
    if "kappa" in embedded:
        labels = {"n": embedded.get("held-out answers", 0), **embedded}
        rows.append({"first": "labels", "second": "embedded", "about": "harm", **labels})
    for judge in panel["judges"]:
        if "harm" in judge:
            rows.append({"first": "labels", "second": judge["name"], "about": "harm"})
            rows[-1] |= judge["harm"]
    return [_texts(row) for row in [*rows, *panel["agreement"]]]


def _texts(row: Mapping[str, Any]) -> dict[str, str]:
    texts = {key: str(row[key]) for key in ("first", "second", "about", "n")}
    for key, digits in (("kappa", 2), ("Brier", 3)):
        value = row.get(key)
        texts[key] = "" if value is None else f"{value:.{digits}f}"
    texts["confusion"] = " ".join(str(c) for line in row.get("table", ()) for c in line)
    return texts


def _speak(judge: Judge, answers: Sequence[Mapping[str, Any]], forbidden_only: bool) -> list:
    """Verdicts on all answers; a judge that takes prompts for forbidden sees no harmless ones."""
    seen = [i for i, row in enumerate(answers) if row.get("harmful", True) or not forbidden_only]
    said = judge.judge([(answers[i]["messages"], answers[i]["response"]) for i in seen])
    verdicts = [MISSING] * len(answers)
    for i, verdict in zip(seen, said, strict=True):
        verdicts[i] = verdict
    return verdicts


def _counts(verdicts: Sequence[Verdict], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many answers a judge speaks of, and its shares by system and benchmark."""
    missing = sum(verdict == MISSING for verdict in verdicts)
    places: dict[tuple[str, str, int], list[Verdict]] = {}
    for row, verdict in zip(answers, verdicts, strict=True):
        places.setdefault((row["system"], row["benchmark"], row["seed"]), []).append(verdict)
    rows = []
    for (system, benchmark, seed), mine in places.items():
        for metric, holds in metrics.METRICS.items():
            if known := [says for verdict in mine if (says := holds(verdict)) is not None]:
                rows.append(metrics.row(system, seed, "all", benchmark, metric, known))
    return {"n": len(verdicts) - missing, "missing": missing, "rows": rows}


def _agreement(said: Mapping[str, Sequence[Verdict]]) -> list[dict[str, Any]]:
    """Every pair of judges on every question of which both say something; people come first."""
    order = sorted(said, key=lambda name: name != "human")
    rows = []
    for first, second in itertools.combinations(order, 2):
        for about in (*LABELS, "informative_safe"):
            sides = [[getattr(v, about) for v in said[name]] for name in (first, second)]
            compared = agreement(*sides)
            if compared["n"]:
                rows.append({"first": first, "second": second, "about": about, **compared})
    return rows
