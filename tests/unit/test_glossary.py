from __future__ import annotations

import pytest

from rlhf_cli.metrics.glossary import DROPPED, GLOSSARY, PREFIXES, SUFFIXES, describe, known, rankable

KEYS = """
pm/tv pm/tv_max pm/kl_rm_policy pm/kl_policy_rm pm/minority_mass pm/minority_mass_target pm/offset_mass pm/divergence
pm_beta/tv pm_beta/divergence gold/tv gold/kl_rm_policy optimum/tv optimum/kl optimum/offset_bound pm/pair_tv
pm/pair_tv/lo pm/pair_tv/hi pm/pair_tv/n heldout/pm/tv heldout/pm/tv_max reference/pm/tv reference/heldout/pm/tv
best/step best/pm/tv reference/mass_near_alpha reward/mean reward/std reward/clip_fraction score/mean kl/per_token
kl/sequence entropy/per_token length/mean eos_rate perplexity/chosen
loss policy_loss value_loss explained_variance clip_fraction value_clip_fraction cost/sequence
engine/ratio engine/max_difference engine/capped
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
reward/best_of_1 reward/best_of_2 reward/best_of_16 reward/best_of_1024 reward/length_correlation
distinct_1 distinct_2 self_bleu repetition win_rate/rm win_rate/gold win_rate/llm
pm/minority_coverage gold/minority_coverage pm_beta/minority_coverage pm/rank_correlation
pool/size pool/prompts pm/pair_ece pm/pair_length_difference sampler/temperature sampler/top_p guard/crossed
reference/reward/best_of_8 reference/distinct_2 reference/entropy/per_token reference/pm/minority_coverage
by/bt/reward/mean by/pcrm_cosine-2.0/win_rate/rm by/0/pm/tv by/bt/pm/pair_tv by/bt/reward/best_of_4
by/reference/pm/tv reference/by/bt/reward/mean by/bt/pm/tv_max by/bt/pm/tv/lo
"""


@pytest.mark.parametrize("key", KEYS.split())
def test_every_emitted_key_is_known_and_described(key: str) -> None:
    assert known(key)
    assert describe(key).meaning


@pytest.mark.parametrize("key", ["pm/tv", "reward/best_of_4", "by/bt/reward/mean", "reference/distinct_2"])
def test_every_key_takes_every_prefix_and_suffix(key: str) -> None:
    for start in ("", "by/x.y/", *PREFIXES):
        for end in ("", *SUFFIXES, "_max/lo", "_max/n"):
            assert known(f"{start}{key}{end}"), f"{start}{key}{end}"


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
        "reward/best_of_",
        "reward/best_of_0",
        "reward/best_of_3",
        "reward/best_of_04",
        "reward/best_of_two",
        "win_rate/sft",
        "by/pm/tv",
        "by//pm/tv",
        "by/a b/pm/tv",
        "by/bt/",
        "by/bt/pm/tb",
    ],
)
def test_unknown_keys_are_not_known(key: str) -> None:
    assert not known(key)


def test_unknown_key_names_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"Unknown metric key 'pm/tvv'. Did you mean 'pm/tv'\?"):
        describe("pm/tvv")


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("reference/pm/tvv", "reference/pm/tv"),
        ("reference/mass_near_alfa", "reference/mass_near_alpha"),
        ("by/bt/pm/pair_tw", "by/bt/pm/pair_tv"),
        ("pm/kl_rmpolicy_max", "pm/kl_rm_policy_max"),
        ("reward/best_of_5", "reward/best_of_"),
        ("pm/minority_coverge/lo", "pm/minority_coverage/lo"),
    ],
)
def test_the_nearest_key_keeps_prefixes_and_suffixes(wrong: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"Unknown metric key '{wrong}'. Did you mean '{nearest}"):
        describe(wrong)


def test_a_key_like_no_other_names_none() -> None:
    with pytest.raises(ValueError, match=r"^Unknown metric key 'qqqqqqqq'\.$"):
        describe("qqqqqqqq")


def test_prefixes_and_suffixes_are_put_into_words() -> None:
    assert "worst prompt" in describe("pm/tv_max").meaning
    assert "no stage trained on" in describe("heldout/pm/tv").meaning
    assert "reference" in describe("reference/pm/tv").meaning
    assert describe("heldout/pm/tv").better == "lower"
    assert describe("by/pcrm_cosine/pm/tv").meaning.endswith("(by the reward model pcrm_cosine)")
    nested = describe("reference/by/bt/reward/best_of_8/lo").meaning
    assert nested.startswith("Expected best reward of 8 samples")
    assert nested.endswith("over prompts, of the reference (SFT) policy, by the reward model bt)")


def test_a_count_has_neither_the_metric_s_unit_nor_its_direction() -> None:
    assert (describe("pm/tv/n").unit, describe("pm/tv/n").better) == ("prompts", "none")
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


def test_what_runs_can_be_ranked_by() -> None:
    lower = "pm/tv pm/tv_max pm/kl_rm_policy optimum/tv self_bleu repetition guard/crossed pm/pair_ece by/bt/pm/tv"
    higher = "reward/mean reward/best_of_4 win_rate/llm distinct_2 pm/minority_coverage pm/rank_correlation"
    assert {rankable(key).better for key in lower.split()} == {"lower"}
    assert {rankable(key).better for key in higher.split()} == {"higher"}


@pytest.mark.parametrize("key", ["length/mean", "pm/minority_mass", "entropy/per_token", "pool/size", "pm/tv/n"])
def test_a_metric_without_a_better_direction_ranks_nothing(key: str) -> None:
    with pytest.raises(ValueError, match=f"Nothing can be ranked by {key}: neither a high nor a low value is better"):
        rankable(key)


def test_ranking_by_an_unknown_metric_names_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"Unknown metric key 'pm/tvv'. Did you mean 'pm/tv'\?"):
        rankable("pm/tvv")
