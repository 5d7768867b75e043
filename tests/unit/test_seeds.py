from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_cli.metrics.seeds import Interval, mean_interval, paired


def test_three_values_by_hand() -> None:
    # Mean 2, sample standard deviation 1; t_{0.975} with two degrees of freedom is 4.302653.
    found = mean_interval([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half == pytest.approx(half, rel=1e-6)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), rel=1e-6)


def test_two_values_by_hand() -> None:
    # Standard deviation |a - b| / sqrt 2; t with one degree of freedom is tan(0.475 pi) = 12.7062.
    found = mean_interval([0.0, 1.0])
    assert found.half == pytest.approx(math.tan(0.475 * math.pi) * 0.5)


def test_one_value_gives_no_interval() -> None:
    assert mean_interval([0.3]) == Interval(0.3, None, None, 1, None)


@pytest.mark.parametrize("value", [0.1, 0.0, -7.3])
def test_equal_values_give_zero_width(value: float) -> None:
    for count in (2, 3, 7):
        assert mean_interval([value] * count) == Interval(value, value, value, count, 0.0)


def test_any_iterable_of_numbers_will_do() -> None:
    assert mean_interval(x for x in (1, 2, 3)) == mean_interval(np.array([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(wrong: float) -> None:
    for values in ([wrong], [0.5, wrong], [wrong, wrong]):
        with pytest.raises(ValueError, match=r"not all values are finite: .*(nan|inf)"):
            mean_interval(values)


def test_no_value_is_refused() -> None:
    with pytest.raises(ValueError, match="there are no values"):
        mean_interval([])


def test_the_interval_covers_the_mean_in_95_of_100() -> None:
    draws = np.random.default_rng(0).normal(size=(1000, 3))
    found = [mean_interval(row) for row in draws]
    assert np.mean([row.low <= 0 <= row.high for row in found]) == pytest.approx(0.95, abs=0.02)


def test_pairs_are_the_seeds_that_both_have() -> None:
    # Differences 0.1, 0.2, 0.3 over seeds 0, 1, 4; seeds 2 and 3 have no counterpart.
    ours, theirs = {0: 1.1, 1: 5.2, 2: 9.0, 4: -0.7}, {4: -1.0, 0: 1.0, 1: 5.0, 3: 2.0}
    found = paired(ours, theirs)
    assert (found.mean, found.count) == (pytest.approx(0.2), 3)
    assert found.half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    swapped = paired(theirs, ours)
    assert (swapped.mean, swapped.half) == (pytest.approx(-found.mean), pytest.approx(found.half))


def test_pairing_takes_out_what_a_seed_does_to_both() -> None:
    luck = {0: 10.0, 1: -4.0, 2: 3.0}
    better = {seed: value + 0.5 for seed, value in luck.items()}
    assert paired(better, luck) == Interval(0.5, 0.5, 0.5, 3, 0.0)
    alone = mean_interval(luck.values()).half
    assert alone is not None
    assert alone > 10


def test_one_seed_in_common_gives_no_interval_and_none_is_refused() -> None:
    assert paired({0: 1.0, 1: 2.0}, {1: 1.5, 2: 0.0}) == Interval(0.5, None, None, 1, None)
    with pytest.raises(ValueError, match="no seed in common: 0, 1 against 2"):
        paired({1: 1.0, 0: 1.0}, {2: 1.0})
    with pytest.raises(ValueError, match="no seed in common: 0 against none"):
        paired({0: 1.0}, {})
    with pytest.raises(ValueError, match="not all values are finite: nan"):
        paired({0: math.nan}, {0: 1.0})
