from __future__ import annotations

import math

import pytest

from rlhf_cli.metrics.glossary import known
from rlhf_cli.metrics.guard import BOUNDS, crossed

HEALTHY = {
    "entropy/per_token": 1.2,
    "reference/entropy/per_token": 1.31,
    "distinct_2": 0.5,
    "reference/distinct_2": 0.55,
    "pm/offset_mass": 0.01,
}


def with_(**changes: float | None) -> dict[str, float | None]:
    """The healthy run with other numbers; `_per_token` and `reference_` are spelt without slashes."""
    names = {"entropy": "entropy/per_token", "reference_entropy": "reference/entropy/per_token"}
    names |= {"reference_distinct_2": "reference/distinct_2", "offset": "pm/offset_mass"}
    return {**HEALTHY, **{names.get(name, name): value for name, value in changes.items()}}


def test_a_healthy_run_crosses_nothing() -> None:
    assert crossed(HEALTHY) == []
    same = {key: HEALTHY[f"reference/{key.removeprefix('reference/')}"] for key in HEALTHY if "offset" not in key}
    assert crossed(same) == []


@pytest.mark.parametrize(
    ("outside", "inside", "sentence"),
    [
        (
            {"entropy": 0.327},
            {"entropy": 0.328},
            "entropy per token 0.327 is below a quarter of the reference's 1.31",
        ),
        (
            {"distinct_2": 0.274},
            {"distinct_2": 0.276},
            "share of distinct 2-grams 0.274 is below half of the reference's 0.55",
        ),
        ({"offset": 0.21}, {"offset": 0.2}, "mass off the answer set 0.21 is above 0.2"),
        (
            {"entropy": 2.63},
            {"entropy": 2.61},
            "entropy per token 2.63 is above 2 times the reference's 1.31: such text means nothing",
        ),
    ],
    ids=["certain", "repeats", "off the set", "noise"],
)
def test_each_bound(outside: dict[str, float], inside: dict[str, float], sentence: str) -> None:
    assert crossed(with_(**outside)) == [sentence]
    assert crossed(with_(**inside)) == []


def test_a_certain_reference_needs_a_whole_nat_more_before_text_is_noise() -> None:
    assert crossed(with_(entropy=0.9, reference_entropy=0.1)) == []  # nine times as much, but little
    assert len(crossed(with_(entropy=1.11, reference_entropy=0.1))) == 1
    assert crossed(with_(entropy=0.0, reference_entropy=0.0)) == []


def test_every_bound_that_is_crossed_has_its_sentence() -> None:
    assert len(crossed(with_(entropy=0.01, distinct_2=0.1, offset=0.9))) == 3


@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_bound_without_its_numbers_is_not_crossed(missing: float | None) -> None:
    assert crossed({}) == []
    assert crossed(dict.fromkeys(HEALTHY, missing)) == []
    worst = {"entropy/per_token": 0.0, "distinct_2": 0.0}
    assert crossed(worst) == []
    assert crossed({**worst, "reference/entropy/per_token": missing, "reference/distinct_2": missing}) == []


def test_the_bounds_are_stated_one_a_line_with_their_numbers() -> None:
    assert len(BOUNDS) == 5
    assert all("\n" not in line and not line.endswith(".") for line in BOUNDS)
    assert "more than 0.2 of the mass off the answer set" in BOUNDS
    assert "entropy per token above 2 times the reference's and over 1 nat above it" in BOUNDS


def test_the_keys_that_are_read_exist() -> None:
    assert all(known(key) for key in HEALTHY)


def test_random_text_is_flagged_where_the_reference_is_unsure_itself() -> None:
    """A reference of 4.5 nats of the 7.62 of 2,048 tokens: twice is more than there is, half of its distance 6.06."""
    unsure = {**HEALTHY, "reference/entropy/per_token": 4.5, "entropy/uniform": 7.62}
    assert crossed({**unsure, "entropy/per_token": 6.0}) == []
    (sentence,) = crossed({**unsure, "entropy/per_token": 6.1})
    assert sentence == (
        "entropy per token 6.1 is nearer to 7.62, that of random tokens, than half of the reference's distance (4.5)"
        ": such text means nothing"
    )


def test_a_policy_that_covers_the_minority_has_not_collapsed() -> None:
    """Where people nearly agree, so does the policy that matches them; on a pool of candidates that cannot be known."""
    narrow = with_(entropy=0.06, reference_entropy=0.7, distinct_2=0.1)
    assert len(crossed(narrow)) == 2
    assert len(crossed({**narrow, "pm/minority_coverage": 0.49})) == 2
    assert crossed({**narrow, "pm/minority_coverage": 0.5}) == []
    assert len(crossed({**narrow, "pm/minority_coverage": 1.0, "pool/size": 9.0})) == 2
    assert len(crossed({**narrow, "pm/minority_coverage": 1.0, "pm/offset_mass": 0.3})) == 1
