"""The glossary's entries: the tables alone, one sentence a key. How keys are read: metrics/glossary.py.

Keys are families (`pm/`, `gold/` … share their distances) plus plain keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Direction = Literal["lower", "higher", "none"]


@dataclass(frozen=True)
class Metric:
    """What a metric key means.

    Args:
        unit: of the number ("" for a pure number).
        meaning: one sentence, without the final full stop.
        better: the direction of improvement; "none" where neither is better in itself.
    """

    unit: str
    meaning: str
    better: Direction


# The distribution each family of distances measures the policy against.
TARGETS = {
    "pm": "the reward model's preferences",
    "pm_beta": "the preferences tempered by beta",
    "gold": "the people's shares",
    "optimum": "the algorithm's own optimum",
}


def _distances(family: str, target: str) -> dict[str, Metric]:
    """Return the metrics that compare the policy with one target distribution."""
    return {
        f"{family}/tv": Metric("share", f"Total variation from {target}", "lower"),
        f"{family}/kl_rm_policy": Metric("nats", f"Forward KL from {target}; harsh on lost answers", "lower"),
        f"{family}/kl_policy_rm": Metric("nats", f"Reverse KL from {target}, on the answer set", "lower"),
        f"{family}/minority_mass": Metric(
            "share", "Policy mass on all answers but the favourite, see its target", "none"
        ),
        f"{family}/minority_mass_target": Metric(
            "share", f"Mass of all answers but the favourite under {target}", "none"
        ),
        f"{family}/minority_coverage": Metric(
            "share",
            f"Share of the mass of all answers but the favourite under {target} that the policy keeps",
            "higher",
        ),
        f"{family}/divergence": Metric(
            "nats^2",
            f"Mean squared gap of reward and log-prob differences, against {target}; zero after collapse too",
            "lower",
        ),
    }


# Why rows are left out (data/*_row.py, data/encode.py).
DROPPED = {
    "no_shared_prompt": "the dialogues have no Assistant turn, or the texts no common start",
    "differ_before_last_turn": "the dialogues differ before their last turn",
    "last_turn_not_assistant": "the last turn is not the assistant's",
    "roles_out_of_turn": "user and assistant do not speak in turns, or somebody else speaks",
    "marker_in_turn": "a message contains Human: or Assistant: as the marker of a turn",
    "no_choice": "nobody chose",
    "empty_prompt": "the prompt is empty",
    "empty_response": "a response is empty",
    "chosen_equals_rejected": "both responses are the same",
    "prompt_too_long": "the prompt is longer than dataset.max_prompt_tokens",
    "equal_after_truncation": "both responses are the same once cut",
    "no_direction": "neither response is preferred (label 0.5)",
    "duplicate_in_ranking": "a response stands twice in its ranking",
    "too_few_responses": "a ranking has fewer than two different responses",
}


def _lengths() -> dict[str, Metric]:
    """Return what length explains of the reward, as it is read and with and without length calibration."""
    of = {"": "the reward as it is read", "_raw": "the reward before length calibration"}
    of["_calibrated"] = "the reward after length calibration"
    found = {}
    for suffix, what in of.items():
        correlation = f"Correlation of {what} with length, within pairs (both orders of each)"
        slope = f"What one token more adds to {what}, within pairs (least squares through the origin)"
        found[f"rm/length_correlation{suffix}"] = Metric("", correlation, "none")
        found[f"rm/length_slope{suffix}"] = Metric("nats/token", slope, "none")
    return found


# The trust report of a reward model (measure/trust.py), on held-out pairs.
TRUST = {
    "rm/accuracy": Metric("share", "Pairs that the reward model orders as people did; a tie is one half", "higher"),
    "rm/log_loss": Metric(
        "nats", "Cross-entropy of sigma(reward difference) and the labels; log 2 knows nothing", "lower"
    ),
    "rm/brier": Metric("", "Mean squared gap of sigma(reward difference) and the labels; 1/4 knows nothing", "lower"),
    "rm/ece": Metric("share", "Expected calibration error: how far confidence is from the share of wins", "lower"),
    "rm/margin/mean": Metric("nats", "Mean margin, reward of the preferred response minus the other", "none"),
    "rm/margin/std": Metric("nats", "Standard deviation of the margin over pairs", "none"),
    **{
        f"rm/margin/q{percent:02d}": Metric("nats", f"Margin that {percent} % of the pairs stay below", "none")
        for percent in (5, 25, 50, 75, 95)
    },
    "rm/bound/mean": Metric("nats", "Mean prior bound delta* of the pairs that have one", "none"),
    "rm/bound/half": Metric("nats", "Mean delta*/2, the margin at which the prior-constrained loss is least", "none"),
    "rm/beyond_bound": Metric("share", "Pairs with a prior bound whose margin is beyond delta*", "lower"),
    "rm/beyond_half": Metric("share", "Pairs with a prior bound whose margin is beyond delta*/2", "none"),
    **_lengths(),
    "rm/length_correlation_labels": Metric("", "Correlation of the labels with length: what people favour", "none"),
    **{
        f"rm/accuracy_{name}": Metric("share", f"Accuracy on pairs whose preferred response is {which}", "higher")
        for name, which in (
            ("longer_won", "the longer one"),
            ("shorter_won", "the shorter one"),
            ("equal_length", "as long as the other"),
        )
    },
    "rm/gold_spearman": Metric(
        "", "Rank correlation (Spearman) of reward and gold over a question's answers", "higher"
    ),
    "rm/gold_kendall": Metric("", "Kendall's tau-b of reward and gold over a question's answers", "higher"),
    "rm/gold_tv": Metric("share", "Total variation of softmax(reward) from softmax(gold) on the answers", "lower"),
    "rm/score_dataset/mean": Metric("nats", "Mean reward of held-out dataset responses", "none"),
    "rm/score_dataset/std": Metric("nats", "Standard deviation of the reward over dataset responses", "none"),
    "rm/score_policy/mean": Metric("nats", "Mean reward of policy samples", "none"),
    "rm/score_policy/std": Metric("nats", "Standard deviation of the reward over policy samples", "none"),
    "rm/score_policy_best/mean": Metric("nats", "Mean over prompts of the best sample's reward", "none"),
    "rm/score_policy_beyond": Metric(
        "share", "Policy samples that score above the 99th percentile of dataset responses", "none"
    ),
    "rm/score_shift": Metric(
        "", "Mean reward of policy samples minus dataset responses, in standard deviations of the latter", "none"
    ),
    # Several members (WARM)
    "rm/disagreement": Metric(
        "nats", "Standard deviation over members of a pair's reward difference, mean over pairs", "none"
    ),
    "rm/member_flip": Metric("share", "Pairs that not all members order alike", "none"),
    **{
        f"rm/member_accuracy/{name}": Metric("share", f"Accuracy, {name} over members", "higher")
        for name in ("mean", "min", "max")
    },
    "rm/member_log_loss/mean": Metric("nats", "Log-loss, mean over members", "lower"),
    "rm/member_ece/mean": Metric("share", "Expected calibration error, mean over members", "lower"),
    "rm/ensemble_accuracy": Metric("share", "Accuracy of the mean of the members' rewards", "higher"),
    "rm/ensemble_log_loss": Metric("nats", "Log-loss of the mean of the members' rewards", "lower"),
    "rm/ensemble_ece": Metric("share", "Expected calibration error of the mean of the members' rewards", "lower"),
}


def _bounded(prefix: str) -> dict[str, Metric]:
    """Return what is logged of the prior bound while training: of reward differences (rm/) or DPO logits."""
    return {
        f"{prefix}bound": Metric("nats", "Mean prior bound delta* of the pairs of the batch", "none"),
        f"{prefix}bound_half": Metric("nats", "Mean delta*/2 of the pairs of the batch", "none"),
        f"{prefix}beyond_bound": Metric("share", "Pairs of the batch whose margin is beyond delta*", "lower"),
        f"{prefix}bounded_margin": Metric("nats", "Mean margin of the pairs of the batch that have a bound", "none"),
    }


# The samples of one prompt, held against each other (measure/diversity.py).
DIVERSITY = {
    **{
        f"distinct_{n}": Metric("share", f"Different {n}-grams per {n}-gram over the samples of a prompt", "higher")
        for n in (1, 2)
    },
    "self_bleu": Metric("share", "Mean BLEU of a sample against the other samples of its prompt", "lower"),
    "repetition": Metric("share", "3-grams of a response that stood in it before", "lower"),
}

JUDGES = {"rm": "the reward model", "gold": "the gold reward", "llm": "a language model"}


def _won(judge: str) -> str:
    """Return the meaning of a win rate."""
    return f"Samples that {judge} prefers to the reference's sample of the same prompt and number; a tie is one half"


GLOSSARY: dict[str, Metric] = {
    **{key: metric for family, target in TARGETS.items() for key, metric in _distances(family, target).items()},
    "gold/reward": Metric(
        "nats",
        "Mean gold reward: the log of the people's share of an answer, dataset.gold_offset_reward off the set",
        "higher",
    ),
    "pm/offset_mass": Metric("share", "Policy mass on text that is not a valid answer", "lower"),
    "pm/rank_correlation": Metric(
        "", "Rank correlation (Spearman) of reward and log-prob over a prompt's responses", "higher"
    ),
    "pm/pair_tv": Metric(
        "share",
        "Mean gap of reward model and policy in preference probability on held-out pairs; saturates on long text",
        "lower",
    ),
    "pm/pair_ece": Metric(
        "share", "Expected calibration error of the policy's preference probabilities on held-out pairs", "lower"
    ),
    "pm/pair_length_difference": Metric(
        "tokens", "Mean difference in length of the two responses of a held-out pair, without its sign", "none"
    ),
    "pool/size": Metric("responses", "Mean number of candidates in a prompt's pool", "none"),
    "pool/prompts": Metric("prompts", "Prompts that have a candidate pool", "none"),
    "optimum/kl": Metric(
        "nats", "KL(optimum || policy): divergence from the algorithm's own closed-form optimum", "lower"
    ),
    "optimum/offset_bound": Metric(
        "share", "Estimated mass that the open-vocabulary optimum itself puts off the answer set", "none"
    ),
    "optimum/divergence": Metric(
        "nats^2", "pm/divergence with the effective reference subtracted: the conditional form", "lower"
    ),
    # Responses
    "reward/mean": Metric("nats", "Mean reward, centred on chosen responses and clipped", "higher"),
    "reward/std": Metric("nats", "Standard deviation of the reward over responses", "none"),
    "reward/length_correlation": Metric(
        "", "Correlation of reward and length over the samples of a prompt (deviations from its means)", "none"
    ),
    "reward/clip_fraction": Metric("share", "Responses whose reward was clipped", "lower"),
    "score/mean": Metric("nats", "Mean raw score of the reward model, before centring and clipping", "none"),
    "score/std": Metric("nats", "Standard deviation of the raw scores of the reward model", "none"),
    "kl/per_token": Metric(
        "nats/token", "Exact KL(policy || reference) over the vocabulary, mean over response tokens", "none"
    ),
    "kl/sequence": Metric("nats", "KL(policy || reference) summed over a response", "none"),
    "entropy/per_token": Metric("nats/token", "Exact entropy over the vocabulary, mean over response tokens", "none"),
    "entropy/uniform": Metric("nats/token", "Entropy of the uniform distribution over the vocabulary", "none"),
    "length/mean": Metric("tokens", "Mean response length, end-of-sequence included", "none"),
    "eos_rate": Metric("share", "Responses that end by themselves within the token limit", "higher"),
    **DIVERSITY,
    **{f"win_rate/{judge}": Metric("share", _won(words), "higher") for judge, words in JUDGES.items()},
    "win_rate/llm_inconsistent": Metric(
        "share", "Pairs on which the language model contradicts itself when their order is swapped", "lower"
    ),
    "win_rate/llm_unreadable": Metric(
        "share", "Replies of the language model that end in no verdict; they count as ties", "lower"
    ),
    "guard/crossed": Metric(
        "bounds", "Bounds of the collapse guard that are crossed; at 0 the policy has not collapsed", "lower"
    ),
    "sampler/temperature": Metric("", "Temperature that the samples were drawn at, where it is not 1", "none"),
    "sampler/top_p": Metric("share", "Mass that the samples were drawn from (top-p), where it is not 1", "none"),
    "perplexity/chosen": Metric("", "Perplexity per token of held-out chosen responses", "lower"),
    "reference/mass_near_alpha": Metric(
        "share", "Response tokens whose reference probability is within a factor of two of alpha", "lower"
    ),
    # On-policy training
    "loss": Metric("", "The training loss", "lower"),
    "policy_loss": Metric("", "Clipped policy-gradient loss", "none"),
    "value_loss": Metric("nats^2", "Clipped squared error of the critic, times one half", "lower"),
    "explained_variance": Metric(
        "share", "Variance of the returns that the critic explains; below 0 it is worse than none", "higher"
    ),
    "clip_fraction": Metric("share", "Tokens whose probability ratio was clipped", "none"),
    "engine/ratio": Metric(
        "", "Mean of policy over engine probability of the sampled tokens; 1 where they agree", "none"
    ),
    "engine/max_difference": Metric(
        "nats", "Largest difference of the log-probs of training and engine, of a token of an update", "lower"
    ),
    "engine/capped": Metric("share", "Tokens whose importance weight was cut at generation.correction_cap", "lower"),
    "value_clip_fraction": Metric("share", "Tokens whose value was clipped", "none"),
    "cost/sequence": Metric(
        "nats", "The regulariser's cost of a response: log policy minus effective reference, summed", "none"
    ),
    "beta": Metric("", "Weight of the cost in force", "none"),
    "advantage/std": Metric("nats", "Standard deviation of the advantage", "none"),
    "learning_rate": Metric("", "Learning rate in force", "none"),
    "grad_norm": Metric("", "Norm of the gradient before clipping", "none"),
    # Pairwise training
    "dpo_loss": Metric("nats", "The DPO part of the loss", "lower"),
    "sft_term": Metric("nats", "The SFT term of the loss, before its weight", "lower"),
    "accuracy": Metric("share", "Pairs whose chosen response has the larger implicit reward", "higher"),
    "margin": Metric("nats", "Mean reward (a policy's: implicit) of chosen minus rejected", "higher"),
    "constraint_loss": Metric("nats", "The prior constraint's part of the loss", "lower"),
    **_bounded(""),
    "chosen_logps": Metric("nats", "Mean log-prob of chosen responses under the policy", "higher"),
    "rejected_logps": Metric("nats", "Mean log-prob of rejected responses under the policy", "none"),
    "chosen_logps_change": Metric(
        "nats", "Mean log-prob of chosen responses under policy minus reference; falls in plain DPO", "higher"
    ),
    # Earlier stages
    "sft/loss": Metric(
        "nats/token", "Cross-entropy of held-out or training demonstrations under the SFT policy", "lower"
    ),
    "rm/loss": Metric("nats", "Training loss of the reward model", "lower"),
    **_bounded("rm/"),
    **TRUST,
    "rm/negative_accuracy": Metric(
        "share", "Damaged responses that the reward model scores below the intact one", "higher"
    ),
    # Data
    "data/demonstrations": Metric("rows", "Demonstrations that the SFT policy learned from", "none"),
    "data/reward_pairs": Metric("rows", "Preference pairs that the reward model learned from", "none"),
    "data/policy_pairs": Metric("rows", "Preference pairs that pairwise alignment learns from", "none"),
    "data/prompts": Metric("prompts", "Prompts that on-policy alignment samples on", "none"),
    "data/heldout_pairs": Metric("rows", "Preference pairs that nothing was trained on", "none"),
    **{f"data/dropped/{key}": Metric("rows", f"Rows left out: {why}", "none") for key, why in DROPPED.items()},
    "data/dropped/response_truncated": Metric(
        "responses", "Responses cut to dataset.max_completion_tokens; their rows are kept", "none"
    ),
    # Bookkeeping
    "step": Metric("steps", "Optimizer step", "none"),
    "epoch": Metric("passes", "Passes over the data", "none"),
    "seconds": Metric("s", "Wall-clock time", "none"),
}
