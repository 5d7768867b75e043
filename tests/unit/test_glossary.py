from __future__ import annotations

import pytest

from rlhf_cli.metrics.glossary import DROPPED, GLOSSARY, describe, known

KEYS = """
pm/tv pm/tv_max pm/kl_rm_policy pm/kl_policy_rm pm/minority_mass pm/minority_mass_target pm/offset_mass pm/divergence
pm_beta/tv pm_beta/divergence gold/tv gold/kl_rm_policy optimum/tv optimum/kl optimum/offset_bound pm/pair_tv
pm/pair_tv/lo pm/pair_tv/hi pm/pair_tv/n heldout/pm/tv heldout/pm/tv_max reference/pm/tv reference/heldout/pm/tv
best/step best/pm/tv reference/mass_near_alpha reward/mean reward/std reward/clip_fraction score/mean kl/per_token
kl/sequence entropy/per_token length/mean eos_rate perplexity/chosen
loss policy_loss value_loss explained_variance clip_fraction value_clip_fraction cost/sequence
beta advantage/std learning_rate grad_norm sft_term dpo_loss
accuracy margin chosen_logps rejected_logps chosen_logps_change sft/loss rm/loss rm/accuracy
rm/negative_accuracy step
rm/accuracy/lo rm/log_loss rm/log_loss/hi rm/brier rm/ece rm/margin/mean rm/margin/q05 rm/margin/q95 rm/bound/mean
rm/bound/half rm/beyond_bound rm/beyond_half rm/length_correlation rm/length_correlation_raw
rm/length_correlation_calibrated rm/length_correlation_labels rm/length_slope rm/length_slope_calibrated
rm/accuracy_longer_won rm/accuracy_equal_length rm/gold_spearman rm/gold_kendall rm/gold_tv rm/gold_tv_max
heldout/rm/gold_tv heldout/rm/gold_tv_max rm/score_dataset/mean rm/score_policy/std rm/score_policy_best/mean
rm/score_policy_beyond rm/score_shift rm/disagreement rm/member_flip rm/member_accuracy/mean rm/member_accuracy/min
rm/member_accuracy/max rm/member_log_loss/mean rm/member_ece/mean rm/ensemble_accuracy rm/ensemble_log_loss
rm/ensemble_ece train/rm/accuracy rm/bound rm/bound_half rm/bounded_margin bound bound_half beyond_bound
constraint_loss score/std data/dropped/no_direction data/dropped/duplicate_in_ranking
data/dropped/too_few_responses
"""


@pytest.mark.parametrize("key", KEYS.split())
def test_every_emitted_key_is_known_and_described(key: str) -> None:
    assert known(key)
    assert describe(key).meaning


@pytest.mark.parametrize(
    "key",
    [
        "",
        "pm/tb",
        "pm",
        "rm/margin",
        "rm/margin/q50/q50",
        "/lo",
        "_max",
        "heldout/",
        "heldout/pm/tb",
        "pm/tv/mean",
        "tv",
    ],
)
def test_unknown_keys_are_not_known(key: str) -> None:
    assert not known(key)


def test_unknown_key_names_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"Unknown metric key 'pm/tvv'. Did you mean 'pm/tv'\?"):
        describe("pm/tvv")


def test_prefixes_and_suffixes_are_put_into_words() -> None:
    assert "worst prompt" in describe("pm/tv_max").meaning
    assert "no stage trained on" in describe("heldout/pm/tv").meaning
    assert "reference" in describe("reference/pm/tv").meaning
    assert describe("heldout/pm/tv").better == "lower"


def test_a_count_has_neither_the_metric_s_unit_nor_its_direction() -> None:
    assert (describe("pm/tv/n").unit, describe("pm/tv/n").better) == ("samples", "none")
    assert (describe("pm/tv/lo").unit, describe("pm/tv/lo").better) == ("share", "lower")


def test_a_key_that_begins_like_a_prefix_keeps_its_own_meaning() -> None:
    assert "alpha" in describe("reference/mass_near_alpha").meaning


def test_meanings_are_single_sentences_without_a_full_stop() -> None:
    for key, metric in GLOSSARY.items():
        assert metric.meaning, key
        assert not metric.meaning.endswith("."), key
        assert "\n" not in metric.meaning, key
        assert metric.better in ("lower", "higher", "none"), key


def test_a_length_metric_says_which_reward_it_is_of() -> None:
    assert "before length calibration" in describe("rm/length_correlation_raw").meaning
    assert "after length calibration" in describe("rm/length_slope_calibrated").meaning
    assert describe("rm/length_slope").unit == "nats/token"


def test_a_reason_for_leaving_rows_out_is_a_clause() -> None:
    assert DROPPED["no_direction"] == "neither response is preferred (label 0.5)"
    assert [why for why in DROPPED.values() if why != why.strip() or why.endswith(".") or why[0].isupper()] == []
