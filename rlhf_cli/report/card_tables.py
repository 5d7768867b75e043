"""The tables of a model card: data, training settings, metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.metrics.glossary import DROPPED, describe
from rlhf_cli.report.card_names import DATA_FILES
from rlhf_cli.report.columns import better

Metrics = dict[str, float | None]
Rows = list[tuple[str, str]]

ROWS = {
    "data/demonstrations": "demonstrations for SFT",
    "data/reward_pairs": "pairs for the reward model",
    "data/policy_pairs": "pairs for alignment",
    "data/prompts": "prompts for alignment",
    "data/heldout_pairs": "held-out pairs",
}
SETTINGS = {
    "batch_size": "batch size",
    "learning_rate": "learning rate",
    "critic_learning_rate": "critic's learning rate",
    "lr_scheduler": "schedule",
    "warmup_fraction": "warm-up, share of steps",
    "adam_beta2": "Adam β2",
    "weight_decay": "weight decay",
    "max_grad_norm": "gradient norm, at most",
}
FACTOR = "learning_rate_factor"


@dataclass(frozen=True)
class Stage:
    """One stage of training: its title and its block of the config."""

    title: str
    block: dict[str, Any]


@dataclass(frozen=True)
class MetricTable:
    """Headers, rows of cells, and what is said below."""

    headers: list[str]
    rows: list[list[str]]
    note: str


def data_rows(dataset: dict[str, Any], metrics: Metrics, digest: str | None) -> Rows:
    """Return what the data are, how they were split and what was left out, name and value each.

    Args:
        dataset: that block of the config, its path as it may be named in public.
        metrics: final ones; they hold the counts.
        digest: sha256 of local data, NAME@COMMIT of the Hub's, or None.
    """
    path = dataset.get("path")
    found: Rows = [("dataset", f"`{dataset['name']}`")]
    if dataset["source"] == "survey":
        found.append(("questions", f"{dataset['questions']}, generated, seed {dataset['seed']}"))
    if dataset.get("parts"):
        weighted = zip(dataset["parts"], dataset["weights"], strict=True)
        found.append(("mixture", ", ".join(f"`{part}` × {weight:g}" for part, weight in weighted)))
    if path is not None:
        found.append(("from", f"`{path}`{_version(digest)}"))
        if Path(path).suffix not in DATA_FILES:  # a file is one split
            found += [(key, f"`{dataset[key]}`") for key in ("subset", "revision", "split") if dataset.get(key)]
    if dataset.get("max_rows"):
        found.append(("rows read, at most", f"{dataset['max_rows']:,}"))
    if "heldout_fraction" in dataset:
        sft, rm, held = (dataset[f"{name}_fraction"] for name in ("sft", "rm", "heldout"))
        shares = f"{held:.0%} held out; of the rest {sft:.0%} SFT, {rm:.0%} reward model, {1 - sft - rm:.0%} alignment"
        found.append(("splits", f"by prompt, seed {dataset['split_seed']}: {shares}".replace("%", " %")))
    found += [(name, f"{value:,.0f}") for key, name in ROWS.items() if (value := metrics.get(key)) is not None]
    longest = f"prompt {dataset['max_prompt_tokens']}, response {dataset['max_completion_tokens']}"
    return [*found, ("longest, in tokens", longest), *_left_out(metrics)]


def _version(digest: str | None) -> str:
    """Return which data they are, as the end of a cell."""
    if digest is None:
        return ""
    _, at, commit = digest.rpartition("@")
    return f", commit `{commit}`" if at else f", sha256 `{digest[:16]}…`"


def _left_out(metrics: Metrics) -> Rows:
    """Return how many rows were left out or cut, by reason."""
    prefix = "data/dropped/"
    counts = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix) and value}
    cut = counts.pop("response_truncated", None)
    dropped: Rows = [(f"left out: {DROPPED.get(key, key)}", f"{value:,.0f}") for key, value in counts.items()]
    return [*dropped, *([("responses cut to that length", f"{cut:,.0f}")] if cut else [])]


def training_stages(command: str, config: dict[str, Any]) -> list[Stage]:
    """Return the stages that led to the model, in order."""
    trainer = config["trainer"]
    stages = [Stage("SFT", trainer["sft"])] if command != "train-rm" or starts_from_sft(config) else []
    if command != "train-sft" and config["reward"]["name"] != "gold":
        stages.append(Stage("reward model", trainer["rm"]))
    if command == "align":
        online = "advantage" in config["algo"]
        stages.append(Stage(f"alignment (`{config['algo']['name']}`)", trainer["online" if online else "pairwise"]))
    return stages


def starts_from_sft(config: dict[str, Any]) -> bool:
    """Return whether the reward model starts from the SFT policy; else it starts from a base."""
    model = config["model"]
    return not model.get("reward_path") and model.get("reward_start", "sft") == "sft"


def training_rows(command: str, config: dict[str, Any]) -> list[list[str]]:
    """Return one row a setting, its name and its value in each stage."""
    stages = training_stages(command, config)
    rows = [["length", *(_length(stage.block) for stage in stages)]]
    for key, name in SETTINGS.items():
        if any(key in stage.block for stage in stages):
            rows.append([name, *(_value(stage.block[key]) if key in stage.block else "–" for stage in stages)])
    return rows


def _length(block: dict[str, Any]) -> str:
    if block.get("max_steps") == 0:  # of SFT: the model it began with is an SFT policy
        return "none, had its SFT"
    if block.get("max_steps") is not None:
        return f"{block['max_steps']:,} steps"
    return f"{block['epochs']:g} epochs"


def setting_rows(command: str, config: dict[str, Any]) -> Rows:
    """Return the settings that no stage's optimiser has, name and value each."""
    found: Rows = []
    if command == "align":
        found.append(("algorithm", _listed(config["algo"])))
    if command != "train-sft":
        found.append(("reward", _listed(config["reward"])))
    # Learning rates stand in the table as they were used, so the factor in them would mislead.
    peft = {key: value for key, value in (config.get("peft") or {"name": "none"}).items() if key != FACTOR}
    found.append(("trained weights", "all" if peft["name"] == "none" else _listed(peft)))
    if command == "align":
        generation = config["generation"]
        found.append(("sampling", f"temperature {generation['temperature']:g}, top-p {generation['top_p']:g}"))
    return [*found, ("seed", str(config["seed"]))]


def _listed(block: dict[str, Any]) -> str:
    """Return a block of the config in one line of code."""
    name = block.get("name", "")
    pairs = [
        f"{key}={{{_listed(value).strip('`')}}}" if isinstance(value, dict) else f"{key}={_value(value)}"
        for key, value in block.items()
        if key != "name" and not (isinstance(value, dict) and value.get("name") == "none")
    ]
    return f"`{' '.join([str(name), *pairs]).strip()}`"


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def metric_table(metrics: Metrics, shown: Sequence[str], checkpoint: str, source: str) -> MetricTable:
    """Return the metrics that matter of the model, beside the reference's where there are any.

    Args:
        metrics: of the run: plain keys are of its last policy, `best/…` of its best.
        shown: keys without such prefixes, in order.
        checkpoint: last or best.
        source: of the dataset: its prompts are what intervals are over.
    """
    prefix = "best/" if checkpoint == "best" else ""
    keys = [key for key in shown if metrics.get(prefix + key) is not None]
    beside = any(metrics.get(f"reference/{key}") is not None for key in keys)
    headers = ["metric", "value", "95 % interval", *(["reference"] if beside else []), "meaning"]
    rows = []
    for key in keys:
        low, high, worst = (metrics.get(f"{prefix}{key}{end}") for end in ("/lo", "/hi", "_max"))
        value = _number(metrics[prefix + key]) + (f" (worst {_number(worst)})" if worst is not None else "")
        span = f"{_number(low)} to {_number(high)}" if low is not None and high is not None else "–"
        reference = [_number(metrics.get(f"reference/{key}"))] if beside else []
        rows.append([f"`{key}`", value, span, *reference, _meaning(key)])
    return MetricTable(headers, rows, _note(metrics, checkpoint, source, beside, any(row[2] != "–" for row in rows)))


def _meaning(key: str) -> str:
    metric = describe(key)
    notes = ", ".join(part for part in (metric.unit, better(metric.better)) if part)
    text = f"{metric.meaning} [{notes}]" if notes else metric.meaning
    return text.replace("|", "\\|")  # it stands in a table


def _note(metrics: Metrics, checkpoint: str, source: str, beside: bool, intervals: bool) -> str:
    over = "the survey's questions" if source == "survey" else "held-out prompts"
    found = []
    if intervals:
        counts = [value for key, value in metrics.items() if key.endswith("/n") and value is not None]
        most = f" ({max(counts):,.0f} at most)" if counts else ""
        found.append(f"Intervals are over {over}{most}, of one training run: another seed may differ by more.")
    if beside:
        found.append("The reference is the SFT policy that it started from.")
    if "pool/size" in metrics:
        found.append("Distances are over a fixed pool of candidate responses to each prompt, not over all text.")
    if checkpoint == "best":
        found.append("This is the best checkpoint, chosen by the first of these numbers, so they flatter it.")
    return " ".join(found)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"
