import math

import numpy as np
import pytest
from scipy.stats import bootstrap, permutation_test
from statsmodels.stats.power import TTestPower

from safemoe_jax.evaluation import statistics


def test_wilson_is_the_score_interval():
    # p = 8/10, z = 1.96: centre (p + z^2/2n) / (1 + z^2/n), by hand.
    interval = statistics.wilson([True] * 8 + [False] * 2)
    assert interval.value == 0.8
    assert interval.low == pytest.approx(0.4902, abs=1e-4)
    assert interval.high == pytest.approx(0.9433, abs=1e-4)


def test_wilson_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no outcomes"):
        statistics.wilson([])


def test_paired_difference_resamples_whole_groups():
    # Ten copies of two prompts: without groups the interval would be that of 20 prompts.
    first, second = [[1] * 10 + [0] * 10], [[0] * 20]
    grouped = statistics.paired_difference(first, second, [0] * 10 + [1] * 10, seed=0).absolute
    alone = statistics.paired_difference(first, second, range(20), seed=0).absolute
    assert grouped.value == alone.value == 0.5
    assert (grouped.low, grouped.high) == (0.0, 1.0)
    assert 0.2 < alone.low < 0.4 and 0.6 < alone.high < 0.8


def test_with_one_seed_it_is_scipys_paired_bootstrap():
    rng = np.random.default_rng(0)
    first_P, second_P = rng.random((2, 80)) < [[0.7], [0.5]]
    ours = statistics.paired_difference(first_P[None], second_P[None], range(80), seed=0)
    theirs = bootstrap(
        (first_P, second_P),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True, vectorized=True, method="percentile", rng=np.random.default_rng(1),
    )  # fmt: skip
    assert ours.absolute.low == pytest.approx(theirs.confidence_interval.low, abs=0.015)
    assert ours.absolute.high == pytest.approx(theirs.confidence_interval.high, abs=0.015)
    assert ours.spread / 80**0.5 == pytest.approx(theirs.standard_error, rel=0.05)
    # The p-value: near that of swapping the two systems at random, prompt by prompt.
    swapped = permutation_test(
        (first_P, second_P),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        permutation_type="samples", vectorized=True, rng=np.random.default_rng(1),
    )  # fmt: skip
    assert ours.p == pytest.approx(swapped.pvalue, abs=0.02)


def test_paired_difference_weighs_groups_by_their_prompts():
    found = statistics.paired_difference([[1, 1, 1, 0]], [[0, 0, 0, 0]], [0, 0, 0, 1], seed=0)
    assert found.absolute.value == 0.75
    weighted = statistics.paired_difference([[1, 0]], [[0, 0]], [0, 1], seed=0, weights_P=[1, 4])
    assert weighted.absolute.value == 0.2


def test_a_seed_is_drawn_for_all_prompts_at_once():
    # Two seeds that differ on all prompts: more prompts do not make that any surer.
    first_SP = np.repeat([[1.0], [0.0]], 200, axis=1)
    found = statistics.paired_difference(first_SP, np.zeros((2, 200)), range(200), seed=0)
    assert (found.absolute.value, found.absolute.low, found.absolute.high) == (0.5, 0.0, 1.0)


def test_a_prompt_without_one_of_its_outcomes_makes_no_pair():
    first_SP, second_SP = [[1.0, np.nan, 0.0, 1.0]], [[0.0, 1.0, 0.0, np.nan]]
    found = statistics.paired_difference(first_SP, second_SP, [0, 1, 2, 3], seed=0)
    assert found.absolute.value == 0.5
    assert found.groups == 2


def test_the_relative_difference_is_the_ratio_of_means():
    first_P, second_P = [1] * 60 + [0] * 40, [1] * 40 + [0] * 60
    found = statistics.paired_difference([first_P], [second_P], range(100), seed=0)
    assert found.relative.value == pytest.approx(0.5)
    assert 0.2 < found.relative.low < 0.5 < found.relative.high < 1.0
    none = statistics.paired_difference([[1, 0, 1]], [[0, 0, 0]], range(3), seed=0)
    assert none.relative is None


def test_paired_difference_needs_two_groups():
    with pytest.raises(ValueError, match="1 group"):
        statistics.paired_difference([[1, 0]], [[0, 0]], [3, 3], seed=0)


def test_equal_systems_have_no_difference():
    outcomes = [[1, 0, 1, 1]]
    found = statistics.paired_difference(outcomes, outcomes, range(4), seed=0)
    assert found.absolute.value == 0.0
    assert found.absolute.low < 0.0 < found.absolute.high
    assert found.p == 1.0


def test_clustered_mean_widens_what_is_not_independent():
    values = [[1] * 30 + [0] * 30]
    alone = statistics.clustered_mean(values, range(60), seed=0)
    grouped = statistics.clustered_mean(values, np.arange(60) // 10, seed=0)
    assert alone.value == grouped.value == 0.5
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)


def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs():
    first, second = np.array([1] * 6 + [0] + [1] * 5), np.array([0] * 6 + [1] + [1] * 5)
    # 1 of 7 discordant pairs: 2 * (C(7,0) + C(7,1)) / 2^7.
    assert statistics.mcnemar_p(first, second) == pytest.approx(2 * 8 / 128)


def test_holm_by_hand():
    # Sorted .01, .03, .04 are multiplied by 3, 2, 1; none may be below the one before it.
    assert statistics.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert statistics.holm([]) == []


def test_power_and_what_can_be_detected():
    # Paired outcomes of which 35 % differ, +15 points: z is about 0.15 * sqrt(n) / spread - 1.96.
    spread = statistics.discordant_spread(0.35, 0.15)
    assert spread == pytest.approx(0.5723, abs=1e-4)
    assert statistics.power(0.15, spread, 62, rates=True) == pytest.approx(0.53, abs=0.02)
    assert 0.99 < statistics.power(0.15, spread, 300, rates=True) < 1.0
    assert statistics.power(0.15, 0.05, 300, rates=False) == pytest.approx(1.0)  # 52 errors
    found = statistics.detectable(spread, 300, rates=True)
    assert statistics.power(found, spread, 300, rates=True) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("groups", [2, 7, 73, 300])  # at 73 statsmodels' own search fails
def test_power_is_that_of_the_noncentral_t(groups):
    effect = statistics.detectable(1.0, groups, rates=False)
    assert statistics.power(effect, 1.0, groups, rates=False) == pytest.approx(0.8)
    effect = 1 / math.sqrt(groups)  # one standard error
    expected = TTestPower().power(effect, groups, 0.05)
    assert statistics.power(effect, 1.0, groups, rates=False) == pytest.approx(expected, abs=1e-9)


def test_that_no_prompt_came_out_differently_proves_little():
    """Seven prompts, all alike: neither certain of no difference, nor able to find one."""
    alike = np.ones((1, 7))
    found = statistics.paired_difference(alike, alike, np.arange(7), 0)
    assert found.spread == 0 and found.p == 1
    unseen = statistics.wilson([False] * 7).high
    assert found.absolute == statistics.Interval(0.0, -unseen, unseen)
    assert found.relative == found.absolute  # of a rate of 1
    assert statistics.power(0.15, found.spread, 7, rates=True) < 0.2
    least = statistics.detectable(found.spread, 7, rates=True)
    assert least > 0.5
    assert statistics.power(least, found.spread, 7, rates=True) == pytest.approx(0.8, abs=1e-3)
    both = statistics.paired_difference(np.ones((1, 2)), np.zeros((1, 2)), np.arange(2), 0)
    assert both.p == 0.5  # two prompts that go one way, as two tosses of a coin may
    # Of likelihoods that are the same to the bit (empty experts) there is nothing to doubt.
    same = statistics.paired_difference(2.5 * alike, 2.5 * alike, np.arange(7), 0)
    assert same.absolute == statistics.Interval(0.0, 0.0, 0.0)
