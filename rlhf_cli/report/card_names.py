"""How a card names models, data and the command: places on the machine of the run are cut to their last part."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
DATA_FILES = {".jsonl", ".json", ".csv", ".parquet", ".gz"}
# Where a run and its store lie, and who follows it, is nobody's business and changes nothing.
PRIVATE = re.compile(r"\+{0,2}~?(run_dir|store_dir|tracker(\..*)?)(=|$)")
LOCAL_PATH = re.compile(r"""(?<=')[~.]*/[^']+|(?<=")[~.]*/[^"]+|(?<![\w.:/-])[~.]*/[^\s,'"\[\]{}]+""")
SPECIAL = set('"$`\\!')  # between double quotes a shell reads these


def on_hub(given: str | None, local: Collection[str] = ()) -> bool:
    """Return whether a model or dataset is named as the Hub names it.

    Args:
        given: a name or a path, or None.
        local: names that are files or folders here, though they look like the Hub's.
    """
    if given is None or given in local or given.startswith((".", "~")) or not HUB_NAME.fullmatch(given):
        return False
    return Path(given).suffix not in DATA_FILES


def public(given: str, local: Collection[str] = ()) -> str:
    """Return how a model or data file may be named in public: a local one by its last part."""
    return given if on_hub(given, local) else Path(given).name


def without_places(value: Any, local: Collection[str] = ()) -> Any:
    """Return a value of a config, or a block of it, with local paths cut to their last part."""
    if isinstance(value, dict):
        return {key: without_places(item, local) for key, item in value.items()}
    if isinstance(value, list):
        return [without_places(item, local) for item in value]
    return public(value, local) if isinstance(value, str) and "/" in value else value


def command_line(command: str, overrides: Sequence[str], config_dir: str | None, local: Collection[str] = ()) -> str:
    """Return the command that made a run; places on its machine are left out, paths keep their last part."""
    kept = [_without_paths(text, local) for text in overrides if not PRIVATE.match(text)]
    own = [] if config_dir is None else ["--config-dir", Path(config_dir).name]
    return " ".join(map(_quoted, ["rlhf", command, *kept, *own]))


def _without_paths(text: str, local: Collection[str]) -> str:
    text = LOCAL_PATH.sub(lambda match: Path(match[0]).name, text)
    for name in local:
        text = re.sub(rf"(?<![\w./-]){re.escape(name)}(?![\w./-])", Path(name).name, text)
    return text


def _quoted(text: str) -> str:
    """Return an argument for a shell; one with single quotes, as Hydra wants them, stays readable."""
    return f'"{text}"' if "'" in text and not SPECIAL & set(text) else shlex.quote(text)
