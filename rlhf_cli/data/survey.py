"""The survey world: opinion questions whose answers, population shares and gold rewards are known exactly.

Everything the theory speaks of is exact here: the response set Y of a prompt, the people's distribution
softmax(gold), the reference's habits, every closed-form optimum and every distance (architecture: embedded default).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from math import ceil, exp

import numpy as np
import yaml

from rlhf_cli.config.schema import SurveyConfig
from rlhf_cli.data.rows import Demonstration, Pair, PreferenceData, Question, Ranking
from rlhf_cli.errors import ConfigError

MIN_ANSWERS, MAX_ANSWERS = 4, 8
PEOPLE_MAJORITY = (0.38, 0.55)  # share of the most popular answer
PEOPLE_MINORITY = (0.02, 0.04)  # share of the rarest answer
WRITER_HABIT = (0.38, 0.54)  # how often the writer gives the answer they are used to
WRITER_FLOOR = 0.06  # the writer's rarest answer: above alpha, so that preference matching can match it
SEVERAL_EVERY = 2  # every second question has several wordings
TRAINED_WORDINGS = 3  # of such a question; one more is held out of all training


@dataclass(frozen=True)
class SurveyWorld:
    """The questions of one world: every wording of every question is one `Question` row."""

    questions: tuple[Question, ...]
    gold_offset_reward: float

    def gold(self, prompt: str, response: str) -> float:
        """Return the gold reward, nats: log share of a valid answer, else `gold_offset_reward`."""
        return self._rewards.get((prompt, " ".join(response.split())), self.gold_offset_reward)

    @cached_property
    def _rewards(self) -> dict[tuple[str, str], float]:
        return {
            (question.prompt, answer): float(np.log(share))
            for question in self.questions
            for answer, share in zip(question.answers, question.people or (), strict=True)
        }


@cache
def question_bank() -> dict[str, list]:
    """Return the bank: `templates` of wordings and `topics` with 8 answers each."""
    return yaml.safe_load((files("rlhf_cli.data") / "survey_bank.yaml").read_text(encoding="utf-8"))


def make_world(cfg: SurveyConfig) -> SurveyWorld:
    """Return the world of `cfg.seed`: the same seed gives the same world on every machine.

    Raises:
        ConfigError: more questions are asked for than the bank holds.
    """
    bank = question_bank()
    if cfg.questions > len(bank["topics"]):
        raise ConfigError(
            f"dataset.questions is {cfg.questions}",
            f"the question bank holds {len(bank['topics'])} topics",
            f"give a number from 1 to {len(bank['topics'])}",
        )
    rng = np.random.default_rng([cfg.seed, 7])
    rows: list[Question] = []
    for index, topic in enumerate(bank["topics"][: cfg.questions]):
        count = int(rng.integers(MIN_ANSWERS, MAX_ANSWERS + 1))
        answers = tuple(topic["answers"][i] for i in sorted(rng.permutation(MAX_ANSWERS)[:count]))
        people = _people_shares(rng, count)
        writer = _writer_shares(rng, people, shares_majority=index % 2 == 0)
        templates = [bank["templates"][i] for i in rng.permutation(len(bank["templates"]))]
        several = index % SEVERAL_EVERY == 1
        wordings = [(template, number == TRAINED_WORDINGS) for number, template in enumerate(templates)]
        wordings = wordings[: TRAINED_WORDINGS + 1] if several else wordings[:1]
        rows += [
            Question(template.format(topic=topic["topic"]), answers, people, writer, index, heldout)
            for template, heldout in wordings
        ]
    return SurveyWorld(tuple(rows), float(cfg.gold_offset_reward))


def _people_shares(rng: np.random.Generator, count: int) -> tuple[float, ...]:
    """Return shares with one clear majority, a rarest answer of 2-4 % and the rest between, in random order."""
    majority, rarest = rng.uniform(*PEOPLE_MAJORITY), rng.uniform(*PEOPLE_MINORITY)
    middle = rng.dirichlet(np.full(count - 2, 3.0)) * (1 - majority - rarest - 0.04 * (count - 2)) + 0.04
    frequent = np.array([majority, *np.minimum(middle, 0.8 * majority)])
    frequent *= (1 - rarest) / frequent.sum()
    return tuple(float(share) for share in rng.permutation([*frequent, rarest]))


def _writer_shares(rng: np.random.Generator, people: tuple[float, ...], *, shares_majority: bool) -> tuple[float, ...]:
    """Return the writer's habits, which differ from the people's shares; no answer is below the floor.

    Args:
        people: the people's shares.
        shares_majority: True: the writer's habit is the people's favourite, so that a policy biased by the writer
            collapses on the majority. False: it is an answer most people do not prefer, so that it is led astray.
    """
    count = len(people)
    by_share = np.argsort(people)
    favourite = int(by_share[-1]) if shares_majority else int(rng.choice(by_share[: count // 2]))
    habit = rng.uniform(*WRITER_HABIT)
    rest = rng.dirichlet(np.full(count - 1, 2.0)) * (1 - habit - WRITER_FLOOR * (count - 1)) + WRITER_FLOOR
    rest = np.minimum(rest, 0.8 * habit)  # the habit stays the favourite; it takes what this leaves
    return tuple(float(share) for share in np.insert(rest, favourite, 1 - rest.sum()))


def load_survey(cfg: SurveyConfig) -> PreferenceData:
    """Return the data of the world: demonstrations by the writer, judgements by people who look at reward and length.

    A judge's reward of an answer is gold + length_bias * (its number of words), nats. With ranking_size 2 the
    judgements are Bradley-Terry pairs; with K > 2, Plackett-Luce rankings of up to K answers, ceil(pairs / (K (K-1)/2))
    of them, and the pairs are those they imply. Held-out pairs are made alike. Neither K nor the bias changes the
    world, its gold reward or the demonstrations.
    """
    world = make_world(cfg)
    rng = np.random.default_rng([cfg.seed, 11])
    trained = [question for question in world.questions if not question.heldout]
    pairs = _draw_pairs(rng, trained, cfg.pairs, cfg.length_bias)
    demonstrations = _draw_demonstrations(rng, trained, cfg.demonstrations)
    heldout = _draw_pairs(rng, trained, cfg.heldout_pairs, cfg.length_bias)
    rankings: list[Ranking] = []
    if cfg.ranking_size > 2:  # drawn last, so that the demonstrations are those of ranking_size 2
        rankings = _draw_rankings(rng, trained, cfg.pairs, cfg)
        pairs, heldout = _implied(rankings), _implied(_draw_rankings(rng, trained, cfg.heldout_pairs, cfg))
    return PreferenceData(
        demonstrations=demonstrations,
        reward_pairs=pairs,
        policy_pairs=pairs,
        prompts=[question.prompt for question in trained],
        heldout_pairs=heldout,
        questions=list(world.questions),
        gold=world.gold,
        word_level=True,
        reward_rankings=rankings,
    )


def _draw_demonstrations(rng: np.random.Generator, questions: list[Question], count: int) -> list[Demonstration]:
    rows = []
    for number in range(count):
        question = questions[number % len(questions)]
        answer = question.answers[int(rng.choice(len(question.answers), p=question.writer))]
        rows.append(Demonstration(question.prompt, answer))
    return rows


def _draw_pairs(rng: np.random.Generator, questions: list[Question], count: int, length_bias: float) -> list[Pair]:
    """Draw two different answers uniformly; which is preferred is drawn from Bradley-Terry.

    P(first) = sigmoid(gold_1 - gold_2 + length_bias * (words_1 - words_2))
    """
    rows = []
    first, second, luck = rng.random(count), rng.random(count), rng.random(count)
    for number in range(count):
        question = questions[number % len(questions)]
        size = len(question.answers)
        one = int(first[number] * size)
        other = (one + 1 + int(second[number] * (size - 1))) % size
        assert question.people is not None
        lead = length_bias * (_words(question.answers[one]) - _words(question.answers[other]))
        # Of the two factors the larger is 1, so that neither overflows.
        weight_one = question.people[one] * exp(min(lead, 0.0))
        weight_other = question.people[other] * exp(min(-lead, 0.0))
        wins = luck[number] < weight_one / (weight_one + weight_other)
        chosen, rejected = (one, other) if wins else (other, one)
        rows.append(Pair(question.prompt, question.answers[chosen], question.answers[rejected]))
    return rows


def _draw_rankings(rng: np.random.Generator, questions: list[Question], pairs: int, cfg: SurveyConfig) -> list[Ranking]:
    """Draw K different answers uniformly, fewer if the question has fewer; their order is drawn from Plackett-Luce.

    P(y_1, ..., y_K) = prod_k exp(r_k) / sum_{j >= k} exp(r_j), with the judge's reward r: sorted by r plus a standard
    Gumbel variable each, best first.

    Args:
        pairs: how many pairs the rankings would imply if every question had K answers.
    """
    size = min(cfg.ranking_size, MAX_ANSWERS)
    rows = []
    for number in range(ceil(pairs / (size * (size - 1) // 2))):
        question = questions[number % len(questions)]
        assert question.people is not None
        words = np.array([_words(answer) for answer in question.answers])
        drawn = rng.permutation(len(words))[:size]
        judged = np.log(question.people)[drawn] + cfg.length_bias * words[drawn] + rng.gumbel(size=len(drawn))
        order = drawn[np.argsort(-judged)]
        rows.append(Ranking(question.prompt, tuple(question.answers[i] for i in order)))
    return rows


def _implied(rankings: list[Ranking]) -> list[Pair]:
    return [pair for ranking in rankings for pair in ranking.pairs()]


def _words(answer: str) -> int:
    return len(answer.split())


def describe_world(world: SurveyWorld) -> str:
    """Return the world as text: every question with its wordings, answers, people's and writer's shares."""
    lines: list[str] = []
    for index in sorted({question.index for question in world.questions}):
        wordings = [question for question in world.questions if question.index == index]
        first = wordings[0]
        lines.append(f"{index + 1}. {first.prompt}")
        lines += [f"   also: {q.prompt}{'   (held out of training)' if q.heldout else ''}" for q in wordings[1:]]
        lines.append("   people  writer")
        shares = zip(first.answers, first.people or (), first.writer or (), strict=True)
        lines += [f"   {100 * p:5.1f}%  {100 * w:5.1f}%  {a}" for a, p, w in sorted(shares, key=lambda row: -row[1])]
        lines.append("")
    return "\n".join(lines)
