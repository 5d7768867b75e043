"""What a model card says to know before the model is trusted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_cli.report.card import Facts


def limits(facts: Facts) -> list[str]:
    """Return what limits the model, one item each."""
    found = [f"Its metrics say: {sentence}." for sentence in facts.warnings]
    found += _of_reward(facts) if facts.is_reward else _of_policy(facts)
    return [
        *found,
        *_of_data(facts.config["dataset"], made_here=facts.config["model"]["path"] is None),
        *_of_weights(facts),
        "It has not been tested for safety, nor on any task but the one above.",
        "No licence is stated: those of what it was made from apply. Add yours to the front matter.",
    ]


def _of_reward(facts: Facts) -> list[str]:
    settings = facts.config["reward"]
    found = [
        "Only differences between responses to one prompt mean something: σ of a difference is the estimated share of "
        "people who prefer the first."
    ]
    if facts.calibrated:
        found.append(
            "The score is as it was trained; `length_calibration.json` holds what length explains of it, and "
            "`rlhf` takes that out where `reward.calibration=length` asks for it."
        )
    if settings["name"] == "warm" and settings["combine"] == "predictions":
        found.append(
            "This is the model of averaged weights; the metrics are of its members' mean reward, and they are not here."
        )
    return found


def _of_policy(facts: Facts) -> list[str]:
    if facts.command == "train-sft":
        return ["It writes as its demonstrations do; nothing here says whether people prefer that."]
    gold = facts.config["dataset"]["source"] == "survey"
    judge = "`pm/…` measures against the preferences that the reward implies" + (
        ", `gold/…` against the people's own." if gold else "; nothing here was judged by people."
    )
    return [
        f"{judge} A policy matches no more than its reward model learned.",
        "Averages hide single prompts: one may be far off.",
    ]


def _of_data(dataset: dict[str, Any], *, made_here: bool) -> list[str]:
    prompt, response = dataset["max_prompt_tokens"], dataset["max_completion_tokens"]
    found = [f"Prompts were at most {prompt} tokens long in training, responses {response}: beyond is untested."]
    if dataset["source"] == "survey" and made_here:
        found.append("It knows the words of its survey questions and no others: a demonstration, not a chat model.")
    if dataset.get("closed_vocabulary"):
        found.append(
            "It was trained and measured with its vocabulary closed to the valid answers; loaded as above it is not, "
            "and may say anything."
        )
    return found


def _of_weights(facts: Facts) -> list[str]:
    adapted = (facts.config.get("peft") or {}).get("name", "none") != "none"
    if facts.base:
        return [f"The adapter means nothing on another model than `{facts.base}`."]
    merged = " LoRA adapters are merged into them." if adapted else ""
    return [f"Weights are {facts.dtype}.{merged}"]
