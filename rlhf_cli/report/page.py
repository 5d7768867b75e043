"""What a report shows, before it is drawn: a page of sections, each with a table, notes, figures and completions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Emphasis = Literal["", "flagged", "failed", "reference"]


@dataclass(frozen=True)
class Table:
    """A table as text; a cell may hold a line break (a mean above its interval).

    `emphasis` says what a row is (one entry a row): "" for any policy, "reference" for the policy that all start at,
    "flagged" for a collapsed one, "failed" for a run without numbers. `tips` gives the meaning of each header.
    """

    headers: list[str]
    rows: list[list[str]]
    emphasis: list[Emphasis]
    tips: list[str]


@dataclass(frozen=True)
class Section:
    """Runs that may be compared: their table, what to know about it, figures and completions.

    `figures` are (caption, PNG); `completions` maps a policy to the lines of its completions.jsonl, of one seed.
    """

    title: str
    table: Table
    notes: list[str] = field(default_factory=list)
    figures: list[tuple[str, Path]] = field(default_factory=list)
    completions: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    all_metrics: Table | None = None


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    sections: list[Section]
    notes: list[str] = field(default_factory=list)
