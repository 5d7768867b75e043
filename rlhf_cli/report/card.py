"""The model card of an exported run: what it is, how to use it, how it was made, what was measured, its limits."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any, Literal

import yaml

from rlhf_cli.report import methods
from rlhf_cli.report.card_limits import limits
from rlhf_cli.report.card_names import command_line, on_hub, public, without_places
from rlhf_cli.report.card_tables import (
    data_rows,
    metric_table,
    setting_rows,
    starts_from_sft,
    training_rows,
    training_stages,
)

TEMPLATE = "model_card.md.j2"
SURVEY_PROMPT, DIALOGUE_PROMPT = "Which season do you like best?", "\\n\\nHuman: How do I make tea?\\n\\nAssistant:"
CENTRE = "reward.json"  # the mean score of chosen training responses
PROMPT = "How do I make tea?"

Form = Literal["text", "dialogue", "chat"]


@dataclass(frozen=True)
class Facts:
    """What a card is written from.

    Args:
        name: the title.
        place: what `from_pretrained` is given: a repository of the Hub, or a folder.
        command: align, train-rm or train-sft.
        config: the run's, as plain containers.
        metrics: the run's final ones.
        shown: the metric keys that matter, in order.
        checkpoint: last or best.
        overrides: of the command line.
        config_dir: the user's own config directory, or None.
        versions: of packages.
        device: the run's, in words.
        dtype: of the weights.
        form: how prompts are written.
        warnings: what a reader of the metrics should not overlook.
        centre: of a reward model: the mean score of chosen responses.
        calibrated: a reward model with a length calibration.
        data_hash: of the data: sha256 of what is local, NAME@COMMIT of the Hub's, or None.
        base: of an adapter that is exported alone: the model it goes on.
        local: names in the config that are files or folders here, though they look like the Hub's.
    """

    name: str
    place: str
    command: str
    config: dict[str, Any]
    metrics: dict[str, float | None]
    shown: Sequence[str]
    checkpoint: str = "last"
    overrides: Sequence[str] = ()
    config_dir: str | None = None
    versions: dict[str, str | None] = field(default_factory=dict)
    device: str = ""
    dtype: str = "float32"
    form: Form = "text"
    warnings: Sequence[str] = ()
    centre: float | None = None
    calibrated: bool = False
    data_hash: str | None = None
    base: str | None = None
    local: Collection[str] = ()

    @property
    def is_reward(self) -> bool:
        """Whether the model scores responses; else it writes them."""
        return self.command == "train-rm"


def model_card(facts: Facts) -> str:
    """Return the card in Markdown, with the front matter that the Hub reads."""
    from jinja2 import Environment, StrictUndefined

    # Markdown, not HTML: nothing is escaped.
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    source = files("rlhf_cli.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    own = {"train-sft": lambda _: methods.sft(), "train-rm": methods.reward, "align": methods.alignment}
    named = front_matter(facts)
    config = without_places(facts.config, facts.local)
    facts = replace(facts, config=config, base=facts.base and public(facts.base))
    text = environment.from_string(source).render(
        facts=facts,
        arxiv=methods.ARXIV,
        front_matter=named,
        summary=summary(facts),
        usage=usage(facts),
        form=form_in_words(facts),
        method=own[facts.command](config),
        reward=methods.reward(config) if facts.command == "align" else None,
        reward_read=_reward_read(facts),
        data=data_rows(config["dataset"], facts.metrics, facts.data_hash),
        stages=training_stages(facts.command, config),
        training=training_rows(facts.command, config),
        settings=setting_rows(facts.command, {**config, "device": facts.device}),
        metrics=metric_table(facts.metrics, facts.shown, facts.checkpoint, config["dataset"]["source"]),
        limits=limits(facts),
        command=command_line(facts.command, facts.overrides, facts.config_dir, facts.local),
        versions=_versions(facts),
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def front_matter(facts: Facts) -> str:
    """Return the YAML that the Hub reads; a licence is left to whoever publishes the model."""
    config = facts.config
    base = facts.base or _base(facts)
    paths = [source.get("path") for source in config["dataset"].get("sources") or [config["dataset"]]]
    algorithm = config["algo"]["name"] if facts.command == "align" else facts.command.removeprefix("train-")
    found = {
        "library_name": "peft" if facts.base else "transformers",
        "pipeline_tag": "text-classification" if facts.is_reward else "text-generation",
        "base_model": [base] if on_hub(base, facts.local) else [],
        "base_model_relation": "adapter" if facts.base else "finetune",
        "datasets": list(dict.fromkeys(path for path in paths if on_hub(path, facts.local))),
        "tags": ["rlhf", "rlhf-cli", "reward-model" if facts.is_reward else algorithm.replace("_", "-")],
    }
    if not found["base_model"]:
        del found["base_model_relation"]
    return yaml.safe_dump({key: value for key, value in found.items() if value}, sort_keys=False, allow_unicode=True)


def summary(facts: Facts) -> str:
    """Return what the model is, in two or three sentences."""
    base, config = _base(facts), facts.config
    start = "A small OPT made from scratch" if base is None else f"`{base}`"
    name, survey = config["dataset"]["name"], config["dataset"]["source"] == "survey"
    on = "the survey world of `rlhf` (opinion questions with known answers)" if survey else f"`{name}`"
    tuned = f"{start}, fine-tuned on demonstrations"
    begun = tuned if starts_from_sft(config) else start
    what = {
        "train-sft": f"{tuned} of {on}.",
        "train-rm": f"A reward model: it scores a response to a prompt by the preferences of {on}. Made from: {begun}.",
        "align": f"{tuned} and then aligned with the preferences of {on} by `{config.get('algo', {}).get('name')}`.",
    }[facts.command]
    which = {"best": " It is the checkpoint with the least distance to the preferences while it trained."}
    adapter = f" This folder holds the adapter alone; it goes on `{facts.base}`." if facts.base else ""
    return f"{what}{which.get(facts.checkpoint, '')}{adapter}"


def usage(facts: Facts) -> str:
    """Return Python that loads the model and uses it once."""
    task = "SequenceClassification" if facts.is_reward else "CausalLM"
    library, kind = ("peft", "AutoPeftModelFor") if facts.base else ("transformers", "AutoModelFor")
    imports = ["import torch"] if facts.is_reward else []
    if facts.base:
        imports += [f"from peft import {kind}{task}", "from transformers import AutoTokenizer"]
    else:
        imports += [f"from {library} import {kind}{task}, AutoTokenizer"]
    labels = ", num_labels=1" if facts.base and facts.is_reward else ""
    place = json.dumps(facts.place, ensure_ascii=False)
    loading = [
        f"tokenizer = AutoTokenizer.from_pretrained({place})",
        f"model = {kind}{task}.from_pretrained({place}{labels})",
    ]
    lines = _scoring(facts) if facts.is_reward else _answering(facts)
    return "\n".join([*imports, "", *loading, "", *lines])


def _example(facts: Facts) -> str:
    """Return an example prompt as Python source, without its quotes."""
    if facts.config["dataset"]["source"] == "survey":
        return SURVEY_PROMPT
    return DIALOGUE_PROMPT if facts.form == "dialogue" else PROMPT


def _answering(facts: Facts) -> list[str]:
    if facts.form == "chat":
        given = [
            f'messages = [{{"role": "user", "content": "{PROMPT}"}}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    else:
        given = [f'inputs = tokenizer("{_example(facts)}", return_tensors="pt")']
    return [
        *given,
        'answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]',
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]


def _scoring(facts: Facts) -> list[str]:
    response = '"I like spring."' if facts.config["dataset"]["source"] == "survey" else '"Boil water first."'
    score = "model(torch.tensor([ids])).logits.item() - centre"
    centre = f"centre = {facts.centre or 0.0!r}  # {CENTRE}"
    if facts.form == "chat":
        return [
            f'messages, response = [{{"role": "user", "content": "{PROMPT}"}}], {response}',
            "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)",
            "text = prompt + response + tokenizer.eos_token",
            'ids = tokenizer(text, add_special_tokens=False)["input_ids"]',
            centre,
            f"print({score})",
        ]
    return [
        f'prompt, response = "{_example(facts)}", {response}',
        'ids = tokenizer(prompt + " " + response)["input_ids"] + [tokenizer.eos_token_id]',
        centre,
        f"print({score})",
    ]


def form_in_words(facts: Facts) -> str:
    """Return how prompts are written, and what the defaults of generation are."""
    sentences = {
        "text": "A prompt is plain text, after the tokenizer's own beginning-of-sequence token, if it has one.",
        "dialogue": "A prompt is a dialogue: each turn begins with a blank line and `Human:` or `Assistant:`, and "
        "it ends with `Assistant:`, as above.",
        "chat": "A prompt is a conversation in the tokenizer's chat template.",
    }
    if facts.is_reward:
        end = "The score is read at the end-of-sequence token, so it must be there."
        zero = "Subtracting the mean score of chosen training responses (`reward.json`) puts zero at a typical one."
        return f"{sentences[facts.form]} {end} {zero}"
    temperature = facts.config.get("generation", {}).get("temperature", 1.0)
    return (
        f"{sentences[facts.form]} By default it samples, at temperature {temperature:g} and from the whole vocabulary: "
        "the policy is that distribution, and greedy decoding shows its most likely answer alone."
    )


def _base(facts: Facts) -> str | None:
    """Return what the training began with, None where it was made from scratch."""
    model = facts.config["model"]
    if facts.is_reward and model.get("reward_path"):
        return str(model["reward_path"])
    return model["path"]


def _reward_read(facts: Facts) -> str:
    """Return how rewards are read, as the end of a sentence."""
    settings = facts.config.get("reward") or {}
    read = "; centred on chosen responses"
    read += f", clipped to ±{settings['clip']:g}" if settings.get("clip") else ""
    read += ", what length explains taken out" if settings.get("calibration") == "length" else ""
    pairwise = facts.command == "align" and "advantage" not in facts.config["algo"]
    return f"{read}. The method learns from pairs: the reward serves the metrics alone." if pairwise else f"{read}."


def _versions(facts: Facts) -> str:
    found = [f"{name} {version}" for name, version in facts.versions.items() if version]
    return f"With {', '.join(found)}; on {facts.device or 'cpu'}." if found else ""
