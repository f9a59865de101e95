"""Intervals at the ends, at small n, and against published values. Their coverage: tests/benchmarks."""

import numpy as np
import pytest
from scipy.stats import binomtest

from diffusionad_hf.evaluation.intervals import auroc_interval, bootstrap_interval, exact_interval, show


@pytest.mark.parametrize(("found", "n"), [(0, 100), (3, 100), (100, 100), (0, 1), (1, 1), (7, 10)])
def test_a_rate_has_the_exact_binomial_interval(found, n):
    expected = binomtest(found, n).proportion_ci(0.95, method="exact")
    assert exact_interval(found / n, n) == pytest.approx([expected.low, expected.high])


def test_none_of_100_missed_leaves_room_for_3_6_percent():
    assert exact_interval(0.0, 100) == [0.0, pytest.approx(0.0362, abs=1e-4)]


@pytest.mark.parametrize("n", [2, 10, 100])
def test_a_perfect_auroc_is_not_certain(n):
    low, high = auroc_interval(1.0, np.arange(n), np.arange(n) + n)
    assert high == 1.0 and 0 < low < 1 - 1.5 / n
    worst = auroc_interval(0.0, np.arange(n) + n, np.arange(n))
    assert worst == pytest.approx([0.0, 1 - low])


def test_a_single_image_of_a_kind_says_nothing_of_the_others():
    assert auroc_interval(0.7, np.arange(10), np.array([6.5])) == [0.0, 1.0]
    assert bootstrap_interval(0.9, np.full(10, 0.9), 1) == [0.0, 1.0]


def test_equal_scores_are_worth_chance_with_room_on_both_sides():
    low, high = auroc_interval(0.5, np.ones(10), np.ones(10))
    assert 0 < low < 0.3 and 0.7 < high < 1


def test_a_kind_of_defect_that_is_missed_widens_the_interval_of_auroc():
    normal, spread = np.linspace(0, 1, 50), np.linspace(0.85, 1.05, 10)
    missed = np.r_[np.full(45, 2.0), np.full(5, -1.0)]  # 0.9, all or nothing
    low, high = auroc_interval(0.9, normal, missed)
    other_low, other_high = auroc_interval(0.9, normal, np.tile(spread, 5))
    assert high - low > 1.2 * (other_high - other_low)


@pytest.mark.parametrize("value", [0.0, 1e-9, 0.3, 0.999999, 1.0])
def test_a_bootstrap_without_spread_still_leaves_doubt_and_holds_the_value(value):
    low, high = bootstrap_interval(value, np.full(20, value), 20)
    assert 0 <= low <= value <= high <= 1 and high - low > 0.03


def test_decimals_follow_the_width():
    def shown(key, value, *interval):
        return show({key: value, "intervals": {key: list(interval)}}, key)

    assert shown("aupro_30", 0.7345, 0.5123, 0.9456) == "0.73 [0.51, 0.95]"
    assert shown("aupro_30", 0.9944, 0.991, 0.9954) == "0.9944 [0.9910, 0.9954]"
    assert shown("image_auroc", 1.0, 0.9815, 1.0) == "1.000 [0.982, 1.000]"
    assert shown("miss_rate", 0.0, 0.0, 0.0362) == "0.0 % [0.0 %, 3.6 %]"
    assert shown("miss_rate", 0.25, 0.032, 0.651) == "25 % [3 %, 65 %]"
    assert shown("image_auroc", 1.0, 1.0, 1.0) == "1.000 [1.000, 1.000]"  # of an evaluation before 0.2
    assert shown("image_auroc", 0.98765) == "0.988"
