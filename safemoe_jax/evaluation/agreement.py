"""How two judges of the same answers agree, people among them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, cohen_kappa_score, roc_auc_score

_BINS = 5


def against_labels(
    labels: Sequence[bool], found: Sequence[bool | None], chance: Sequence[float | None]
) -> dict[str, Any]:
    """How a judge agrees with people.

    Args:
      labels: what people said of each answer.
      found: what the judge says, None where nothing.
      chance: the probability that it gives, None where it gives none.

    Returns:
      {n, missing, kappa, table, F1, AUC, Brier, calibration}: `table` as `agreement` has it;
      calibration are pairs (mean probability, share of labels) of five equally filled bins. What
      cannot be computed is None.
    """
    compared = agreement(labels, found)
    (_, alarms), (missed, hits) = compared["table"]
    said = [(p, label) for p, label in zip(chance, labels, strict=True) if p is not None]
    auc = brier = curve = None
    if len({label for _, label in said}) == 2:
        p, truth = map(np.array, zip(*said, strict=True))
        auc, brier = float(roc_auc_score(truth, p)), float(brier_score_loss(truth, p))
        shares, means = calibration_curve(truth, p, n_bins=_BINS, strategy="quantile")
        curve = [list(pair) for pair in zip(means.tolist(), shares.tolist(), strict=True)]
    return {
        **compared,
        "missing": len(labels) - compared["n"],
        "F1": 2 * hits / (2 * hits + alarms + missed) if hits + alarms + missed else None,
        "AUC": auc,
        "Brier": brier,
        "calibration": curve,
    }


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
