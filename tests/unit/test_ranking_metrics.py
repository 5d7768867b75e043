"""Can a bad policy look good? A collapsed, a uniform and a gibberish one, and the exact optimum, side by side."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_cli.measure.exact import summarise
from rlhf_cli.metrics.glossary import rankable
from rlhf_cli.metrics.guard import crossed
from rlhf_cli.metrics.preference import preference_distribution, preference_metrics

# Two prompts with four and three answers. q is (.455, .276, .167, .102) and (.387, .317, .296): people are divided, so
# the uniform policy is nearer to them than one that always gives the favourite.
REWARDS = torch.tensor([[1.0, 0.5, 0.0, -0.5], [0.2, 0.0, -0.07, 0.0]], dtype=torch.float64)
MASK = torch.tensor([[True] * 4, [True, True, True, False]])
TARGET = preference_distribution(REWARDS, MASK)
UNIFORM = preference_distribution(torch.zeros_like(REWARDS), MASK)
OTHER_TEXTS = 5000  # texts off the answer set that a policy can write, one token each
RIGHT_ORDER = ["optimum", "uniform", "collapsed", "gibberish"]


def collapsed(rest: float) -> Tensor:
    """All mass but `rest` on the reward model's favourite answer."""
    favourite = torch.zeros_like(REWARDS)
    favourite[:, 0] = 1.0
    shares = (1 - rest) * favourite + rest * (1 - favourite) / (MASK.sum(-1, keepdim=True) - 1)
    return shares.masked_fill(~MASK, 0.0).log()


POLICIES = {
    "gibberish": UNIFORM + math.log(1e-3),  # 99.9 % of the mass off the answer set
    "collapsed": collapsed(1e-3),
    "optimum": TARGET,
    "uniform": UNIFORM,
}
# The policy that alignment starts from: near uniform, 2 % of its mass off the set.
REFERENCE = (0.2 * TARGET.exp() + 0.8 * UNIFORM.exp()).log() + math.log(0.98)


def metrics(policy: Tensor) -> dict[str, float]:
    """The exact metrics as a run reports them, means over the prompts."""
    per_prompt = {f"pm/{key}": values for key, values in preference_metrics(TARGET, REWARDS, policy, MASK).items()}
    return summarise(per_prompt, torch.ones(2).bool())


def entropy(policy: Tensor) -> float:
    """Entropy per token over the vocabulary: a token an answer, the mass off the set spread evenly over the others."""
    shares = policy.exp()
    off = (1 - shares.sum(-1)).clamp(min=0)
    on_set = torch.special.entr(shares).sum(-1)
    return float((on_set + torch.special.entr(off) + off * math.log(OTHER_TEXTS)).mean())


def ranked(key: str) -> list[str]:
    """The policies from best to worst by a shipped metric, in its own better direction."""
    sign = -1 if rankable(key).better == "higher" else 1
    return sorted(POLICIES, key=lambda name: sign * metrics(POLICIES[name])[key])


@pytest.mark.parametrize(
    "key", ["pm/tv", "pm/tv_max", "pm/kl_rm_policy", "pm/kl_rm_policy_max", "pm/minority_coverage"]
)
def test_the_ranking_metrics_put_them_in_the_right_order(key: str) -> None:
    assert ranked(key) == RIGHT_ORDER
    values = [metrics(POLICIES[name])[key] for name in RIGHT_ORDER]
    assert len(set(values)) == 4
    assert values[0] == pytest.approx(1.0 if key == "pm/minority_coverage" else 0.0, abs=1e-9)


def test_the_distances_by_hand() -> None:
    first, second = TARGET[:, 0].exp().tolist()
    # Collapsed: what it lacks of the minorities, less the little that it leaves them.
    assert metrics(POLICIES["collapsed"])["pm/tv"] == pytest.approx(1 - (first + second) / 2 - 1e-3)
    # Uniform: what it lacks of the answers that have more than their even share: two of four, and one of three.
    above = first + TARGET[0, 1].exp().item() - 2 / 4 + second - 1 / 3
    assert metrics(UNIFORM)["pm/tv"] == pytest.approx(above / 2)
    # Gibberish: all but the thousandth part; 1000 times less than uniform for every answer.
    assert metrics(POLICIES["gibberish"])["pm/tv"] == pytest.approx(0.999)
    gap = metrics(POLICIES["gibberish"])["pm/kl_rm_policy"] - metrics(UNIFORM)["pm/kl_rm_policy"]
    assert gap == pytest.approx(math.log(1000))


def test_the_official_divergence_ranks_the_collapsed_policy_as_good_as_the_optimum() -> None:
    assert metrics(TARGET)["pm/divergence"] == pytest.approx(0.0, abs=1e-12)
    found = [metrics(collapsed(rest)) for rest in (1e-3, 1e-6, 0.0)]
    divergences = [row["pm/divergence"] for row in found]
    assert divergences == sorted(divergences, reverse=True)  # the more it has collapsed, the better it looks
    assert divergences[-1] == 0.0
    uniform = metrics(UNIFORM)
    assert uniform["pm/divergence"] > 2 * divergences[0]  # and better than the uniform policy, which is nearer
    # Off the set it sees nothing at all: gibberish looks like the uniform policy.
    assert metrics(POLICIES["gibberish"])["pm/divergence"] == pytest.approx(uniform["pm/divergence"])
    for row in found:
        assert row["pm/tv"] > 2 * uniform["pm/tv"]
        assert row["pm/kl_rm_policy"] > 2 * uniform["pm/kl_rm_policy"]
    assert found[-1]["pm/kl_rm_policy"] == math.inf
    assert found[-1]["pm/minority_coverage"] == 0.0


def test_the_guard_flags_the_collapsed_and_the_gibberish_policy_alone() -> None:
    flagged = {}
    for name, policy in {**POLICIES, "reference": REFERENCE, "fully collapsed": collapsed(0.0)}.items():
        numbers = {
            "entropy/per_token": entropy(policy),
            "reference/entropy/per_token": entropy(REFERENCE),
            "pm/offset_mass": metrics(policy)["pm/offset_mass"],
        }
        flagged[name] = crossed(numbers)
        by_offset = crossed({"pm/offset_mass": numbers["pm/offset_mass"]})
        assert bool(by_offset) == (name == "gibberish")
    assert {name for name, sentences in flagged.items() if sentences} == {"collapsed", "fully collapsed", "gibberish"}
    assert "below a quarter of the reference's" in flagged["collapsed"][0]
    assert len(flagged["gibberish"]) == 2
    assert "such text means nothing" in flagged["gibberish"][0]
    assert flagged["gibberish"][1] == "mass off the answer set 0.999 is above 0.2"
