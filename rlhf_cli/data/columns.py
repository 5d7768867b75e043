"""The columns of a row: found by the names the config gives them, inwards along dots, and checked to be text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rlhf_cli.errors import DataError

ABSENT = object()


def inward(row: dict[str, Any], name: str) -> Any:
    """Return what a row holds under a name, ABSENT if nothing; `summaries.0.text` goes inwards, counted from 0."""
    if name in row:
        return row[name]
    found: Any = row
    for part in name.split("."):
        if isinstance(found, dict) and part in found:
            found = found[part]
        elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            return ABSENT
    return found


def required(row: dict[str, Any], columns: dict[str, str], *, where: str, todo: str = "") -> tuple[Any, ...]:
    """Return what a row holds in its columns.

    Args:
        columns: their names by the key of dataset.columns that gives them.
        todo: what to do where one is missing; empty: give it, or say what it is called.

    Raises:
        DataError: a column is missing.
    """
    values = {key: inward(row, name) for key, name in columns.items()}
    if missing := [key for key, value in values.items() if value is ABSENT]:
        called = " ".join(f"dataset.columns.{key}=COLUMN" for key in missing)
        usual = f"give every row {', '.join(columns.values())}, or say what they are called: {called}"
        what = f"{where}: no column {' or '.join(columns[key] for key in missing)}"
        raise DataError(what, listed(row), todo or usual)
    return tuple(values.values())


def listed(row: Iterable[str]) -> str:
    """Return a sentence with the names of a row's columns."""
    return f"the row's columns are: {', '.join(row) or 'none'}"


def text(value: Any, name: str, *, where: str) -> str:
    """Return a value that is text.

    Raises:
        DataError: it is not, or it is not valid Unicode.
    """
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise DataError(f"{where}: {name} is {kind}, not text", "", "give plain text in every column")
    # JSON may escape half a surrogate pair, which no tokenizer takes.
    if not value.isascii() and value.encode("utf-8", "replace").decode() != value:
        raise DataError(f"{where}: {name} is not valid Unicode", "it holds half a surrogate pair", "mend the row")
    return value
