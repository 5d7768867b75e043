from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.metrics.bootstrap import interval, interval_of, share_interval
from rlhf_cli.metrics.calibration import binomial_interval


def test_the_interval_of_equal_values_is_a_point() -> None:
    assert interval("pm/tv", np.full(7, 0.25)) == {"pm/tv": 0.25, "pm/tv/lo": 0.25, "pm/tv/hi": 0.25, "pm/tv/n": 7}


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=20))
@settings(deadline=None, max_examples=50)
def test_the_interval_lies_within_the_values(values: list[float]) -> None:
    found = interval("x", np.array(values), resamples=200)
    assert found["x"] == pytest.approx(np.mean(values))
    assert min(values) - 1e-9 <= found["x/lo"] <= found["x/hi"] <= max(values) + 1e-9


def test_the_width_is_that_of_a_95_percent_interval() -> None:
    # The mean of n values with standard deviation s has the interval +- 1.96 s / sqrt(n): 1.96 / 20 here.
    values = np.random.default_rng(1).normal(size=400)
    found = interval("x", values / values.std() - (values / values.std()).mean())
    assert found["x/hi"] == pytest.approx(0.098, abs=0.008)
    assert found["x/lo"] == pytest.approx(-0.098, abs=0.008)


def test_coverage_is_near_95_percent() -> None:
    rng = np.random.default_rng(0)
    found = [interval("x", rng.exponential(size=60), resamples=300) for _ in range(200)]
    assert 0.89 <= np.mean([row["x/lo"] <= 1.0 <= row["x/hi"] for row in found]) <= 0.98


def test_prompts_without_the_metric_are_left_out() -> None:
    assert interval("x", np.array([1.0, np.nan, 3.0])) == interval("x", np.array([1.0, 3.0]))
    assert interval("x", np.array([1.0, np.nan, 3.0]))["x/n"] == 2


def test_the_seed_alone_decides() -> None:
    values = np.arange(10.0)
    np.random.seed(3)
    first = interval("x", values)
    np.random.seed(4)
    assert interval("x", values) == first
    assert interval("x", values, seed=1) != first


def test_nothing_to_average_is_refused() -> None:
    for values in ([], [np.nan, np.nan]):
        with pytest.raises(ValueError, match="pm/tv has no values: there is nothing to average"):
            interval("pm/tv", np.array(values))


# -- statistics that are no means over prompts ------------------------------------------------------------------------


def test_a_mean_as_a_statistic_has_the_interval_of_means() -> None:
    values = np.random.default_rng(2).normal(size=30)
    found = interval_of("x", lambda column: column.mean(), values)
    assert found == pytest.approx(interval("x", values))
    assert found["x/n"] == 30


def test_prompts_are_drawn_whole_in_every_column() -> None:
    # Two samples a prompt that cancel, and a second column that is twice the first: any draw keeps both.
    first = np.array([[1.0, -1.0], [2.0, -2.0], [5.0, -5.0]])
    seen: list[bool] = []

    def slope(x: np.ndarray, y: np.ndarray) -> float:
        seen.append(bool((x.sum(-1) == 0).all()) and x.shape == (3, 2))
        return float((x * y).sum() / (x * x).sum())

    assert interval_of("x", slope, first, 2 * first) == {"x": 2.0, "x/lo": 2.0, "x/hi": 2.0, "x/n": 3}
    assert len(seen) == 1001
    assert all(seen)


def test_the_interval_of_a_standard_deviation_is_as_wide_as_theory_says() -> None:
    # For normal values the standard deviation of s is sigma / sqrt(2 n): 1.96 / sqrt(800) on either side.
    values = np.random.default_rng(3).normal(size=400)
    found = interval_of("reward/std", lambda column: column.std(), values / values.std())
    assert found["reward/std"] == pytest.approx(1.0)
    assert (found["reward/std/hi"] - found["reward/std/lo"]) / 2 == pytest.approx(1.96 / 800**0.5, rel=0.15)


def test_draws_without_the_statistic_are_left_out() -> None:
    def spread(column: np.ndarray) -> float | None:
        return None if column.min() == column.max() else 7.0

    found = interval_of("x", spread, np.array([1.0, 2.0]), resamples=50)
    assert found == {"x": 7.0, "x/lo": 7.0, "x/hi": 7.0, "x/n": 2}


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_a_statistic_that_is_not_defined_is_refused(nothing: float | None) -> None:
    with pytest.raises(ValueError, match="reward/length_correlation is not defined for these prompts"):
        interval_of("reward/length_correlation", lambda column: nothing, np.ones(4))


def test_columns_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="x needs one row a prompt in every column: their lengths are 3, 4"):
        interval_of("x", lambda a, b: 0.0, np.ones(3), np.ones((4, 2)))
    for columns in ([], [np.ones((0, 2))]):
        with pytest.raises(ValueError, match="x needs one row a prompt in every column"):
            interval_of("x", lambda *some: 0.0, *columns)


def test_a_share_s_interval_is_wilson_s_of_as_many_trials_as_vary_alike() -> None:
    """p = 1/2; s^2 = 4/3 * 1/4 = 1/3 of four prompts, so p (1 - p) / (s^2 / 4) = 3 trials."""
    found = share_interval("win", np.array([1.0, 0.0, 1.0, 0.0]))
    low, high = binomial_interval(np.array([0.5]), np.array([3.0]))
    assert found == {"win": 0.5, "win/lo": low[0], "win/hi": high[0], "win/n": 4}


def test_a_share_of_1_has_an_interval_all_the_same() -> None:
    """Wilson at s = 1: n / (n + z^2)."""
    found = share_interval("eos_rate", np.array([1.0] * 20 + [np.nan]))
    assert found["eos_rate/hi"] == 1
    assert found["eos_rate/lo"] == pytest.approx(20 / (20 + 1.959964**2))
    assert found["eos_rate/n"] == 20


@pytest.mark.parametrize(("shares", "message"), [([np.nan], "nothing to average"), ([1.5, 1.5], "outside")])
def test_a_share_s_interval_refuses(shares: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        share_interval("win", np.array(shares))


def test_a_rare_event_s_interval_covers() -> None:
    """200 prompts with 4 samples and an event in 1 of 1,000: the bootstrap of the mean covers half the time."""
    rng = np.random.default_rng(0)
    drawn = [share_interval("eos", rng.binomial(4, 0.999, size=200) / 4) for _ in range(400)]
    assert np.mean([found["eos/lo"] <= 0.999 <= found["eos/hi"] for found in drawn]) > 0.9


def test_wordings_of_a_question_are_drawn_together() -> None:
    """Two copies of each of 40 values: as pairs they say no more than the 40, alone they would pass for 80."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=40)
    twice, groups = np.repeat(values, 2), np.repeat(np.arange(40), 2)
    own, paired, alone = interval("m", values), interval("m", twice, groups=groups), interval("m", twice)
    widths = [found["m/hi"] - found["m/lo"] for found in (own, paired, alone)]
    assert paired == pytest.approx(own)
    assert widths[2] == pytest.approx(widths[0] / np.sqrt(2), rel=0.1)
    mean = interval_of("m", np.mean, twice, groups=groups)
    assert [mean[f"m{end}"] for end in ("", "/lo", "/hi", "/n")] == pytest.approx(list(own.values()))
    shares = rng.integers(2, size=40).astype(float)
    assert share_interval("s", np.repeat(shares, 2), groups=groups) == pytest.approx(share_interval("s", shares))


def test_one_prompt_has_no_interval() -> None:
    assert interval("m", np.array([0.3, np.nan])) == {"m": 0.3, "m/n": 1}
    assert interval_of("m", np.mean, np.array([0.3])) == {"m": 0.3, "m/n": 1}
    assert interval("m", np.array([0.3, 0.5]), groups=np.array([7, 7])) == {"m": 0.4, "m/n": 1}
