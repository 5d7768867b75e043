"""Preference pairs from a local .jsonl or .jsonl.gz file: checked row by row, then split by prompt."""

from __future__ import annotations

import difflib
import gzip
import json
import random
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_cli.config.schema import TextConfig
from rlhf_cli.data.rows import Demonstration, Pair, PreferenceData
from rlhf_cli.errors import ConfigError, DataError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
COLUMNS = {"hh_rlhf": ("chosen", "rejected"), "preferences": ("prompt", "chosen", "rejected")}


def load_text(cfg: TextConfig) -> PreferenceData:
    """Return the checked preference rows of `cfg.path`, split by prompt: no prompt is in two splits.

    `hh_rlhf` rows hold two dialogues that share all but the last Assistant turn; `preferences` rows hold prompt,
    chosen and rejected. Responses are stripped; rows that carry no preference are left out and counted in `dropped`.

    Raises:
        DataError: the file is missing, empty or not JSON lines; a row lacks a column or holds something other than
            text; no row is usable; too few prompts for the splits.
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
    dropped: Counter[str] = Counter()
    pairs = []
    for number, row in _rows(path):
        texts = _columns(row, cfg.source, where=f"{path}, line {number}")
        pair = _dialogue_pair(*texts) if cfg.source == "hh_rlhf" else _plain_pair(*texts)
        if isinstance(pair, Pair):
            pairs.append(pair)
        else:
            dropped[pair] += 1
    if not pairs:
        if not dropped:
            raise DataError(f"{path} is empty", "", "give a file with one JSON object a line")
        counts = ", ".join(f"{reason} {count}" for reason, count in dropped.items())
        raise DataError(
            f"no usable row in {path}",
            f"all {dropped.total()} rows were left out: {counts}",
            f"check that the rows are in the form of dataset={cfg.source}",
        )
    data = _split(pairs, cfg)
    data.dropped = dict(dropped)
    return data


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


def _columns(row: dict[str, Any], source: str, *, where: str) -> tuple[str, ...]:
    """Return the text columns of a row in the order of COLUMNS."""
    needed = COLUMNS[source]
    other = _other_form(row, source)
    missing = [name for name in needed if name not in row]
    if missing or other:
        what = f"no column {' or '.join(missing)}" if missing else "chosen and rejected are not dialogues"
        todo = f"these rows look like dataset={other}" if other else f"give every row {', '.join(needed)}"
        raise DataError(f"{where}: {what}", f"the row's columns are: {', '.join(row) or 'none'}", todo)
    for name in needed:
        value = row[name]
        if not isinstance(value, str):
            kind = "null" if value is None else type(value).__name__
            raise DataError(f"{where}: {name} is {kind}, not text", "", "give plain text in every column")
        # JSON may escape half a surrogate pair, which no tokenizer takes.
        if not value.isascii() and value.encode("utf-8", "replace").decode() != value:
            raise DataError(f"{where}: {name} is not valid Unicode", "it holds half a surrogate pair", "mend the row")
    return tuple(row[name] for name in needed)


def _other_form(row: dict[str, Any], source: str) -> str | None:
    """Return the other dataset's name if the row is in its form, not in that of `source`."""
    dialogues = all(ASSISTANT in str(row.get(name, "")) for name in COLUMNS["hh_rlhf"])
    if source == "preferences":
        return "hh_rlhf" if dialogues and "prompt" not in row else None
    return "preferences" if not dialogues and set(COLUMNS["preferences"]) <= set(row) else None


def _dialogue_pair(chosen: str, rejected: str) -> Pair | str:
    """Return the pair two dialogues make, split after their last "Assistant:", or the reason why there is none."""
    prompt, turn, chosen_reply = chosen.rpartition(ASSISTANT)
    other_prompt, other_turn, rejected_reply = rejected.rpartition(ASSISTANT)
    if not turn or not other_turn:
        return "no_shared_prompt"
    if prompt != other_prompt:
        return "differ_before_last_turn"
    if HUMAN in chosen_reply or HUMAN in rejected_reply:
        return "last_turn_not_assistant"
    if not prompt.replace(HUMAN, "").strip():
        return "empty_prompt"
    return _plain_pair(prompt + turn, chosen_reply, rejected_reply)


def _plain_pair(prompt: str, chosen: str, rejected: str) -> Pair | str:
    """Return the pair, stripped, or the reason why it is of no use."""
    # Responses are encoded with one space before them, so the prompt must not bring its own.
    prompt, chosen, rejected = prompt.rstrip(" "), chosen.strip(), rejected.strip()
    if not prompt.strip():
        return "empty_prompt"
    if not chosen or not rejected:
        return "empty_response"
    if chosen == rejected:
        return "chosen_equals_rejected"
    return Pair(prompt, chosen, rejected)


def _split(pairs: list[Pair], cfg: TextConfig) -> PreferenceData:
    """Return the pairs split by prompt: held out, SFT, reward model, alignment. File order is kept in each."""
    # Sorted first, so that the split depends on the prompts and the seed, not on the order of the rows.
    prompts = sorted({pair.prompt for pair in pairs})
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
    rows: dict[str, list[Pair]] = {name: [] for name in sizes}
    for pair in pairs:
        rows[split_of[pair.prompt]].append(pair)
    return PreferenceData(
        demonstrations=[Demonstration(pair.prompt, pair.chosen) for pair in rows["sft"]],
        reward_pairs=rows["rm"],
        policy_pairs=rows["align"],
        prompts=list(dict.fromkeys(pair.prompt for pair in rows["align"])),
        heldout_pairs=rows["heldout"],
    )
