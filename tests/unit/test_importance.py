from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_cli.algos import ppo

MASK = torch.tensor([[True, True, True], [True, False, False]])
OURS = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, 9.0, 9.0]], dtype=torch.float64)
ENGINE = torch.tensor([[-1.0, -2.0 - math.log(3), -3.0 + math.log(4)], [-0.5 - math.log(1.5), -9.0, 0.0]]).double()


@pytest.mark.parametrize("mask", [MASK, MASK.float(), MASK.long()], ids=["bool", "float", "int"])
def test_weights_by_hand(mask: Tensor) -> None:
    # exp(ours - engine): 1, 3, 1/4 and 1.5; the 3 is cut at 2; 1 under the mask
    weights = ppo.importance_weights(OURS, ENGINE, mask, cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 2.0, 0.25], [1.5, 1.0, 1.0]]).double())
    whole = ppo.importance_weights(OURS, ENGINE, mask, cap=None)
    torch.testing.assert_close(whole, torch.tensor([[1.0, 3.0, 0.25], [1.5, 1.0, 1.0]]).double())


def test_equal_numbers_weigh_one() -> None:
    assert torch.equal(ppo.importance_weights(OURS, OURS, MASK, cap=2.0), torch.ones(2, 3).double())


@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf, 1e4])
def test_what_is_under_the_mask_does_not_matter(fill: float) -> None:
    found = ppo.importance_weights(OURS.masked_fill(~MASK, fill), ENGINE.masked_fill(~MASK, fill), MASK, cap=2.0)
    assert torch.equal(found, ppo.importance_weights(OURS, ENGINE, MASK, cap=2.0))


def test_a_token_that_the_engine_found_impossible_keeps_the_weights_finite() -> None:
    far = ENGINE - 1e4
    assert ppo.importance_weights(OURS, far, MASK, cap=None).isfinite().all()
    assert (ppo.importance_weights(OURS, far, MASK, cap=2.0)[MASK] == 2).all()


def test_without_a_cap_the_weighted_mean_is_that_of_the_policy() -> None:
    """E over mu of pi/mu f = E over pi of f, exactly, on an alphabet of four tokens."""
    pi, mu, f = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [5.0, -1.0, 2.0, 7.0]]).double()
    weights = ppo.importance_weights(pi.log()[None], mu.log()[None], torch.ones(1, 4), cap=None)[0]
    torch.testing.assert_close((mu * weights * f).sum(), (pi * f).sum())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_weighted_advantages_weigh_the_clipped_loss_and_its_gradient(sign: float) -> None:
    old = OURS.masked_fill(~MASK, 0.0)
    advantages = sign * torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, 0.0]]).double()
    weights = ppo.importance_weights(OURS, ENGINE, MASK, cap=2.0)
    shift = torch.tensor([[0.05, 0.4, -0.5], [-0.1, 0.0, 0.0]]).double()  # within the clip range and beyond it

    def loss(new: Tensor) -> Tensor:
        return ppo.policy_loss(new, old, advantages * weights, MASK, clip_range=0.2)

    def by_token(new: Tensor) -> Tensor:
        each = [
            w * ppo.policy_loss(n[None, None], o[None, None], a[None, None], torch.ones(1, 1), clip_range=0.2)
            for w, n, o, a, keep in zip(weights.flatten(), new.flatten(), old.flatten(), advantages.flatten(),
                                        MASK.flatten(), strict=True) if keep
        ]  # fmt: skip
        return torch.stack(each).mean()

    new = (old + shift).requires_grad_(True)
    torch.testing.assert_close(loss(new), by_token(new))
    assert torch.autograd.gradcheck(loss, (new,))
    (one,), (other,) = (torch.autograd.grad(f(new), new) for f in (loss, by_token))
    torch.testing.assert_close(one, other)
    assert one.abs().sum() > 0


def test_what_is_no_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cap is 0\.5: it must be >= 1"):
        ppo.importance_weights(OURS, ENGINE, MASK, cap=0.5)
    with pytest.raises(ValueError, match="shape"):
        ppo.importance_weights(OURS, ENGINE[:, :2], MASK, cap=2.0)
