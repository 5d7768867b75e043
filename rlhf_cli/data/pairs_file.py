"""A dataset's pairs as a file that dataset=preferences reads back as they are."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_cli.config.schema import DatasetConfig, SplitConfig, SurveyConfig
from rlhf_cli.data.rows import Pair, Ranking
from rlhf_cli.data.survey import load_survey
from rlhf_cli.data.text import usable_rows
from rlhf_cli.errors import RunError
from rlhf_cli.store import make_folder

SUFFIX = ".jsonl"


def write_pairs(cfg: DatasetConfig, file: Path) -> tuple[int, dict[str, int]]:
    """Return how many rows were written, one JSON object a line, and how many were left out, by reason.

    All splits together, in the order of the dataset: prompt, chosen, rejected, and label and margin where they say
    something; of a ranking prompt and responses. The file appears whole or not at all.

    Args:
        file: what is made; its name ends in .jsonl.

    Raises:
        RunError: the file exists, has another ending, or cannot be written.
        UserError: as `data.load` says.
    """
    if file.suffix != SUFFIX:
        raise RunError(f"--out={file} is no {SUFFIX} file", "pairs are written as JSON lines", f"name it FILE{SUFFIX}")
    if os.path.lexists(file):
        raise RunError(f"--out={file} exists", "it is not overwritten", "choose another name, or remove it")
    make_folder(file.parent, "--out")
    dropped: Counter[str] = Counter()
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with unfinished.open("w", encoding="utf-8") as lines:
            for row in _rows(cfg, dropped):
                lines.write(json.dumps(_columns(row), ensure_ascii=False) + "\n")
                count += 1
        unfinished.replace(file)
    except OSError as error:
        raise RunError(f"--out={file} cannot be written", error.strerror or str(error), "choose another") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return count, dict(dropped)


def _rows(cfg: DatasetConfig, dropped: Counter[str]) -> Iterable[Pair | Ranking]:
    if isinstance(cfg, SurveyConfig):
        world = load_survey(cfg)
        return [*world.reward_pairs, *world.heldout_pairs]
    assert isinstance(cfg, SplitConfig)
    return usable_rows(cfg, dropped)


def _columns(row: Pair | Ranking) -> dict[str, Any]:
    if isinstance(row, Ranking):
        return {"prompt": row.prompt, "responses": row.responses}
    columns: dict[str, Any] = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
    judged = {"label": (row.label, 1.0), "margin": (row.margin, 0.0)}
    return columns | {name: value for name, (value, usual) in judged.items() if value != usual}
