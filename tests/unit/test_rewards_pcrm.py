"""Prior-constrained reward models: similarities, the bound, and a loss whose optimum is half of it."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_cli import rewards
from rlhf_cli.rewards.base import PairScores, pair_loss
from rlhf_cli.rewards.bt import bt_loss, preference_loss
from rlhf_cli.rewards.pcrm import (
    angle,
    angular_similarity,
    bound_loss,
    cosine_similarity,
    length_ratio,
    margin_bound,
    pcrm_loss,
)

BETAS = {"beta1": 10.0, "beta2": 0.001, "beta3": -5.0}
PLAIN = SimpleNamespace(label_smoothing=0.0, centering=0.0)

wide = settings(deadline=None, max_examples=50)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_at(difference: float, bound: float) -> float:
    return pcrm_loss(f64(difference), f64(0.0), f64(bound)).item()


# -- similarities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.long, torch.float32, torch.float64])
def test_length_ratio_by_hand(kind: torch.dtype) -> None:
    found = length_ratio(torch.tensor([3, 8, 5, 0], dtype=kind), torch.tensor([4, 2, 5, 7], dtype=kind))
    assert found.tolist() == [0.75, 0.25, 1.0, 0.0]


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 500)), min_size=1, max_size=8))
@wide
def test_length_ratio_is_symmetric_and_in_range(lengths: list[tuple[int, int]]) -> None:
    one, other = (torch.tensor(side) for side in zip(*lengths, strict=True))
    found = length_ratio(one, other)
    assert torch.equal(found, length_ratio(other, one))
    assert bool(((found >= 0) & (found <= 1)).all())
    assert torch.equal(found == 1, one == other)


def test_lengths_without_a_ratio_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 pairs have no token after their first difference: their responses are eq"):
        length_ratio(torch.tensor([0, 3, 0]), torch.tensor([0, 0, 0]))
    with pytest.raises(ValueError, match="a length is negative: lengths count tokens"):
        length_ratio(torch.tensor([4]), torch.tensor([-1]))
    with pytest.raises(ValueError, match=r"chosen_lengths \(2,\), rejected_lengths \(3,\)\. They must be equal"):
        length_ratio(torch.ones(2), torch.ones(3))


def test_similarities_of_embeddings_by_hand() -> None:
    # cosines 1, 1/2, 0, and -1 clamped to 0; (pi - arccos c) / pi is 1, 1 - 1/3, 1/2, 1/2
    chosen = torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    rejected = torch.tensor([[5.0, 0.0], [0.5, math.sqrt(0.75)], [0.0, 3.0], [-2.0, 0.0]])
    torch.testing.assert_close(cosine_similarity(chosen, rejected), torch.tensor([1.0, 0.5, 0.0, 0.0]))
    torch.testing.assert_close(angular_similarity(chosen, rejected), torch.tensor([1.0, 2 / 3, 0.5, 0.5]))
    torch.testing.assert_close(angle(f64(1.0, 0.5, 0.0)), f64(1.0, 2 / 3, 0.5))


@given(st.integers(0, 10_000), st.floats(1e-3, 1e3))
@wide
def test_similarity_ignores_lengths_of_embeddings_and_their_order(seed: int, scale: float) -> None:
    one, other = normal(4, 7, seed=seed), normal(4, 7, seed=seed + 1)
    found = angular_similarity(one, other)
    torch.testing.assert_close(angular_similarity(scale * other, one), found)
    assert bool(((found >= 0.5) & (found <= 1)).all())
    assert bool((cosine_similarity(one, scale * one) <= 1).all())  # rounding stays inside
    torch.testing.assert_close(angular_similarity(one, one), torch.ones(4, dtype=torch.float64), atol=1e-7, rtol=0)


def test_large_embeddings_in_half_precision_have_a_similarity() -> None:
    # norms of 400 each: their product is beyond half precision
    chosen, rejected = torch.full((1, 4), 200.0).half(), torch.tensor([[200.0, 200.0, 0.0, 0.0]]).half()
    assert cosine_similarity(chosen, rejected).item() == pytest.approx(math.sqrt(0.5), abs=2e-3)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("first", [True, False])
def test_embeddings_without_a_direction_are_refused(bad: float, first: bool) -> None:
    good, wrong = torch.ones(2, 3), torch.tensor([[1.0, 2.0, 3.0], [bad] * 3])
    with pytest.raises(ValueError, match="an embedding is zero or not finite: it has no direction"):
        angular_similarity(*((wrong, good) if first else (good, wrong)))


def test_embeddings_of_several_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"chosen_embeddings \(2, 3\), rejected_embeddings \(1, 3\)"):
        angular_similarity(torch.ones(2, 3), torch.ones(1, 3))


# -- the bound ---------------------------------------------------------------------------------------------------------


def test_margin_bound_by_hand() -> None:
    # 10 / (1 + .25) - 5 and 10 / (.25 + .25) - 5
    found = margin_bound(f64(1.0, 0.25), beta1=10.0, beta2=0.25, beta3=-5.0)
    torch.testing.assert_close(found, f64(3.0, 15.0))


@given(st.floats(0, 1), st.floats(0, 1))
@wide
def test_the_more_alike_the_smaller_the_bound(one: float, other: float) -> None:
    low, high = margin_bound(f64(min(one, other), max(one, other)), **BETAS)
    assert low >= high
    assert math.isfinite(low)


@pytest.mark.parametrize("similarity", [-0.01, 1.01, math.nan])
def test_a_similarity_outside_its_range_is_refused(similarity: float) -> None:
    with pytest.raises(ValueError, match=r"a similarity is outside \[0, 1\]"):
        margin_bound(f64(0.5, similarity), **BETAS)


@pytest.mark.parametrize("key", ["beta1", "beta2"])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_coefficient_that_is_not_positive_is_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{key} is {value}.*both must be > 0"):
        margin_bound(f64(0.5), **{**BETAS, key: value})


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_pcrm_loss_by_hand() -> None:
    # d = 1, delta* = 4: log(1 + e^-1) + log(1 + e^-3) = .313262 + .048587
    torch.testing.assert_close(pcrm_loss(f64(3.0), f64(2.0), f64(4.0)), f64(0.361849), atol=1e-6, rtol=0)
    torch.testing.assert_close(bound_loss(f64(1.0), f64(4.0)), f64(0.048587), atol=1e-6, rtol=0)


@given(st.floats(-10, 250), st.floats(-300, 300))
@wide
def test_the_optimum_of_a_pair_is_half_its_bound(bound: float, away: float) -> None:
    d = f64(bound / 2).requires_grad_()
    pcrm_loss(d, f64(0.0), f64(bound)).sum().backward()
    assert d.grad is not None
    assert d.grad.item() == pytest.approx(0, abs=1e-12)
    assert loss_at(bound / 2 + away, bound) >= loss_at(bound / 2, bound)


@given(st.floats(0, 50), st.floats(-60, 60), st.floats(-60, 60), st.floats(0, 1))
@wide
def test_the_loss_of_a_pair_is_convex(bound: float, one: float, other: float, weight: float) -> None:
    between = loss_at(weight * one + (1 - weight) * other, bound)
    assert between <= weight * loss_at(one, bound) + (1 - weight) * loss_at(other, bound) + 1e-9


@given(st.floats(0.1, 50), st.floats(-60, 60))
@wide
def test_the_loss_of_a_pair_is_symmetric_about_its_optimum(bound: float, away: float) -> None:
    assert loss_at(bound / 2 + away, bound) == pytest.approx(loss_at(bound / 2 - away, bound))


def test_gradient_descent_ends_at_half_the_bound() -> None:
    bound = margin_bound(f64(0.9, 0.5, 1.0), **BETAS)
    d = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([d], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = pcrm_loss(d, torch.zeros_like(d), bound).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(d.detach(), bound / 2, atol=1e-3, rtol=0)


def test_no_gradient_flows_through_the_bound() -> None:
    similarity = f64(0.2, 0.8).requires_grad_()
    lengths = f64(3.0, 4.0).requires_grad_()
    embeddings = normal(2, 3, seed=0).requires_grad_()
    assert not margin_bound(similarity, **BETAS).requires_grad
    assert not margin_bound(length_ratio(lengths, f64(5.0, 6.0)), **BETAS).requires_grad
    assert not margin_bound(angular_similarity(embeddings, normal(2, 3, seed=1)), **BETAS).requires_grad
    # not even if the bound is computed elsewhere and asks for one
    leaf, reward = f64(4.0, 5.0).requires_grad_(), f64(1.0, 2.0).requires_grad_()
    tied = 10 / (similarity + 0.001) - 5
    scores = PairScores(reward, torch.zeros(2), torch.full((2,), 0.7), torch.zeros(2), tied)
    whole = pcrm_loss(reward, torch.zeros(2), leaf) + pcrm_loss(reward, torch.zeros(2), tied)
    (whole + pair_loss(rewards.get("pcrm_length"), scores, PLAIN)).sum().backward()
    assert leaf.grad is None
    assert similarity.grad is None
    assert reward.grad is not None
    assert bool((reward.grad != 0).all())


def test_without_a_bound_it_is_bradley_terry() -> None:
    for scale in (1.0, 1e4):
        sides, plain = [[normal(5, seed=seed, scale=scale).requires_grad_() for seed in (0, 1)] for _ in range(2)]
        found, expected = pcrm_loss(*sides, torch.full((5,), math.inf)), bt_loss(*plain)
        assert torch.equal(found, expected)
        for loss in (found, expected):
            loss.sum().backward()
        for one, other in zip(sides, plain, strict=True):
            assert one.grad is not None
            assert bool(one.grad.isfinite().all())
            assert torch.equal(one.grad, other.grad)


def test_loss_and_gradient_are_finite_at_1e4() -> None:
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    found = pcrm_loss(chosen, -chosen.detach(), torch.full((2,), 5.0))
    found.sum().backward()
    # d = +-2e4: the bound's term d - delta*, or Bradley-Terry's -d
    torch.testing.assert_close(found.detach(), torch.tensor([2e4 - 5, 2e4]))
    torch.testing.assert_close(chosen.grad, torch.tensor([1.0, -1.0]))


def test_losses_pass_gradcheck() -> None:
    chosen, rejected = normal(4, seed=0).requires_grad_(), normal(4, seed=1).requires_grad_()
    bound = f64(0.5, 5.0, 90.0, math.inf)
    assert torch.autograd.gradcheck(lambda c, r: pcrm_loss(c, r, bound), (chosen, rejected))
    assert torch.autograd.gradcheck(lambda d: bound_loss(d, bound), (chosen,))


def test_wrong_shapes_are_refused() -> None:
    good = torch.zeros(3)
    for position in range(3):
        sides = [good] * 3
        sides[position] = torch.zeros(3, 1)
        with pytest.raises(ValueError, match=r"chosen \(.*\), rejected \(.*\), bound \(.*They must be equal"):
            pcrm_loss(*sides)
    with pytest.raises(ValueError, match=r"difference \(3,\), bound \(1,\)\. They must be equal"):
        bound_loss(good, torch.zeros(1))


# -- the record: soft labels, margins, options -------------------------------------------------------------------------


def scores(difference: Tensor, *, label: float = 1.0, margin: float = 0.0, bound: float = 5.0) -> PairScores:
    columns = (torch.full_like(difference.detach(), value) for value in (label, margin, bound))
    return PairScores(difference, torch.zeros_like(difference), *columns)


def slope(difference: float, **columns: float) -> float:
    d = f64(difference).requires_grad_()
    pair_loss(rewards.get("pcrm_length"), scores(d, **columns), PLAIN).sum().backward()
    assert d.grad is not None
    return d.grad.item()


@pytest.mark.parametrize("name", ["pcrm_length", "pcrm_cosine", "pcrm_fixed", "pcrm_random"])
def test_one_record_serves_all_priors(name: str) -> None:
    record = rewards.get(name)
    assert record.ranking_loss is None  # a ranking is learned as pairs, each with a bound of its own
    d = normal(3, 4, seed=0)
    torch.testing.assert_close(record.pair_loss(scores(d), PLAIN), pcrm_loss(d, 0 * d, torch.full_like(d, 5.0)))


@given(st.floats(0, 1), st.floats(-20, 20), st.floats(1, 20))
@wide
def test_swapping_a_pair_and_its_label_changes_nothing(label: float, difference: float, bound: float) -> None:
    pair = scores(f64(difference), label=label, bound=bound)
    turned = replace(pair, chosen=pair.rejected, rejected=pair.chosen, label=1 - pair.label)
    record = rewards.get("pcrm_fixed")
    torch.testing.assert_close(pair_loss(record, pair, PLAIN), pair_loss(record, turned, PLAIN))


@given(st.floats(0.01, 20), st.floats(0, 3))
@wide
def test_optima_of_certain_labels_and_ties(bound: float, margin: float) -> None:
    # -log sigmoid(d - m) - log sigmoid(delta* - d) is symmetric about (delta* + m) / 2
    assert slope((bound + margin) / 2, bound=bound, margin=margin) == pytest.approx(0, abs=1e-12)
    assert slope(-(bound + margin) / 2, bound=bound, margin=margin, label=0.0) == pytest.approx(0, abs=1e-12)
    assert slope(0.0, bound=bound, margin=margin, label=0.5) == pytest.approx(0, abs=1e-12)


@given(st.floats(0.02, 0.98), st.floats(0.5, 10))
@wide
def test_a_bound_draws_the_optimum_of_a_soft_label_towards_zero(label: float, bound: float) -> None:
    free = math.log(label / (1 - label))
    assert slope(free, label=label, bound=bound) * math.copysign(1, free) >= 0


def test_without_a_bound_soft_labels_are_those_of_bradley_terry() -> None:
    d = normal(4, seed=0)
    pair = scores(d, label=0.7, margin=0.4, bound=math.inf)
    found = pair_loss(rewards.get("pcrm_length"), pair, PLAIN)
    torch.testing.assert_close(found, preference_loss(d, label=pair.label, margin=pair.margin))


def test_smoothing_and_centering_reach_the_bounded_loss() -> None:
    d = normal(4, seed=0)
    cfg = SimpleNamespace(label_smoothing=0.1, centering=0.3)
    found = pair_loss(rewards.get("pcrm_length"), scores(d), cfg)
    torch.testing.assert_close(
        found,
        pair_loss(rewards.get("bt"), scores(d, label=0.9), PLAIN)
        + 0.9 * bound_loss(d, torch.full_like(d, 5.0))
        + 0.1 * bound_loss(-d, torch.full_like(d, 5.0))
        + 0.3 * d**2,
    )
