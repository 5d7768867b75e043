"""From a row of preferences to a pair or a ranking: plain texts or messages, the prompt apart or within both."""

from __future__ import annotations

import json
import sys
from os.path import commonprefix
from typing import Any

from rlhf_cli.config.inputs import PairColumns
from rlhf_cli.data.columns import ABSENT, inward, listed, required, text
from rlhf_cli.data.conversation import prompt_and_replies, read_messages
from rlhf_cli.data.files import Cells
from rlhf_cli.data.rows import Pair, Ranking
from rlhf_cli.data.text_row import are_dialogues, plain_pair
from rlhf_cli.errors import DataError

# Optional columns of pairs: value where there is none, largest value, rule.
NUMBERS = {
    "label": (1.0, 1.0, "it must be a number from 0 to 1: the probability that chosen is the better response"),
    "margin": (0.0, sys.float_info.max, "it must be a finite number, 0 or more: by how many nats chosen is better"),
}


def read_preference(row: dict[str, Any], columns: PairColumns, *, where: str) -> Pair | Ranking | str:
    """Return the pair or ranking that a row holds, or the reason why it is of no use.

    Args:
        where: file and line, for messages.

    Raises:
        DataError: a column is missing, neither text nor messages, not valid Unicode, or out of range.
    """
    if is_ranking(row, columns):
        return _ranking(row, columns, where=where)
    apart = {} if _within(row, columns) else {"prompt": str(columns.prompt)}
    needed = {**apart, "chosen": columns.chosen, "rejected": columns.rejected}
    values = required(row, needed, where=where, todo=_advice(row, columns, needed, where=where))
    prompt = text_or_messages(values[0], needed["prompt"], where=where) if apart else None
    texts = _texts(prompt, dict(zip((columns.chosen, columns.rejected), values[-2:], strict=True)), where=where)
    label, margin = (_number(row, name, getattr(columns, name), where=where) for name in NUMBERS)
    pair = texts if isinstance(texts, str) else plain_pair(texts[0], *texts[1])
    if isinstance(pair, str):
        return pair
    if label < 0.5:
        return Pair(pair.prompt, pair.rejected, pair.chosen, 1 - label, margin)
    return Pair(pair.prompt, pair.chosen, pair.rejected, label, margin)


def is_ranking(row: dict[str, Any], columns: PairColumns) -> bool:
    """Return whether a row has the columns of a ranking and not those of a pair."""
    if columns.responses is None or inward(row, columns.responses) is ABSENT:
        return False
    return all(inward(row, name) is ABSENT for name in (columns.chosen, columns.rejected))


def is_conversational(row: dict[str, Any], columns: PairColumns) -> bool:
    """Return whether a row holds messages rather than plain texts."""
    response = inward(row, columns.chosen)
    if is_ranking(row, columns):
        response = (inward(row, str(columns.responses)) or [None])[0]
    return isinstance(response, list) or (columns.prompt is not None and isinstance(inward(row, columns.prompt), list))


def text_or_messages(value: Any, name: str, *, where: str) -> str | list[dict[str, str]]:
    """Return a value as text, or as messages if it is a list.

    Raises:
        DataError: it is neither.
    """
    return read_messages(value, name, where=where) if isinstance(value, list) else text(value, name, where=where)


def _within(row: dict[str, Any], columns: PairColumns) -> bool:
    """Return whether chosen and rejected begin with the prompt: the config says so, or whole conversations show it."""
    if columns.prompt is None:
        return True
    whole = all(isinstance(inward(row, name), list) for name in (columns.chosen, columns.rejected))
    return whole and inward(row, columns.prompt) in (ABSENT, None)


def _advice(row: dict[str, Any], columns: PairColumns, needed: dict[str, str], *, where: str) -> str:
    """Return what to do about a missing column; empty: the usual.

    Raises:
        DataError: the rows are in the form of dataset=hh_rlhf.
    """
    todo = "these rows look like dataset=hh_rlhf"
    if are_dialogues(inward(row, columns.chosen), inward(row, columns.rejected)):
        if columns.prompt is None:
            raise DataError(f"{where}: chosen and rejected are dialogues", listed(row), todo)
        return todo
    missing = [name for name in needed.values() if inward(row, name) is ABSENT]
    if missing == [columns.prompt]:
        usual = f"give every row {columns.prompt}, or say what it is called: dataset.columns.prompt=COLUMN"
        return f"{usual}, null where {columns.chosen} and {columns.rejected} begin with it"
    return ""


def _texts(prompt: Any, responses: dict[str, Any], *, where: str) -> Any:
    """Return (prompt, replies) as texts, or why the row is of no use.

    Args:
        prompt: text or messages; None: it is within each response.
        responses: by their names.

    Raises:
        DataError: a response is neither text nor messages, or some are text and others messages.
    """
    listed_ = [name for name, value in responses.items() if isinstance(value, list)]
    others = [name for name in responses if name not in listed_]
    if listed_ and others:
        text(responses[others[0]], others[0], where=where)
        what = f"{where}: {listed_[0]} is list, not text as {others[0]} is"
        raise DataError(what, "", "give all responses of a row as text, or all as messages")
    found = [text_or_messages(value, name, where=where) for name, value in responses.items()]
    if listed_ or isinstance(prompt, list):
        return prompt_and_replies(prompt, [_reply(value) for value in found])
    return _apart(found) if prompt is None else (prompt, found)


def _reply(response: Any) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": response}] if isinstance(response, str) else response


def _apart(texts: list[Any]) -> Any:
    """Return (shared prompt, what follows it in each text): the longest shared start, up to the last space.

    A word is never cut in two, where TRL's `extract_prompt` cuts one that begins alike in both.
    """
    start = commonprefix(texts)
    if not all(len(value) == len(start) or value[len(start)].isspace() for value in texts):
        start = start[: max((i + 1 for i, letter in enumerate(start) if letter.isspace()), default=0)]
    return (start, [value[len(start) :] for value in texts]) if start.strip() else "no_shared_prompt"


def _number(row: dict[str, Any], key: str, name: str | None, *, where: str) -> float:
    otherwise, largest, rule = NUMBERS[key]
    value = otherwise if name is None else inward(row, name)
    if isinstance(row, Cells) and (value is None or isinstance(value, str)):
        value = _cell(value)
    if value is ABSENT:
        return otherwise
    # A bool is an int to Python; NaN fails every comparison.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= largest:
        raise DataError(
            f"{where}: {name} is {json.dumps(value, default=str)[:40]}",
            rule,
            f"correct it, or leave {name} out where it is not known"
            + (f"; if it is something else: dataset.columns.{key}=null" if isinstance(row, Cells) else ""),
        )
    return float(value)


def _cell(value: str | None) -> Any:
    """Return the number in a cell of a table, ABSENT if it is empty, else its text."""
    try:
        return float(value) if value else ABSENT
    except ValueError:
        return value


def _ranking(row: dict[str, Any], columns: PairColumns, *, where: str) -> Ranking | str:
    """Return the ranking, stripped, each response at its best place only, or the reason why it is of no use."""
    name = str(columns.responses)
    responses = inward(row, name)
    within = columns.prompt is None
    needed = {"responses": name} if within else {"prompt": str(columns.prompt), "responses": name}
    values = required(row, needed, where=where, todo=f"give every row {', '.join(needed.values())}")
    for number in (getattr(columns, key) for key in NUMBERS):
        if number is not None and inward(row, number) not in (ABSENT, *([None, ""] if isinstance(row, Cells) else [])):
            raise DataError(f"{where}: {number} beside {name}", "a ranking has none, only pairs have", "leave it out")
    prompt = None if within else text_or_messages(values[0], needed["prompt"], where=where)
    if not isinstance(responses, list):
        kind = "null" if responses is None else type(responses).__name__
        raise DataError(f"{where}: {name} is {kind}, not a list", "", "give a list of texts, best first")
    if not responses:
        return "too_few_responses"
    found = _texts(prompt, {f"{name}[{i}]": value for i, value in enumerate(responses)}, where=where)
    if isinstance(found, str):
        return found
    prompt, texts = found[0].rstrip(" "), [value.strip() for value in found[1]]
    if not prompt.strip():
        return "empty_prompt"
    if not all(texts):
        return "empty_response"
    unique = tuple(dict.fromkeys(texts))
    return Ranking(prompt, unique) if len(unique) > 1 else "too_few_responses"
