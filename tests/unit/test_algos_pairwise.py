"""dpo, dpm, rpo and the Bradley-Terry loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_cli import algos
from rlhf_cli.algos.base import PairLogps
from rlhf_cli.algos.dpo import dpo_loss
from rlhf_cli.algos.rpo import REDUCTIONS, rpo_loss, sft_term
from rlhf_cli.rewards.bt import bt_loss

LOG2 = math.log(2)
MASK = torch.arange(5) < torch.tensor([5, 2, 3]).unsqueeze(-1)  # (3, 5): B != T
OTHER_MASK = torch.arange(4) < torch.tensor([1, 4, 2]).unsqueeze(-1)
RPO = {"beta": 0.5, "eta": 0.7, "sft_reduction": "sum", "sft_scale_by_beta": True}


def logps(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -4 * torch.rand(*shape, generator=generator, dtype=torch.float64)


def pairs(fill: float = 0.0) -> PairLogps:
    chosen, ref_chosen = (logps(3, 5, seed=seed).masked_fill(~MASK, fill) for seed in (0, 1))
    rejected, ref_rejected = (logps(3, 4, seed=seed).masked_fill(~OTHER_MASK, fill) for seed in (2, 3))
    return PairLogps(chosen, rejected, ref_chosen, ref_rejected, MASK, OTHER_MASK)


def terms(name: str, batch: PairLogps, **config: object) -> dict[str, Tensor]:
    pair_loss = algos.get(name).pair_loss
    assert pair_loss is not None
    return pair_loss(batch, SimpleNamespace(**config))


def test_dpo_by_hand() -> None:
    # logits .5 ((-1 + 2) - (-3 + 1)) = 1.5 and .5 ((-4 + 1) - (-1 + 1)) = -1.5; log(1 + e^-1.5) = .201413
    chosen, rejected = torch.tensor([-1.0, -4.0]), torch.tensor([-3.0, -1.0])
    found = dpo_loss(chosen, rejected, torch.tensor([-2.0, -1.0]), torch.tensor([-1.0, -1.0]), beta=0.5)
    torch.testing.assert_close(found, torch.tensor([0.201413, 1.701413]))


def test_a_policy_that_equals_its_reference_has_loss_log_2() -> None:
    chosen, rejected = logps(4, seed=0), logps(4, seed=1)
    expected = torch.full((4,), LOG2, dtype=torch.float64)
    torch.testing.assert_close(dpo_loss(chosen, rejected, chosen, rejected, beta=0.3), expected)
    torch.testing.assert_close(rpo_loss(chosen, rejected, chosen, rejected, beta=0.3, eta=0), expected)
    torch.testing.assert_close(bt_loss(chosen, chosen), expected)


def test_rpo_by_hand() -> None:
    # DPO part log 2; SFT part - eta beta log pi_w = 2 * .5 * 3
    threes = torch.tensor([-3.0])
    found = rpo_loss(threes, threes, threes, threes, beta=0.5, eta=2.0)
    torch.testing.assert_close(found, torch.tensor([LOG2 + 3.0]))


@given(st.integers(0, 10_000), st.floats(0.01, 5), st.floats(0, 5))
@settings(deadline=None, max_examples=50)
def test_rpo_is_dpo_plus_the_sft_term(seed: int, beta: float, eta: float) -> None:
    sides = [logps(4, seed=seed + i) for i in range(4)]
    dpo = dpo_loss(*sides, beta=beta)
    torch.testing.assert_close(rpo_loss(*sides, beta=beta, eta=eta), dpo - eta * beta * sides[0])
    assert torch.equal(rpo_loss(*sides, beta=beta, eta=0.0), dpo)


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=50)
def test_swapping_a_pair_turns_the_win_probability_round(seed: int) -> None:
    one, other, ref_one, ref_other = (logps(4, seed=seed + i) for i in range(4))
    wins = (-dpo_loss(one, other, ref_one, ref_other, beta=0.7)).exp()
    loses = (-dpo_loss(other, one, ref_other, ref_one, beta=0.7)).exp()
    torch.testing.assert_close(wins + loses, torch.ones(4, dtype=torch.float64))


def test_bradley_terry_by_hand() -> None:
    # -log sigmoid(2) = .126928; -log sigmoid(-2) = 2.126928
    found = bt_loss(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(found, torch.tensor([0.126928, 2.126928]))


@pytest.mark.parametrize("loss", [lambda a, b: bt_loss(a, b), lambda a, b: dpo_loss(a, b, a * 0, b * 0, beta=1.0)])
def test_loss_and_gradient_are_finite_at_1e4(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    first = torch.tensor([1e4, -1e4], requires_grad=True)
    found = loss(first, -first.detach())
    found.sum().backward()
    torch.testing.assert_close(found.detach(), torch.tensor([0.0, 2e4]))
    torch.testing.assert_close(first.grad, torch.tensor([0.0, -1.0]))


def test_losses_pass_gradcheck() -> None:
    sides = [logps(3, seed=seed).requires_grad_() for seed in range(4)]
    assert torch.autograd.gradcheck(lambda *x: dpo_loss(*x, beta=0.3), sides)
    assert torch.autograd.gradcheck(lambda *x: rpo_loss(*x, beta=0.3, eta=0.5), sides)
    assert torch.autograd.gradcheck(bt_loss, sides[:2])
    tokens = logps(3, 5, seed=0).requires_grad_()
    for reduction in REDUCTIONS:
        assert torch.autograd.gradcheck(lambda x, how=reduction: sft_term(x, MASK, reduction=how), (tokens,))


def test_wrong_shapes_and_coefficients_are_refused() -> None:
    good = torch.zeros(3)
    for position in range(4):
        sides = [good] * 4
        sides[position] = torch.zeros(3, 1)
        with pytest.raises(ValueError, match=r"\(3, 1\).*They must be equal"):
            dpo_loss(*sides, beta=1.0)
        with pytest.raises(ValueError, match=r"\(3, 1\).*They must be equal"):
            rpo_loss(*sides, beta=1.0, eta=1.0)
    with pytest.raises(ValueError, match=r"chosen \(3,\), rejected \(2,\)"):
        bt_loss(good, torch.zeros(2))
    for beta in (0, -0.1):
        with pytest.raises(ValueError, match=rf"beta is {beta}: it must be > 0"):
            dpo_loss(good, good, good, good, beta=beta)
        with pytest.raises(ValueError, match=rf"beta is {beta}: it must be > 0"):
            rpo_loss(good, good, good, good, beta=beta, eta=1.0)
    with pytest.raises(ValueError, match=r"eta is -1: it must be >= 0"):
        rpo_loss(good, good, good, good, beta=1.0, eta=-1)


# -- the SFT term ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [MASK, MASK.float(), MASK.long()], ids=["bool", "float", "int"])
@pytest.mark.parametrize("fill", [0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("reduction", "expected"), [("sum", 19 / 3), ("seq_mean", 5.5 / 3), ("token_mean", 1.9)])
def test_sft_reductions_by_hand(mask: Tensor, fill: float, reduction: str, expected: float) -> None:
    # -log pi: 5 tokens of 2; 1, 2; 1, 2, 3. Sums 10, 3, 6 over 5, 2, 3 tokens.
    # sum: (10 + 3 + 6) / 3; seq_mean: (2 + 1.5 + 2) / 3; token_mean: 19 / 10
    tokens = -torch.tensor([[2.0] * 5, [1.0, 2.0, 0, 0, 0], [1.0, 2.0, 3.0, 0, 0]])
    found = sft_term(tokens.masked_fill(~MASK, fill), mask, reduction=reduction)
    assert found.item() == pytest.approx(expected)


def test_the_gradient_of_the_sft_term_ignores_masked_tokens() -> None:
    tokens = logps(3, 5, seed=0).masked_fill(~MASK, math.nan).requires_grad_()
    sft_term(tokens, MASK, reduction="token_mean").backward()
    torch.testing.assert_close(tokens.grad, -MASK.double() / 10)


def test_sft_term_refuses_what_has_no_mean() -> None:
    with pytest.raises(ValueError, match=r"chosen_token_logps \(3, 5\), mask \(5, 3\)"):
        sft_term(torch.zeros(3, 5), MASK.T, reduction="sum")
    with pytest.raises(ValueError, match="reduction is 'mean': it must be one of sum, seq_mean, token_mean"):
        sft_term(torch.zeros(3, 5), MASK, reduction="mean")
    with pytest.raises(ValueError, match="a sequence has no tokens under its mask"):
        sft_term(torch.zeros(2, 2), torch.tensor([[1, 1], [0, 0]]), reduction="sum")


# -- whole batches of token log-probs ----------------------------------------------------------------------------------


def test_dpo_of_a_batch_is_the_mean_loss_of_summed_tokens() -> None:
    batch = pairs()
    sides = [batch.chosen, batch.rejected, batch.ref_chosen, batch.ref_rejected]
    found, expected = terms("dpo", batch, beta=0.4), dpo_loss(*(side.sum(-1) for side in sides), beta=0.4)
    torch.testing.assert_close(found["loss"], expected.mean())
    assert found["margin"].item() == pytest.approx((-(expected.exp() - 1).log()).mean().item())
    assert found["accuracy"].item() == pytest.approx((expected < LOG2).double().mean().item())
    assert not found["dpo_loss"].requires_grad


@pytest.mark.parametrize(
    ("name", "config"), [("dpo", {"beta": 0.5}), ("dpm", {"beta": 0.5, "alpha": 1.0}), ("rpo", RPO)]
)
def test_logits_are_given_pair_by_pair_with_gradient(name: str, config: dict[str, object]) -> None:
    batch = pairs()
    batch.chosen.requires_grad_()
    found = terms(name, batch, **config)["logits"]
    sides = [side.sum(-1) for side in (batch.chosen, batch.rejected, batch.ref_chosen, batch.ref_rejected)]
    torch.testing.assert_close(found, 0.5 * ((sides[0] - sides[2]) - (sides[1] - sides[3])))
    found.sum().backward()
    torch.testing.assert_close(batch.chosen.grad, 0.5 * MASK.double())


def test_dpm_uses_pm_s_effective_reference() -> None:
    batch = pairs()
    torch.testing.assert_close(terms("dpm", batch, beta=0.4, alpha=1.0), terms("dpo", batch, beta=0.4))
    # without a reference and at beta = 1: preference maximum likelihood of log pi_w - log pi_l
    found = terms("dpm", batch, beta=1.0, alpha=None)["loss"]
    torch.testing.assert_close(found, bt_loss(batch.chosen.sum(-1), batch.rejected.sum(-1)).mean())
    # between: tokens whose reference probability is above alpha leave the reference
    unlikely = [side * (side.exp() <= 0.2) for side in (batch.ref_chosen, batch.ref_rejected)]
    between = terms("dpo", replace(batch, ref_chosen=unlikely[0], ref_rejected=unlikely[1]), beta=0.4)
    torch.testing.assert_close(terms("dpm", batch, beta=0.4, alpha=0.2)["loss"], between["loss"])


@pytest.mark.parametrize(("reduction", "scaled"), [(r, s) for r in REDUCTIONS for s in (True, False)])
def test_rpo_adds_the_weighted_sft_term_and_reports_it(reduction: str, scaled: bool) -> None:
    batch = pairs()
    found = terms("rpo", batch, **{**RPO, "sft_reduction": reduction, "sft_scale_by_beta": scaled})
    sft = sft_term(batch.chosen, MASK, reduction=reduction)
    dpo = terms("dpo", batch, beta=0.5)
    torch.testing.assert_close(found["loss"], dpo["loss"] + (0.35 if scaled else 0.7) * sft)
    assert found["sft_term"].item() == pytest.approx(sft.item())
    assert found["dpo_loss"].item() == pytest.approx(dpo["loss"].item())


def test_rpo_in_sum_form_is_the_paper_s_loss() -> None:
    batch = pairs()
    sides = [side.sum(-1) for side in (batch.chosen, batch.rejected, batch.ref_chosen, batch.ref_rejected)]
    torch.testing.assert_close(terms("rpo", batch, **RPO)["loss"], rpo_loss(*sides, beta=0.5, eta=0.7).mean())
    assert torch.equal(terms("rpo", batch, **{**RPO, "eta": 0.0})["loss"], terms("dpo", batch, beta=0.5)["loss"])


@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "config"), [("dpo", {"beta": 0.5}), ("dpm", {"beta": 0.5, "alpha": 0.2}), ("rpo", RPO)]
)
def test_neither_loss_nor_gradient_sees_masked_tokens(name: str, config: dict[str, object], fill: float) -> None:
    batch = pairs(fill)
    batch.chosen.requires_grad_()
    found = terms(name, batch, **config)
    torch.testing.assert_close(found, terms(name, pairs(), **config))
    found["loss"].backward()
    assert batch.chosen.grad is not None
    assert bool((batch.chosen.grad[~MASK] == 0).all())
    assert bool((batch.chosen.grad[MASK] < 0).all())  # every chosen token is pushed up
