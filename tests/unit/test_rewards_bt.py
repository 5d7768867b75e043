"""Bradley-Terry, Plackett-Luce, and the options every reward-model loss has."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_cli import rewards
from rlhf_cli.config import compose
from rlhf_cli.rewards.base import PairScores, RewardLoss, centering_penalty, pair_loss, smoothed
from rlhf_cli.rewards.bt import bt_loss, negative_log_sigmoid, plackett_luce_loss, preference_loss

PLAIN = SimpleNamespace(label_smoothing=0.0, centering=0.0)
MASK = torch.arange(5) < torch.tensor([5, 2, 3]).unsqueeze(-1)  # (3, 5): B != K
ALTERNATE = torch.tensor([[1, 0, 1, 0, 1], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()

wide = settings(deadline=None, max_examples=50)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(chosen: Tensor, rejected: Tensor, *, label: float = 1.0, margin: float = 0.0) -> PairScores:
    def full(value: float) -> Tensor:
        return torch.full_like(chosen.detach(), value)

    return PairScores(chosen, rejected, label=full(label), margin=full(margin), bound=full(math.inf))


def slope(loss: RewardLoss, difference: float, cfg: Any = PLAIN, **columns: float) -> float:
    """Return the derivative of a pair's loss with respect to its reward difference."""
    d = f64(difference).requires_grad_()
    pair_loss(loss, pairs(d, torch.zeros_like(d), **columns), cfg).sum().backward()
    assert d.grad is not None
    return d.grad.item()


# -- one pair ----------------------------------------------------------------------------------------------------------


def test_negative_log_sigmoid_by_hand() -> None:
    # log(1 + e^0) = log 2; log(1 + e^-2) = .126928; nothing is lost at infinity
    x = f64(0.0, 2.0, 1e4, -1e4, math.inf).requires_grad_()
    found = negative_log_sigmoid(x)
    torch.testing.assert_close(found, f64(math.log(2), 0.126928, 0.0, 1e4, 0.0), atol=1e-6, rtol=0)
    found.sum().backward()
    # -sigmoid(-x)
    torch.testing.assert_close(x.grad, f64(-0.5, -0.119203, 0.0, -1.0, 0.0), atol=1e-6, rtol=0)


def test_preference_loss_by_hand() -> None:
    # d = 2, p = .75, m = .5: .75 log(1 + e^-1.5) + .25 log(1 + e^2.5) = .75 * .201413 + .25 * 2.578890
    found = preference_loss(f64(2.0), label=f64(0.75), margin=f64(0.5))
    torch.testing.assert_close(found, f64(0.795782), atol=1e-6, rtol=0)


@given(st.integers(0, 10_000), st.floats(-3, 3))
@wide
def test_a_certain_label_is_bradley_terry_shifted_by_the_margin(seed: int, margin: float) -> None:
    d, one = normal(4, seed=seed), torch.ones(4, dtype=torch.float64)
    won = preference_loss(d, label=one, margin=margin * one)
    torch.testing.assert_close(won, bt_loss(d, margin * one))
    torch.testing.assert_close(preference_loss(-d, label=0 * one, margin=margin * one), won)


@given(st.floats(0.02, 0.98), st.floats(-4, 4))
@wide
def test_a_soft_label_is_learnt_as_the_difference_that_predicts_it(label: float, other: float) -> None:
    best = math.log(label / (1 - label))  # sigmoid(d) = p
    assert slope(rewards.get("bt"), best, label=label) == pytest.approx(0, abs=1e-9)
    at_best, elsewhere = (
        preference_loss(f64(d), label=f64(label), margin=f64(0.0)).item() for d in (best, best + other)
    )
    assert elsewhere >= at_best


@given(st.floats(0, 5))
@wide
def test_a_tie_has_no_difference_at_any_margin(margin: float) -> None:
    assert slope(rewards.get("bt"), 0.0, label=0.5, margin=margin) == pytest.approx(0, abs=1e-12)


@given(st.floats(0.02, 0.98), st.floats(0, 3))
@wide
def test_a_margin_moves_the_optimum_of_a_soft_label(label: float, margin: float) -> None:
    # p / (1 + u e^-m) = (1 - p) / (1 + e^-m / u) at u = e^d: a quadratic in u, whose root at m = 0 is p / (1 - p)
    lead = 2 * label - 1
    u = (lead + math.sqrt(lead**2 + 4 * label * (1 - label) * math.exp(-2 * margin))) / (2 * (1 - label))
    best = math.log(u) + margin
    assert slope(rewards.get("bt"), best, label=label, margin=margin) == pytest.approx(0, abs=1e-9)
    free = math.log(label / (1 - label))
    assert (best - free) * lead >= -1e-12  # away from zero, on the side of the likelier winner


@pytest.mark.parametrize("margin", [0.0, 2.0])
def test_a_certain_label_has_no_optimum(margin: float) -> None:
    # the slope is -sigmoid(m - d): negative everywhere, so a margin alone bounds nothing
    for d in (-5.0, 0.0, 5.0, 20.0):
        assert slope(rewards.get("bt"), d, margin=margin) == pytest.approx(-1 / (1 + math.exp(d - margin)))


def test_losses_of_single_pairs_pass_gradcheck() -> None:
    d, label, margin = normal(4, seed=0).requires_grad_(), f64(0.0, 0.2, 0.5, 1.0), f64(0.0, 1.0, -1.0, 2.0)
    assert torch.autograd.gradcheck(lambda x: preference_loss(x, label=label, margin=margin), (d,))
    assert torch.autograd.gradcheck(negative_log_sigmoid, (d,))
    assert torch.autograd.gradcheck(centering_penalty, (d, normal(4, seed=1).requires_grad_()))


@pytest.mark.parametrize("label", [0.0, 0.3, 1.0])
def test_preference_loss_is_finite_at_1e4(label: float) -> None:
    d = torch.tensor([1e4, -1e4], requires_grad=True)
    found = preference_loss(d, label=torch.full((2,), label), margin=torch.zeros(2))
    found.sum().backward()
    torch.testing.assert_close(found.detach(), torch.tensor([(1 - label) * 1e4, label * 1e4]))
    torch.testing.assert_close(d.grad, torch.tensor([1 - label, -label]))


def test_wrong_shapes_are_refused() -> None:
    three, column = torch.zeros(3), torch.zeros(3, 1)
    with pytest.raises(ValueError, match=r"difference \(3,\), label \(3, 1\), margin \(3,\)\. They must be equal"):
        preference_loss(three, label=column, margin=three)
    with pytest.raises(ValueError, match=r"margin \(3, 1\)\. They must be equal"):
        preference_loss(three, label=three, margin=column)


# -- what every loss can do --------------------------------------------------------------------------------------------


def test_smoothed_by_hand() -> None:
    # (1 - 2 * .1) p + .1
    torch.testing.assert_close(smoothed(f64(1.0, 0.5, 0.0, 0.75), 0.1), f64(0.9, 0.5, 0.1, 0.7))
    assert torch.equal(smoothed(f64(1.0, 0.3), 0.0), f64(1.0, 0.3))


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0, math.nan])
def test_smoothing_outside_its_range_is_refused(smoothing: float) -> None:
    with pytest.raises(ValueError, match=rf"smoothing is {smoothing}: it must be in \[0, 0\.5\)"):
        smoothed(f64(1.0), smoothing)


@pytest.mark.parametrize("label", [-0.01, 1.01, math.nan, math.inf])
def test_a_label_that_is_no_probability_is_refused(label: float) -> None:
    with pytest.raises(ValueError, match=r"a label is outside \[0, 1\]"):
        smoothed(f64(0.5, label), 0.1)
    with pytest.raises(ValueError, match=r"a label is outside \[0, 1\]"):
        pair_loss(rewards.get("bt"), pairs(f64(1.0), f64(0.0), label=label), PLAIN)


@given(st.floats(0.01, 0.49))
@wide
def test_label_smoothing_bounds_the_difference(smoothing: float) -> None:
    cfg = SimpleNamespace(label_smoothing=smoothing, centering=0.0)
    best = math.log((1 - smoothing) / smoothing)
    assert slope(rewards.get("bt"), best, cfg) == pytest.approx(0, abs=1e-9)
    assert slope(rewards.get("bt"), -best, cfg, label=0.0) == pytest.approx(0, abs=1e-9)
    assert slope(rewards.get("bt"), 0.0, cfg, label=0.5) == pytest.approx(0, abs=1e-12)


def test_centering_by_hand() -> None:
    # (2 + 1)^2 and (3 - 3)^2, each times .1, on top of log(1 + e^-1) and log(1 + e^-6)
    chosen, rejected = f64(2.0, 3.0), f64(1.0, -3.0)
    torch.testing.assert_close(centering_penalty(chosen, rejected), f64(9.0, 0.0))
    cfg = SimpleNamespace(label_smoothing=0.0, centering=0.1)
    found = pair_loss(rewards.get("bt"), pairs(chosen, rejected), cfg)
    torch.testing.assert_close(found, bt_loss(chosen, rejected) + f64(0.9, 0.0))
    assert torch.equal(pair_loss(rewards.get("bt"), pairs(chosen, rejected), PLAIN), bt_loss(chosen, rejected))


def test_centering_pulls_the_mean_of_a_pair_to_zero_and_not_its_difference() -> None:
    chosen, rejected = f64(2.0).requires_grad_(), f64(1.0).requires_grad_()
    centering_penalty(chosen, rejected).sum().backward()
    assert chosen.grad == rejected.grad == f64(6.0)


def test_options_act_token_by_token_too() -> None:
    chosen, rejected = normal(3, 5, seed=0), normal(3, 5, seed=1)
    cfg = SimpleNamespace(label_smoothing=0.1, centering=0.2)
    found = pair_loss(rewards.get("bt"), pairs(chosen, rejected, label=0.7, margin=0.3), cfg)
    assert found.shape == (3, 5)
    flat = pair_loss(rewards.get("bt"), pairs(chosen.flatten(), rejected.flatten(), label=0.7, margin=0.3), cfg)
    torch.testing.assert_close(found.flatten(), flat)


@pytest.mark.parametrize("side", ["chosen", "rejected", "label", "margin", "bound"])
def test_pair_scores_of_several_shapes_are_refused(side: str) -> None:
    columns = {name: torch.ones(3) for name in ("chosen", "rejected", "label", "margin", "bound")}
    columns[side] = torch.ones(1)  # would broadcast
    with pytest.raises(ValueError, match=rf"{side} \(1,\).*They must be equal"):
        pair_loss(rewards.get("bt"), PairScores(**columns), PLAIN)


# -- rankings ----------------------------------------------------------------------------------------------------------


def test_plackett_luce_by_hand() -> None:
    # log 3 + log 2 + 0 for three equal scores; 2, 1, 0: log(e^2 + e + 1) - 2 = .407606, log(e + 1) - 1 = .313262
    mask = torch.ones(2, 3)
    found = plackett_luce_loss(torch.tensor([[0.0, 0.0, 0.0], [2.0, 1.0, 0.0]]), mask)
    torch.testing.assert_close(found, torch.tensor([math.log(6), 0.720868]))


@given(st.integers(0, 10_000), st.floats(0, 20))
@wide
def test_a_ranking_of_two_is_bradley_terry(seed: int, scale: float) -> None:
    scores = normal(5, 2, seed=seed, scale=scale)
    torch.testing.assert_close(plackett_luce_loss(scores, torch.ones(5, 2)), bt_loss(scores[:, 0], scores[:, 1]))


@given(st.integers(0, 10_000), st.floats(0, 5))
@wide
def test_the_probabilities_of_all_rankings_sum_to_one(seed: int, scale: float) -> None:
    orders = torch.tensor(list(permutations(range(4))))
    probabilities = (-plackett_luce_loss(normal(4, seed=seed, scale=scale)[orders], torch.ones(24, 4))).exp()
    assert probabilities.sum().item() == pytest.approx(1)


@given(st.integers(0, 10_000))
@wide
def test_the_first_place_is_softmax(seed: int) -> None:
    scores = normal(4, seed=seed)
    orders = torch.tensor(list(permutations(range(4))))
    probabilities = (-plackett_luce_loss(scores[orders], torch.ones(24, 4))).exp()
    first = torch.stack([probabilities[orders[:, 0] == best].sum() for best in range(4)])
    torch.testing.assert_close(first, scores.softmax(0))


@given(st.integers(0, 10_000), st.floats(-50, 50))
@wide
def test_only_differences_count_in_a_ranking(seed: int, shift: float) -> None:
    scores = normal(3, 5, seed=seed)
    torch.testing.assert_close(plackett_luce_loss(scores + shift, MASK), plackett_luce_loss(scores, MASK))


@pytest.mark.parametrize("kept", [MASK, ALTERNATE], ids=["prefix", "gaps"])
@pytest.mark.parametrize("fill", [0.0, 1e4, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [torch.bool, torch.float64, torch.long])
def test_masked_scores_change_neither_loss_nor_gradient(kept: Tensor, fill: float, kind: torch.dtype) -> None:
    scores = normal(3, 5, seed=0)
    filled = scores.masked_fill(~kept, fill).requires_grad_()
    found = plackett_luce_loss(filled, kept.to(kind))
    found.sum().backward()
    assert filled.grad is not None
    assert bool((filled.grad[~kept] == 0).all())
    for row in range(3):  # as if the others had never been there
        alone = scores[row][kept[row]].unsqueeze(0).requires_grad_()
        expected = plackett_luce_loss(alone, torch.ones_like(alone))
        expected.sum().backward()
        torch.testing.assert_close(found[row], expected[0])
        torch.testing.assert_close(filled.grad[row][kept[row]], alone.grad[0])


def test_a_ranking_is_finite_at_1e4() -> None:
    scores = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4]], requires_grad=True)
    found = plackett_luce_loss(scores, torch.ones(2, 3))
    found.sum().backward()
    torch.testing.assert_close(found.detach(), torch.tensor([0.0, 3e4]))
    # the order is undone at both places: -1 for the first, -1 + 1 for none in between, +1 and +1 for the last
    torch.testing.assert_close(scores.grad, torch.tensor([[0.0, 0, 0], [-1.0, -1.0, 2.0]]), atol=5e-3, rtol=0)


def test_plackett_luce_passes_gradcheck() -> None:
    scores = normal(3, 5, seed=0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: plackett_luce_loss(x, MASK), (scores,))
    assert torch.autograd.gradcheck(lambda x: plackett_luce_loss(x, ALTERNATE), (scores,))


def test_what_is_no_ranking_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scores \(3, 5\), mask \(5, 3\)\. They must be equal"):
        plackett_luce_loss(torch.zeros(3, 5), MASK.T)
    with pytest.raises(ValueError, match="a ranking has fewer than two responses"):
        plackett_luce_loss(torch.zeros(2, 3), torch.tensor([[1, 1, 0], [1, 0, 0]]))


# -- records -----------------------------------------------------------------------------------------------------------


def test_bt_learns_pairs_and_rankings() -> None:
    record = rewards.get("bt")
    chosen, rejected = normal(4, seed=0), normal(4, seed=1)
    assert record.name == "bt"
    torch.testing.assert_close(record.pair_loss(pairs(chosen, rejected), PLAIN), bt_loss(chosen, rejected))
    assert record.ranking_loss is not None
    scores = normal(3, 5, seed=2)
    assert torch.equal(record.ranking_loss(scores, MASK, PLAIN), plackett_luce_loss(scores, MASK))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's directory with reward/own_square.yaml and rewards/own_square.py, forgotten after the test."""
    monkeypatch.setattr(rewards, "__path__", list(rewards.__path__))
    for name in ("reward", "rewards"):
        (tmp_path / name).mkdir()
    common = (
        "negative_share: 0.0\nlabel_smoothing: 0.0\ncentering: 0.0\ntoken_wise: false\ncalibration: none\nclip: 5\n"
    )
    (tmp_path / "reward/own_square.yaml").write_text(f"name: own_square\ntarget: 2.0\n{common}")
    (tmp_path / "reward/bt_mild.yaml").write_text(f"name: bt_mild\n{common}")
    (tmp_path / "rewards/own_square.py").write_text(
        "from dataclasses import dataclass\n"
        "from rlhf_cli.config.schema import TrainedRewardConfig, setting\n"
        "from rlhf_cli.rewards.base import RewardLoss\n"
        "@dataclass\n"
        "class Config(TrainedRewardConfig):\n"
        "    target: float = setting(gt=0)\n"
        "LOSS = RewardLoss('own_square', lambda s, cfg: (s.chosen - s.rejected - cfg.target) ** 2)\n"
    )
    yield tmp_path
    sys.modules.pop("rlhf_cli.rewards.own_square", None)


def test_a_users_own_loss_is_found(own: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"rlhf_cli\.rewards\.own"):
        rewards.get("own_square")
    cfg = compose.load("train-rm", ["reward=own_square", "reward.target=3", "reward.centering=0.5"], own).reward
    found = pair_loss(rewards.get("own_square"), pairs(f64(1.0, 2.0), f64(0.0, 1.0)), cfg)
    # (1 - 3)^2 + .5 * 1 and (1 - 3)^2 + .5 * 9
    torch.testing.assert_close(found, f64(4.5, 8.5))


def test_a_users_yaml_without_a_module_uses_that_of_its_first_word(own: Path) -> None:
    cfg = compose.load("train-rm", ["reward=bt_mild"], own).reward
    assert (cfg.name, type(cfg).__module__) == ("bt_mild", "rlhf_cli.rewards.bt")
    assert rewards.get("bt_mild") is rewards.get("bt")
