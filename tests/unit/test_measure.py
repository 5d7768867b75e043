from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import BOS, EOS, PAD, VOCAB, tiny_policy
from torch import Tensor

from rlhf_cli import algos
from rlhf_cli.data.rows import Question
from rlhf_cli.measure import exact, offset, sampled
from rlhf_cli.measure.exact import ExactMeasure, enumerate_answers, summarise
from rlhf_cli.measure.sampled import PairMeasure, SampledMeasure, Sampling
from rlhf_cli.metrics.optimum import closed_form
from rlhf_cli.metrics.preference import divergence
from rlhf_cli.models.logps import frozen_token_logps
from rlhf_cli.models.prefix_tree import PrefixTree
from rlhf_cli.models.tokens import collate

# Two trained wordings and a held-out one; 3, 2 and 3 answers of unequal length.
PROMPTS = [[BOS, 4], [BOS, 5, 6], [BOS, 6, 4]]
ANSWERS = [
    [[7, EOS], [8, 9, EOS], [7, 9, EOS]],
    [[7, 8, 9, EOS], [10, EOS]],
    [[7, EOS], [8, 9, EOS], [7, 9, EOS]],
]
PEOPLE = [(0.5, 0.3, 0.2), (0.9, 0.1), (0.5, 0.3, 0.2)]
QUESTIONS = [
    Question(f"prompt {i}", tuple(f"answer {j}" for j in range(len(people))), people, None, i // 2, heldout=i == 2)
    for i, people in enumerate(PEOPLE)
]
ENUMERATION = enumerate_answers(QUESTIONS, PROMPTS, ANSWERS, PAD, "cpu")
N = 8
REWARDS = torch.tensor([1.0, 0.0, -1.0, 0.5, -7.0, 0.3, 2.0, -0.2])  # -7 is clipped to -5
TREE = PrefixTree(zip(ENUMERATION.prompt_ids, ENUMERATION.response_ids, strict=True), VOCAB, PAD)
TARGET = torch.tensor([[1.0, 0.0, -1.0], [0.5, -5.0, -math.inf], [0.3, 2.0, -0.2]]).softmax(-1)
KL = SimpleNamespace(beta=1.0)

Stub = Tensor  # where `frozen_token_logps` is replaced, a policy is its token log-probs, (N, T)


def lookup(prompts: Any, responses: Any) -> Tensor:
    table = {
        (tuple(p), tuple(r)): REWARDS[i].item()
        for i, (p, r) in enumerate(zip(ENUMERATION.prompt_ids, ENUMERATION.response_ids, strict=True))
    }
    return torch.tensor([table.get((tuple(p), tuple(r)), -1.5) for p, r in zip(prompts, responses, strict=True)])


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Token log-probs of a reference; policies are read from tables instead of models."""

    def read(model: Stub, batch: Any, **reading: Any) -> Tensor:
        return model.masked_fill(~batch.response_mask, 0.0)

    monkeypatch.setattr(exact, "frozen_token_logps", read)
    return torch.rand(N, 4, generator=torch.Generator().manual_seed(0)).log()


def measure(
    reference: Any, name: str = "kl_ppo", algo: Any = KL, questions: list[Question] = QUESTIONS, **changes: Any
) -> ExactMeasure:
    settings: dict[str, Any] = {"reward_clip": 5.0, "temperature": 1.0, "tree": None}
    rows = replace(ENUMERATION, questions=questions)
    return ExactMeasure(rows, reference, lookup, algorithm=algos.get(name), algo=algo, **{**settings, **changes})


def policy_from(shares: Tensor) -> Stub:
    """A policy that gives each answer its share, (P, A): all of its log-prob on the first token."""
    tokens = torch.zeros(N, 4)
    tokens[:, 0] = shares[ENUMERATION.mask].log()
    return tokens


# -- exact -------------------------------------------------------------------------------------------------------------


def test_the_enumeration_lays_answers_out_by_question() -> None:
    assert ENUMERATION.mask.tolist() == [[True] * 3, [True, True, False], [True] * 3]
    table = ENUMERATION.table(torch.arange(8.0), -1.0)
    assert table.tolist() == [[0, 1, 2], [3, 4, -1], [5, 6, 7]]
    assert ENUMERATION.batch.response_ids[3].tolist() == [7, 8, 9, EOS]
    assert ENUMERATION.prompt_ids[3:5] == [[BOS, 5, 6]] * 2


@pytest.mark.parametrize(
    ("name", "beta", "alpha"),
    [("kl_ppo", 1.0, 1.0), ("kl_ppo", 0.3, 1.0), ("pm", 1.0, 0.3), ("pm", 2.0, 0.3), ("pm", 1.0, None)],
)
def test_the_true_optimum_is_at_distance_0(reference: Stub, name: str, beta: float, alpha: float | None) -> None:
    best = torch.zeros(3, 3)
    for question in range(3):
        rows = torch.tensor([ids == PROMPTS[question] for ids in ENUMERATION.prompt_ids])
        logps = closed_form(
            reference[rows],
            REWARDS[rows].clamp(-5, 5),
            ENUMERATION.batch.response_mask[rows],
            beta=beta,
            alpha=alpha,
        )
        best[question, : len(logps)] = logps.exp()
    found = measure(reference, name, SimpleNamespace(beta=beta, alpha=alpha)).metrics(policy_from(best))
    for key in ("optimum/tv", "optimum/kl", "optimum/tv_max", "pm/offset_mass"):
        assert found[key] == pytest.approx(0.0, abs=1e-5), key
    at_preferences = (alpha, beta) == (None, 1.0)
    assert (found["pm/tv"] < 1e-5) == at_preferences
    assert ("pm_beta/tv" in found) == (beta != 1)
    if alpha is None:
        assert found.get("pm_beta/tv", 0.0) == pytest.approx(0.0, abs=1e-5)


def test_pairwise_algorithms_are_measured_against_the_people_s_optimum(reference: Stub) -> None:
    # dpm without a reference, beta = 1: its optimum is the population itself
    people = torch.tensor([[*shares, 0.0][:3] for shares in PEOPLE])
    found = measure(reference, "dpm", SimpleNamespace(beta=1.0, alpha=None)).metrics(policy_from(people))
    for key in ("optimum/tv", "optimum/kl", "gold/tv", "gold/kl_rm_policy", "gold/kl_policy_rm", "gold/divergence"):
        assert found[key] == pytest.approx(0.0, abs=1e-5), key
    assert found["gold/minority_mass"] == pytest.approx((0.5 + 0.1) / 2)
    # dpo: reference times share to the power 1 / beta
    weights = ENUMERATION.table((reference * ENUMERATION.batch.response_mask).sum(-1), -math.inf).exp() * people**2
    best = weights / weights.sum(-1, keepdim=True)
    found = measure(reference, "dpo", SimpleNamespace(beta=0.5)).metrics(policy_from(best))
    assert found["optimum/tv"] == pytest.approx(0.0, abs=1e-5)
    assert found["gold/tv"] > 0.05


def test_rpo_has_no_optimum(reference: Stub) -> None:
    work = measure(reference, "rpo", SimpleNamespace(beta=1.0))
    assert not [key for key in work.metrics(reference) if key.startswith("optimum")]
    assert work.distributions(reference)[0]["optimum"] is None


def test_averages_are_over_trained_wordings_and_heldout_is_apart(reference: Stub) -> None:
    shares = TARGET.clone()
    shares[2] = torch.tensor([1.0, 1e-30, 1e-30])
    found = measure(reference).metrics(policy_from(shares))
    assert found["pm/tv"] == pytest.approx(0.0, abs=1e-6)
    assert found["pm/tv_max"] == pytest.approx(0.0, abs=1e-6)
    assert found["heldout/pm/tv"] == pytest.approx(1 - TARGET[2, 0].item())
    shares = TARGET.clone()
    shares[1, :2] = torch.tensor([0.25, 0.25])  # rewards .5 and -5: q is (.99593, .00407)
    found = measure(reference).metrics(policy_from(shares))
    tv = (0.995930 - 0.25 + 0.25 - 0.004070 + 0.5) / 2
    assert found["pm/tv"] == pytest.approx(tv / 2, abs=1e-5)
    assert found["pm/tv_max"] == pytest.approx(tv, abs=1e-5)
    assert found["pm/offset_mass"] == pytest.approx(0.25)
    assert found["heldout/pm/tv"] == pytest.approx(0.0, abs=1e-6)


def test_reference_metrics_are_those_of_the_reference(reference: Stub) -> None:
    work = measure(reference)
    assert work.reference_metrics() == {f"reference/{key}": value for key, value in work.metrics(reference).items()}


def test_without_known_shares_there_are_no_gold_metrics(reference: Stub) -> None:
    unknown = [Question(q.prompt, q.answers, None, None, q.index) for q in QUESTIONS]
    work = measure(reference, "dpo", questions=unknown)
    assert not [key for key in work.metrics(reference) if key.startswith(("gold", "heldout"))]
    assert work.distributions(reference)[0]["people"] is None
    torch.testing.assert_close(work.optimum, measure(reference, "kl_ppo").optimum)


def test_rewards_are_clipped_as_in_training(reference: Stub) -> None:
    assert measure(reference).rewards[1, 1].item() == -5.0
    assert measure(reference, reward_clip=None).rewards[1, 1].item() == -7.0


def test_distributions_hold_every_bar(reference: Stub) -> None:
    shares = TARGET * 0.8
    rows = measure(reference).distributions(policy_from(shares))
    assert [row["heldout"] for row in rows] == [False, False, True]
    assert [row["answers"] for row in rows] == [list(question.answers) for question in QUESTIONS]
    row = rows[1]
    assert row["people"] == pytest.approx([0.9, 0.1])
    assert row["reward_model"] == pytest.approx(TARGET[1, :2].tolist(), abs=1e-6)
    assert row["policy"] == pytest.approx((0.8 * TARGET[1, :2]).tolist(), abs=1e-6)
    assert row["policy_offset"] == pytest.approx(0.2, abs=1e-5)
    assert sum(row["optimum"]) == pytest.approx(1.0, abs=1e-5)
    by_hand = (reference * ENUMERATION.batch.response_mask).sum(-1)[3:5].exp()
    assert row["reference"] == pytest.approx(by_hand.tolist(), abs=1e-6)


def test_summarise() -> None:
    trained = torch.tensor([True, True, False])
    table = {"pm/tv": torch.tensor([0.1, 0.3, 0.9]), "gold/minority_mass_target": torch.tensor([0.2, 0.4, 0.9])}
    assert summarise(table, trained) == pytest.approx(
        {"pm/tv": 0.2, "pm/tv_max": 0.3, "heldout/pm/tv": 0.9, "gold/minority_mass_target": 0.3}
    )
    assert "heldout/pm/tv" not in summarise(table, torch.ones(3).bool())


def test_a_model_is_read_as_in_training() -> None:
    policy = tiny_policy()
    found = measure(tiny_policy(1), tree=TREE).metrics(policy)
    assert found["pm/offset_mass_max"] == pytest.approx(0.0, abs=1e-5)
    assert found["pm/tv"] > 0.01
    hot = measure(tiny_policy(1), tree=TREE, temperature=1e6).policy_logps(policy)
    # 3 answers of the first prompt: half 8 9, half 7, which splits in two; all but equal logits
    assert hot[0].exp().tolist() == pytest.approx([0.25, 0.5, 0.25], abs=1e-3)


# -- sampled -----------------------------------------------------------------------------------------------------------


def sampling(tree: PrefixTree | None = TREE, **changes: Any) -> Sampling:
    return Sampling(**{"max_new_tokens": 4, "temperature": 1.0, "tree": tree, "eos_ids": [EOS], "pad_id": PAD,
                       "device": "cpu", **changes})  # fmt: skip


def sampled_measure(samples: int, reward: Any = lookup, algo: Any = KL, seed: int = 0, **how: Any) -> SampledMeasure:
    return SampledMeasure(
        PROMPTS, samples, tiny_policy(1), reward, reward_clip=5.0, algorithm=algos.get("kl_ppo"), algo=algo,
        sampling=sampling(**how), seed=seed,
    )  # fmt: skip


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
    policy, reference = tiny_policy(), tiny_policy(1)
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
    monkeypatch.setattr(sampled.logps, "frozen_token_logps", lambda *_, **__: torch.tensor(tokens))
    found = PairMeasure(pairs, lookup, reward_clip=clip, sampling=sampling()).metrics(None)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    gaps = [abs(sigmoid(5.5 if clip else 7.5) - sigmoid(1.0)), abs(sigmoid(-1.0) - sigmoid(2.0))]
    assert found["pm/pair_tv"] == pytest.approx(sum(gaps) / 2, abs=1e-6)
    assert found["pm/pair_tv/n"] == 2
    # chosen responses of 4 and 3 tokens, end-of-sequence included, with log-probs -3 and -1
    assert found["perplexity/chosen"] == pytest.approx(math.exp(4 / 7))


def test_pair_tv_of_a_policy_that_equals_its_reward_is_0() -> None:
    policy = tiny_policy()
    pairs = [
        {"prompt_ids": prompt, "chosen_ids": answers[0], "rejected_ids": answers[1]}
        for prompt, answers in zip(PROMPTS, ANSWERS, strict=True)
    ]

    def own(prompts: Any, responses: Any) -> Tensor:
        batch = collate(prompts, responses, PAD)
        return frozen_token_logps(policy, batch, temperature=1.0, tree=None).sum(-1)

    found = PairMeasure(pairs, own, reward_clip=None, sampling=sampling(tree=None)).metrics(policy)
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
