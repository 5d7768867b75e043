from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from functools import cache
from typing import Any

import numpy as np
import pytest

from rlhf_cli.config.schema import SurveyConfig
from rlhf_cli.data import load
from rlhf_cli.data import survey as module
from rlhf_cli.data.rows import PreferenceData
from rlhf_cli.data.survey import SurveyWorld, describe_world, load_survey, make_world, question_bank
from rlhf_cli.errors import ConfigError

SEEDS = range(12)


def config(**changes: Any) -> SurveyConfig:
    settings: dict[str, Any] = {
        "source": "survey", "max_prompt_tokens": 24, "max_completion_tokens": 12, "seed": 0, "questions": 16,
        "demonstrations": 500, "pairs": 500, "heldout_pairs": 50, "gold_offset_reward": -5.0,
        "closed_vocabulary": False, "ranking_size": 2, "length_bias": 0.0,
    }  # fmt: skip
    return SurveyConfig(**{**settings, **changes})


@cache
def world(seed: int, questions: int = 48) -> SurveyWorld:
    return make_world(config(seed=seed, questions=questions))


@cache
def data() -> PreferenceData:
    return load_survey(config(demonstrations=20_000, pairs=40_000))


def test_a_seed_gives_one_world_and_another_seed_another() -> None:
    assert make_world(config()) == make_world(config())
    first, second = load_survey(config()), load_survey(config())
    for name in ("demonstrations", "reward_pairs", "policy_pairs", "prompts", "heldout_pairs", "questions"):
        assert getattr(first, name) == getattr(second, name), name
    other = load_survey(config(seed=1))
    assert {q.people for q in first.questions}.isdisjoint(q.people for q in other.questions)
    assert first.questions[0].answers != other.questions[0].answers or first.prompts != other.prompts
    assert first.reward_pairs != other.reward_pairs


def test_neither_the_world_nor_its_first_rows_depend_on_how_much_is_drawn() -> None:
    assert make_world(config(pairs=9, demonstrations=7)) == make_world(config())
    first = make_world(config(questions=4)).questions
    assert make_world(config()).questions[: len(first)] == first


@pytest.mark.parametrize("seed", SEEDS)
def test_the_people_have_a_majority_and_real_minorities(seed: int) -> None:
    for question in world(seed).questions:
        assert question.people is not None
        shares = sorted(question.people)
        assert sum(shares) == pytest.approx(1.0, abs=1e-12)
        assert 0.38 <= shares[-1] <= 0.55
        assert 0.02 <= shares[0] <= 0.04
        assert shares[-2] <= 0.8 * shares[-1] + 1e-9  # the majority is clear
        assert shares[1] >= 0.04 - 1e-9


@pytest.mark.parametrize("seed", SEEDS)
def test_the_writer_shares_the_majority_or_leans_to_a_minority_and_writes_every_answer(seed: int) -> None:
    for question in world(seed).questions:
        people, writer = np.array(question.people), np.array(question.writer)
        assert writer.sum() == pytest.approx(1.0, abs=1e-12)
        assert writer.min() >= module.WRITER_FLOOR - 1e-12
        assert 0.38 <= writer.max() <= 0.6
        assert np.sort(writer)[-2] <= 0.8 * writer.max() + 1e-12  # the habit is clear
        if question.index % 2 == 0:
            assert writer.argmax() == people.argmax()
        else:
            assert (people > people[writer.argmax()]).sum() >= len(people) / 2  # among the less popular half


@pytest.mark.parametrize("seed", SEEDS)
def test_questions_have_4_to_8_answers_of_2_to_8_words_and_unequal_length(seed: int) -> None:
    for question in world(seed).questions:
        lengths = [len(answer.split()) for answer in question.answers]
        assert 4 <= len(lengths) <= 8
        assert len(set(question.answers)) == len(lengths)
        assert min(lengths) >= 2
        assert max(lengths) <= 8
        assert len(set(lengths)) > 1


def test_every_second_question_has_several_wordings_and_one_of_them_is_held_out() -> None:
    wordings = defaultdict(list)
    for question in world(0, 16).questions:
        wordings[question.index].append(question)
    assert list(wordings) == list(range(16))
    for index, rows in wordings.items():
        trained = module.TRAINED_WORDINGS if index % 2 else 1
        assert [row.heldout for row in rows] == [False] * trained + [True] * (index % 2)
        assert len({(row.answers, row.people, row.writer) for row in rows}) == 1
    prompts = [question.prompt for question in world(0, 48).questions]
    assert len(set(prompts)) == len(prompts)
    assert module.TRAINED_WORDINGS >= 2


def test_no_row_of_any_stage_uses_a_held_out_wording() -> None:
    heldout = {question.prompt for question in data().questions if question.heldout}
    assert len(heldout) == 8
    used = {row.prompt for rows in (data().demonstrations, data().reward_pairs, data().heldout_pairs) for row in rows}
    assert used == set(data().prompts) == {question.prompt for question in data().questions} - heldout


def test_row_counts_are_as_asked() -> None:
    found = load(config(demonstrations=11, pairs=13, heldout_pairs=3))
    assert (len(found.demonstrations), len(found.reward_pairs), len(found.heldout_pairs)) == (11, 13, 3)
    assert found.policy_pairs == found.reward_pairs
    assert found.heldout_pairs != found.reward_pairs[:3]
    assert found.word_level
    assert found.dropped == {}


def test_demonstrations_follow_the_writer() -> None:
    for question in data().questions:
        answers = [row.response for row in data().demonstrations if row.prompt == question.prompt]
        if question.heldout:
            assert not answers
            continue
        shares = np.array([answers.count(answer) for answer in question.answers]) / len(answers)
        assert shares.sum() == pytest.approx(1.0)
        assert np.abs(shares - np.array(question.writer)).max() < 4 * 0.5 / len(answers) ** 0.5


def test_pairs_follow_bradley_terry_with_the_gold_reward() -> None:
    gold = data().gold
    assert gold is not None
    expected, variance, won, counts = 0.0, 0.0, 0, defaultdict(int)
    for pair in data().reward_pairs:
        assert pair.chosen != pair.rejected
        first, second = sorted((pair.chosen, pair.rejected))
        p = 1 / (1 + math.exp(gold(pair.prompt, second) - gold(pair.prompt, first)))
        expected, variance, won = expected + p, variance + p * (1 - p), won + (pair.chosen == first)
        counts[pair.prompt, first, second] += 1
    assert abs(won - expected) < 3.5 * variance**0.5
    # the stronger answer wins as often as its lead says, in bins of the lead
    rows = [(gold(p.prompt, p.chosen) - gold(p.prompt, p.rejected)) for p in data().reward_pairs]
    for low, high in ((0.1, 0.5), (0.5, 1.5), (1.5, 4.0)):
        leads = [lead for lead in rows if low <= abs(lead) < high]
        predicted = np.mean([1 / (1 + math.exp(-abs(lead))) for lead in leads])
        assert np.mean([lead > 0 for lead in leads]) == pytest.approx(predicted, abs=4 * 0.5 / len(leads) ** 0.5)
    # both answers of a pair are drawn evenly
    question = data().questions[0]
    size = len(question.answers)
    mine = [count for (prompt, _, _), count in counts.items() if prompt == question.prompt]
    assert len(mine) == size * (size - 1) / 2
    assert max(mine) < min(mine) + 8 * np.mean(mine) ** 0.5


def test_default_judgements_are_those_of_the_first_release() -> None:
    found = load_survey(config(demonstrations=8192, pairs=40_000, heldout_pairs=2000))  # conf/dataset/survey.yaml
    lines = [f"{row.prompt}\t{row.response}" for row in found.demonstrations]
    for pairs in (found.reward_pairs, found.policy_pairs, found.heldout_pairs):
        lines += [f"{pair.prompt}\t{pair.chosen}\t{pair.rejected}" for pair in pairs]
    digest = hashlib.sha256("\n".join(lines + found.prompts).encode()).hexdigest()
    assert digest == "60875c390bf1a4e8f90cbedee925ee5a236427fe157b98766ceb227ff93148fa"
    assert found.reward_rankings == []


def test_gold_is_the_log_share_on_the_set_and_the_offset_reward_off_it() -> None:
    the_world = make_world(config(gold_offset_reward=-7.5))
    for question in the_world.questions:
        golds = [the_world.gold(question.prompt, answer) for answer in question.answers]
        assert np.exp(golds).tolist() == pytest.approx(question.people)
    question, other = the_world.questions[0], the_world.questions[-1]
    answer = question.answers[0]
    assert the_world.gold(question.prompt, f"  {answer.replace(' ', '  ')}\n") == golds_of(the_world, question)[0]
    for prompt, response in [
        (question.prompt, ""),
        (question.prompt, answer.rsplit(" ", 1)[0]),
        (question.prompt, f"{answer} {answer}"),
        (question.prompt, f"{answer} <unk>"),
        (question.prompt, answer.upper()),
        (question.prompt, other.answers[0]),
        (f"{question.prompt} ", answer),
        ("", ""),
    ]:
        assert the_world.gold(prompt, response) == -7.5


def golds_of(the_world: SurveyWorld, question: Any) -> list[float]:
    return [the_world.gold(question.prompt, answer) for answer in question.answers]


def test_two_worlds_do_not_share_their_gold() -> None:
    question = world(0).questions[0]
    other = make_world(config(gold_offset_reward=-9.0))
    assert world(0).gold("", "") == -5.0
    assert other.gold("", "") == -9.0
    assert other.gold(question.prompt, question.answers[0]) == world(0).gold(question.prompt, question.answers[0])


def test_more_questions_than_the_bank_holds_are_refused() -> None:
    assert len({question.index for question in world(0, 48).questions}) == len(question_bank()["topics"]) == 48
    with pytest.raises(ConfigError, match=r"dataset.questions is 49. the question bank holds 48 topics. give a number"):
        make_world(config(questions=49))


def test_the_description_shows_every_wording_and_share() -> None:
    text = describe_world(world(0, 4))
    for question in world(0, 4).questions:
        assert question.prompt in text
        for answer, people, writer in zip(question.answers, question.people or (), question.writer or (), strict=True):
            assert f"{100 * people:5.1f}%  {100 * writer:5.1f}%  {answer}" in text
    assert text.count("(held out of training)") == 2
