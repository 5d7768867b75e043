"""Every PPO, RPO and PCRM value of the official code, through the public functions, to 1e-6."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_values import PCRM, PCRM_DPO, PPO, RPO
from torch import Tensor

from rlhf_cli.algos.dpo import dpo_loss
from rlhf_cli.algos.pm import effective_reference
from rlhf_cli.algos.ppo import gae, policy_loss, token_rewards, value_loss
from rlhf_cli.algos.rpo import rpo_loss, sft_term
from rlhf_cli.rewards.pcrm import angular_similarity, length_ratio, margin_bound, pcrm_loss

SIDES = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")

each_ppo_case = pytest.mark.parametrize("case", PPO, ids=[f"alpha={c['alpha']}" for c in PPO])
each_rpo_case = pytest.mark.parametrize("case", RPO, ids=[f"{c['sft_reduction']}-eta={c['eta']}" for c in RPO])
each_pcrm_case = pytest.mark.parametrize("case", PCRM, ids=[f"{c['method']}-beta1={c['beta1']}" for c in PCRM])
each_pcrm_dpo_case = pytest.mark.parametrize("case", PCRM_DPO, ids=[f"beta1={c['beta1']}" for c in PCRM_DPO])


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def equal(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, f64(expected), rtol=0, atol=1e-6)


def masks(case: dict[str, Any]) -> list[Tensor]:
    full = torch.ones(len(case["scores"]), len(case["values"][0]))
    return [full.bool(), full.double(), full.long()]


@each_ppo_case
def test_token_rewards(case: dict[str, Any]) -> None:
    effective = effective_reference(f64(case["ref_logprobs"]), alpha=case["alpha"] or 1.0)
    for mask in masks(case):
        found = token_rewards(
            f64(case["completion_logprobs"]), effective, mask, f64(case["scores"]), beta=case["beta"], reward_clip=5.0
        )
        equal(found, case["token_rewards"])


@each_ppo_case
def test_advantages_and_returns(case: dict[str, Any]) -> None:
    for mask in masks(case):
        advantages, returns = gae(f64(case["token_rewards"]), f64(case["values"]), mask, gamma=1.0, lam=0.95)
        equal(advantages, case["advantages"])
        equal(returns, case["returns"])


@each_ppo_case
def test_policy_and_value_loss(case: dict[str, Any]) -> None:
    new, old = f64(case["new_logprobs"]), f64(case["completion_logprobs"])
    values, old_values, returns = f64(case["new_values"]), f64(case["values"]), f64(case["returns"])
    for mask in masks(case):
        equal(policy_loss(new, old, f64(case["advantages"]), mask, clip_range=0.2), case["policy_loss"])
        equal(value_loss(values, old_values, returns, mask, clip_range=0.2), case["value_loss"])


@each_rpo_case
def test_dpo_part_of_rpo(case: dict[str, Any]) -> None:
    found = dpo_loss(*(f64(case[side]) for side in SIDES), beta=case["beta"])
    equal(found.mean(), case["dpo_loss"])


@pytest.mark.parametrize("case", [c for c in RPO if c["sft_reduction"] == "sum"])
def test_rpo_in_sum_form(case: dict[str, Any]) -> None:
    found = rpo_loss(*(f64(case[side]) for side in SIDES), beta=case["beta"], eta=case["eta"])
    equal(found, case["per_pair_loss"])
    equal(found.mean(), case["loss"])


@each_rpo_case
def test_rpo_as_dpo_plus_the_sft_term(case: dict[str, Any]) -> None:
    lengths = torch.tensor(case["chosen_lengths"]).unsqueeze(-1)
    mask = torch.arange(int(lengths.max())) < lengths
    # each summed log-prob spread evenly over its tokens
    spread = (f64(case["policy_chosen_logps"]).unsqueeze(-1) / lengths).masked_fill(~mask, torch.nan)
    reduction, weight = {
        "sum": ("sum", case["eta"] * case["beta"]),
        "mean": ("token_mean", case["eta"]),
    }[case["sft_reduction"]]
    for numbers in (mask, mask.double(), mask.long()):
        found = case["dpo_loss"] + weight * sft_term(spread, numbers, reduction=reduction)
        equal(found, case["loss"])


def bound(similarity: Tensor, case: dict[str, Any]) -> Tensor:
    return margin_bound(similarity, beta1=case["beta1"], beta2=case["beta2"], beta3=case["beta3"])


@each_pcrm_case
def test_pcrm_from_lengths_or_embeddings_to_the_loss(case: dict[str, Any]) -> None:
    measure, of = {
        "length_ratio": (length_ratio, "lengths"),
        "cosine_similarity": (angular_similarity, "embeddings"),
    }[case["method"]]
    similarity = measure(f64(case[f"chosen_{of}"]), f64(case[f"rejected_{of}"]))
    equal(similarity, case["similarity"])
    equal(bound(similarity, case), case["delta_star"])
    found = pcrm_loss(f64(case["chosen_rewards"]), f64(case["rejected_rewards"]), bound(similarity, case))
    equal(found, case["per_pair_loss"])
    equal(found.mean(), case["loss"])


@each_pcrm_dpo_case
def test_pcrm_on_the_dpo_logit(case: dict[str, Any]) -> None:
    # the logit beta [(log pi_w - log pi_ref,w) - (log pi_l - log pi_ref,l)] is the difference of these two rewards
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = (f64(case[side]) for side in SIDES)
    rewards = case["beta"] * (policy_chosen - ref_chosen), case["beta"] * (policy_rejected - ref_rejected)
    found = pcrm_loss(*rewards, bound(f64(case["similarity"]), case))
    equal(found, case["per_pair_loss"])
    equal(found.mean(), case["loss"])
