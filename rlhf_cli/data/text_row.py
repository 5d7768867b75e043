"""From one JSON object of a preference file to a pair or a ranking: its columns checked, its texts stripped."""

from __future__ import annotations

import json
import sys
from typing import Any

from rlhf_cli.data.rows import Pair, Ranking
from rlhf_cli.errors import DataError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
COLUMNS = {"hh_rlhf": ("chosen", "rejected"), "preferences": ("prompt", "chosen", "rejected")}
RANKING_COLUMNS = ("prompt", "responses")
# Optional columns of pairs: value where there is none, largest value, rule.
NUMBERS = {
    "label": (1.0, 1.0, "it must be a number from 0 to 1: the probability that chosen is the better response"),
    "margin": (0.0, sys.float_info.max, "it must be a finite number, 0 or more: by how many nats chosen is better"),
}


def read_row(row: dict[str, Any], source: str, *, where: str) -> Pair | Ranking | str:
    """Return the pair or ranking that a row holds, or the reason why it is of no use.

    Args:
        source: `hh_rlhf` or `preferences`; only the latter has labels, margins and rankings.
        where: file and line, for messages.

    Raises:
        DataError: a column is missing, not text, not valid Unicode, or out of range.
    """
    if source == "hh_rlhf":
        return _dialogue_pair(*_columns(row, source, where=where))
    if is_ranking(row):
        return _ranking(row, where=where)
    pair = _plain_pair(*_columns(row, source, where=where))
    label, margin = (_number(row, name, where=where) for name in NUMBERS)
    if isinstance(pair, str):
        return pair
    if label < 0.5:
        return Pair(pair.prompt, pair.rejected, pair.chosen, 1 - label, margin)
    return Pair(pair.prompt, pair.chosen, pair.rejected, label, margin)


def is_ranking(row: dict[str, Any]) -> bool:
    """Return whether a `preferences` row has the columns of a ranking and not those of a pair."""
    return "responses" in row and not {"chosen", "rejected"} & set(row)


def _columns(row: dict[str, Any], source: str, *, where: str) -> tuple[str, ...]:
    """Return the text columns of a row in the order of COLUMNS."""
    needed = COLUMNS[source]
    other = _other_form(row, source)
    missing = [name for name in needed if name not in row]
    if missing or other:
        what = f"no column {' or '.join(missing)}" if missing else "chosen and rejected are not dialogues"
        todo = f"these rows look like dataset={other}" if other else f"give every row {', '.join(needed)}"
        raise DataError(f"{where}: {what}", _names(row), todo)
    return tuple(_text(row[name], name, where=where) for name in needed)


def _names(row: dict[str, Any]) -> str:
    return f"the row's columns are: {', '.join(row) or 'none'}"


def _text(value: Any, name: str, *, where: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise DataError(f"{where}: {name} is {kind}, not text", "", "give plain text in every column")
    # JSON may escape half a surrogate pair, which no tokenizer takes.
    if not value.isascii() and value.encode("utf-8", "replace").decode() != value:
        raise DataError(f"{where}: {name} is not valid Unicode", "it holds half a surrogate pair", "mend the row")
    return value


def _number(row: dict[str, Any], name: str, *, where: str) -> float:
    otherwise, largest, rule = NUMBERS[name]
    value = row.get(name, otherwise)
    # A bool is an int to Python; NaN fails every comparison.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= largest:
        raise DataError(
            f"{where}: {name} is {json.dumps(value)[:40]}",
            rule,
            f"correct it, or leave {name} out where it is not known",
        )
    return float(value)


def _other_form(row: dict[str, Any], source: str) -> str | None:
    """Return the other dataset's name if the row is in its form, not in that of `source`."""
    dialogues = all(ASSISTANT in str(row.get(name, "")) for name in COLUMNS["hh_rlhf"])
    if source == "preferences":
        return "hh_rlhf" if dialogues and "prompt" not in row else None
    plain = any(set(columns) <= set(row) for columns in (COLUMNS["preferences"], RANKING_COLUMNS))
    return "preferences" if not dialogues and plain else None


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


def _ranking(row: dict[str, Any], *, where: str) -> Ranking | str:
    """Return the ranking, stripped, each response at its best place only, or the reason why it is of no use."""
    if "prompt" not in row:
        raise DataError(f"{where}: no column prompt", _names(row), f"give every row {', '.join(RANKING_COLUMNS)}")
    if extra := [name for name in NUMBERS if name in row]:
        raise DataError(f"{where}: {extra[0]} beside responses", "a ranking has none, only pairs have", "leave it out")
    prompt, responses = _text(row["prompt"], "prompt", where=where).rstrip(" "), row["responses"]
    if not isinstance(responses, list):
        kind = "null" if responses is None else type(responses).__name__
        raise DataError(f"{where}: responses is {kind}, not a list", "", "give a list of texts, best first")
    texts = [_text(value, f"responses[{i}]", where=where).strip() for i, value in enumerate(responses)]
    if not prompt.strip():
        return "empty_prompt"
    if not all(texts):
        return "empty_response"
    unique = tuple(dict.fromkeys(texts))
    return Ranking(prompt, unique) if len(unique) > 1 else "too_few_responses"
