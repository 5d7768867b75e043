"""Preferences from a local .jsonl or .jsonl.gz file: checked row by row (text_row.py), then split by prompt."""

from __future__ import annotations

import difflib
import gzip
import json
import random
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.config.schema import TextConfig
from rlhf_cli.data.rows import Demonstration, Pair, PreferenceData, Ranking
from rlhf_cli.data.text_row import is_ranking, read_row
from rlhf_cli.errors import ConfigError, DataError


def load_text(cfg: TextConfig) -> PreferenceData:
    """Return the checked preference rows of `cfg.path`, split by prompt: no prompt is in two splits.

    `hh_rlhf` rows hold two dialogues that share all but the last Assistant turn. `preferences` rows hold prompt, chosen
    and rejected, and may hold label and margin (see `Pair`), or they all hold prompt and responses, best first.
    Responses are stripped; rows that carry no preference are left out and counted in `dropped`. A pair with label 0.5
    is there for the reward model; elsewhere it would need a direction, and is counted as `no_direction`.

    Raises:
        DataError: the file is missing, empty or not JSON lines; a row lacks a column or holds something other than
            text, or a label or margin out of range; pairs and rankings are mixed; no row is usable; too few prompts
            for the splits, or a split without a direction.
        ConfigError: sft_fraction + rm_fraction leave nothing for alignment.
    """
    if cfg.sft_fraction + cfg.rm_fraction >= 1:
        total = cfg.sft_fraction + cfg.rm_fraction
        raise ConfigError(
            f"dataset.sft_fraction + dataset.rm_fraction = {total:g}",
            "their sum must stay below 1, because the rest of the prompts is for alignment",
            "lower one of them",
        )
    path = existing_file(cfg.path)
    rows, dropped = _usable(path, cfg.source)
    if not rows:
        if not dropped:
            raise DataError(f"{path} is empty", "", "give a file with one JSON object a line")
        counts = ", ".join(f"{reason} {count}" for reason, count in dropped.items())
        raise DataError(
            f"no usable row in {path}",
            f"all {dropped.total()} rows were left out: {counts}",
            f"check that the rows are in the form of dataset={cfg.source}",
        )
    data = _split(rows, cfg)
    data.dropped = dict(dropped) | data.dropped
    return data


def _usable(path: Path, source: str) -> tuple[list[Pair | Ranking], Counter[str]]:
    """Return the usable rows, all pairs or all rankings, and how many others there were, by reason.

    Raises:
        DataError: a row is malformed, or is a ranking among pairs or the other way round.
    """
    rows: list[Pair | Ranking] = []
    dropped: Counter[str] = Counter()
    ranked: bool | None = None
    for number, row in _rows(path):
        where = f"{path}, line {number}"
        found = read_row(row, source, where=where)
        before, ranked = ranked, source == "preferences" and is_ranking(row)
        if before not in (None, ranked):
            kinds = ("a ranking", "pairs") if ranked else ("a pair", "rankings")
            what = f"{where}: {kinds[0]} in a file of {kinds[1]}"
            raise DataError(what, "the rows of one file are all pairs or all rankings", "make it two files")
        if isinstance(found, str):
            dropped[found] += 1
            continue
        rows.append(found)
        if isinstance(found, Ranking) and (repeated := len(row["responses"]) - len(found.responses)):
            dropped["duplicate_in_ranking"] += repeated
    return rows, dropped


def existing_file(name: str | None) -> Path:
    if not name:
        raise DataError(
            "dataset.path is not set", "this dataset reads a local file", "add dataset.path=FILE.jsonl[.gz]"
        )
    path = Path(name).expanduser()
    if path.is_dir():
        raise DataError(f"dataset.path={name} is a folder", "", "give a .jsonl or .jsonl.gz file")
    if not path.is_file():
        if not path.parent.is_dir():
            raise DataError(
                f"dataset.path={name} does not exist", f"there is no folder {path.parent}", "correct the path"
            )
        names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file())
        near = difflib.get_close_matches(path.name, names, n=1)
        todo = f"did you mean {path.parent / near[0]}?" if near else "correct the path"
        raise DataError(f"dataset.path={name} does not exist", "", todo)
    return path


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) for every line that is not blank."""
    compressed = path.suffix == ".gz"
    number = 0
    try:
        with gzip.open(path) if compressed else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _parse(line, where=f"{path}, line {number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be decompressed after line {number}",
            f"it is not a whole gzip file ({error})",
            "fetch it again, or remove .gz from its name if it is plain text",
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read", error.strerror or str(error), "check its permissions") from error


def _parse(line: bytes, *, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 text", "", "convert the file to UTF-8, or name it .gz if it is compressed"
        ) from error
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise DataError(f"{where}: not JSON ({reason})", "", "write one JSON object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON {type(row).__name__}, not an object", "", "write one JSON object a line")
    return row


def _split(rows: Sequence[Pair | Ranking], cfg: TextConfig) -> PreferenceData:
    """Return the rows split by prompt: held out, SFT, reward model, alignment. File order is kept in each."""
    parts = _parts(rows, cfg)
    directed = {name: [row for row in part if _has_direction(row)] for name, part in parts.items() if name != "rm"}
    for name, part in directed.items():
        if not part:
            raise DataError(
                f"every row of the {name} split of {cfg.path} has label 0.5",
                "demonstrations, pairwise algorithms and held-out measures need to know which response is better",
                "give it rows with other labels, or change dataset.split_seed",
            )
    undirected = sum(len(parts[name]) - len(part) for name, part in directed.items())
    return PreferenceData(
        demonstrations=[Demonstration(row.prompt, _best(row)) for row in directed["sft"]],
        reward_pairs=_pairs(parts["rm"]),
        policy_pairs=_pairs(directed["align"]),
        prompts=list(dict.fromkeys(row.prompt for row in parts["align"])),
        heldout_pairs=_pairs(directed["heldout"]),
        dropped={"no_direction": undirected} if undirected else {},
        reward_rankings=[row for row in parts["rm"] if isinstance(row, Ranking)],
    )


def _parts(rows: Sequence[Pair | Ranking], cfg: TextConfig) -> dict[str, list[Pair | Ranking]]:
    # Sorted first, so that the split depends on the prompts and the seed, not on the order of the rows.
    prompts = sorted({row.prompt for row in rows})
    random.Random(cfg.split_seed).shuffle(prompts)
    heldout = max(1, round(cfg.heldout_fraction * len(prompts)))
    training = len(prompts) - heldout
    sft, rm = (max(1, round(fraction * training)) for fraction in (cfg.sft_fraction, cfg.rm_fraction))
    if training - sft - rm < 1:
        raise DataError(
            f"{cfg.path} has {len(prompts)} usable prompts",
            f"held-out {heldout}, SFT {sft} and reward model {rm} leave none for alignment",
            "give more prompts, or lower dataset.heldout_fraction, sft_fraction or rm_fraction",
        )
    sizes = {"heldout": heldout, "sft": sft, "rm": rm, "align": training - sft - rm}
    names = (name for name, size in sizes.items() for _ in range(size))
    split_of = dict(zip(prompts, names, strict=True))
    parts: dict[str, list[Pair | Ranking]] = {name: [] for name in sizes}
    for row in rows:
        parts[split_of[row.prompt]].append(row)
    return parts


def _pairs(rows: Sequence[Pair | Ranking]) -> list[Pair]:
    return [pair for row in rows for pair in (row.pairs() if isinstance(row, Ranking) else [row])]


def _has_direction(row: Pair | Ranking) -> bool:
    return isinstance(row, Ranking) or row.label > 0.5


def _best(row: Pair | Ranking) -> str:
    return row.responses[0] if isinstance(row, Ranking) else row.chosen
