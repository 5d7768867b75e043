from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.metrics.bootstrap import interval


def test_the_interval_of_equal_values_is_a_point() -> None:
    assert interval("pm/tv", np.full(7, 0.25)) == {"pm/tv": 0.25, "pm/tv/lo": 0.25, "pm/tv/hi": 0.25, "pm/tv/n": 7}


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=20))
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
