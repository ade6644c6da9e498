import numpy as np
import pytest

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
    first, second = [1] * 10 + [0] * 10, [0] * 20
    grouped = statistics.paired_difference(first, second, [0] * 10 + [1] * 10, seed=0)
    alone = statistics.paired_difference(first, second, range(20), seed=0)
    assert grouped.value == alone.value == 0.5
    assert (grouped.low, grouped.high) == (0.0, 1.0)
    assert 0.2 < alone.low < 0.4 and 0.6 < alone.high < 0.8


def test_paired_difference_weighs_groups_by_their_prompts():
    interval = statistics.paired_difference([1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1], seed=0)
    assert interval.value == 0.75


def test_paired_difference_needs_two_groups():
    with pytest.raises(ValueError, match="1 group"):
        statistics.paired_difference([1, 0], [0, 0], [3, 3], seed=0)


def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs():
    first, second = np.array([1] * 6 + [0] + [1] * 5), np.array([0] * 6 + [1] + [1] * 5)
    # 1 of 7 discordant pairs: 2 * (C(7,0) + C(7,1)) / 2^7.
    assert statistics.mcnemar_p(first, second) == pytest.approx(2 * 8 / 128)
