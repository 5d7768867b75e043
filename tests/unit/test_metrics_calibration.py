from __future__ import annotations

from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlhf_cli.metrics.calibration import (
    binomial_interval,
    brier,
    expected_calibration_error,
    logistic_loss,
    pair_correlation,
    pair_slope,
    reliability,
    right_side,
)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def shares(size: int) -> st.SearchStrategy[np.ndarray]:
    return arrays(float, size, elements=st.floats(0, 1))


def log_loss(probability: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    """The textbook form, for probabilities strictly between 0 and 1."""
    return -outcome * np.log(probability) - (1 - outcome) * np.log(1 - probability)


def test_log_loss_by_hand() -> None:
    # sigma(log 3) = 3/4: -log 3/4, -log 1/4, and their mean
    found = logistic_loss(np.full(3, log(3)), np.array([1.0, 0.0, 0.5]))
    np.testing.assert_allclose(found, [log(4 / 3), log(4), (log(4 / 3) + log(4)) / 2])


def test_right_side_counts_ties_as_half_and_soft_labels_as_shares() -> None:
    found = right_side(np.array([2.0, -1.0, 0.0, 3.0, -3.0]), np.array([1.0, 1.0, 1.0, 0.75, 0.75]))
    assert found.tolist() == [1.0, 0.0, 0.5, 0.75, 0.25]


def test_logistic_loss_is_the_log_loss_of_sigma_and_exact_where_sigma_is_1() -> None:
    d, y = np.array([-2.0, 0.0, 3.0]), np.array([1.0, 0.3, 0.0])
    np.testing.assert_allclose(logistic_loss(d, y), log_loss(sigmoid(d), y))
    # -log sigma(-1000) = log(1 + e^1000) = 1000; the right side of it loses nothing.
    assert logistic_loss(np.array([1e3, 1e4]), np.array([0.0, 1.0])).tolist() == [1e3, 0.0]


def test_brier_by_hand() -> None:
    # (0.8 - 1)^2, (0.8 - 0)^2, (0.8 - 0.5)^2
    np.testing.assert_allclose(brier(np.full(3, 0.8), np.array([1.0, 0.0, 0.5])), [0.04, 0.64, 0.09])


def test_reliability_by_hand() -> None:
    # Confidences .6, .6, .9, .8; the confident side wins: yes, no (p = .4, y = 1), yes, half.
    p, y = np.array([0.6, 0.4, 0.9, 0.2]), np.array([1.0, 1.0, 1.0, 0.5])
    found = reliability(p, y, bins=2)  # [.5, .75), [.75, 1]
    assert found.edges.tolist() == [0.5, 0.75, 1.0]
    assert found.count.tolist() == [2, 2]
    np.testing.assert_allclose(found.predicted, [0.6, 0.85])
    np.testing.assert_allclose(found.observed, [0.5, 0.75])
    # 2/4 * |.5 - .6| + 2/4 * |.75 - .85|
    assert expected_calibration_error(p, y, bins=2) == pytest.approx(0.1)


def test_a_tie_wins_half_and_certainty_is_in_the_last_bin() -> None:
    found = reliability(np.array([0.5, 1.0, 0.0]), np.array([1.0, 1.0, 0.0]), bins=5)
    assert found.count.tolist() == [1, 0, 0, 0, 2]
    assert found.observed[[0, 4]].tolist() == [0.5, 1.0]
    assert np.isnan(found.predicted[1:4]).all()
    assert np.isnan(found.observed[1:4]).all()


@given(shares(12), shares(12), arrays(bool, 12))
@settings(deadline=None, max_examples=50)
def test_the_order_in_which_a_pair_is_listed_changes_nothing(p: np.ndarray, y: np.ndarray, swap: np.ndarray) -> None:
    p = np.round(p, 2) + 0.001  # away from the edges, where 1 - (1 - p) may round into the next bin
    p = np.minimum(p, 0.999)
    other_p, other_y = np.where(swap, 1 - p, p), np.where(swap, 1 - y, y)
    np.testing.assert_allclose(log_loss(other_p, other_y), log_loss(p, y))
    np.testing.assert_allclose(brier(other_p, other_y), brier(p, y), atol=1e-12)
    ours, theirs = reliability(p, y), reliability(other_p, other_y)
    np.testing.assert_array_equal(ours.count, theirs.count)
    np.testing.assert_allclose(ours.observed, theirs.observed, atol=1e-12)


def test_the_fold_is_the_curve_of_both_orders_on_0_to_1() -> None:
    rng = np.random.default_rng(0)
    p, y = rng.random(500), rng.integers(0, 2, 500).astype(float)
    both_p, both_y = np.concatenate([p, 1 - p]), np.concatenate([y, 1 - y])
    place = np.minimum((both_p * 20).astype(int), 19)  # 20 bins on [0, 1]: ten on [1/2, 1]
    gaps = [abs(both_y[place == k].mean() - both_p[place == k].mean()) * (place == k).sum() for k in range(20)]
    assert expected_calibration_error(p, y, bins=10) == pytest.approx(sum(gaps) / 1000)


def test_a_calibrated_model_has_no_error_and_an_overconfident_one_has() -> None:
    rng = np.random.default_rng(1)
    d = rng.normal(0, 1.5, 20000)
    first_won = (rng.random(20000) < sigmoid(d)).astype(float)
    # The winner is listed first, as in preference data: every outcome is 1.
    winner = np.where(first_won == 1, d, -d)
    won = np.ones(20000)
    assert expected_calibration_error(sigmoid(winner), won) < 0.012
    assert expected_calibration_error(sigmoid(3 * winner), won) > 0.1
    assert expected_calibration_error(sigmoid(winner / 3), won) > 0.1
    assert logistic_loss(winner, won).mean() < min(logistic_loss(s * winner, won).mean() for s in (1 / 3, 3))


def test_soft_outcomes_equal_to_the_predictions_are_calibrated_exactly() -> None:
    p = np.random.default_rng(2).random(200)
    assert expected_calibration_error(p, p) == pytest.approx(0, abs=1e-12)


def test_wilson_s_interval_by_hand() -> None:
    # s = 1/2, n = 96, z^2 = 3.84146: half = 1.95996 sqrt(.25/96 + 3.84146/(4 * 96^2)) / (1 + 3.84146/96) = 0.098080
    low, high = binomial_interval(np.array([0.5, 1.0, 0.0]), np.array([96, 10, 10]))
    assert (low[0], high[0]) == (pytest.approx(0.5 - 0.09808, abs=1e-5), pytest.approx(0.5 + 0.09808, abs=1e-5))
    # s = 1: low = 1 / (1 + z^2/n) = 1/1.384146
    assert (low[1], high[1]) == (pytest.approx(1 / 1.384146, abs=1e-5), pytest.approx(1))
    assert (low[2], high[2]) == (pytest.approx(0, abs=1e-12), pytest.approx(1 - 1 / 1.384146, abs=1e-5))


def test_correlation_and_slope_within_pairs_by_hand() -> None:
    # sum d l = 1*2 + 3*(-1) = -1; sum d^2 = 10, sum l^2 = 5
    d, lengths = np.array([1.0, 3.0]), np.array([2.0, -1.0])
    assert pair_correlation(d, lengths) == pytest.approx(-1 / 50**0.5)
    assert pair_slope(d, lengths) == pytest.approx(-1 / 5)


def test_correlation_is_pearson_s_over_both_orders() -> None:
    rng = np.random.default_rng(3)
    d, lengths = rng.normal(1, 2, 50), rng.integers(-20, 30, 50).astype(float)
    both = np.corrcoef(np.concatenate([d, -d]), np.concatenate([lengths, -lengths]))[0, 1]
    assert pair_correlation(d, lengths) == pytest.approx(both)
    assert pair_correlation(0.3 * lengths, lengths) == pytest.approx(1)
    assert pair_correlation(1e-200 * d, lengths) == pytest.approx(both)
    assert pair_slope(0.3 * lengths, lengths) == pytest.approx(0.3)


def test_correlation_of_a_constant_is_none() -> None:
    zeros, ones = np.zeros(3), np.ones(3)
    assert pair_correlation(zeros, ones) is None
    assert pair_correlation(ones, zeros) is None
    assert pair_slope(ones, zeros) is None
    assert pair_slope(zeros, ones) == 0


@pytest.mark.parametrize("function", [brier, reliability, expected_calibration_error])
def test_wrong_input_is_refused(function) -> None:
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\)"):
        function(np.full(2, 0.5), np.ones(3))
    with pytest.raises(ValueError, match="a value of probability is outside"):
        function(np.array([1.5]), np.ones(1))
    with pytest.raises(ValueError, match="a value of probability is outside"):
        function(np.array([np.nan]), np.ones(1))
    with pytest.raises(ValueError, match="a value of outcome is outside"):
        function(np.full(1, 0.5), np.array([-0.1]))


def test_wrong_shapes_and_counts_are_refused() -> None:
    for function in (logistic_loss, pair_correlation, pair_slope, binomial_interval):
        with pytest.raises(ValueError, match=r"shapes \(2,\) and \(1,\)"):
            function(np.zeros(2), np.ones(1))
    with pytest.raises(ValueError, match="one number a pair is needed"):
        brier(np.full((2, 2), 0.5), np.ones((2, 2)))
    with pytest.raises(ValueError, match="0 pairs in 10 bins"):
        reliability(np.zeros(0), np.zeros(0))
    with pytest.raises(ValueError, match="1 pairs in 0 bins"):
        reliability(np.ones(1), np.ones(1), bins=0)
    with pytest.raises(ValueError, match="rests on no pair"):
        binomial_interval(np.ones(1), np.zeros(1))


@pytest.mark.parametrize(("pairs", "floor"), [(44, 0.15), (200, 0.07), (1000, 0.03)])
def test_even_a_calibrated_model_shows_some_ece_on_few_pairs(pairs: int, floor: float) -> None:
    # docs/reward_models.md: the floor of ECE; margins as wide as the survey world's
    rng, found = np.random.default_rng(0), []
    for _ in range(200):
        p = sigmoid(rng.normal(scale=1.3, size=pairs))
        found.append(expected_calibration_error(p, (rng.random(pairs) < p).astype(float)))
    assert np.mean(found) == pytest.approx(floor, abs=0.012)
