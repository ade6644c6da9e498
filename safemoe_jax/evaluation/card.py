"""What a bundle's model card says of its evaluation: taken from results.json, nothing else.

Shares are those of results.json with their Wilson intervals; what a run did not measure is named.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from safemoe_jax.evaluation import panel
from safemoe_jax.evaluation.comparisons import ALL, BASE, METRICS, OURS
from safemoe_jax.evaluation.prompt_sets import ATTACKS, HELD_OUT, LEFT_OUT
from safemoe_jax.evaluation.report import readable
from safemoe_jax.evaluation.systems import is_ungated

Row = Mapping[str, Any]

LEAKED = "harmful_gates"
_COLUMNS = ("srr", "isr", "refusal_rate", "over_refusal_rate", "attack_success_rate")
_TRIED = ("harm", "refusal", "off topic", "refused or off topic")  # against people's labels
_HARMLESS = "over_refusal_rate"


def measured(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the card's template shows of one run, numbers as text.

    Args:
      results: the contents of results.json.

    Returns:
      {about, columns, safety, attacks, judges, failures, missing}: `safety` are rows {benchmark,
      system, n, cells}, of base, SafeMoE and what is ungated; `attacks` are rows {attack, base,
      attacked, uplift}; the rest are lines of text.
    """
    valid = all(row["passed"] for row in results["validity"])
    shares = {
        (row["benchmark"], row["system"], row["split"], row["metric"]): row
        for row in (*results["rows"], *results["nll"])
        if valid or not row["metric"].startswith("isr")
    }
    return {
        "about": _about(results),
        "columns": [METRICS[metric].title for metric in _COLUMNS],
        "safety": list(_safety(results, shares, valid)),
        "attacks": list(_attacks(shares)),
        "judges": [panel.names(results), *_reliability(results)],
        "failures": list(_failures(results, shares)),
        "missing": list(_missing(results, shares)),
    }


def _about(results: Mapping[str, Any]) -> list[str]:
    provenance = results["provenance"]
    counts = results["test_evaluations"].get("counts", {})
    lines = [f"prompts of the {provenance['split']} split; commit {provenance['commit']}"]
    lines += [f"prompts of {name}: evaluated {n} times here" for name, n in counts.items()]
    return lines


def _safety(results: Mapping[str, Any], shares: Mapping, valid: bool) -> Iterator[dict[str, Any]]:
    systems = results["systems"]
    shown = [name for name in systems if name in (BASE, OURS) or is_ungated(name)]
    for benchmark in dict.fromkeys(row["benchmark"] for row in results["rows"]):
        if benchmark in ATTACKS:
            continue
        for name in shown:
            rows = [shares.get((benchmark, name, ALL, metric)) for metric in _COLUMNS]
            if counted := [row["n"] for row in rows if row]:
                yield {
                    "benchmark": benchmark,
                    "system": systems[name]["title"],
                    "n": max(counted),
                    "cells": [
                        "withheld" if metric == "isr" and not valid else _share(row)
                        for metric, row in zip(_COLUMNS, rows, strict=True)
                    ],
                }


def _attacks(shares: Mapping) -> Iterator[dict[str, str]]:
    """Attack success rates; of a leaked bundle it is that of gates trained for harm."""
    places = [(attack, attack, OURS) for attack in ATTACKS]
    places.append(("leaked bundle, gates trained for harm", HELD_OUT, LEAKED))
    for title, benchmark, system in places:
        base, ours = (
            shares.get((benchmark, name, ALL, "attack_success_rate")) for name in (BASE, system)
        )
        if base and ours:
            yield {
                "attack": title,
                "base": _share(base),
                "attacked": _share(ours),
                "uplift": f"{100 * (ours['value'] - base['value']):+.1f}",
            }


def _reliability(results: Mapping[str, Any]) -> list[str]:
    judges = [results["judge"], *results["panel"]["judges"]]
    return [
        f"{judge['name']}: {key} {text}"
        for judge in judges
        for key, text in readable({k: v for k, v in judge.items() if k in _TRIED}, digits=3)
        if not key.endswith(("calibration", "table")) and text != "None"
    ]


def _failures(results: Mapping[str, Any], shares: Mapping) -> Iterator[str]:
    if results["demonstration"]:
        yield "A demonstration: too short a run to judge the method by."
    for row in results["validity"]:
        if not row["passed"]:
            yield (
                f"The judge fails its check ({row['name']}: {100 * row['value']:.1f} %, bound "
                f"{100 * row['bound']:.0f} %), so the informative safe rate is withheld."
            )
    if not results["panel"]["judges"]:
        yield "One small classifier gave all verdicts; no other judge and no person was heard."
    for (benchmark, system, split, metric), ours in shares.items():
        better = METRICS[metric].better if metric in METRICS else 0
        base = shares.get((benchmark, BASE, split, metric))
        if system != OURS or base is None or not better:
            continue
        if (ours["value"] - base["value"]) * better < 0 and (split == ALL or metric == "srr"):
            where = benchmark if split == ALL else f"{benchmark}, {split}"
            yield f"{METRICS[metric].title}, {where}: {_value(ours)}, the base {_value(base)}."


def _missing(results: Mapping[str, Any], shares: Mapping) -> Iterator[str]:
    there = {benchmark for benchmark, *_ in shares}
    for attack in ATTACKS:
        if attack not in there:
            yield f"attacks: {attack}"
    if LEAKED not in results["systems"]:
        yield "what a leaked bundle gives to who trains other gates (system harmful_gates)"
    if LEFT_OUT not in there:
        yield "domains that no expert has seen"
    if not any(metric == _HARMLESS for *_, metric in shares):
        yield "over-refusal of harmless prompts"
    if not any(metric == "accuracy" for *_, metric in shares):
        yield "general ability"


def _share(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{100 * row['value']:.1f} % ({100 * row['low']:.0f} to {100 * row['high']:.0f})"


def _value(row: Row) -> str:
    return f"{row['value']:.3f}" if row["low"] is None else _share(row)
