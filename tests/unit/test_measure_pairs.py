"""A policy on held-out preference pairs: pair preferences, calibration, lengths, log-probs of chosen responses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import EOS, PAD, tiny_policy
from tiny_world import ANSWERS, PROMPTS, lookup, sampling
from torch import Tensor

from rlhf_cli.measure import pairs as module
from rlhf_cli.measure.memo import Memo
from rlhf_cli.measure.pairs import PairMeasure
from rlhf_cli.models.logps import frozen_token_logps
from rlhf_cli.models.tokens import collate
from rlhf_cli.store import Store

PAIRS: list[dict[str, Any]] = [
    {"prompt_ids": PROMPTS[1], "chosen_ids": ANSWERS[1][0], "rejected_ids": ANSWERS[1][1]},  # 4 and 2 tokens
    {"prompt_ids": PROMPTS[0], "chosen_ids": ANSWERS[0][1], "rejected_ids": ANSWERS[0][0]},  # 3 and 2
]
REAL = [
    {"prompt_ids": prompt, "chosen_ids": answers[0], "rejected_ids": answers[1], "label": 0.75}
    for prompt, answers in zip(PROMPTS, ANSWERS, strict=True)
]


class Told:
    """Log-probs of whole responses, chosen then rejected: reads what it is given instead of a model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def read_logps(model: Any, prompts: Any, responses: Any, how: Any, memo: Any, identity: Any, label: Any) -> Any:
            assert len(responses) == len(model)
            return [np.full(len(ids), logp / len(ids)) for ids, logp in zip(responses, model, strict=True)]

        monkeypatch.setattr(module, "read_logps", read_logps)

    def measure(self, pairs: Any, reference: Any, reward: Any = lookup, clip: float | None = 5.0) -> PairMeasure:
        return PairMeasure(pairs, reference, reward, reward_clip=clip, sampling=sampling(None))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    return Told(monkeypatch)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("clip", [5.0, None])
def test_pair_tv_by_hand(told: Told, clip: float | None) -> None:
    # r: .5 - (-7), clipped .5 - (-5); 0 - 1. log pi: -3 - (-4), -1 - (-3).
    work = told.measure(PAIRS, [-1.5, -0.5, -2.0, -1.5], clip=clip)
    found = work.metrics(work.read([-3.0, -1.0, -4.0, -3.0]))
    gaps = [abs(sigmoid(5.5 if clip else 7.5) - sigmoid(1.0)), abs(sigmoid(-1.0) - sigmoid(2.0))]
    assert found["pm/pair_tv"] == pytest.approx(sum(gaps) / 2, abs=1e-6)
    assert found["pm/pair_length_difference"] == 1.5
    # chosen responses of 4 and 3 tokens, end-of-sequence included, with log-probs -3 and -1
    assert found["perplexity/chosen"] == pytest.approx(math.exp(4 / 7))
    assert found["chosen_logps"] == pytest.approx(-2.0)
    assert found["chosen_logps_change"] == pytest.approx(-1.0)
    # of each prompt alone: exp(3/4) and exp(1/3); -1.5 and -.5
    assert found["perplexity/chosen/lo"] == pytest.approx(math.exp(1 / 3))
    assert found["perplexity/chosen/hi"] == pytest.approx(math.exp(3 / 4))
    assert (found["chosen_logps_change/lo"], found["chosen_logps_change/hi"]) == pytest.approx((-1.5, -0.5))
    for key in ("pm/pair_tv", "perplexity/chosen", "chosen_logps", "chosen_logps_change"):
        assert found[f"{key}/n"] == 2


def test_pairs_of_one_prompt_are_resampled_together(told: Told) -> None:
    """pm/pair_tv is a mean over prompts; log-probs of chosen responses are means over pairs."""
    pairs = [PAIRS[0], {**PAIRS[0], "chosen_ids": [7, EOS]}, PAIRS[1]]
    work = told.measure(pairs, [0.0] * 6, lambda p, r: torch.zeros(len(p)))
    found = work.metrics(work.read([0.0, -6.0, -2.0, 0.0, 0.0, 0.0]))
    gaps = [0.0, 0.5 - sigmoid(-6), 0.5 - sigmoid(-2)]
    assert found["pm/pair_tv"] == pytest.approx(((gaps[0] + gaps[1]) / 2 + gaps[2]) / 2)
    assert found["chosen_logps"] == pytest.approx(-8 / 3)
    assert found["perplexity/chosen"] == pytest.approx(math.exp(8 / (4 + 2 + 3)))
    assert {found[f"{key}/n"] for key in ("pm/pair_tv", "chosen_logps")} == {2}


@pytest.mark.parametrize(
    ("labels", "ece"),
    [
        (None, 1 - sigmoid(3.0)),  # every pair was won with a confidence of .953
        (1.0, 1 - sigmoid(3.0)),
        (0.75, sigmoid(3.0) - 0.75),
        (0.0, sigmoid(3.0)),
    ],
)
def test_pair_ece_is_against_the_labels(told: Told, labels: float | None, ece: float) -> None:
    pairs = PAIRS if labels is None else [{**pair, "label": labels} for pair in PAIRS]
    work = told.measure(pairs, [0.0] * 4)
    assert work.metrics(work.read([-1.0, -2.0, -4.0, -5.0]))["pm/pair_ece"] == pytest.approx(ece)


def test_extreme_log_probs_are_finite(told: Told) -> None:
    work = told.measure(PAIRS, [0.0] * 4)
    found = work.metrics(work.read([-1e4, -1.0, -1.0, -1e4]))
    assert all(math.isfinite(value) for value in found.values())
    assert found["perplexity/chosen"] == pytest.approx(math.exp(80))  # 10001 / 7 nats a token are not printed


def own(policy: Any) -> Any:
    def reward(prompts: Any, responses: Any) -> Tensor:
        batch = collate(prompts, responses, PAD)
        return frozen_token_logps(policy, batch, temperature=1.0, tree=None).sum(-1)

    return reward


def test_a_policy_that_equals_its_reward_has_pair_tv_0() -> None:
    policy = tiny_policy()
    work = PairMeasure(REAL, policy, own(policy), reward_clip=None, sampling=sampling(None))
    found = work.metrics(work.read(policy))
    assert found["pm/pair_tv"] == pytest.approx(0.0, abs=1e-5)
    assert found["chosen_logps_change"] == pytest.approx(0.0, abs=1e-5)
    other = work.metrics(work.read(tiny_policy(2)))
    assert other["pm/pair_tv"] > 0.05


def test_log_probs_are_those_of_chosen_then_rejected() -> None:
    policy = tiny_policy(2)
    work = PairMeasure(REAL, policy, lookup, reward_clip=5.0, sampling=sampling(None))
    responses = [pair["chosen_ids"] for pair in REAL] + [pair["rejected_ids"] for pair in REAL]
    expected = own(policy)(PROMPTS * 2, responses)
    np.testing.assert_allclose(work.read(policy), expected, rtol=0, atol=1e-5)


def test_rewards_and_readings_are_kept(tmp_path: Path) -> None:
    policy, memo = tiny_policy(2), Memo(Store(tmp_path))
    what = {"reward": {"reward": "a"}, "reference": {"policy": "b"}}

    def work(reference: Any, reward: Any) -> PairMeasure:
        return PairMeasure(REAL, reference, reward, reward_clip=5.0, sampling=sampling(None), memo=memo, identity=what)

    first = work(tiny_policy(1), lookup)
    logps = first.read(policy, memo, {"policy": "c"})
    again = work(None, None)  # neither is called
    np.testing.assert_array_equal(again.read(None, memo, {"policy": "c"}), logps)
    assert again.metrics(logps) == first.metrics(logps)
    assert again.histograms(logps) == first.histograms(logps)


# -- pairs.json --------------------------------------------------------------------------------------------------------


def test_histograms_by_hand(told: Told) -> None:
    # P(chosen): reward model sigma(5.5) = .996, sigma(-1) = .269; reference 1/2 twice; policy sigma(1), sigma(2)
    work = told.measure(PAIRS, [0.0] * 4)
    found = work.histograms(work.read([-3.0, -1.0, -4.0, -3.0]))
    assert found["edges"] == [i / 20 for i in range(21)]
    filled = {name: {bin: n for bin, n in enumerate(counts) if n} for name, counts in found["counts"].items()}
    assert filled == {"reward_model": {19: 1, 5: 1}, "reference": {10: 2}, "policy": {14: 1, 17: 1}}
    assert all(len(counts) == 20 for counts in found["counts"].values())
    curve = found["reliability"]
    assert len(curve["edges"]) == 11
    assert curve["count"] == [0, 0, 0, 0, 1, 0, 0, 1, 0, 0]  # .731 and .881 in bins of .05 from 1/2
    assert curve["predicted"][4] == pytest.approx(sigmoid(1.0))
    assert curve["observed"][7] == 1.0
    assert curve["predicted"][0] is None
    assert curve["observed"][0] is None
    assert found["length_difference"] == [2, 1]
    assert found["pairs"] == 2
    json.dumps(found, allow_nan=False)


def test_certain_preferences_are_in_the_end_bins(told: Told) -> None:
    work = told.measure(PAIRS, [-1e4, 0.0, 0.0, -1e4])
    found = work.histograms(work.read([0.0, -1e4, -1e4, 0.0]))
    assert found["counts"]["reference"] == [1, *[0] * 18, 1] == found["counts"]["policy"]


def test_length_differences_are_thinned_evenly(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POINTS", 3)
    pairs = [{"prompt_ids": [4], "chosen_ids": [7] * (i + 1), "rejected_ids": [7]} for i in range(8)]
    found = told.measure(pairs, [0.0] * 16).histograms(np.zeros(16))
    assert found["length_difference"] == [0, 3, 6]
    assert found["pairs"] == 8
