from __future__ import annotations

import json
from dataclasses import replace
from math import log
from typing import Any

import numpy as np
import pytest

from rlhf_cli.errors import RunError
from rlhf_cli.measure.trust import Gold, HeldOut, Spread, trust_report
from rlhf_cli.metrics.glossary import TRUST, known

WARM = ("rm/disagreement", "rm/member_", "rm/ensemble_")  # of several members: not of one model's report


def pairs(chosen: Any, rejected: Any, **changes: Any) -> HeldOut:
    """Return pairs of prompts of their own, hard labels and equal lengths, unless `changes` say otherwise."""
    chosen, rejected = np.asarray(chosen, dtype=float), np.asarray(rejected, dtype=float)
    count = len(chosen)
    plain: dict[str, Any] = {
        "prompts": np.arange(count),
        "raw_chosen": chosen,
        "raw_rejected": rejected,
        "calibrated_chosen": None,
        "calibrated_rejected": None,
        "chosen_lengths": np.full(count, 5),
        "rejected_lengths": np.full(count, 5),
        "label": np.ones(count),
        "length_ratio": np.ones(count),
    }
    return HeldOut(chosen=chosen, rejected=rejected, **{**plain, **changes})


def simulated(count: int = 2000, *, scale: float = 1.0, seed: int = 0) -> HeldOut:
    """Return pairs whose winner, listed first, was drawn from the difference itself; rewards `scale` times that."""
    rng = np.random.default_rng(seed)
    d = rng.normal(0, 1.5, count)
    lost = rng.random(count) > 1 / (1 + np.exp(-d))
    d = scale * np.where(lost, -d, d)
    base = rng.normal(0, 1, count)
    lengths = rng.integers(1, 60, (2, count))
    return pairs(
        base + d / 2,
        base - d / 2,
        prompts=np.arange(count) // 4,
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        length_ratio=lengths.min(0) / lengths.max(0),
    )


def full(count: int = 60) -> tuple[HeldOut, Gold, Spread]:
    """Return a report's input in which everything is known."""
    heldout = simulated(count)
    heldout.chosen_lengths[0] = heldout.rejected_lengths[0]
    calibrated = {
        f"calibrated_{side}": getattr(heldout, side) - 0.01 * getattr(heldout, f"{side}_lengths")
        for side in ("chosen", "rejected")
    }
    rng = np.random.default_rng(1)
    heldout = replace(heldout, **calibrated, cosine=rng.uniform(0.5, 1, count), bound=rng.uniform(1, 6, count))
    known_rewards = [rng.normal(0, 1, 5) for _ in range(6)]
    ours = [rewards + rng.normal(0, 0.2, 5) for rewards in known_rewards]
    gold = Gold(ours, known_rewards, [True, True, True, False, False, True])
    return heldout, gold, Spread(rng.normal(0, 1, 2 * count), rng.normal(1, 1, (20, 4)), "sft")


def metrics_of(heldout: HeldOut, gold: Gold | None = None, spread: Spread | None = None) -> dict[str, float]:
    return trust_report(heldout, gold, spread)[0]


# --- pairs


def test_accuracy_by_hand_with_a_tie() -> None:
    # right, wrong, tie: (1 + 0 + 1/2) / 3
    found = metrics_of(pairs([1, 0, 2], [0, 1, 2]))
    assert found["rm/accuracy"] == pytest.approx(0.5)
    assert found["rm/accuracy/n"] == 3
    # -log sigma(1), -log sigma(-1), log 2; sigma(1) = .731059
    assert found["rm/log_loss"] == pytest.approx((-log(0.7310586) - log(0.2689414) + log(2)) / 3)
    assert found["rm/brier"] == pytest.approx((0.2689414**2 + 0.7310586**2 + 0.25) / 3)


def test_a_soft_label_counts_by_its_share() -> None:
    # Chosen first: .7 of the label; rejected first: 1 - .6.
    found = metrics_of(pairs([1, 0], [0, 1], label=np.array([0.7, 0.6])))
    assert found["rm/accuracy"] == pytest.approx((0.7 + 0.4) / 2)


def test_accuracy_is_a_mean_over_prompts() -> None:
    # Prompt 0: right, right, wrong; prompt 1: wrong. (2/3 + 0) / 2
    found = metrics_of(pairs([1, 1, 0, 0], [0, 0, 1, 1], prompts=np.array([0, 0, 0, 1])))
    assert found["rm/accuracy"] == pytest.approx(1 / 3)
    assert found["rm/accuracy/n"] == 2
    assert found["rm/accuracy/lo"] <= 1 / 3 <= found["rm/accuracy/hi"]


def test_a_constant_of_each_prompt_changes_no_pair_metric() -> None:
    heldout = simulated(200)
    shift = 3 * np.sin(heldout.prompts)
    moved = {name: getattr(heldout, name) + shift for name in ("chosen", "rejected", "raw_chosen", "raw_rejected")}
    before, after = metrics_of(heldout), metrics_of(replace(heldout, **moved))
    assert before.keys() == after.keys()
    assert after == pytest.approx(before, abs=1e-9)


def test_the_side_a_pair_is_listed_on_changes_nothing() -> None:
    heldout, _, _ = full()
    swap = np.arange(60) % 3 == 0
    sides = [("chosen", "rejected"), ("raw_chosen", "raw_rejected"), ("calibrated_chosen", "calibrated_rejected")]
    sides.append(("chosen_lengths", "rejected_lengths"))
    changes: dict[str, Any] = {"label": np.where(swap, 0.0, 1.0)}
    for first, second in sides:
        ours, theirs = getattr(heldout, first), getattr(heldout, second)
        changes |= {first: np.where(swap, theirs, ours), second: np.where(swap, ours, theirs)}
    (before, drawn), (after, redrawn) = (trust_report(x, None, None) for x in (heldout, replace(heldout, **changes)))
    assert after == pytest.approx(before, abs=1e-9)
    for panel in ("margins", "accuracy"):
        assert redrawn[panel] == drawn[panel]


def test_calibration_is_told_from_scale() -> None:
    ece = {scale: metrics_of(simulated(8000, scale=scale))["rm/ece"] for scale in (1.0, 3.0, 0.3)}
    assert ece[1.0] < 0.025
    assert min(ece[3.0], ece[0.3]) > 0.1


def test_scale_changes_no_order() -> None:
    ours, scaled = metrics_of(simulated(300)), metrics_of(simulated(300, scale=4.0))
    for key in ("rm/accuracy", "rm/length_correlation", "rm/accuracy_longer_won"):
        assert scaled[key] == pytest.approx(ours[key])
    assert scaled["rm/margin/q95"] == pytest.approx(4 * ours["rm/margin/q95"])


def test_margins_by_hand() -> None:
    # Margins 0, 1, 2, 3, 4: quartiles 1, 2, 3; 5th percentile 0.2; variance 2
    found = metrics_of(pairs(range(5), np.zeros(5)))
    names = ("mean", "std", "q05", "q25", "q50", "q75", "q95")
    expected = [2, 2**0.5, 0.2, 1, 2, 3, 3.8]
    assert [found[f"rm/margin/{name}"] for name in names] == pytest.approx(expected)


def test_a_margin_is_that_of_the_preferred_response() -> None:
    assert metrics_of(pairs([1, 0], [0, 3], label=np.array([1.0, 0.1])))["rm/margin/mean"] == pytest.approx(2)


def test_bounds_by_hand() -> None:
    # Bounds 4, 4, inf, 8: mean 16/3. Margins 5 > 4; 3 > 2 alone; unbounded; 1.
    heldout = pairs([5, 3, 100, 1], np.zeros(4), bound=np.array([4, 4, np.inf, 8.0]))
    found = metrics_of(heldout)
    assert found["rm/bound/mean"] == pytest.approx(16 / 3)
    assert found["rm/bound/half"] == pytest.approx(8 / 3)
    assert found["rm/beyond_bound"] == pytest.approx(1 / 3)
    assert found["rm/beyond_half"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("bound", [None, np.full(2, np.inf)])
def test_without_a_bound_nothing_is_said_of_it(bound: np.ndarray | None) -> None:
    metrics, panels = trust_report(pairs([1, 2], [0, 0], bound=bound), None, None)
    assert not [key for key in metrics if "bound" in key or "beyond" in key]
    assert panels["margins"]["half"] is None
    assert "delta*/2" not in panels["percentiles"]["rows"]


# --- length


def test_a_planted_length_bias_is_found_and_its_calibration_removes_it() -> None:
    heldout = simulated(2000)
    length = {side: 0.05 * getattr(heldout, f"{side}_lengths") for side in ("chosen", "rejected")}
    raw = {side: getattr(heldout, side) + length[side] for side in length}
    biased = replace(
        heldout,
        **raw,
        **{f"raw_{side}": raw[side] for side in raw},
        **{f"calibrated_{side}": raw[side] - length[side] for side in raw},
    )
    found = metrics_of(biased)
    assert found["rm/length_slope"] == found["rm/length_slope_raw"] == pytest.approx(0.05, abs=0.005)
    assert found["rm/length_correlation_raw"] > 0.4
    assert abs(found["rm/length_correlation_calibrated"]) < 0.05
    assert abs(found["rm/length_slope_calibrated"]) < 0.005


def test_what_labels_favour_by_hand() -> None:
    # The winner is longer by 1 twice and shorter by 2 once: (1 + 1 - 2) / sqrt(3 * 6) = 0; without the last, 2/2.
    heldout = pairs([1, 1, 1], [0, 0, 0], chosen_lengths=np.array([2, 2, 1]), rejected_lengths=np.array([1, 1, 3]))
    assert metrics_of(heldout)["rm/length_correlation_labels"] == pytest.approx(0)
    swapped = replace(heldout, label=np.array([1.0, 1.0, 0.0]))  # (1 + 1 + 2) / sqrt(18)
    assert metrics_of(swapped)["rm/length_correlation_labels"] == pytest.approx(4 / 18**0.5)


def test_accuracy_by_whose_winner_is_longer() -> None:
    # Longer won: right, right. Shorter won: wrong (label 0: the rejected, shorter one won). Equal: right. .5: no class.
    heldout = pairs(
        [1, 2, 1, 1, 9],
        [0, 1, 0, 0, 0],
        chosen_lengths=np.array([9, 9, 9, 5, 9]),
        rejected_lengths=np.array([5, 5, 5, 5, 5]),
        label=np.array([1, 1, 0, 1, 0.5]),
    )
    found = metrics_of(heldout)
    assert found["rm/accuracy_longer_won"] == 1
    assert found["rm/accuracy_shorter_won"] == 0
    assert found["rm/accuracy_equal_length"] == 1
    assert "rm/accuracy_shorter_won" not in metrics_of(pairs([1], [0]))


def test_lengths_may_be_unsigned() -> None:
    few, many = np.array([1, 2], dtype=np.uint8), np.array([3, 3], dtype=np.uint8)
    found = metrics_of(pairs([0, 0], [1, 1], chosen_lengths=few, rejected_lengths=many))
    assert found["rm/length_slope"] == pytest.approx((2 + 1) / (4 + 1))  # d = -1, l = -2 and -1


# --- gold and policies


def test_agreement_with_gold_by_hand() -> None:
    # Ranks 123 against 132: Spearman 1 - 6 * 2 / (3 * 8) = 1/2, Kendall (2 - 1)/3. TV of (1/3, 1/3, 1/3) and
    # (1/2, 1/4, 1/4) = 1/6; the held-out question agrees but for a constant.
    ours = [np.array([1.0, 2, 3]), np.zeros(3), np.array([5.0, 6, 8])]
    gold = Gold(ours, [np.array([1.0, 3, 2]), np.log([2.0, 1, 1]), np.array([0.0, 1, 3])], [True, True, False])
    found = metrics_of(pairs([1], [0]), gold)
    assert found["rm/gold_spearman"] == pytest.approx(0.5)  # constant rewards have no ranks: the second is left out
    assert found["rm/gold_kendall"] == pytest.approx(1 / 3)
    # softmax(1,2,3) and softmax(1,3,2): the gap is that of the two swapped answers.
    swapped = (np.exp(3) - np.exp(2)) / np.exp([1, 2, 3]).sum()
    assert found["rm/gold_tv"] == pytest.approx((swapped + 1 / 6) / 2)
    assert found["rm/gold_tv_max"] == pytest.approx(swapped)
    assert found["heldout/rm/gold_tv"] == pytest.approx(0, abs=1e-12)
    assert found["heldout/rm/gold_spearman"] == found["heldout/rm/gold_kendall"] == pytest.approx(1)


def test_ranks_of_two_answers_are_not_reported() -> None:
    found = metrics_of(pairs([1], [0]), Gold([np.array([0.0, 1])], [np.array([0.0, 2])], [True]))
    assert "rm/gold_tv" in found
    assert not [key for key in found if "spearman" in key or "kendall" in key or key.startswith("heldout/")]


def test_spread_by_hand() -> None:
    # Data 0 .. 100: 99th percentile 99, mean 50. Policy mean 90, bests 98 and 122; 1 of 4 beyond 99.
    spread = Spread(np.arange(101.0), np.array([[60.0, 98.0], [80.0, 122.0]]), "sft")
    found = metrics_of(pairs([1], [0]), None, spread)
    assert found["rm/score_dataset/mean"] == 50
    assert found["rm/score_dataset/std"] == pytest.approx(((101**2 - 1) / 12) ** 0.5)
    assert found["rm/score_policy/mean"] == 90
    assert found["rm/score_policy_best/mean"] == 110
    assert found["rm/score_policy_beyond"] == 0.25
    assert found["rm/score_shift"] == pytest.approx(40 / found["rm/score_dataset/std"])


# --- robustness and form


def test_every_key_is_in_the_glossary_and_every_number_is_finite() -> None:
    metrics, panels = trust_report(*full())
    assert [key for key in metrics if not known(key)] == []
    assert all(type(value) in (float, int) and np.isfinite(value) for value in metrics.values())
    assert set(TRUST) - metrics.keys() == {key for key in TRUST if key.startswith(WARM)}
    assert json.loads(json.dumps(panels, allow_nan=False)) == panels


@pytest.mark.parametrize("count", [1, 2, 10])
def test_few_pairs_of_constant_scores_are_enough(count: int) -> None:
    spread = Spread(np.zeros(2 * count), np.zeros((1, 1)), "sft")
    gold = Gold([np.zeros(3)], [np.zeros(3)], [True])
    metrics, panels = trust_report(pairs(np.zeros(count), np.zeros(count)), gold, spread)
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["rm/accuracy"] == 0.5
    assert metrics["rm/log_loss"] == pytest.approx(log(2))
    left_out = ("rm/length_correlation", "rm/length_slope", "rm/score_shift", "rm/gold_spearman")
    assert not [key for key in metrics if key.startswith(left_out)]
    json.dumps(panels, allow_nan=False)


def test_a_huge_reward_difference_is_finite_and_not_flattered() -> None:
    found = metrics_of(pairs([0, 1e4], [1e4, 0]))
    assert found["rm/log_loss"] == pytest.approx(5e3)
    assert found["rm/ece"] == pytest.approx(0.5)


def test_the_same_input_gives_the_same_report() -> None:
    assert trust_report(*full()) == trust_report(*full())


@pytest.mark.parametrize("where", ["chosen", "raw_rejected", "calibrated_chosen", "policy", "gold"])
def test_a_score_that_is_not_finite_is_one_clear_line(where: str) -> None:
    heldout, gold, spread = full()
    if where == "policy":
        spread.policy[0, 0] = np.inf
    elif where == "gold":
        gold.rewards[0][0] = np.nan
    else:
        heldout = replace(heldout, **{where: np.where(np.arange(60) == 0, np.nan, getattr(heldout, where))})
    # 6 columns of 60, 120 dataset responses, 80 samples, 30 answers
    with pytest.raises(RunError, match=r"1 of 590 scores of the reward model are not finite\..*learning_rate") as error:
        trust_report(heldout, gold, spread)
    assert "\n" not in str(error.value)


def test_no_pairs_wrong_columns_and_wrong_labels_are_refused() -> None:
    with pytest.raises(RunError, match=r"There are no held-out pairs"):
        trust_report(pairs([], []), None, None)
    with pytest.raises(ValueError, match="label, length_ratio: one number for each of the 2 pairs"):
        trust_report(pairs([1, 2], [0, 0], label=np.ones(3), length_ratio=np.ones(1)), None, None)
    with pytest.raises(ValueError, match="a value of outcome is outside"):
        trust_report(pairs([1], [0], label=np.array([1.2])), None, None)


# --- panels


def test_bins_hold_every_pair_once() -> None:
    _, panels = trust_report(*full())
    assert sum(row["count"] for row in panels["reliability"]["bins"]) == 60
    assert sum(panels["margins"]["count"]) == 60
    assert sum(panels["margins"]["half"]["count"]) + panels["margins"]["half"]["outside"] == 60
    groups = panels["accuracy"]["groups"]
    assert [group["by"] for group in groups] == ["length difference", "length ratio", "embedding similarity"]
    for group in groups:
        assert sum(row["count"] for row in group["bins"]) == 60
        ends = [end for row in group["bins"] for end in (row["from"], row["to"])]
        assert ends == sorted(ends)
        assert all(row["low"] <= row["accuracy"] <= row["high"] for row in group["bins"])
    for curve in panels["length"]["curves"]:
        assert sum(row["count"] for row in curve["bins"]) + panels["length"]["equal"] == 60
    widths = np.diff(panels["scores"]["edges"])
    assert np.dot(widths, panels["scores"]["dataset"]) == pytest.approx(1)
    assert np.dot(widths, panels["scores"]["policy"]) == pytest.approx(1)


def test_few_levels_have_a_bin_each() -> None:
    ratio = np.repeat([0.25, 0.5, 1.0], 20)
    heldout = replace(simulated(60), length_ratio=ratio)
    bins = trust_report(heldout, None, None)[1]["accuracy"]["groups"][1]["bins"]
    assert [(row["from"], row["to"], row["count"]) for row in bins] == [(x, x, 20) for x in (0.25, 0.5, 1.0)]


def test_the_length_curve_is_that_of_the_longer_response() -> None:
    # The chosen is longer by 2, d = 1; the rejected is longer by 2, d = -3: the longer one gets 1 and 3 more.
    # Correlation: (1 * 2 + 3 * 2) / sqrt((1 + 9) (4 + 4)).
    heldout = pairs([1, 0], [0, 3], chosen_lengths=np.array([4, 2]), rejected_lengths=np.array([2, 4]))
    (curve,) = trust_report(heldout, None, None)[1]["length"]["curves"]
    assert (curve["name"], curve["correlation"]) == ("raw", pytest.approx(8 / 80**0.5))
    assert [(row["tokens"], row["mean"], row["count"]) for row in curve["bins"]] == [(2, 2, 2)]


def test_a_few_huge_bounds_do_not_flatten_the_histogram_of_margins() -> None:
    bound = np.where(np.arange(200) < 4, 2e4, 4.0)
    panel = trust_report(replace(simulated(200), bound=bound), None, None)[1]["margins"]
    assert panel["edges"][-1] < 20
    assert panel["half"]["outside"] == 4
    assert (panel["half"]["median"], panel["half"]["constant"]) == (2.0, False)


def test_answers_against_gold_are_centred_by_question_and_bounded_in_number() -> None:
    gold = Gold([np.array([1.0, 3.0])], [np.array([10.0, 20.0])], [False])
    points = trust_report(pairs([1], [0]), gold, None)[1]["gold"]["points"]
    expected = [{"gold": -5.0, "reward": -1.0, "trained": False}, {"gold": 5.0, "reward": 1.0, "trained": False}]
    assert points == expected
    many = Gold([np.arange(10.0)] * 400, [np.arange(10.0)] * 400, [True] * 400)
    assert 1000 <= len(trust_report(pairs([1], [0]), many, None)[1]["gold"]["points"]) <= 1500
