"""Rankings and the planted length bias of the survey world, against their laws."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest

from rlhf_cli.config.schema import SurveyConfig
from rlhf_cli.data.rows import Pair, PreferenceData
from rlhf_cli.data.survey import load_survey

BIAS = 0.4  # nats per word


@cache
def data(**changes: Any) -> PreferenceData:
    settings: dict[str, Any] = {
        "source": "survey", "max_prompt_tokens": 24, "max_completion_tokens": 12, "seed": 0, "questions": 16,
        "demonstrations": 500, "pairs": 40_000, "heldout_pairs": 8000, "gold_offset_reward": -5.0,
        "closed_vocabulary": False, "ranking_size": 2, "length_bias": 0.0,
    }  # fmt: skip
    return load_survey(SurveyConfig(**{**settings, **changes}))


def words(answer: str) -> int:
    return len(answer.split())


def judged(found: PreferenceData, prompt: str, answer: str, bias: float) -> float:
    assert found.gold is not None
    return found.gold(prompt, answer) + bias * words(answer)


def deviation(found: PreferenceData, pairs: list[Pair], bias: float) -> float:
    """Return by how many standard deviations the longer answers won more often than Bradley-Terry says."""
    expected, variance, won = 0.0, 0.0, 0
    for pair in pairs:
        more = words(pair.chosen) - words(pair.rejected)
        if more == 0:
            continue
        longer, shorter = (pair.chosen, pair.rejected) if more > 0 else (pair.rejected, pair.chosen)
        lead = judged(found, pair.prompt, longer, bias) - judged(found, pair.prompt, shorter, bias)
        p = 1 / (1 + math.exp(-lead))
        expected, variance, won = expected + p, variance + p * (1 - p), won + (more > 0)
    return (won - expected) / variance**0.5


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("bias", [BIAS, -BIAS])
def test_each_word_more_shifts_the_log_odds_by_the_bias(size: int, bias: float) -> None:
    found = data(length_bias=bias, ranking_size=size)
    for pairs in (found.reward_pairs, found.heldout_pairs):
        assert abs(deviation(found, pairs, bias)) < 3.5
        assert abs(deviation(found, pairs, 0.0)) > 10  # the flaw is there to be seen


def test_the_bias_leaves_the_world_and_the_writer_alone() -> None:
    plain, biased = data(), data(length_bias=BIAS)
    assert biased.demonstrations == plain.demonstrations
    assert biased.questions == plain.questions
    assert biased.prompts == plain.prompts
    for question in plain.questions:
        for answer in question.answers:
            assert plain.gold is not None
            assert biased.gold is not None
            assert biased.gold(question.prompt, answer) == plain.gold(question.prompt, answer)
    # The same pairs are judged with the same luck, so the winner turns only towards the longer answer.
    turned = [(a, b) for a, b in zip(plain.reward_pairs, biased.reward_pairs, strict=True) if a != b]
    assert turned
    assert all((b.chosen, b.rejected) == (a.rejected, a.chosen) for a, b in turned)
    assert all(words(b.chosen) > words(b.rejected) for _, b in turned)


@pytest.mark.parametrize("bias", [1e4, -1e4])
def test_an_overwhelming_bias_decides_by_length_alone(bias: float) -> None:
    found = data(length_bias=bias, pairs=2000, ranking_size=2)
    assert all(words(pair.chosen) * bias >= words(pair.rejected) * bias for pair in found.reward_pairs)
    ranked = data(length_bias=bias, pairs=2000, ranking_size=5).reward_rankings
    for row in ranked:
        lengths = [words(answer) for answer in row.responses]
        assert lengths == sorted(lengths, reverse=bias > 0)


@pytest.mark.parametrize("bias", [0.0, BIAS])
def test_first_places_follow_plackett_luce(bias: float) -> None:
    found = data(ranking_size=8, pairs=300_000, length_bias=bias)  # whole questions are ranked
    chi2, freedom = 0.0, 0
    for question in (question for question in found.questions if not question.heldout):
        rows = [row for row in found.reward_rankings if row.prompt == question.prompt]
        rewards = np.array([judged(found, question.prompt, answer, bias) for answer in question.answers])
        expected = np.exp(rewards) / np.exp(rewards).sum() * len(rows)
        won = Counter(row.responses[0] for row in rows)
        chi2 += sum((won[answer] - mean) ** 2 / mean for answer, mean in zip(question.answers, expected, strict=True))
        freedom += len(question.answers) - 1
    assert abs(chi2 - freedom) < 4 * (2 * freedom) ** 0.5  # chi-squared: mean df, variance 2 df


def test_second_places_follow_plackett_luce_among_the_rest() -> None:
    found = data(ranking_size=4, pairs=100_000)
    expected, variance, won = 0.0, 0.0, 0
    for row in found.reward_rankings:
        rest = row.responses[1:]
        weights = [math.exp(judged(found, row.prompt, answer, 0.0)) for answer in rest]
        p = weights[rest.index(min(rest))] / sum(weights)  # of the alphabetically first
        expected, variance, won = expected + p, variance + p * (1 - p), won + (rest[0] == min(rest))
    assert abs(won - expected) < 3.5 * variance**0.5


@pytest.mark.parametrize("size", [3, 4, 8])
def test_rankings_hold_different_answers_of_their_question(size: int) -> None:
    found = data(ranking_size=size, pairs=1000, heldout_pairs=100)
    answers = {question.prompt: question.answers for question in found.questions}
    assert len(found.reward_rankings) == math.ceil(1000 / (size * (size - 1) / 2))
    for row in found.reward_rankings:
        assert len(set(row.responses)) == len(row.responses) == min(size, len(answers[row.prompt]))
        assert set(row.responses) <= set(answers[row.prompt])
    assert {row.prompt for row in found.reward_rankings} == set(found.prompts)


def test_the_pairs_are_those_the_rankings_imply() -> None:
    found = data(ranking_size=4, pairs=1000, heldout_pairs=100)
    assert found.reward_pairs == [pair for row in found.reward_rankings for pair in row.pairs()]
    assert found.policy_pairs is found.reward_pairs
    # 167 and 17 rankings of 4: every question has at least 4 answers
    assert (len(found.reward_pairs), len(found.heldout_pairs)) == (167 * 6, 17 * 6)
    assert found.heldout_pairs != found.reward_pairs[: 17 * 6]


def test_drawn_answers_are_drawn_evenly() -> None:
    found = data(ranking_size=3, pairs=60_000)
    question = next(question for question in found.questions if len(question.answers) > 4)
    rows = [row for row in found.reward_rankings if row.prompt == question.prompt]
    share = 3 / len(question.answers)
    seen = Counter(answer for row in rows for answer in row.responses)
    for answer in question.answers:
        assert abs(seen[answer] - share * len(rows)) < 4 * (share * (1 - share) * len(rows)) ** 0.5


def test_a_ranking_beyond_every_question_ranks_all_answers() -> None:
    assert data(ranking_size=30, pairs=1000).reward_rankings == data(ranking_size=8, pairs=1000).reward_rankings


def test_the_size_of_a_ranking_changes_judgements_alone() -> None:
    pairs, rankings = data(), data(ranking_size=4)
    assert rankings.demonstrations == pairs.demonstrations
    assert rankings.questions == pairs.questions


def test_a_seed_gives_the_same_rankings_and_another_seed_others() -> None:
    first, again = (data.__wrapped__(ranking_size=4, pairs=600) for _ in range(2))
    assert first.reward_rankings == again.reward_rankings
    assert first.heldout_pairs == again.heldout_pairs
    assert data(ranking_size=4, pairs=600, seed=1).reward_rankings != first.reward_rankings
