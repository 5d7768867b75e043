"""A finished run of align, train-sft or train-rm, read back from its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf_cli.config.compose import RECORD_FILE
from rlhf_cli.data.dialogue import ASSISTANT
from rlhf_cli.errors import RunError
from rlhf_cli.report.card import Form
from rlhf_cli.store import read_json

MARKER = "rlhf_export.json"  # of an export: what it was made from, and how its prompts are written
COMMANDS = ("align", "train-rm", "train-sft")
TODO = "name a folder that rlhf align, train-sft or train-rm wrote"


@dataclass(frozen=True)
class FinishedRun:
    """What a run folder holds besides its models.

    Args:
        folder: the run folder.
        command: align, train-rm or train-sft.
        config: in force, as plain containers.
        manifest: identity, versions, device.
        overrides: of the command line.
        config_dir: the user's own config directory, or None.
        metrics: final ones, empty where there are none.
    """

    folder: Path
    command: str
    config: dict[str, Any]
    manifest: dict[str, Any]
    overrides: list[str]
    config_dir: str | None
    metrics: dict[str, float | None]


def read_run(folder: Path) -> FinishedRun:
    """Return the finished run in `folder`.

    Raises:
        RunError: it is no run folder, the run has not finished, trains no model, or its record is damaged.
    """
    status, config = read_json(folder / "status.json"), read_config(folder)
    if status is None or config is None:
        why = "there is no such folder" if not folder.is_dir() else "config.yaml and status.json are not both there"
        raise RunError(f"{folder} is not a run folder", why, TODO)
    record, manifest = read_json(folder / RECORD_FILE), read_json(folder / "manifest.json")
    if record is None or manifest is None or "command" not in record:
        raise RunError(f"{folder} is not whole", f"{RECORD_FILE} or manifest.json is missing or damaged", TODO)
    if record["command"] not in COMMANDS:
        raise RunError(f"{folder} holds no model", f"rlhf {record['command']} trains none", TODO)
    if status.get("state") != "finished":
        what = f"the run in {folder} has not finished: its state is {status.get('state')}"
        raise RunError(what, "", "run its command again to go on with it")
    return FinishedRun(
        folder,
        str(record["command"]),
        config,
        manifest,
        [str(text) for text in record.get("overrides") or []],
        record.get("config_dir"),
        read_json(folder / "metrics.json") or {},
    )


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the config of the run in `folder`, None where there is none, or it is damaged."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return config if isinstance(config, dict) and "dataset" in config else None


def model_of(run: FinishedRun, checkpoint: str) -> Path:
    """Return the model folder of a checkpoint, last or best.

    Raises:
        RunError: the run has none.
    """
    folder = run.folder / ("model" if checkpoint == "last" else "best")
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return folder
    if checkpoint == "best":
        why = "a policy is kept as the best when it is measured while it trains (rlhf align)"
        raise RunError(f"{run.folder} has no best checkpoint", why, "leave out --checkpoint")
    raise RunError(f"{run.folder} has no model", f"{folder} is missing or empty", "run its command again")


def prompt_form(config: dict[str, Any], tokenizer: Any, folder: Path) -> Form:
    """Return how prompts are written for a policy: in its chat template, as dialogues, or as they are.

    Args:
        config: of the run that trained it, empty where there is none.
        tokenizer: the policy's.
        folder: of the run, or of an export.
    """
    if tokenizer.chat_template:
        return "chat"
    return "dialogue" if on_dialogues(config, folder) else "text"


def on_dialogues(config: dict[str, Any], folder: Path) -> bool:
    """Return whether a policy was trained on conversations: its data, or the prompts of its completions, say so."""
    if config.get("dataset", {}).get("source") == "hh_rlhf":
        return True
    if (made := read_json(folder / MARKER)) is not None:
        return made.get("prompts") == "dialogue"
    try:
        with (folder / "completions.jsonl").open(encoding="utf-8") as file:
            return str(json.loads(file.readline())["prompt"]).endswith(ASSISTANT)
    except (OSError, ValueError, KeyError, TypeError):
        return False
