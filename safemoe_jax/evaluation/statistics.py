"""Uncertainty of shares and of paired differences; tests and their corrections.

Methods are statsmodels' and scipy's where they have them. Theirs is no bootstrap over two crossed
factors, prompts and training seeds; that one is here.

Shape letters: S training seeds, P prompts, G groups of prompts, N resamples.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.stats import chi, norm, t
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

SIGNIFICANCE = 0.05
RESAMPLES = 9_999


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """What separates two systems on the same prompts.

    Attributes:
      absolute: mean of first - second. Where outcomes are true or false and all resamples are
        alike, its interval is as wide as Wilson's bound of what was not seen.
      relative: mean of first over mean of second, less 1; None where second's mean is 0, in the
        data or in a resample.
      p: two-sided, of no difference; the interval of `absolute` ends at 0 where it is 0.05, unless
        all resamples are alike: then that of the exact sign test over groups.
      spread: standard deviation over groups, such that spread / sqrt(groups) is the standard error
        that prompts alone would give; for power.
      groups: of prompts with pairs.
    """

    absolute: Interval
    relative: Interval | None
    p: float
    spread: float
    groups: int


def wilson(outcomes: Sequence[bool] | np.ndarray) -> Interval:
    """The share of true outcomes with its Wilson score interval; outcomes are independent.

    Raises:
      ValueError: without outcomes.
    """
    if not len(outcomes):
        raise ValueError("no outcomes: a share of nothing is not defined")
    hits = int(np.sum(outcomes))
    low, high = proportion_confint(hits, len(outcomes), alpha=SIGNIFICANCE, method="wilson")
    return Interval(hits / len(outcomes), float(low), float(high))


def clustered_mean(
    values_SP: np.ndarray,
    groups_P: ArrayLike,
    seed: int,
    weights_P: np.ndarray | None = None,
) -> Interval:
    """Mean over seeds and prompts that are not independent, bootstrapped as `paired_difference` is.

    Args:
      values_SP: NaN where there is none.
      groups_P, seed, weights_P: as there.

    Raises:
      ValueError: on fewer than two groups with values.
    """
    values_SP = np.asarray(values_SP, np.float64)
    sums_SG, weights_SG = _by_group(values_SP, groups_P, _weights(values_SP, weights_P))
    resampled_N = _resampled(sums_SG, seed) / _resampled(weights_SG, seed)
    return _interval(sums_SG.sum() / weights_SG.sum(), resampled_N)


def paired_difference(
    first_SP: np.ndarray,
    second_SP: np.ndarray,
    groups_P: ArrayLike,
    seed: int,
    weights_P: np.ndarray | None = None,
) -> Difference:
    """How far two systems differ on the same prompts, by a paired bootstrap at two levels.

    A resample draws whole groups of prompts, since near-duplicates, or prompts of one objective or
    template, are not independent (Miller, "Adding Error Bars to Evals", arXiv 2411.00640, sections
    2 and 4), and within it training seeds. One draw of seeds serves all groups of a resample: a
    seed is one trained model, which does well or ill on all prompts alike (Owen, "The pigeonhole
    bootstrap", Annals of Applied Statistics 1(2), 2007). Percentile intervals of 9,999 resamples.

    Args:
      first_SP, second_SP: outcomes, NaN where there is none; a pair counts where both are there.
      groups_P: each prompt's group.
      seed: of the resampling.
      weights_P: what each prompt counts for (tokens, of a mean over tokens); equally by default.

    Raises:
      ValueError: on fewer than two groups with pairs.
    """
    first_SP, second_SP = np.asarray(first_SP, np.float64), np.asarray(second_SP, np.float64)
    weights_P = _weights(first_SP, weights_P)
    unpaired_SP = np.isnan(first_SP) | np.isnan(second_SP)
    (first_SG, weights_SG), (second_SG, _) = (
        _by_group(np.where(unpaired_SP, np.nan, side_SP), groups_P, weights_P)
        for side_SP in (first_SP, second_SP)
    )
    first_N, second_N, weights_N = (
        _resampled(table_SG, seed) for table_SG in (first_SG, second_SG, weights_SG)
    )
    weight, groups = weights_SG.sum(), weights_SG.shape[1]
    difference = (first_SG.sum() - second_SG.sum()) / weight
    resampled_N = (first_N - second_N) / weights_N
    relative = None
    if second_N.min() > 0:
        relative = _interval(first_SG.sum() / second_SG.sum() - 1, first_N / second_N - 1)
    tail = min(np.sum(resampled_N <= 0), np.sum(resampled_N >= 0))
    # How far each group pulls the mean, such that the standard error is spread / sqrt(groups).
    pull_G = (first_SG - second_SG - difference * weights_SG).sum(axis=0) * groups / weight
    spread, absolute = float(np.std(pull_G, ddof=1)), _interval(difference, resampled_N)
    p = min(1.0, 2 * (int(tail) + 1) / (RESAMPLES + 1))
    paired = np.stack([first_SP, second_SP])[:, ~unpaired_SP]
    if absolute.low == absolute.high and np.isin(paired, (0, 1)).all():
        unseen, difference = wilson(np.zeros(groups, bool)).high, float(difference)
        absolute = Interval(
            difference, max(-1.0, difference - unseen), min(1.0, difference + unseen)
        )
        p = max(p, 2.0 ** (1 - groups)) if difference else 1.0  # the exact sign test
        if relative:
            rate = float(second_SG.sum() / weight)
            relative = Interval(relative.value, absolute.low / rate, absolute.high / rate)
    return Difference(
        absolute,
        relative,
        p=p,
        spread=spread,
        groups=groups,
    )


def mcnemar_p(first: ArrayLike, second: ArrayLike) -> float:
    """Exact two-sided McNemar test of two systems' binary outcomes on the same prompts.

    It takes prompts for independent, and one seed's.
    """
    one, other = np.asarray(first, bool), np.asarray(second, bool)
    table = [
        [np.sum(one & other), np.sum(one & ~other)],
        [np.sum(~one & other), np.sum(~one & ~other)],
    ]
    return float(mcnemar(table, exact=True).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of one family of tests, corrected for their number (Holm 1979)."""
    if len(p_values) < 2:
        return list(p_values)
    return multipletests(p_values, method="holm")[1].tolist()


def power(difference: float, spread: float, groups: int, *, rates: bool) -> float:
    """The probability that a true difference would be found: two-sided paired t-test at 5 %.

    Args:
      difference: the true mean of first - second.
      spread: standard deviation over groups of prompts (`Difference.spread`); of independent
        prompts of which a share d comes out differently it is sqrt(d - difference^2).
      groups: how many there are.
      rates: whether they are rates. These differ on no fewer prompts than by how much, so the
        spread has a least value, whatever was seen.
    """
    if rates:
        spread = max(spread, discordant_spread(abs(difference), difference))
    if spread == 0:
        return 1.0
    # By the noncentral t distribution, which SciPy's and statsmodels' own return NaN of in places:
    # a normal over the samples' spread, whose distribution is integrated.
    degrees, shift = groups - 1, math.sqrt(groups) * abs(difference) / spread
    critical = t(degrees).ppf(1 - SIGNIFICANCE / 2)
    samples = chi(degrees, scale=1 / math.sqrt(degrees))
    return float(
        samples.expect(lambda x: norm.cdf(shift - critical * x) + norm.cdf(-shift - critical * x))
    )


def detectable(spread: float, groups: int, target: float = 0.8, *, rates: bool) -> float:
    """The smallest true difference that would be found with probability `target`; see `power`."""
    if not spread and not rates:
        return 0.0
    effect = _detectable_effect(groups, target)
    least = effect**2 / (1 + effect**2) if rates else 0.0  # where all that differ differ one way
    return max(least, effect * spread)


@functools.lru_cache
def _detectable_effect(groups: int, target: float) -> float:
    """The same in units of the spread; finding it takes a search."""
    return float(brentq(lambda effect: power(effect, 1.0, groups, rates=False) - target, 0, 100))


def discordant_spread(share: float, difference: float) -> float:
    """The spread of paired outcomes of independent prompts.

    Args:
      share: of prompts on which the two systems come out differently.
      difference: of their rates; at most `share`.
    """
    return math.sqrt(share - difference**2)


def _by_group(
    values_SP: np.ndarray, groups_P: ArrayLike, weights_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted sums and weights [S, G] of what is not NaN; groups without anything are left out."""
    names, index_P = np.unique(np.asarray(groups_P), return_inverse=True)
    member_PG = np.eye(len(names))[index_P]
    there_SP = ~np.isnan(values_SP)
    sums_SG = np.where(there_SP, values_SP, 0.0) * weights_P[None] @ member_PG
    weights_SG = there_SP * weights_P[None] @ member_PG
    kept = weights_SG.any(axis=0)
    if kept.sum() < 2:
        raise ValueError(f"{kept.sum()} group of prompts; a bootstrap by groups needs two or more")
    return sums_SG[:, kept], weights_SG[:, kept]


def _resampled(table_SG: np.ndarray, seed: int) -> np.ndarray:
    """Sums of the table over drawn seeds and groups, [N]; the same draws for the same seed."""
    times_NS, times_NG = _draws(*table_SG.shape, seed)
    return np.sum(times_NS * (times_NG @ table_SG.T), axis=1)


@functools.lru_cache(maxsize=4)
def _draws(seeds: int, groups: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each resample takes each seed, [N, S], and each group, [N, G]."""
    rng = np.random.default_rng(seed)
    times_NS, times_NG = (
        rng.multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float64)
        for count in (seeds, groups)
    )
    return times_NS, times_NG


def _weights(values_SP: np.ndarray, weights_P: np.ndarray | None) -> np.ndarray:
    return np.ones(values_SP.shape[1]) if weights_P is None else np.asarray(weights_P, np.float64)


def _interval(value: float, resampled_N: np.ndarray) -> Interval:
    tail = SIGNIFICANCE / 2
    low, high = np.quantile(resampled_N, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))
