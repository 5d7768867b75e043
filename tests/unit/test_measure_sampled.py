"""Metrics from samples, on preference pairs, and of the optimum's mass off the set."""

from __future__ import annotations

import math
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import EOS, PAD, VOCAB, tiny_policy
from tiny_world import ANSWERS, ENUMERATION, PROMPTS, REWARDS, TREE, lookup, measure, sampled_measure, sampling
from torch import Tensor

from rlhf_cli import algos
from rlhf_cli.data.rows import Question
from rlhf_cli.measure import offset, sampled
from rlhf_cli.measure.exact import ExactMeasure, enumerate_answers
from rlhf_cli.measure.sampled import PairMeasure, SampledMeasure
from rlhf_cli.metrics.optimum import closed_form
from rlhf_cli.metrics.preference import divergence
from rlhf_cli.models.logps import frozen_token_logps
from rlhf_cli.models.tokens import collate


def test_sampled_metrics_repeat_and_leave_the_global_random_state_alone() -> None:
    policy, work = tiny_policy().train(), sampled_measure(8)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = work.measure(policy)
    assert torch.equal(torch.rand(3), expected)
    torch.rand(7)
    second = work.measure(policy)
    assert first[0] == second[0]
    assert first[1] == second[1]
    assert policy.training
    assert sampled_measure(8, seed=1).measure(policy)[1] != first[1]


def test_sampled_metrics_agree_with_the_exact_ones() -> None:
    """On a closed vocabulary every expectation is a sum over the answers."""
    policy, reference = tiny_policy(2), tiny_policy(1)
    found, responses, rewards = sampled_measure(700).measure(policy)
    assert len(responses) == len(rewards) == 2100
    batch, mask = ENUMERATION.batch, ENUMERATION.mask
    ours, theirs = (
        ENUMERATION.table(frozen_token_logps(model, batch, temperature=1.0, tree=TREE).sum(-1), -math.inf)
        for model in (policy, reference)
    )
    clipped = ENUMERATION.table(REWARDS.clamp(-5, 5), 0.0)
    share = ours.exp()
    lengths = ENUMERATION.table(batch.response_mask.sum(-1).float(), 0.0)
    expected = {
        "reward/mean": (share * clipped).sum(-1),
        "kl/sequence": (share * (ours - theirs)).nan_to_num().sum(-1),
        "length/mean": (share * lengths).sum(-1),
        "pm/divergence": divergence(clipped, ours, mask),
        "optimum/divergence": divergence(clipped + theirs.masked_fill(~mask, 0.0), ours, mask),
        "pm_beta/divergence": divergence(clipped, ours, mask),
    }
    for key, values in expected.items():
        assert found[key] == pytest.approx(values.mean().item(), rel=0.1, abs=0.05), key
    assert found["eos_rate"] == 1.0
    assert found["reward/mean/n"] == 3
    assert found["reward/mean/lo"] <= found["reward/mean"] <= found["reward/mean/hi"]


def test_a_policy_that_matches_its_reward_has_divergence_0() -> None:
    policy, reference = tiny_policy(), tiny_policy(1)

    def logps(model: Any, prompts: Any, responses: Any) -> Tensor:
        batch = collate(prompts, responses, PAD)
        return frozen_token_logps(model, batch, temperature=1.0, tree=None).sum(-1)

    def work(reward: Any, beta: float) -> dict[str, float]:
        algo = SimpleNamespace(beta=beta)
        measure = SampledMeasure(
            PROMPTS, 8, reference, reward, reward_clip=None, algorithm=algos.get("kl_ppo"), algo=algo,
            sampling=sampling(tree=None), seed=0,
        )  # fmt: skip
        return measure.measure(policy)[0]

    found = work(lambda p, r: logps(policy, p, r) + 3, 1.0)
    assert found["pm/divergence"] == pytest.approx(0.0, abs=1e-6)
    assert found["optimum/divergence"] > 0.1
    found = work(lambda p, r: 0.5 * logps(policy, p, r), 0.5)
    assert found["pm_beta/divergence"] == pytest.approx(0.0, abs=1e-6)
    assert found["pm/divergence"] > 0.1
    found = work(lambda p, r: 0.5 * (logps(policy, p, r) - logps(reference, p, r)), 0.5)
    assert found["optimum/divergence"] == pytest.approx(0.0, abs=1e-6)
    assert found["pm_beta/divergence"] > 0.1


def test_kl_of_the_reference_to_itself_is_0_and_cut_responses_are_counted() -> None:
    work = sampled_measure(20, tree=None, max_new_tokens=2)
    found, responses, _ = work.measure(tiny_policy(1))
    assert found["kl/sequence"] == pytest.approx(0.0, abs=1e-6)
    assert found["entropy/per_token"] > 0.1
    assert found["eos_rate"] == pytest.approx(np.mean([ids[-1] == EOS for ids in responses]))
    assert found["length/mean"] == pytest.approx(np.mean([len(ids) for ids in responses]))


def test_the_micro_batch_changes_no_metric_that_is_read() -> None:
    policy, work = tiny_policy(), sampled_measure(8)
    responses = work.draw(policy, work.prompts)
    pieces = [sampled_measure(8, micro_batch=size) for size in (1, 5, 128)]
    for other in pieces:
        other.draw = lambda *_: responses  # type: ignore[method-assign]
    first, *rest = (other.measure(policy)[0] for other in pieces)
    assert all(found == pytest.approx(first, abs=1e-4) for found in rest)


@pytest.mark.parametrize("clip", [5.0, None])
def test_pair_tv_by_hand(monkeypatch: pytest.MonkeyPatch, clip: float | None) -> None:
    # r: .5 - (-7), clipped .5 - (-5); 0 - 1. log pi: (-1 - 2) - (-4), (-1) - (-1 - 2).
    tokens = [[-1.0, -2.0, 0.0, 0.0], [-0.5, -0.5, 0.0, 0.0], [-4.0, 0.0, 0.0, 0.0], [-1.0, -2.0, 0.0, 0.0]]
    pairs = [
        {"prompt_ids": PROMPTS[1], "chosen_ids": ANSWERS[1][0], "rejected_ids": ANSWERS[1][1]},
        {"prompt_ids": PROMPTS[0], "chosen_ids": ANSWERS[0][1], "rejected_ids": ANSWERS[0][0]},
    ]
    # the reference (first reading) gives every response half the log-prob that the policy gives it
    readings = iter([torch.tensor(tokens) / 2, torch.tensor(tokens)])
    monkeypatch.setattr(sampled.logps, "frozen_token_logps", lambda *_, **__: next(readings))
    found = PairMeasure(pairs, None, lookup, reward_clip=clip, sampling=sampling()).metrics(None)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    gaps = [abs(sigmoid(5.5 if clip else 7.5) - sigmoid(1.0)), abs(sigmoid(-1.0) - sigmoid(2.0))]
    assert found["pm/pair_tv"] == pytest.approx(sum(gaps) / 2, abs=1e-6)
    assert found["pm/pair_tv/n"] == 2
    # chosen responses of 4 and 3 tokens, end-of-sequence included, with log-probs -3 and -1
    assert found["perplexity/chosen"] == pytest.approx(math.exp(4 / 7))
    assert found["chosen_logps"] == pytest.approx(-2.0)
    assert found["chosen_logps_change"] == pytest.approx(-1.0)


def test_pair_tv_of_a_policy_that_equals_its_reward_is_0() -> None:
    policy = tiny_policy()
    pairs = [
        {"prompt_ids": prompt, "chosen_ids": answers[0], "rejected_ids": answers[1]}
        for prompt, answers in zip(PROMPTS, ANSWERS, strict=True)
    ]

    def own(prompts: Any, responses: Any) -> Tensor:
        batch = collate(prompts, responses, PAD)
        return frozen_token_logps(policy, batch, temperature=1.0, tree=None).sum(-1)

    found = PairMeasure(pairs, policy, own, reward_clip=None, sampling=sampling(tree=None)).metrics(policy)
    assert found["pm/pair_tv"] == pytest.approx(0.0, abs=1e-5)


# -- the optimum's own mass off the set --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "alpha"), [("kl_ppo", 1.0), ("pm", 0.3), ("pm", 0.1)])
def test_offset_bound_is_the_optimum_s_mass_off_the_set(
    monkeypatch: pytest.MonkeyPatch, name: str, alpha: float
) -> None:
    """With responses of at most 2 tokens, every response there is can be enumerated."""
    monkeypatch.setattr(offset, "SAMPLES", 1500)
    reference, algo = tiny_policy(1), SimpleNamespace(beta=1.0, alpha=alpha)
    algorithm = algos.get(name)
    answers = [[[7, EOS], [8, EOS]], [[EOS]], [[9, 9], [4, EOS]]]
    questions = [Question(f"{i}", tuple("ab"[: len(rows)]), None, None, i, i == 2) for i, rows in enumerate(answers)]
    enumeration = enumerate_answers(questions, PROMPTS, answers, PAD, "cpu")

    def reward(prompts: Any, responses: Any) -> Tensor:
        return torch.tensor([1.0 if [*r] in ([7, EOS], [8, EOS], [EOS], [4, EOS]) else -1.0 for r in responses])

    work = ExactMeasure(
        enumeration, reference, reward, reward_clip=5.0, algorithm=algorithm, algo=algo, temperature=1.0, tree=None
    )
    drawn = SampledMeasure(
        PROMPTS, 2, reference, reward, reward_clip=5.0, algorithm=algorithm, algo=algo,
        sampling=sampling(tree=None, max_new_tokens=2), seed=0,
    )  # fmt: skip
    found = offset.offset_bound(work, drawn)
    everything = [[EOS]] + [[a, b] for a, b in product(range(VOCAB), repeat=2) if a != EOS]
    masses = []
    for prompt, valid in list(zip(PROMPTS, answers, strict=True))[:2]:  # the third is held out
        batch = collate([prompt] * len(everything), everything, PAD)
        token_logps = frozen_token_logps(reference, batch, temperature=1.0, tree=None)
        best = closed_form(
            token_logps, reward([prompt] * len(everything), everything), batch.response_mask, beta=1.0, alpha=alpha
        )
        on = torch.tensor([ids in valid for ids in everything])
        masses.append(best[~on].exp().sum().item())
    assert found["optimum/offset_bound"] == pytest.approx(np.mean(masses), rel=0.1)
    assert found["optimum/offset_bound/n"] == 3000


def test_a_closed_vocabulary_has_nothing_off_the_set() -> None:
    work = measure(tiny_policy(1), tree=TREE)
    assert offset.offset_bound(work, sampled_measure(2))["optimum/offset_bound"] == 0.0
