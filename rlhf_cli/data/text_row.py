"""From a row of two dialogues to a pair; what every pair of texts must be."""

from __future__ import annotations

from typing import Any

from rlhf_cli.data.columns import listed, required, text
from rlhf_cli.data.dialogue import ASSISTANT, HUMAN
from rlhf_cli.data.rows import Pair
from rlhf_cli.errors import DataError

COLUMNS = ("chosen", "rejected")
OTHERS = ({"prompt", *COLUMNS}, {"prompt", "responses"})  # of dataset=preferences


def read_dialogues(row: dict[str, Any], *, where: str) -> Pair | str:
    """Return the pair that two dialogues make, split after their last "Assistant:", or why the row is of no use.

    Args:
        where: file and line, for messages.

    Raises:
        DataError: a column is missing, not text, or not valid Unicode.
    """
    if not are_dialogues(*(row.get(name) for name in COLUMNS)) and _other_form(row):
        missing = [name for name in COLUMNS if name not in row]
        what = f"no column {' or '.join(missing)}" if missing else "chosen and rejected are not dialogues"
        raise DataError(f"{where}: {what}", listed(row), "these rows look like dataset=preferences")
    values = required(row, {name: name for name in COLUMNS}, where=where, todo="give every row chosen, rejected")
    chosen, rejected = (text(value, name, where=where) for name, value in zip(COLUMNS, values, strict=True))
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
    return plain_pair(prompt + turn, chosen_reply, rejected_reply)


def _other_form(row: dict[str, Any]) -> bool:
    return any(names <= set(row) for names in OTHERS) or any(isinstance(row.get(name), list) for name in COLUMNS)


def are_dialogues(*values: Any) -> bool:
    """Return whether all of these are texts with an Assistant turn in them."""
    return all(isinstance(value, str) and ASSISTANT in value for value in values)


def plain_pair(prompt: str, chosen: str, rejected: str) -> Pair | str:
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
