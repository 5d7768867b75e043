from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_cli.metrics.optimum import closed_form, optimum

MASK = torch.arange(3) < torch.tensor([3, 1, 2, 2]).unsqueeze(-1)  # 4 responses of at most 3 tokens
REWARDS = torch.tensor([1.0, 0.0, 2.0, -1.0], dtype=torch.float64)


def reference(seed: int = 0, fill: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(4, 3, generator=generator, dtype=torch.float64).log().masked_fill(~MASK, fill)


@pytest.mark.parametrize(
    "mask", [MASK[:2, :2], MASK[:2, :2].float(), MASK[:2, :2].long()], ids=["bool", "float", "int"]
)
def test_closed_form_by_hand(mask: Tensor) -> None:
    # Two responses, y1 of two tokens (pi_ref .5 and .1), y2 of one (.25); exp(r / beta) = 2 and 1 (r = log 4, beta 2).
    ref = torch.tensor([[0.5, 0.1], [0.25, 0.9]]).log()
    rewards = torch.tensor([math.log(4.0), 0.0])
    for alpha, weights in {
        1.0: (2 * 0.05, 0.25),  # KL: pi_ref exp(r / beta)
        None: (2.0, 1.0),  # PM: exp(r / beta)
        0.2: (2 * 0.1, 1.0),  # .5 and .25 are likely
        0.3: (2 * 0.1, 0.25),  # .5 is likely
        0.05: (2.0, 1.0),  # all are likely
    }.items():
        found = closed_form(ref, rewards, mask, beta=2, alpha=alpha).exp()
        torch.testing.assert_close(found, torch.tensor(weights) / sum(weights))


def test_kl_is_the_reference_where_rewards_are_equal() -> None:
    ref = reference()
    expected = ref.sum(-1).log_softmax(-1)
    torch.testing.assert_close(closed_form(ref, REWARDS * 0 + 3, MASK, beta=0.1, alpha=1.0), expected)


def test_unconditional_pm_is_the_preference_distribution_and_beta_tempers_it() -> None:
    ref = reference()
    torch.testing.assert_close(closed_form(ref, REWARDS, MASK, beta=1.0, alpha=None), REWARDS.log_softmax(-1))
    torch.testing.assert_close(closed_form(ref, REWARDS, MASK, beta=4.0, alpha=None), (REWARDS / 4).log_softmax(-1))


def test_kl_collapses_as_beta_falls() -> None:
    assert closed_form(reference(), REWARDS, MASK, beta=0.01, alpha=1.0).exp()[2].item() == pytest.approx(1.0)


@given(st.integers(0, 10_000), st.floats(0.05, 10), st.none() | st.floats(0.001, 1.0))
@settings(deadline=None, max_examples=100)
def test_closed_form_is_a_distribution_that_no_constant_reward_changes(
    seed: int, beta: float, alpha: float | None
) -> None:
    found = closed_form(reference(seed), REWARDS, MASK, beta=beta, alpha=alpha)
    assert found.exp().sum().item() == pytest.approx(1.0)
    torch.testing.assert_close(found, closed_form(reference(seed), REWARDS + 5, MASK, beta=beta, alpha=alpha))


@given(st.integers(0, 10_000), st.floats(0.001, 1.0))
@settings(deadline=None, max_examples=100)
def test_conditional_pm_maximises_its_own_objective(seed: int, alpha: float) -> None:
    """E_pi[r - beta sum_t (log pi - e_t)] at the closed form is beta log Z, and no other policy reaches it."""
    ref, beta = reference(seed), 0.7
    effective = (ref * (ref.exp() <= alpha)).sum(-1)

    def objective(policy: Tensor) -> float:
        return float((policy.exp() * (REWARDS - beta * (policy - effective))).sum())

    best = objective(closed_form(ref, REWARDS, MASK, beta=beta, alpha=alpha))
    assert best == pytest.approx(beta * float((REWARDS / beta + effective).logsumexp(-1)))
    rivals = [
        closed_form(ref, REWARDS, MASK, beta=beta, alpha=1.0),
        closed_form(ref, REWARDS, MASK, beta=1, alpha=None),
    ]
    rivals.append(torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1))
    assert all(objective(rival) <= best + 1e-9 for rival in rivals)


@given(st.integers(0, 10_000), st.floats(0.001, 1.0))
@settings(deadline=None, max_examples=100)
def test_conditional_pm_lies_between_kl_and_pm(seed: int, alpha: float) -> None:
    """Its unnormalised log weights lie between those of KL (below) and of unconditional PM (above)."""
    ref = reference(seed)
    kl, between, pm = (closed_form(ref, REWARDS, MASK, beta=1.0, alpha=a) for a in (1.0, alpha, None))
    likely = (ref.exp() > alpha) & MASK
    if bool(likely[MASK].all()):
        torch.testing.assert_close(between, pm)
    if not bool(likely.any()):
        torch.testing.assert_close(between, kl)
    weight = REWARDS + (ref * ~likely).sum(-1)
    torch.testing.assert_close(between, weight.log_softmax(-1))
    assert bool((REWARDS + ref.sum(-1) <= weight + 1e-12).all())
    assert bool((weight <= REWARDS + 1e-12).all())


@pytest.mark.parametrize("alpha", [1.0, 0.2, None])
@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf, 1e4])
def test_closed_form_does_not_see_masked_tokens(alpha: float | None, fill: float) -> None:
    clean = closed_form(reference(), REWARDS, MASK, beta=0.5, alpha=alpha)
    assert torch.equal(closed_form(reference(fill=fill), REWARDS, MASK, beta=0.5, alpha=alpha), clean)


def test_integer_rewards_and_huge_ones() -> None:
    zeros = torch.zeros(4, 3)
    found = closed_form(zeros, torch.tensor([1, 0, 2, -1]), MASK, beta=1, alpha=1)
    torch.testing.assert_close(found.double(), REWARDS.log_softmax(-1), check_dtype=False)
    huge = closed_form(reference(), REWARDS * 1e4, MASK, beta=1.0, alpha=0.3)
    assert bool(huge.isfinite().all())
    assert huge.exp().tolist() == [0.0, 0.0, 1.0, 0.0]


def test_wrong_arguments_are_refused() -> None:
    ref = reference()
    with pytest.raises(ValueError, match=r"ref_token_logps \(4, 3\), mask \(3, 4\)"):
        closed_form(ref, REWARDS, MASK.T, beta=1.0, alpha=1.0)
    with pytest.raises(ValueError, match=r"rewards \(3,\), sequences \(4,\)"):
        closed_form(ref, REWARDS[:3], MASK, beta=1.0, alpha=1.0)
    for beta in (0, -1.0):
        with pytest.raises(ValueError, match=rf"beta is {beta}: it must be > 0"):
            closed_form(ref, REWARDS, MASK, beta=beta, alpha=1.0)
    for alpha in (0, 1.5):
        with pytest.raises(ValueError, match=rf"alpha is {alpha}: it is a probability threshold"):
            closed_form(ref, REWARDS, MASK, beta=1.0, alpha=alpha)
    with pytest.raises(ValueError, match=r"effective_ref \(2, 4\), rewards \(4,\)"):
        optimum(torch.zeros(2, 4), REWARDS, beta=1.0)


def test_optimum_of_several_prompts_leaves_no_mass_where_there_is_no_response() -> None:
    effective = torch.tensor([[0.0, -1.0, -math.inf], [0.0, 0.0, 0.0]])
    rewards = torch.tensor([[0.0, 1.0, 50.0], [0.0, 0.0, math.log(2.0)]])
    found = optimum(effective, rewards, beta=1.0).exp()
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]))
