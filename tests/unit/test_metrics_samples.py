from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.metrics.samples import best_of, length_correlation, win_rate

# Two prompts, four samples each
REWARDS = np.array([[3.0, 0.0, 1.0, 2.0], [5.0, 5.0, -1.0, 5.0]])
LENGTHS = np.array([[30.0, 3.0, 12.0, 15.0], [7.0, 7.0, 1.0, 9.0]])


# -- best of n ---------------------------------------------------------------------------------------------------------


def test_best_of_by_hand() -> None:
    found = best_of(REWARDS)
    assert list(found) == [1, 2, 4]
    assert found[1].tolist() == pytest.approx([1.5, 3.5])
    # Two of 0, 1, 2, 3: of six pairs one has the maximum 1, two have 2, three have 3: (1 + 4 + 9) / 6.
    # Two of -1, 5, 5, 5: every pair has a 5.
    assert found[2].tolist() == pytest.approx([14 / 6, 5.0])
    assert found[4].tolist() == pytest.approx([3.0, 5.0])


@given(st.integers(1, 7), st.integers(0, 10_000))
@settings(deadline=None, max_examples=40)
def test_best_of_is_the_mean_over_all_subsets(size: int, seed: int) -> None:
    rewards = np.random.default_rng(seed).normal(size=(3, size)).round(1)  # with ties
    found = best_of(rewards)
    assert list(found) == [k for k in (1, 2, 4) if k <= size]
    for k, values in found.items():
        subsets = list(itertools.combinations(range(size), k))
        by_hand = np.mean([rewards[:, subset].max(-1) for subset in subsets], axis=0)
        assert values == pytest.approx(by_hand)


def test_best_of_is_unbiased_and_rises_with_k() -> None:
    # The larger of two uniform numbers on [0, 1] has mean 2/3, the largest of four 4/5.
    found = best_of(np.random.default_rng(0).uniform(size=(4000, 6)))
    for k, mean in {1: 1 / 2, 2: 2 / 3, 4: 4 / 5}.items():
        assert found[k].mean() == pytest.approx(mean, abs=0.01)
    assert (found[1] <= found[2]).all()
    assert (found[2] <= found[4]).all()


def test_best_of_does_not_depend_on_the_order_of_samples() -> None:
    assert best_of(REWARDS[:, ::-1])[2].tolist() == best_of(REWARDS)[2].tolist()
    assert list(best_of(np.zeros((0, 3)))) == [1, 2]


def test_best_of_many_samples_stays_finite() -> None:
    found = best_of(np.full((2, 1500), 1e4))
    assert max(found) == 1024
    assert all(values.tolist() == pytest.approx([1e4, 1e4]) for values in found.values())


def test_best_of_refuses_what_is_no_table_of_samples() -> None:
    with pytest.raises(ValueError, match=r"rewards has shape \(3,\): one row a prompt is needed, \(P, S\)"):
        best_of(np.zeros(3))
    with pytest.raises(ValueError, match="there are no samples"):
        best_of(np.zeros((3, 0)))


# -- reward and length -------------------------------------------------------------------------------------------------


def test_length_correlation_by_hand() -> None:
    # Deviations from the prompts' means. Rewards: 1, -1, 0 and 3, 0, -3; lengths: 2, -1, -1 and 1, 1, -2.
    rewards = np.array([[2.0, 0.0, 1.0], [10.0, 7.0, 4.0]])
    lengths = np.array([[5.0, 2.0, 2.0], [101.0, 101.0, 98.0]])
    # sum d l = 2 + 1 + 0 + 3 + 0 + 6 = 12; sum d^2 = 2 + 18; sum l^2 = 6 + 6
    assert length_correlation(rewards, lengths) == pytest.approx(12 / (20 * 12) ** 0.5)


def test_length_correlation_is_within_prompts() -> None:
    longer_is_worse = -LENGTHS
    assert length_correlation(longer_is_worse, LENGTHS) == pytest.approx(-1.0)
    shifted = longer_is_worse + np.array([[1000.0], [-1000.0]])  # a constant a prompt says nothing
    assert length_correlation(shifted, LENGTHS) == pytest.approx(-1.0)


def test_length_correlation_is_undefined_where_nothing_varies_within_prompts() -> None:
    constant = np.array([[0.1, 0.1, 0.1], [7.3, 7.3, 7.3]])  # whose means are not exactly 0.1 and 7.3
    varying = np.array([[1.0, 2.0, 3.0], [1.0, 0.0, 2.0]])
    assert length_correlation(constant, varying) is None
    assert length_correlation(varying, constant) is None
    assert length_correlation(varying[:, :1], varying[:, :1]) is None


def test_length_correlation_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"rewards \(2, 4\), lengths \(4, 2\)"):
        length_correlation(REWARDS, LENGTHS.T)


# -- win rate ----------------------------------------------------------------------------------------------------------


def test_win_rate_by_hand() -> None:
    theirs = np.array([[2.0, 0.0, 5.0, 2.0], [4.0, 4.0, -2.0, 4.0]])
    assert win_rate(REWARDS, theirs).tolist() == [(1 + 0.5 + 0 + 0.5) / 4, 1.0]


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=30)
def test_win_rates_of_both_sides_sum_to_1(seed: int) -> None:
    ours, theirs = np.random.default_rng(seed).integers(-2, 3, size=(2, 3, 5)).astype(float)
    assert win_rate(ours, theirs) + win_rate(theirs, ours) == pytest.approx(1.0)
    assert win_rate(ours, ours).tolist() == [0.5] * 3


def test_a_missing_score_is_neither_won_nor_lost() -> None:
    assert np.isnan(win_rate(np.array([[1.0, np.nan]]), np.zeros((1, 2)))).all()


def test_win_rate_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"ours \(2, 4\), theirs \(2, 3\)"):
        win_rate(REWARDS, REWARDS[:, :3])
    with pytest.raises(ValueError, match=r"ours has shape \(4,\)"):
        win_rate(REWARDS[0], REWARDS[1])
