"""Uncertainty of shares and of paired differences; the methods are statsmodels' and scipy's."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(outcomes: Sequence[bool]) -> Interval:
    """The share of true outcomes with its Wilson score interval; outcomes are independent.

    Raises:
      ValueError: without outcomes.
    """
    if not len(outcomes):
        raise ValueError("no outcomes: a share of nothing is not defined")
    hits = int(np.sum(outcomes))
    low, high = proportion_confint(hits, len(outcomes), alpha=1 - CONFIDENCE, method="wilson")
    return Interval(hits / len(outcomes), float(low), float(high))


def paired_difference(
    first: Sequence[float], second: Sequence[float], groups: Sequence[int], seed: int
) -> Interval:
    """Mean of `first - second` over the same prompts, bootstrapped by whole groups of prompts.

    Percentile interval of 9,999 resamples: near-duplicate prompts stay together, since they are not
    independent (Miller, "Adding Error Bars to Evals", arXiv 2411.00640, section 2).

    Args:
      first, second: outcomes of two systems, prompt by prompt.
      groups: each prompt's group.
      seed: of the resampling.

    Raises:
      ValueError: on fewer than two groups.
    """
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    _, index = np.unique(groups, return_inverse=True)
    sums, sizes = np.bincount(index, difference), np.bincount(index)
    if len(sums) < 2:
        raise ValueError(f"{len(sums)} group of prompts; a bootstrap by groups needs two or more")
    resampled = bootstrap(
        (sums, sizes),
        lambda sums, sizes, axis: sums.sum(axis=axis) / sizes.sum(axis=axis),
        paired=True,
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = resampled.confidence_interval
    return Interval(float(difference.mean()), float(interval.low), float(interval.high))


def mcnemar_p(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact two-sided McNemar test of two systems' binary outcomes on the same prompts."""
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    table = [
        [np.sum(first & second), np.sum(first & ~second)],
        [np.sum(~first & second), np.sum(~first & ~second)],
    ]
    return float(mcnemar(table, exact=True).pvalue)
