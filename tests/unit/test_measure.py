from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import BOS, EOS, tiny_policy
from tiny_world import ENUMERATION, PEOPLE, PROMPTS, QUESTIONS, REWARDS, TARGET, TREE, N, measure
from torch import Tensor

from rlhf_cli.data.rows import Question
from rlhf_cli.measure import exact
from rlhf_cli.measure.exact import summarise
from rlhf_cli.metrics.glossary import describe, known
from rlhf_cli.metrics.optimum import closed_form

Stub = Tensor  # where `frozen_token_logps` is replaced, a policy is its token log-probs, (N, T)


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Token log-probs of a reference; policies are read from tables instead of models."""

    def read(model: Stub, batch: Any, **reading: Any) -> Tensor:
        return model.masked_fill(~batch.response_mask, 0.0)

    monkeypatch.setattr(exact, "frozen_token_logps", read)
    return torch.rand(N, 4, generator=torch.Generator().manual_seed(0)).log()


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
    [
        ("kl_ppo", 1.0, 1.0),
        ("kl_ppo", 0.3, 1.0),
        ("pm", 1.0, 0.3),
        ("pm", 2.0, 0.3),
        ("pm", 1.0, None),
        ("pm", 2.0, None),
    ],
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


def test_only_what_is_better_the_lower_has_a_worst_prompt_that_is_a_maximum(reference: Stub) -> None:
    found = measure(reference, "dpo", SimpleNamespace(beta=0.5)).metrics(reference)
    assert {"pm/minority_coverage", "gold/minority_coverage", "pm_beta/minority_coverage"} <= found.keys()
    worst = {key.removesuffix("_max") for key in found if key.endswith("_max")}
    assert {key for key in found.keys() & worst if describe(key).better != "lower"} == set()
    assert {"pm/tv", "pm/offset_mass", "gold/kl_rm_policy", "optimum/kl", "pm_beta/divergence"} <= worst
    assert all(known(key) for key in found)


def test_prompts_without_a_rank_correlation_are_left_out_of_its_mean() -> None:
    trained = torch.tensor([True, True, True, False])
    table = {"pm/rank_correlation": torch.tensor([0.2, math.nan, 0.6, 0.9])}
    assert summarise(table, trained) == pytest.approx({"pm/rank_correlation": 0.4})
    assert summarise({"pm/rank_correlation": torch.full((4,), math.nan)}, trained) == {}
    broken = summarise({"pm/tv": torch.tensor([0.2, math.nan, 0.6, 0.9])}, trained)
    assert math.isnan(broken["pm/tv"])  # a fault, not a prompt without the metric
    assert broken["heldout/pm/tv"] == pytest.approx(0.9)


def test_a_model_is_read_as_in_training() -> None:
    policy = tiny_policy()
    found = measure(tiny_policy(1), tree=TREE).metrics(policy)
    assert found["pm/offset_mass_max"] == pytest.approx(0.0, abs=1e-5)
    assert found["pm/tv"] > 0.01
    hot = measure(tiny_policy(1), tree=TREE, temperature=1e6).policy_logps(policy)
    # 3 answers of the first prompt: half 8 9, half 7, which splits in two; all but equal logits
    assert hot[0].exp().tolist() == pytest.approx([0.25, 0.5, 0.25], abs=1e-3)


def test_gold_reward_by_hand() -> None:
    """Of an answer it is the log of its share, off the set the world's; the held-out wording does not count."""
    found, policy = measure(tiny_policy(1), gold_offset=-5.0), tiny_policy(2)
    shares = found.policy_logps(policy).exp()
    expected = [
        sum(float(shares[i, j]) * math.log(PEOPLE[i][j]) for j in range(len(PEOPLE[i])))
        - 5 * (1 - float(shares[i].sum()))
        for i in (0, 1)
    ]
    metrics = found.metrics(policy)
    assert metrics["gold/reward"] == pytest.approx(sum(expected) / 2, abs=1e-5)
    assert "gold/reward_max" not in metrics
    assert "gold/reward" not in measure(tiny_policy(1)).metrics(policy)
