"""Answers of a policy and its reference, for people to read: side by side where there is room, else one block each."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

SIDE_BY_SIDE = 100  # columns of a terminal, from here on
INDENT = "    "

Line = Mapping[str, Any]  # prompt, sample, completion, tokens, ended; reward; the same of the reference


def show(lines: Iterable[Line]) -> None:
    """Print answers: side by side on a wide terminal, stacked elsewhere."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    if console.is_terminal and console.width >= SIDE_BY_SIDE:
        for line in lines:
            console.print(side_by_side(line))
    else:
        sys.stdout.write("".join(f"{stacked(line)}\n" for line in lines))
        sys.stdout.flush()


def side_by_side(line: Line) -> Any:
    """Return a rich table: policy left, reference right, the prompt above the first sample of it."""
    from rich.table import Table
    from rich.text import Text

    title = Text(str(line["prompt"]).strip(), style="bold") if line["sample"] == 0 else None
    table = Table(title=title, title_justify="left", show_edge=False, expand=True, pad_edge=False)
    for name, _ in _answers(line):
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(Text(text) for _, text in _answers(line)))
    return table


def stacked(line: Line) -> str:
    """Return the answers one below the other; the prompt stands above the first sample of it."""
    blocks = [f"> {_indented(str(line['prompt']).strip(), '  ')}"] if line["sample"] == 0 else []
    blocks += [f"{name}\n{INDENT}{_indented(text, INDENT)}" for name, text in _answers(line)]
    return "\n".join(blocks)


def _answers(line: Line) -> list[tuple[str, str]]:
    """Return name and text of each answer; the name says its reward, and whether it was cut."""
    number = f" {line['sample'] + 1}" if line.get("samples", 1) > 1 else ""
    found = [(_name(f"policy{number}", line.get("reward"), line["ended"]), str(line["completion"]))]
    if "reference" in line:
        name = _name(f"reference{number}", line.get("reference_reward"), line["reference_ended"])
        found.append((name, str(line["reference"])))
    return found


def _name(who: str, reward: float | None, ended: bool) -> str:
    notes = [] if reward is None else [f"reward {reward:.3f}"]
    notes += [] if ended else ["cut"]
    return f"{who} ({', '.join(notes)})" if notes else who


def _indented(text: str, indent: str) -> str:
    return text.replace("\n", f"\n{indent}")
