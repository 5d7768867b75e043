"""Length calibration: what LOWESS says length explains goes, the mean of the chosen responses stays."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.errors import DataError, RunError
from rlhf_cli.models.calibration import CALIBRATION_FILE, MIN_POINTS, LengthCalibration, fit_length_calibration

SMALL = LengthCalibration(lengths=(2.0, 4.0, 8.0), offsets=(-1.0, 1.0, 0.0))


def drawn(seed: int, size: int, longest: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Return lengths of at least two kinds and scores without any relation to them."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, size).astype(float)
    lengths[:2] = 1, longest
    return lengths, random.normal(size=size)


def calibrated(lengths: np.ndarray, scores: np.ndarray, fitted: LengthCalibration | None = None) -> np.ndarray:
    fitted = fitted or fit_length_calibration(lengths, scores)
    return scores - np.interp(lengths, fitted.lengths, fitted.offsets)


def correlation(lengths: np.ndarray, scores: np.ndarray) -> float:
    return float(np.corrcoef(lengths, scores)[0, 1])


def test_offset_is_linear_between_knots_and_constant_beyond() -> None:
    lengths = torch.tensor([[1, 2, 3], [6, 8, 99]])
    found = SMALL.offset(lengths)
    # halfway from -1 to 1, then halfway from 1 to 0
    torch.testing.assert_close(found, torch.tensor([[-1.0, -1.0, 0.0], [0.5, 0.0, 0.0]]))
    assert found.dtype == torch.float32


def test_local_fit_by_hand() -> None:
    # frac = 0.5 of 20 responses on lengths 1..20: ten neighbours of length 1 reach to 10, radius 9; the weights are
    # (1 - (d / 9)^3)^3, and the fit at 1 is the intercept of their weighted least squares.
    lengths = np.arange(1, 21, dtype=float)
    scores = np.sqrt(lengths)
    fitted = fit_length_calibration(lengths, scores, frac=0.5)
    near = lengths[:10]
    weight = (1 - ((near - 1) / 9) ** 3) ** 3
    slope_first = np.polyfit(near - 1, scores[:10], 1, w=np.sqrt(weight))
    near20 = lengths[10:]
    weight20 = (1 - ((20 - near20) / 9) ** 3) ** 3
    slope_last = np.polyfit(near20 - 20, scores[10:], 1, w=np.sqrt(weight20))
    assert fitted.offsets[-1] - fitted.offsets[0] == pytest.approx(slope_last[1] - slope_first[1], abs=1e-9)


def test_three_lengths_only() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(3, 6, 1000).astype(float)
    scores = 2 * lengths + random.normal(size=1000)
    fitted = fit_length_calibration(lengths, scores)
    assert fitted.lengths == (3.0, 4.0, 5.0)
    steps = np.diff(fitted.offsets)
    assert steps == pytest.approx([2, 2], abs=0.3)
    assert abs(correlation(lengths, calibrated(lengths, scores, fitted))) < 0.02


def test_two_lengths_are_brought_to_one_mean() -> None:
    lengths, scores = np.repeat([5.0, 9.0], 10), np.r_[np.arange(10.0), np.arange(10.0) + 7]
    after = calibrated(lengths, scores)
    assert after[:10].mean() == pytest.approx(after[10:].mean())
    assert after.mean() == pytest.approx(scores.mean())


def test_a_length_that_most_responses_have_is_fitted_by_its_mean() -> None:
    """Where two thirds of all responses have one length, the window of LOWESS has no width there."""
    random = np.random.default_rng(0)
    lengths = np.r_[np.full(900, 5.0), random.integers(6, 30, 100)]
    scores = 0.5 * lengths + random.normal(size=1000)
    after = calibrated(lengths, scores)
    assert after[:900].mean() == pytest.approx(after.mean(), abs=0.05)
    assert abs(correlation(lengths, after)) < 0.05


@pytest.mark.parametrize("longest", [3, 40])
def test_an_exact_line_is_taken_out_whole(longest: int) -> None:
    """Residuals are zero here: robust weights would be 0 / 0."""
    lengths, _ = drawn(0, 500, longest)
    after = calibrated(lengths, 0.7 * lengths - 3)
    assert after == pytest.approx(np.full(500, (0.7 * lengths - 3).mean()), abs=1e-8)


def test_a_smooth_trend_is_taken_out_of_many_responses_at_once() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 500, 20_000).astype(float)
    noise = random.normal(size=20_000)
    scores = noise + lengths / 100
    started = time.perf_counter()
    fitted = fit_length_calibration(lengths, scores)
    assert time.perf_counter() - started < 5  # a fit at every response would take far longer
    after = calibrated(lengths, scores, fitted)
    assert correlation(lengths, scores) > 0.8
    assert abs(correlation(lengths, after)) < 0.02
    assert correlation(noise, after) > 0.99


def test_the_mean_of_the_centre_stays() -> None:
    lengths, scores = drawn(3, 60)
    scores = scores + lengths
    centre = np.arange(60) < 30
    after = calibrated(lengths, scores, fit_length_calibration(lengths, scores, centre=centre))
    assert after[centre].mean() == pytest.approx(scores[centre].mean())
    assert after.mean() != pytest.approx(scores.mean(), abs=1e-3)


SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(MIN_POINTS, 80)
LONGEST = st.integers(2, 40)
NUMBERS = st.floats(-10, 10)


@settings(max_examples=40, deadline=None)
@given(SEEDS, SIZES, LONGEST, NUMBERS, NUMBERS)
def test_law_a_line_in_length_changes_calibrated_scores_by_a_constant(
    seed: int, size: int, longest: int, slope: float, constant: float
) -> None:
    """Local linear fits reproduce a line, so r and r + a l + b are calibrated to the same scores but for their mean."""
    lengths, scores = drawn(seed, size, longest)
    moved = scores + slope * lengths + constant
    before, after = calibrated(lengths, scores), calibrated(lengths, moved)
    assert after - after.mean() == pytest.approx(before - before.mean(), abs=1e-6)
    assert after.mean() == pytest.approx(moved.mean(), abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(SEEDS, SIZES, LONGEST, NUMBERS)
def test_law_offsets_are_linear_in_the_scores_and_blind_to_a_constant(
    seed: int, size: int, longest: int, factor: float
) -> None:
    lengths, first = drawn(seed, size, longest)
    second = np.random.default_rng([seed, 1]).normal(size=size)
    one, other = fit_length_calibration(lengths, first), fit_length_calibration(lengths, second)
    both = fit_length_calibration(lengths, first + factor * second + 5)
    assert both.offsets == pytest.approx(np.add(one.offsets, np.multiply(factor, other.offsets)), abs=1e-7)


@settings(max_examples=20, deadline=None)
@given(SEEDS, SIZES, LONGEST)
def test_law_the_order_of_the_responses_does_not_matter(seed: int, size: int, longest: int) -> None:
    lengths, scores = drawn(seed, size, longest)
    order = np.random.default_rng([seed, 2]).permutation(size)
    straight, shuffled = fit_length_calibration(lengths, scores), fit_length_calibration(lengths[order], scores[order])
    assert shuffled.lengths == straight.lengths == tuple(sorted(set(lengths.tolist())))
    assert shuffled.offsets == pytest.approx(straight.offsets, abs=1e-7)


def test_reload_gives_the_same_numbers(tmp_path: Path) -> None:
    fitted = fit_length_calibration(*drawn(5, 50))
    path = tmp_path / CALIBRATION_FILE
    fitted.save(path)
    assert LengthCalibration.load(path) == fitted
    assert set(json.loads(path.read_text(encoding="utf-8"))) == {"lengths", "offsets"}
    lengths = torch.linspace(0, 50, 101)
    assert torch.equal(LengthCalibration.load(path).offset(lengths), fitted.offset(lengths))


def test_a_model_without_calibration_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has no length calibration\. .*at least 20 .*reward\.calibration=none"):
        LengthCalibration.load(tmp_path / CALIBRATION_FILE)


@pytest.mark.parametrize("size", [0, 1, MIN_POINTS - 1])
def test_too_few_responses(size: int) -> None:
    lengths = np.arange(size, dtype=float)
    with pytest.raises(DataError, match=rf"has {size} held-out responses.*at least 20.*reward\.calibration=none"):
        fit_length_calibration(lengths, lengths)


def test_the_fewest_responses_are_enough() -> None:
    lengths = np.arange(MIN_POINTS, dtype=float)
    assert calibrated(lengths, lengths) == pytest.approx(np.full(MIN_POINTS, lengths.mean()))


def test_one_length_alone() -> None:
    with pytest.raises(DataError, match=r"all 30 held-out responses have length 7\. .*nothing to calibrate"):
        fit_length_calibration(np.full(30, 7.0), np.arange(30.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": np.r_[np.nan, np.arange(29.0)]}, "not finite"),
        ({"lengths": np.r_[np.inf, np.arange(29.0)]}, "not finite"),
        ({"scores": np.arange(29.0)}, r"\(30,\), scores \(29,\)"),
        ({"scores": np.ones((30, 1))}, "one shape"),
        ({"centre": np.ones(29, dtype=bool)}, r"centre \(29,\)"),
        ({"centre": np.zeros(30, dtype=bool)}, "centre keeps no response"),
        ({"frac": 0.0}, "frac is 0.0"),
        ({"frac": 1.5}, "frac is 1.5"),
    ],
)
def test_wrong_input(change: dict, message: str) -> None:
    given = {"lengths": np.arange(30.0), "scores": np.arange(30.0)} | change
    with pytest.raises(ValueError, match=message):
        fit_length_calibration(**given)
