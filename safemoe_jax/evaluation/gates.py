"""What a router did while it answered.

Shape letters: T tokens of an answer, L layers, E experts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_DIGITS = 5


def gate_statistics(gates_TLE: np.ndarray, has_null: bool) -> dict[str, Any]:
    """One answer's statistics, as they stand in its row.

    Args:
      gates_TLE: each token's gates.
      has_null: whether what the gates lack to 1 is the share of no expert ("softmax_null").

    Returns:
      gates_layers, the mean gate, and mass_layers, the mean magnitude, both [L][E]; entropy, in
      nats, of the magnitudes' shares, over all tokens and layers with any; null, the mean share of
      no expert. What is not defined is None.
    """
    tokens, layers, experts = gates_TLE.shape
    gates_TLE = gates_TLE.astype(np.float64)
    mass_TLE = np.abs(gates_TLE)
    total_TL = mass_TLE.sum(axis=-1)
    share = mass_TLE[total_TL > 0] / total_TL[total_TL > 0][:, None]
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1.0)), axis=-1)
    zero_LE = np.zeros((layers, experts))
    return {
        "gates_layers": (gates_TLE.mean(axis=0) if tokens else zero_LE).round(_DIGITS).tolist(),
        "mass_layers": (mass_TLE.mean(axis=0) if tokens else zero_LE).round(_DIGITS).tolist(),
        "entropy": float(entropy.mean()) if len(entropy) else None,
        "null": float((1 - gates_TLE.sum(axis=-1)).mean()) if has_null and tokens else None,
    }


def router_rows(
    answers: Sequence[Mapping[str, Any]], domains: Sequence[str]
) -> list[dict[str, Any]]:
    """The same over all answers of a system to a benchmark; answers without gates are passed over.

    Args:
      answers: rows of answers.jsonl.
      domains: of the experts, in their order.

    Returns:
      rows of results.json; means are over tokens.
    """
    places: dict[tuple[str, int, str, str], list[Mapping[str, Any]]] = {}
    for row in answers:
        if "mass_layers" in row and row["num_tokens"]:
            about = (row["system"], row["seed"], row["fold"], row["benchmark"])
            places.setdefault(about, []).append(row)
    rows = []
    for (system, seed, fold, benchmark), mine in places.items():
        experts = [domain for domain in domains if domain != fold]
        weights = [row["num_tokens"] for row in mine]
        argmax: dict[str, dict[str, int]] = {}
        for row in mine:
            mass_E = np.mean(row["mass_layers"], axis=0)
            if mass_E.max() > 0:
                counts = argmax.setdefault(row["domain"], dict.fromkeys(experts, 0))
                counts[experts[int(mass_E.argmax())]] += 1
        rows.append(
            {
                "system": system,
                "seed": seed,
                "fold": fold,
                "benchmark": benchmark,
                "experts": experts,
                "gates_LE": _mean(mine, "gates_layers", weights),
                "mass_LE": _mean(mine, "mass_layers", weights),
                "entropy": _mean(mine, "entropy", weights),
                "null": _mean(mine, "null", weights),
                "argmax": argmax,
            }
        )
    return rows


def _mean(rows: Sequence[Mapping[str, Any]], key: str, weights: Sequence[int]) -> Any:
    found = [(row[key], weight) for row, weight in zip(rows, weights, strict=True)]
    known = [pair for pair in found if pair[0] is not None]
    if not known:
        return None
    values, weights = zip(*known, strict=True)
    return np.average(values, axis=0, weights=weights).round(_DIGITS).tolist()
