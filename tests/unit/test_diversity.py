from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_cli.measure.diversity import diversity
from rlhf_cli.metrics.glossary import describe


def of(*texts: str) -> dict[str, float]:
    """The numbers of one prompt with these samples."""
    return {key: float(values[0]) for key, values in diversity([list(texts)]).items()}


def test_two_samples_by_hand() -> None:
    found = of("a b c d", "a b c e")
    assert found["distinct_1"] == pytest.approx(5 / 8)  # a b c d e
    assert found["distinct_2"] == pytest.approx(4 / 6)  # ab bc cd ce
    # Precisions 3/4, 2/3, 1/2 and none of one 4-gram, smoothed to 1 / (2 * 1); equal lengths have no penalty.
    assert found["self_bleu"] == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** (1 / 4))
    assert found["repetition"] == 0.0


def test_three_samples_by_hand() -> None:
    # "x x": the others have one x each, so 1 of 2 unigrams counts, and no bigram: (1/2 * 1/2)^(1/2).
    # "x": precision 1 of its only order; the nearest length is 1 (the other "x"). Twice.
    found = of("x x", "x", "x")
    assert found["self_bleu"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert found["distinct_1"] == pytest.approx(1 / 4)
    assert found["distinct_2"] == 1.0  # one bigram


def test_repetition_by_hand() -> None:
    # aba bab aba bab: two of four stood before; c d e: none of one; "c d" has no 3-gram and does not count.
    assert of("a b a b a b", "c d e", "c d")["repetition"] == pytest.approx((2 / 4 + 0) / 2)
    assert of("a " * 50)["repetition"] == pytest.approx(47 / 48)


def test_a_collapsed_policy_and_one_that_never_says_the_same() -> None:
    same, different = of(*["we like long walks ."] * 4), of("one two three", "four five six", "seven eight nine")
    assert same["self_bleu"] == pytest.approx(1.0)
    assert same["distinct_2"] == pytest.approx(1 / 4)
    assert different == {"distinct_1": 1.0, "distinct_2": 1.0, "self_bleu": 0.0, "repetition": 0.0}


def test_every_prompt_is_measured_by_itself() -> None:
    groups = [["a b c d", "a b c e"], ["x x", "x", "x"], ["y z", ""]]
    found = diversity(groups)
    assert {key: values.shape for key, values in found.items()} == dict.fromkeys(found, (3,))
    for number, texts in enumerate(groups):
        for key, value in of(*texts).items():
            np.testing.assert_equal(found[key][number], value)


def test_words_and_punctuation_are_split_and_case_is_kept() -> None:
    assert of("Yes, sure.\nYes")["distinct_1"] == pytest.approx(4 / 5)  # Yes , sure . Yes
    assert of("yes Yes")["distinct_1"] == 1.0


def test_empty_completions_are_allowed() -> None:
    for nothing in ("", " ", "\n"):
        found = of("a b c", nothing)
        assert (found["distinct_1"], found["repetition"], found["self_bleu"]) == (1.0, 0.0, 0.0)
        collapsed = of(nothing, "")  # a policy that always ends at once
        assert collapsed["self_bleu"] == 1.0
        assert all(math.isnan(collapsed[key]) for key in ("distinct_1", "distinct_2", "repetition"))


def test_what_is_not_defined_is_nan() -> None:
    one = of("a")
    assert math.isnan(one["self_bleu"])
    assert math.isnan(one["distinct_2"])
    assert math.isnan(one["repetition"])
    assert one["distinct_1"] == 1.0
    assert all(math.isnan(value) for value in of().values())
    assert {key: values.shape for key, values in diversity([]).items()} == dict.fromkeys(one, (0,))


def test_the_order_of_samples_does_not_matter() -> None:
    texts = ["the cat sat on the mat", "the dog sat on a mat", "no", ""]
    for key, value in of(*texts).items():
        assert of(*reversed(texts))[key] == pytest.approx(value), key


def test_every_key_is_in_the_glossary() -> None:
    better = {key: describe(key).better for key in of("a")}
    assert better == {"distinct_1": "higher", "distinct_2": "higher", "self_bleu": "lower", "repetition": "lower"}
