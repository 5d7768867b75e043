from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_cli.metrics import preference as metrics

MASK = torch.tensor([[True, True, True, True], [True, True, False, False], [True, True, True, False]])  # (P, A)
SEEDS = st.integers(0, 10_000)
DISTANCES = [metrics.total_variation, metrics.forward_kl, metrics.reverse_kl]


def log(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def random_policy(seed: int, offset: float = 0.0, scale: float = 1.0) -> Tensor:
    """Random log-probs over the responses of each prompt that leave `offset` off the set."""
    logits = scale * torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.masked_fill(~MASK, -torch.inf).log_softmax(-1) + math.log1p(-offset)


TARGET = log([0.6, 0.3, 0.1], [0.5, 0.5, 0.0])
POLICY = log([0.2, 0.3, 0.3], [0.25, 0.5, 0.0])  # .2 and .25 of the mass off the set
ON = torch.tensor([[True, True, True], [True, True, False]])
each_mask = pytest.mark.parametrize("mask", [ON, ON.float(), ON.long()], ids=["bool", "float", "int"])


@each_mask
def test_every_metric_by_hand(mask: Tensor) -> None:
    found = metrics.preference_metrics(TARGET, TARGET.masked_fill(~ON, 7.0), POLICY, mask)
    renormalised = [[0.25, 0.375, 0.375], [1 / 3, 2 / 3]]
    expected = {
        "tv": [(0.4 + 0.0 + 0.2 + 0.2) / 2, (0.25 + 0.0 + 0.25) / 2],
        "kl_rm_policy": [0.6 * math.log(3) + 0.1 * math.log(1 / 3), 0.5 * math.log(2)],
        "kl_policy_rm": [
            0.25 * math.log(0.25 / 0.6) + 0.375 * math.log(0.375 / 0.3) + 0.375 * math.log(3.75),
            1 / 3 * math.log(2 / 3) + 2 / 3 * math.log(4 / 3),
        ],
        "minority_mass": [0.6, 0.5],  # without the answer that the target likes best
        "minority_mass_target": [0.4, 0.5],
        "offset_mass": [0.2, 0.25],
        "minority_coverage": [(0.3 + 0.1) / 0.4, 1.0],
        # Ranks of 3, 2, 1 and 1, 2.5, 2.5: deviations (1, 0, -1) and (-1, .5, .5). Two equal rewards have no ranks.
        "rank_correlation": [-1.5 / (2 * 1.5) ** 0.5, math.nan],
    }
    for key, values in expected.items():
        assert found[key].tolist() == pytest.approx(values, nan_ok=True), key
    targets = [[0.6, 0.3, 0.1], [0.5, 0.5]]
    by_hand = [
        sum(
            p1 * p2 * (math.log(q1 / q2) - math.log(p1 / p2)) ** 2
            for p1, q1 in zip(ps, qs, strict=True)
            for p2, q2 in zip(ps, qs, strict=True)
        )
        for ps, qs in zip(renormalised, targets, strict=True)
    ]
    assert found["divergence"].tolist() == pytest.approx(by_hand)
    assert set(found) == {*expected, "divergence"}


@each_mask
def test_the_preference_distribution_is_plackett_luce(mask: Tensor) -> None:
    # softmax(log 4, log 2, 0) and softmax(0, log 3); at beta = 2 the weights are their square roots
    rewards = torch.tensor([[4.0, 2.0, 1.0], [1.0, 3.0, 9.0]]).log()
    torch.testing.assert_close(
        metrics.preference_distribution(rewards, mask).exp(), torch.tensor([[4 / 7, 2 / 7, 1 / 7], [0.25, 0.75, 0.0]])
    )
    tempered = metrics.preference_distribution(rewards, mask, beta=2.0).exp()
    assert tempered[1].tolist() == pytest.approx([1 / (1 + 3**0.5), 3**0.5 / (1 + 3**0.5), 0.0])


@given(SEEDS, st.floats(0, 0.99), st.floats(0, 5))
@settings(deadline=None, max_examples=100)
def test_total_variation_lies_in_0_1_and_is_at_least_the_mass_off_the_set(
    seed: int, offset: float, scale: float
) -> None:
    target, policy = random_policy(seed), random_policy(seed + 1, offset, scale)
    tv = metrics.total_variation(target, policy, MASK)
    assert bool((tv >= offset - 1e-9).all())
    assert bool((tv <= 1 + 1e-9).all())
    torch.testing.assert_close(metrics.offset_mass(policy, MASK), torch.full_like(tv, offset), atol=1e-9, rtol=0)
    swapped = 0.5 * ((policy.exp() - target.exp()).abs().sum(-1) + offset)
    torch.testing.assert_close(tv, swapped)


@given(SEEDS)
@settings(deadline=None, max_examples=50)
def test_distances_are_0_for_equal_distributions_and_positive_for_others(seed: int) -> None:
    one, other = random_policy(seed), random_policy(seed + 1)
    for distance in DISTANCES:
        torch.testing.assert_close(distance(one, one, MASK), torch.zeros(3).double(), atol=1e-9, rtol=0)
        assert bool((distance(one, other, MASK) > 0).all()), distance.__name__


@given(SEEDS, st.floats(0, 0.9))
@settings(deadline=None, max_examples=50)
def test_divergence_is_the_mean_over_pairs_of_samples(seed: int, offset: float) -> None:
    policy, rewards = random_policy(seed, offset), random_policy(seed + 1, scale=3.0)
    probabilities = random_policy(seed).exp()  # renormalised on the set
    gap = (rewards - policy).masked_fill(~MASK, 0.0)
    pairs = probabilities.unsqueeze(-1) * probabilities.unsqueeze(-2)
    brute_force = (pairs * (gap.unsqueeze(-1) - gap.unsqueeze(-2)) ** 2).sum((-1, -2))
    torch.testing.assert_close(metrics.divergence(rewards.masked_fill(~MASK, 0.0), policy, MASK), brute_force)


def test_divergence_is_0_for_a_match_and_for_a_collapsed_policy() -> None:
    matching = metrics.divergence(TARGET.masked_fill(~ON, 0.0) + 3, TARGET, ON)
    torch.testing.assert_close(matching, torch.zeros(2).double(), atol=1e-12, rtol=0)
    rewards = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    for rest in (-60.0, -math.inf):  # all mass on the best answer
        collapsed = torch.tensor([[rest, rest, 0.0]], dtype=torch.float64)
        on = torch.ones(1, 3)
        assert metrics.divergence(rewards, collapsed, on).item() == pytest.approx(0.0, abs=1e-9)
        q = metrics.preference_distribution(rewards, on)
        assert metrics.total_variation(q, collapsed, on).item() == pytest.approx(1 - q[0, 2].exp().item())
        assert metrics.reverse_kl(q, collapsed, on).item() == pytest.approx(-q[0, 2].item())
    assert metrics.forward_kl(q, collapsed, on).item() == math.inf


def test_a_policy_off_the_set_is_as_far_as_can_be() -> None:
    policy = torch.full((3, 4), -1e4, dtype=torch.float64)
    target = random_policy(0)
    assert metrics.total_variation(target, policy, MASK).tolist() == [1.0] * 3
    assert metrics.offset_mass(policy, MASK).tolist() == [1.0] * 3
    found = metrics.preference_metrics(target, target.masked_fill(~MASK, 0.0), policy, MASK)
    assert found.pop("rank_correlation").isnan().all()  # equally unlikely answers have no ranks
    assert all(bool(values.isfinite().all()) for values in found.values())


def test_rounding_never_gives_negative_mass_off_the_set() -> None:
    assert metrics.offset_mass(torch.zeros(1, 2).log_softmax(-1) + 1e-6, torch.ones(1, 2)).item() == 0.0


@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf, 1e4])
def test_missing_answers_cannot_change_a_metric(fill: float) -> None:
    target, policy = random_policy(0), random_policy(1, offset=0.1)
    rewards = target.masked_fill(~MASK, 0.0)
    clean = metrics.preference_metrics(target, rewards, policy, MASK)
    soiled = [values.masked_fill(~MASK, fill) for values in (target, rewards, policy)]
    torch.testing.assert_close(metrics.preference_metrics(*soiled, MASK), clean)
    torch.testing.assert_close(
        metrics.preference_distribution(soiled[1], MASK), metrics.preference_distribution(rewards, MASK)
    )


def test_wrong_shapes_are_refused() -> None:
    for distance in [*DISTANCES, metrics.minority_mass, metrics.minority_coverage]:
        with pytest.raises(ValueError, match=r"target_logps \(4,\), policy_logps \(3, 4\)"):
            distance(torch.zeros(4), random_policy(0), MASK)
    with pytest.raises(ValueError, match=r"rewards \(3, 4\), policy_logps \(3, 4\), mask \(4, 3\)"):
        metrics.divergence(random_policy(0), random_policy(0), MASK.T)
    with pytest.raises(ValueError, match=r"rewards \(3, 4\), policy_logps \(3, 4\), mask \(4, 3\)"):
        metrics.rank_correlation(random_policy(0), random_policy(0), MASK.T)


# -- minorities --------------------------------------------------------------------------------------------------------


@each_mask
def test_minority_coverage_by_hand(mask: Tensor) -> None:
    # Minorities of q: 0.3 and 0.1, of which min(0.1, 0.3) and min(0.5, 0.1) are kept; 0.5, of which 0.2 is.
    policy = log([0.3, 0.1, 0.5], [0.7, 0.2, 0.0])
    assert metrics.minority_coverage(TARGET, policy, mask).tolist() == pytest.approx([0.2 / 0.4, 0.2 / 0.5])


def test_minority_coverage_is_1_for_a_match_0_after_collapse_and_1_without_minorities() -> None:
    assert metrics.minority_coverage(TARGET, TARGET, ON).tolist() == pytest.approx([1.0, 1.0])
    collapsed = log([1.0, 0.0, 0.0], [1.0, 0.0, 0.0])
    assert metrics.minority_coverage(TARGET, collapsed, ON).tolist() == [0.0, 0.0]
    assert metrics.minority_coverage(collapsed, TARGET, ON).tolist() == [1.0, 1.0]
    alone = torch.tensor([[True, False, False], [True, True, False]])  # one answer: no minority
    assert metrics.minority_coverage(log([1.0, 0.0, 0.0], [0.5, 0.5, 0.0]), POLICY, alone)[0].item() == 1.0


@given(SEEDS, st.floats(0, 0.9), st.floats(0, 5))
@settings(deadline=None, max_examples=50)
def test_minority_coverage_lies_in_0_1_and_what_is_lost_costs_total_variation(
    seed: int, offset: float, scale: float
) -> None:
    target, policy = random_policy(seed), random_policy(seed + 1, offset, scale)
    coverage = metrics.minority_coverage(target, policy, MASK)
    assert bool(((coverage >= 0) & (coverage <= 1)).all())
    # TV = sum over answers of what pi lacks of q, of which the minorities' part is (1 - coverage) of their mass
    lost = (1 - coverage) * metrics.minority_mass(target, target, MASK)
    assert bool((lost <= metrics.total_variation(target, policy, MASK) + 1e-9).all())


# -- ranks -------------------------------------------------------------------------------------------------------------


@given(SEEDS, st.booleans())
@settings(deadline=None, max_examples=50)
def test_rank_correlation_is_scipy_s_spearman(seed: int, ties: bool) -> None:
    from scipy.stats import spearmanr

    rewards, policy = 3 * random_policy(seed), random_policy(seed + 1, offset=0.1)
    if ties:
        rewards, policy = rewards.round(), policy.round()
    found = metrics.rank_correlation(rewards, policy, MASK)
    for row, (r, p, on) in enumerate(zip(rewards, policy, MASK, strict=True)):
        varies = len(r[on].unique()) > 1 and len(p[on].unique()) > 1
        expected = spearmanr(r[on], p[on]).statistic if varies else math.nan
        assert found[row].item() == pytest.approx(expected, nan_ok=True)


def test_rank_correlation_sees_order_alone_and_is_undefined_without_one() -> None:
    rewards = torch.tensor([[3.0, 1.0, 2.0], [1.0, 5.0, 0.0], [4.0, 0.0, 0.0]])
    policy = torch.tensor([[-0.1, -math.inf, -50.0], [-1.0, -1.0, -3.0], [-1.0, -2.0, -3.0]])
    on = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    found = metrics.rank_correlation(rewards, policy, on)
    assert found[0].item() == pytest.approx(1.0)
    assert found[1:].isnan().all()  # equally likely; one response alone
    assert metrics.rank_correlation(-rewards, policy, on)[0].item() == pytest.approx(-1.0)


def test_a_broken_log_prob_is_not_hidden_by_its_rank() -> None:
    policy = random_policy(0)
    policy[0, 1] = math.nan
    found = metrics.rank_correlation(random_policy(1), policy, MASK)
    assert found.isnan().tolist() == [True, False, False]
