"""The usable rows of one dataset, in the order they are read: pairs or rankings, checked row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from rlhf_cli.config.inputs import ChoicesConfig, PreferencesConfig, TextConfig
from rlhf_cli.data.choice_row import ChoiceReader
from rlhf_cli.data.columns import inward
from rlhf_cli.data.preference_row import is_conversational, is_ranking, read_preference
from rlhf_cli.data.rows import Pair, Ranking
from rlhf_cli.data.sources import read_rows
from rlhf_cli.data.text_row import read_dialogues
from rlhf_cli.errors import DataError

Row = dict[str, Any]


def checked_rows(cfg: TextConfig, dropped: Counter[str]) -> Iterator[Pair | Ranking]:
    """Yield the usable rows of a dataset, all pairs or all rankings; `dropped` gains the others, by reason.

    Raises:
        DataError: there is nothing to read, a row is malformed, or it is of another kind than those before it.
        UserError: the Hub, or the dataset on it, cannot be reached.
    """
    read = _reader(cfg, dropped)
    for where, row in read_rows(cfg):
        found = read(row, where)
        if isinstance(found, str):
            dropped[found] += 1
        else:
            yield found


def _reader(cfg: TextConfig, dropped: Counter[str]) -> Callable[[Row, str], Pair | Ranking | str]:
    if isinstance(cfg, ChoicesConfig):
        choices = ChoiceReader(cfg.columns)
        return lambda row, where: choices.read(row, where=where)
    if isinstance(cfg, PreferencesConfig):
        return _preferences(cfg, dropped)
    return lambda row, where: read_dialogues(row, where=where)


def _preferences(cfg: PreferencesConfig, dropped: Counter[str]) -> Callable[[Row, str], Pair | Ranking | str]:
    """Return what reads rows one after the other, and refuses the first of another kind."""
    columns = cfg.columns
    before: list[tuple[bool, bool]] = []

    def read(row: Row, where: str) -> Pair | Ranking | str:
        found = read_preference(row, columns, where=where)
        kind = is_ranking(row, columns), is_conversational(row, columns)
        if before and before[0] != kind:
            raise _other_kind(before[0], kind, where)
        before[:] = [kind]
        if isinstance(found, Ranking):
            repeated = len(inward(row, str(columns.responses))) - len(found.responses)
            if repeated:
                dropped["duplicate_in_ranking"] += repeated
        return found

    return read


def _other_kind(before: tuple[bool, bool], kind: tuple[bool, bool], where: str) -> DataError:
    if before[0] != kind[0]:
        kinds = ("a ranking", "pairs") if kind[0] else ("a pair", "rankings")
        rule = "the rows of one file are all pairs or all rankings"
    else:
        kinds = ("a conversation", "plain texts") if kind[1] else ("plain text", "conversations")
        rule = "the rows of one file are all messages or all plain text"
    return DataError(f"{where}: {kinds[0]} in a file of {kinds[1]}", rule, "make it two files")
