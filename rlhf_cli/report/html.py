"""The report as one HTML file that needs nothing else: images, styles, script and completions are inside."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from rlhf_cli.report.page import Page, Section, Table
from rlhf_cli.report.style import REFERENCE, hues

TEMPLATE = "compare.html.j2"
# What is embedded of completions, at most; a page of all would be tens of megabytes.
PROMPTS, SAMPLES = 100, 4
PIXELS_PER_INCH = 100  # at which a figure is shown; figures are drawn at twice that, for sharp screens
PNG_HEAD = b"\x89PNG\r\n\x1a\n"
NUMBER = re.compile(r"[+\-\u2212]?(\d+(\.\d+)?(e[+-]?\d+)?|inf|nan)\s?%?(\s|$)")
NO_NUMBER = ("–", "", "B")

Line = dict[str, Any]  # of a completions.jsonl


def write_html(page: Page, path: Path) -> None:
    """Write the page as one file without a single outside address.

    Args:
        page: what it shows; its figures are PNG files.
        path: the HTML file to write.

    Raises:
        ValueError: a figure is not a PNG.
        OSError: a figure cannot be read, or the file cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["numeric"] = numeric_columns
    source = files("rlhf_cli.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    sections = [_parts(section) for section in page.sections]
    text = environment.from_string(source).render(page=page, sections=sections, samples=SAMPLES)
    # Names of folders may hold bytes that are no text.
    path.write_text(text, encoding="utf-8", errors="replace")


def numeric_columns(table: Table) -> list[bool]:
    """Return of each column whether it holds numbers: these are aligned right and sorted by value."""
    found = []
    for number in range(len(table.headers)):
        cells = [row[number] for row, mark in zip(table.rows, table.emphasis, strict=True) if mark != "failed"]
        first = [cell.partition("\n")[0].strip() for cell in cells]
        numbers = [cell for cell in first if NUMBER.match(cell)]
        found.append(bool(numbers) and all(cell in numbers or cell in NO_NUMBER for cell in first))
    return found


def embedded(completions: Mapping[str, Sequence[Line]]) -> dict[str, Any]:
    """Return what the completions browser shows, ready for JSON: prompts, a column for the reference and each policy.

    Prompts that more policies answered come first. `left_out` counts the prompts that are not among the first PROMPTS,
    `cut` says whether a prompt has more than SAMPLES completions of a policy.
    """
    groups = {name: _by_prompt(lines) for name, lines in completions.items()}
    everyone = dict.fromkeys(prompt for group in groups.values() for prompt in group)
    ranked = sorted(everyone, key=lambda prompt: -sum(prompt in group for group in groups.values()))
    prompts = ranked[:PROMPTS]
    columns = []
    # The reference's samples are the same beside every policy of one seed.
    before = [_with_reference(groups, prompt) for prompt in prompts]
    if any(before):
        samples = [[_reference(line) for line in lines[:SAMPLES]] for lines in before]
        columns.append({"name": "reference", "colour": REFERENCE, "samples": samples})
    for name, hue in hues(groups).items():
        samples = [[_sample(line) for line in groups[name].get(prompt, [])[:SAMPLES]] for prompt in prompts]
        columns.append({"name": name, "colour": hue, "samples": samples})
    cut = any(len(group.get(prompt, [])) > SAMPLES for group in groups.values() for prompt in prompts)
    return {"prompts": prompts, "columns": columns, "left_out": len(ranked) - len(prompts), "cut": cut}


def _parts(section: Section) -> dict[str, Any]:
    """Return what the template shows of a section."""
    return {
        "section": section,
        "figures": [_figure(caption, path) for caption, path in section.figures],
        "browser": embedded(section.completions) if any(section.completions.values()) else None,
    }


def _figure(caption: str, path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    if not data.startswith(PNG_HEAD):
        raise ValueError(f"{path} is not a PNG.")
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    shown = {"width": width * PIXELS_PER_INCH // 200, "height": height * PIXELS_PER_INCH // 200}
    return {"caption": caption, "data": base64.b64encode(data).decode(), **shown}


def _by_prompt(lines: Sequence[Line]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(str(line["prompt"]), []).append(line)
    return found


def _with_reference(groups: Mapping[str, dict[str, list[Line]]], prompt: str) -> list[Line]:
    """Return the lines of the first policy that has the reference's samples of a prompt beside its own."""
    for group in groups.values():
        lines = [line for line in group.get(prompt, []) if line.get("reference") is not None]
        if lines:
            return lines
    return []


def _sample(line: Line) -> dict[str, Any]:
    reward, before = (_finite(line.get(key)) for key in ("reward", "reference_reward"))
    return {
        "text": str(line.get("completion") or ""),
        "reward": reward,
        "gain": None if reward is None or before is None else reward - before,
        "tokens": line.get("tokens"),
        "ended": line.get("ended", True),
    }


def _reference(line: Line) -> dict[str, Any]:
    """Return the reference's sample; its tokens are not counted in completions.jsonl."""
    text, reward = str(line.get("reference") or ""), _finite(line.get("reference_reward"))
    return {"text": text, "reward": reward, "gain": None, "tokens": None, "ended": line.get("reference_ended", True)}


def _finite(value: Any) -> float | None:
    """Return a number that JSON can hold, rounded to what is shown, else None."""
    return round(float(value), 4) if value is not None and math.isfinite(value) else None
