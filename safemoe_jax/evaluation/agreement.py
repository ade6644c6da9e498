"""How two judges of the same answers agree, people among them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, cohen_kappa_score

from safemoe_jax.evaluation.verdicts import Verdict

_BINS = 5


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
