from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_cli.algos import ppo

Make = Callable[[Any], Tensor]
LENGTHS = torch.tensor([4, 2, 1])
MASK = torch.arange(4) < LENGTHS.unsqueeze(-1)  # (3, 4): B != T
MASKS = [MASK, MASK.float(), MASK.long()]
each_mask = pytest.mark.parametrize("mask", MASKS, ids=["bool", "float", "int"])
rubbish = pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf, 1e4])


def random(*shape: int, seed: int = 0, requires_grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)


def soiled(values: Tensor, fill: float) -> Tensor:
    return values.masked_fill(~MASK, fill)


# -- token rewards -----------------------------------------------------------------------------------------------------


@each_mask
def test_token_rewards_by_hand(mask: Tensor) -> None:
    logps = torch.tensor([[-1.0, -2.0, -1.5, -0.5], [-1.0, -3.0, 9.0, 9.0], [-2.0, 9.0, 9.0, 9.0]])
    effective = torch.tensor([[0.0, -1.0, -2.0, 0.0], [-2.0, -1.0, 9.0, 9.0], [-2.0, 9.0, 9.0, 9.0]])
    scores = torch.tensor([7, -1, -9])  # clipped to 5, -1, -5; integers are numbers too
    # -0.5 (l - e): row 1: .5, .5, -.25, .25 + 5; row 2: -.5, 1 - 1; row 3: 0 - 5
    expected = torch.tensor([[0.5, 0.5, -0.25, 5.25], [-0.5, 0.0, 0.0, 0.0], [-5.0, 0.0, 0.0, 0.0]])
    found = ppo.token_rewards(logps, effective, mask, scores, beta=0.5, reward_clip=5)
    torch.testing.assert_close(found, expected)


def test_without_a_clip_scores_are_taken_as_they_are() -> None:
    zeros = torch.zeros(3, 4)
    found = ppo.token_rewards(zeros, zeros, MASK, torch.tensor([7.0, -1e4, 0.5]), beta=1.0, reward_clip=None)
    assert found.sum(-1).tolist() == [7.0, -1e4, 0.5]


def test_a_policy_that_equals_its_effective_reference_pays_nothing() -> None:
    logps, scores = random(3, 4), random(3, seed=1)
    found = ppo.token_rewards(logps, logps, MASK, scores, beta=2.0, reward_clip=None)
    torch.testing.assert_close(found.sum(-1), scores)
    assert int((found != 0).sum()) == 3


@given(st.integers(0, 10_000), st.floats(0.01, 10))
@settings(deadline=None, max_examples=50)
def test_token_rewards_sum_to_reward_minus_beta_times_cost(seed: int, beta: float) -> None:
    logps, effective, scores = random(3, 4, seed=seed), random(3, 4, seed=seed + 1), random(3, seed=seed + 2)
    found = ppo.token_rewards(logps, effective, MASK, scores, beta=beta, reward_clip=None).sum(-1)
    torch.testing.assert_close(found, scores - beta * ((logps - effective) * MASK).sum(-1))


@rubbish
def test_token_rewards_do_not_see_masked_tokens(fill: float) -> None:
    logps, effective, scores = random(3, 4), random(3, 4, seed=1), random(3, seed=2)
    clean = ppo.token_rewards(logps, effective, MASK, scores, beta=0.3, reward_clip=5.0)
    found = ppo.token_rewards(soiled(logps, fill), soiled(effective, -1), MASK, scores, beta=0.3, reward_clip=5.0)
    assert torch.equal(found, clean)


def test_a_row_without_tokens_gets_no_reward() -> None:
    zeros, mask = torch.zeros(2, 3), torch.tensor([[1, 1, 0], [0, 0, 0]])
    found = ppo.token_rewards(zeros, zeros, mask, torch.tensor([1.0, math.nan]), beta=1.0, reward_clip=None)
    assert found.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


def test_an_infinite_score_stays_on_the_last_token() -> None:
    zeros = torch.zeros(3, 4)
    found = ppo.token_rewards(zeros, zeros, MASK, torch.full((3,), -math.inf), beta=1.0, reward_clip=None)
    assert found.tolist() == [[0, 0, 0, -math.inf], [0, -math.inf, 0, 0], [-math.inf, 0, 0, 0]]


def test_token_rewards_refuse_wrong_shapes_and_coefficients() -> None:
    values, scores = torch.zeros(3, 4), torch.zeros(3)
    with pytest.raises(ValueError, match=r"token_logps \(3, 4\), effective_ref \(4, 3\), mask \(3, 4\)"):
        ppo.token_rewards(values, torch.zeros(4, 3), MASK, scores, beta=1.0, reward_clip=5.0)
    with pytest.raises(ValueError, match=r"scores \(3, 1\), sequences \(3,\)"):
        ppo.token_rewards(values, values, MASK, scores.unsqueeze(-1), beta=1.0, reward_clip=5.0)
    with pytest.raises(ValueError, match=r"scores \(4,\), sequences \(3,\)"):
        ppo.token_rewards(values, values, MASK, torch.zeros(4), beta=1.0, reward_clip=5.0)
    for beta in (0, -1.0):
        with pytest.raises(ValueError, match=rf"beta is {beta}: it must be > 0"):
            ppo.token_rewards(values, values, MASK, scores, beta=beta, reward_clip=5.0)
    with pytest.raises(ValueError, match="reward_clip is 0: it must be > 0, or None"):
        ppo.token_rewards(values, values, MASK, scores, beta=1.0, reward_clip=0)


# -- advantages --------------------------------------------------------------------------------------------------------


@each_mask
def test_gae_by_hand(mask: Tensor) -> None:
    rewards = torch.tensor([[1.0, 0.0, 2.0, 1.0], [1.0, 2.0, 9.0, 9.0], [3.0, 9.0, 9.0, 9.0]])
    values = torch.tensor([[1.0, 1.0, 0.0, 2.0], [0.0, 1.0, 9.0, 9.0], [1.0, 9.0, 9.0, 9.0]])
    # gamma 1, lambda 1/2. Row 1: delta = 1+1-1, 0+0-1, 2+2-0, 1-2 = 1, -1, 4, -1;
    # A_4 = -1, A_3 = 4 - .5 = 3.5, A_2 = -1 + 1.75 = .75, A_1 = 1 + .375. Row 2: delta = 1+1-0, 2-1; A = 2.5, 1.
    advantages, returns = ppo.gae(rewards, values, mask, gamma=1, lam=0.5)
    expected = torch.tensor([[1.375, 0.75, 3.5, -1.0], [2.5, 1.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, (expected + values).masked_fill(~MASK, 0.0))


def test_gamma_discounts_next_value_and_carried_advantage() -> None:
    # gamma .5, lambda .5: delta = 0 + .5*4 - 1, 2 - 4 = 1, -2; A_1 = 1 + .25 * -2 = .5
    advantages, _ = ppo.gae(
        torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 4.0]]), torch.ones(1, 2), gamma=0.5, lam=0.5
    )
    assert advantages.tolist() == [[0.5, -2.0]]


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=50)
def test_with_lambda_1_gae_is_reward_to_go_minus_value(seed: int) -> None:
    rewards, values = random(3, 4, seed=seed), random(3, 4, seed=seed + 1)
    advantages, returns = ppo.gae(rewards, values, MASK, gamma=1.0, lam=1.0)
    to_go = (rewards * MASK).flip(-1).cumsum(-1).flip(-1) * MASK
    torch.testing.assert_close(returns, to_go)
    torch.testing.assert_close(advantages, to_go - values * MASK)


def test_with_lambda_0_gae_is_the_one_step_error() -> None:
    rewards, values = random(3, 4), random(3, 4, seed=1) * MASK
    advantages, _ = ppo.gae(rewards, values, MASK, gamma=0.9, lam=0.0)
    after = torch.cat([values[:, 1:], torch.zeros(3, 1)], dim=1)
    torch.testing.assert_close(advantages, (rewards + 0.9 * after - values) * MASK)


@rubbish
def test_gae_does_not_see_masked_tokens(fill: float) -> None:
    rewards, values = random(3, 4), random(3, 4, seed=1)
    clean = ppo.gae(rewards, values, MASK, gamma=0.9, lam=0.95)
    found = ppo.gae(soiled(rewards, fill), soiled(values, fill), MASK, gamma=0.9, lam=0.95)
    assert all(torch.equal(*pair) for pair in zip(found, clean, strict=True))


def test_gae_takes_integer_rewards() -> None:
    advantages, _ = ppo.gae(torch.tensor([[1, 2, 3]]), torch.zeros(1, 3), torch.ones(1, 3), gamma=1, lam=1)
    assert advantages.tolist() == [[6.0, 5.0, 3.0]]


def test_gae_refuses_wrong_shapes_and_coefficients() -> None:
    values = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"token_rewards \(3, 4\), values \(3, 5\), mask \(3, 4\)"):
        ppo.gae(values, torch.zeros(3, 5), MASK, gamma=1.0, lam=1.0)
    for gamma, lam in ((1.1, 0.5), (-0.1, 0.5), (1.0, 1.1), (1.0, -0.1)):
        with pytest.raises(ValueError, match=rf"gamma is {gamma} and lam is {lam}: both must be in \[0, 1\]"):
            ppo.gae(values, values, MASK, gamma=gamma, lam=lam)


def test_leave_one_out_by_hand() -> None:
    # siblings' means: (2+6)/2 = 4, 3.5, 1.5; and 0 for three equal rewards
    found = ppo.leave_one_out(torch.tensor([1, 2, 6, 5, 5, 5]), num_generations=3)
    torch.testing.assert_close(found, torch.tensor([-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]))


@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_leave_one_out_sums_to_0_in_each_group_and_ignores_the_others(seed: int, size: int, groups: int) -> None:
    rewards = random(groups * size, seed=seed)
    found = ppo.leave_one_out(rewards, num_generations=size).view(groups, size)
    torch.testing.assert_close(found.sum(-1), torch.zeros(groups, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(found[0], ppo.leave_one_out(rewards[:size], num_generations=size))
    torch.testing.assert_close(found.flatten(), ppo.leave_one_out(rewards + 7, num_generations=size))


@pytest.mark.parametrize(("responses", "size"), [(6, 4), (6, 1), (3, 6), (4, 0)])
def test_leave_one_out_refuses_groups_that_do_not_fit(responses: int, size: int) -> None:
    with pytest.raises(ValueError, match=rf"{responses} responses cannot be split into groups of {size}"):
        ppo.leave_one_out(torch.zeros(responses), num_generations=size)


@each_mask
@rubbish
def test_whitening_gives_mean_0_and_variance_1_over_kept_tokens(mask: Tensor, fill: float) -> None:
    values = soiled(5 + 3 * random(3, 4), fill)
    found = ppo.whiten(values, mask)
    kept = found[MASK]
    torch.testing.assert_close(kept.mean(), torch.tensor(0.0, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(kept.var(correction=0), torch.tensor(1.0, dtype=torch.float64))
    assert bool((found[~MASK] == 0).all())
    assert torch.equal(kept.argsort(), values[MASK].argsort())


def test_whitening_equal_values_gives_0() -> None:
    assert torch.equal(ppo.whiten(torch.full((3, 4), 2.0), MASK), torch.zeros(3, 4))


# -- losses ------------------------------------------------------------------------------------------------------------


@each_mask
def test_policy_loss_by_hand(mask: Tensor) -> None:
    # Ratios 1.5, .5, 1.5, .5 | 1.1, 1 | 1; advantages 1, 1, -1, -1 | 2, 3 | -4; clip .2.
    # min(A rho, A clip(rho)): 1.2, .5, -1.5, -.8 | 2.2, 3 | -4; their mean over 7 tokens is .6 / 7.
    ratios = torch.tensor([[1.5, 0.5, 1.5, 0.5], [1.1, 1.0, 9.0, 9.0], [1.0, 9.0, 9.0, 9.0]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0], [2.0, 3.0, 9.0, 9.0], [-4.0, 9.0, 9.0, 9.0]])
    old = random(3, 4).float()
    found = ppo.policy_loss(old + ratios.log(), old, advantages, mask, clip_range=0.2)
    torch.testing.assert_close(found, torch.tensor(-0.6 / 7))


def test_on_policy_the_loss_is_minus_the_mean_advantage_and_its_gradient_reinforce() -> None:
    logps, advantages = random(3, 4, requires_grad=True), random(3, 4, seed=1)
    loss = ppo.policy_loss(logps, logps.detach(), advantages, MASK, clip_range=0.2)
    loss.backward()
    torch.testing.assert_close(loss.detach(), -advantages[MASK].mean())
    torch.testing.assert_close(logps.grad, -advantages * MASK / 7)


@each_mask
def test_value_loss_by_hand(mask: Tensor) -> None:
    # old 0, clip .2. V: 1, -1, .1, .3 | .5, 2 | 0; R: 0, 0, 1, .25 | 1, 1 | 3
    # (V-R)^2: 1, 1, .81, .0025 | .25, 1 | 9; clipped V: .2, -.2, .1, .2 | .2, .2 | 0 ->
    # .04, .04, .81, .0025 | .64, .64 | 9; larger: 1, 1, .81, .0025 | .64, 1 | 9 = 13.4525; half the mean: / 14
    new = torch.tensor([[1.0, -1.0, 0.1, 0.3], [0.5, 2.0, 9.0, 9.0], [0.0, 9.0, 9.0, 9.0]])
    returns = torch.tensor([[0.0, 0.0, 1.0, 0.25], [1.0, 1.0, 9.0, 9.0], [3.0, 9.0, 9.0, 9.0]])
    found = ppo.value_loss(new, torch.zeros(3, 4), returns, mask, clip_range=0.2)
    torch.testing.assert_close(found, torch.tensor(13.4525 / 14))


def test_losses_pass_gradcheck() -> None:
    new, old = random(3, 4, requires_grad=True), random(3, 4, seed=1)
    other = random(3, 4, seed=2)
    assert torch.autograd.gradcheck(lambda x: ppo.policy_loss(x, old, other, MASK, clip_range=0.2), (new,))
    assert torch.autograd.gradcheck(lambda x: ppo.value_loss(x, old, other, MASK, clip_range=0.2), (new,))


@rubbish
@pytest.mark.parametrize("loss", [ppo.policy_loss, ppo.value_loss])
def test_neither_loss_nor_gradient_sees_masked_tokens(loss: Callable[..., Tensor], fill: float) -> None:
    arguments = [random(3, 4, seed=seed) for seed in range(3)]
    clean = loss(*arguments, MASK, clip_range=0.2)
    new, old, other = (soiled(values, fill) for values in arguments)
    new.requires_grad_()
    found = loss(new, old, other, MASK, clip_range=0.2)
    found.backward()
    assert torch.equal(found, clean)
    assert new.grad is not None
    assert bool((new.grad[~MASK] == 0).all())
    assert bool(new.grad[MASK].isfinite().all())


@pytest.mark.parametrize("gap", [1e4, -1e4])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_policy_loss_and_gradient_are_finite_at_1e4(gap: float, advantage: float) -> None:
    new = torch.full((3, 4), gap, requires_grad=True)
    loss = ppo.policy_loss(new, torch.zeros(3, 4), torch.full((3, 4), advantage), MASK, clip_range=0.2)
    loss.backward()
    assert math.isfinite(loss.item())
    assert new.grad is not None
    assert bool(new.grad.isfinite().all())


def test_value_loss_is_finite_at_1e4() -> None:
    big = torch.full((3, 4), 1e4)
    assert ppo.value_loss(big, -big, -big, MASK, clip_range=0.2).item() == pytest.approx(0.5 * (2e4) ** 2)


@pytest.mark.parametrize("loss", [ppo.policy_loss, ppo.value_loss])
def test_losses_refuse_wrong_shapes_and_clip_ranges(loss: Callable[..., Tensor]) -> None:
    values = torch.zeros(3, 4)
    for position in range(3):
        arguments = [values] * 3
        arguments[position] = torch.zeros(3)
        with pytest.raises(ValueError, match=r"\(3, 4\), .*They must be equal"):
            loss(*arguments, MASK, clip_range=0.2)
    with pytest.raises(ValueError, match=r"mask \(4, 3\)"):
        loss(values, values, values, MASK.T, clip_range=0.2)
    with pytest.raises(ValueError, match="clip_range is 0: it must be > 0"):
        loss(values, values, values, MASK, clip_range=0)


def test_the_mean_over_no_tokens_is_0() -> None:
    assert ppo.masked_mean(torch.full((2, 3), math.nan), torch.zeros(2, 3)).item() == 0.0


# -- what is logged, and the adaptive coefficient ----------------------------------------------------------------------


@rubbish
def test_explained_variance(fill: float) -> None:
    returns = random(3, 4)
    perfect = ppo.explained_variance(soiled(returns, fill), soiled(returns, 1.0), MASK)
    constant = ppo.explained_variance(torch.full_like(returns, 3.0), soiled(returns, fill), MASK)
    opposite = ppo.explained_variance(-returns, returns, MASK)  # error 2R: 1 - 4
    assert (perfect.item(), constant.item(), opposite.item()) == pytest.approx((1.0, 0.0, -3.0))
    assert ppo.explained_variance(returns, torch.zeros(3, 4), MASK).item() == 0.0


def test_beta_follows_the_cost() -> None:
    # at 1.1 times the target: 1 + .1 * 64/640 = 1.01; above 1.2 or below .8 the error is clipped to .2
    step = {"target": 6.0, "horizon": 640, "responses": 64}
    assert ppo.adapted_beta(0.5, 6.6, **step) == pytest.approx(0.5 * 1.01)
    assert ppo.adapted_beta(0.5, 6.0, **step) == 0.5
    assert ppo.adapted_beta(0.5, 600.0, **step) == pytest.approx(0.5 * 1.02)
    assert ppo.adapted_beta(0.5, -5.0, **step) == pytest.approx(0.5 * 0.98)


def test_a_short_horizon_cannot_turn_beta_negative() -> None:
    assert ppo.adapted_beta(0.5, 0.0, target=6.0, horizon=1, responses=64) == pytest.approx(0.4)
