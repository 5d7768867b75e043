"""From a row of two responses and a choice to a pair."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rlhf_cli.config.inputs import ChoiceColumns
from rlhf_cli.data.columns import required, text
from rlhf_cli.data.rows import Pair
from rlhf_cli.data.text_row import plain_pair
from rlhf_cli.errors import DataError

FIELD = re.compile(r"\{([^{}]+)\}")
BOOLS = {"true": "1", "false": "0"}


@dataclass
class ChoiceReader:
    """Reads choices; whatever is not `first_value` names the second response, and there is one such value only.

    Args:
        columns: where things are.
        second_value: the value of the rows so far whose second response was chosen; None: there was none.
    """

    columns: ChoiceColumns
    second_value: str | None = None

    def read(self, row: dict[str, Any], *, where: str) -> Pair | str:
        """Return the pair that a row holds, or the reason why it is of no use.

        Raises:
            DataError: a column is missing or not text, or the choice has a third value.
        """
        names = {key: getattr(self.columns, key) for key in ("first", "second", "choice")}
        first, second, choice = required(row, names, where=where)
        prompt = self._prompt(row, where=where)
        first, second = (text(value, names[key], where=where) for key, value in (("first", first), ("second", second)))
        value = as_text(choice)
        if not value:
            return "no_choice"
        if value == as_text(self.columns.first_value):
            return plain_pair(prompt, first, second)
        if self.second_value not in (None, value):
            raise DataError(
                f"{where}: {self.columns.choice} is {choice}",
                f"so far {self.second_value} was the choice of {names['second']} "
                f"and {self.columns.first_value} that of {names['first']}",
                "leave out rows without a choice, or set dataset.columns.first_value",
            )
        self.second_value = value
        return plain_pair(prompt, second, first)

    def _prompt(self, row: dict[str, Any], *, where: str) -> str:
        """Return the template with its columns filled in; the short one where a column of the other is empty."""
        template = self.columns.prompt
        values = _values(template, row, "prompt", where=where)
        if self.columns.short_prompt is not None and not all(value.strip() for value in values.values()):
            template = self.columns.short_prompt
            values = _values(template, row, "short_prompt", where=where)
        if values and not any(value.strip() for value in values.values()):
            return ""
        return FIELD.sub(lambda field: values[field[1]], template)


def as_text(value: Any) -> str:
    """Return a choice as text: 1, 1.0, true and "True" are all 1; nothing is empty."""
    if value is None:
        return ""
    found = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    return BOOLS.get(found.lower(), found)


def _values(template: str, row: dict[str, Any], key: str, *, where: str) -> dict[str, str]:
    """Return what a row holds in each column that a template names, as text; a null is empty."""
    names = list(dict.fromkeys(FIELD.findall(template)))
    todo = f"name others within braces in dataset.columns.{key}"
    found = required(row, {name: name for name in names}, where=where, todo=todo)
    plain = ("" if value is None else value for value in found)
    return {
        name: text(str(value) if isinstance(value, int | float) else value, name, where=where)
        for name, value in zip(names, plain, strict=True)
    }
