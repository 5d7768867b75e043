"""A comparison as tables: for the terminal, markdown and the HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table as RichTable

from rlhf_cli.metrics.glossary import describe, known
from rlhf_cli.metrics.seeds import Interval
from rlhf_cli.report.columns import Column, better, file_columns, fitting, legend, meaning, notes, shortened
from rlhf_cli.report.comparison import Cell, Comparison, Row, Stopped
from rlhf_cli.report.page import Emphasis, Table

MISSING = "–"
FLAG = "!"
NAME_WIDTH = 18
# The table fits in a terminal of this width, and is as wide in a file.
WIDTH = 100


def to_rich(comparison: Comparison, width: int = WIDTH) -> tuple[RichTable, list[Column]]:
    """Return the table for a terminal of that width, intervals under the means, and the columns that fit."""
    from rich.markup import escape

    shown = fitting(comparison, lambda some: _width(comparison, some), width)
    table = RichTable(box=None, pad_edge=False, padding=(0, 1, 1, 0), header_style="bold")
    table.add_column(first_header(comparison), max_width=NAME_WIDTH, overflow="fold")
    table.add_column("rank", justify="right", no_wrap=True)
    for column in shown:
        table.add_column(_stacked(column.header), justify="right", no_wrap=True)
    for row in comparison.rows:
        style = {"flagged": "yellow", "reference": "dim"}.get(emphasis(row), "")
        name = f"{escape(flagged(row))}\n[dim]{_seeds(len(row.runs))}[/dim]"
        cells = (_dimmed(text(row, column)) for column in shown)
        table.add_row(name, str(row.rank or MISSING), *cells, style=style)
    for run in comparison.stopped:
        name = f"{escape(run.name)}\n[dim]{_attempt(run)}[/dim]"
        table.add_row(name, *[MISSING] * (1 + len(shown)), style="red")
    return table, shown


def markdown(comparisons: Sequence[Comparison]) -> str:
    """Return all tables as markdown; each has its title where there are several."""
    if len(comparisons) == 1:
        return to_markdown(comparisons[0])
    return "\n".join(f"## {one.title}\n\n{to_markdown(one)}" for one in comparisons)


def to_markdown(comparison: Comparison) -> str:
    """Return the table, its legend and its notes as markdown."""
    shown = file_columns(comparison)
    rows = [[first_header(comparison), "seeds", "rank", *(column.header for column in shown)]]
    rows.append(["---", *["---:"] * (2 + len(shown))])
    for row in comparison.rows:
        values = [text(row, column).replace("\n", " ").replace("±", "± ") for column in shown]
        rows.append([flagged(row), str(len(row.runs)), str(row.rank or MISSING), *values])
    for run in comparison.stopped:
        name = run.name if run.seed is None else f"{run.name}, seed {run.seed}"
        rows.append([name, run.state, *[MISSING] * (1 + len(shown))])
    below = [*legend(comparison, shown), *notes(comparison)]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", *(f"- {line}" for line in below)]) + "\n"


def page_table(comparison: Comparison) -> Table:
    """Return the table of the HTML page: every column, a mean above its interval."""
    shown = file_columns(comparison)
    ranked = "not ranked" if comparison.rank_by is None else f"Place by {comparison.rank_by}, 1 is best"
    headers = [first_header(comparison), "seeds", "rank", *(column.header for column in shown)]
    name = "Reward" if comparison.kind == "rm" else "Algorithm"
    tips = [f"{name} and the settings that differ", "Runs that a row stands for", ranked]
    tips += [meaning(column, comparison) for column in shown]
    rows = [
        [flagged(row), str(len(row.runs)), str(row.rank or MISSING), *(text(row, column) for column in shown)]
        for row in comparison.rows
    ]
    for run in comparison.stopped:
        reason = f"\n{run.state}" + (f": {shortened(run.reason)}" if run.reason else "")
        rows.append([f"{run.name}{reason}", _attempt(run), *[MISSING] * (1 + len(shown))])
    marks: list[Emphasis] = [emphasis(row) for row in comparison.rows]
    marks += ["failed" for _ in comparison.stopped]
    return Table(headers, rows, marks, tips)


def metric_table(comparison: Comparison) -> Table:
    """Return every metric of every row: a row a metric, a column a policy, with the difference from the baseline.

    The reference's are those of its own column.
    """
    keys = sorted({key for row in comparison.rows for key in row.cells if not key.startswith("reference/")})
    rows = []
    for key in keys:
        metric = describe(key) if known(key) else None
        unit = [part for part in (metric.unit, better(metric.better)) if part] if metric else []
        words = (metric.meaning if metric else "") + (f" [{', '.join(unit)}]" if unit else "")
        rows.append([key, words, *(_with_difference(row.cells.get(key)) for row in comparison.rows)])
    tips = ["Key in metrics.json", "What it says"]
    for row in comparison.rows:
        seeds = f"Seeds {', '.join(str(run.seed) for run in row.runs)}"
        tips.append(f"{seeds}; Δ: minus {row.baseline}, same seeds" if row.baseline else seeds)
    return Table(["metric", "meaning", *(flagged(row) for row in comparison.rows)], rows, [""] * len(rows), tips)


def text(row: Row, column: Column) -> str:
    """Return a cell: the mean above its interval, or the improvement over the baseline (B: it is the baseline)."""
    if column.versus:
        value = row.improvement.get(column.key)
        if value is None:
            return "B" if row.is_baseline else MISSING
        digits = 1 if abs(value) < 100 else 0
        unsure = "~" if row.cells[column.key].unsure else ""
        return f"{unsure}{round(value, digits) + 0.0:+.{digits}f}%"  # + 0.0: no -0.0
    if column.difference:
        cell = row.cells.get(column.key)
        found = None if cell is None else cell.difference
        return _signed(found, "\n") if found is not None else "B" if row.is_baseline else MISSING
    return with_interval(row.cells.get(column.key))


def with_interval(cell: Cell | None) -> str:
    """Return the mean and, on a second line, ± of several seeds or [low, high] of one."""
    if cell is None:
        return MISSING
    if cell.half is not None:
        return f"{number(cell.mean)}\n±{number(cell.half)}"
    if cell.low is not None and cell.high is not None:
        return f"{number(cell.mean)}\n[{number(cell.low)}, {number(cell.high)}]"
    return number(cell.mean)


def number(value: float) -> str:
    """Return a number in at most six or seven characters: three decimals, fewer where it is large."""
    size = abs(value)
    if not math.isfinite(value):
        return "∞"
    if size < 10:
        return f"{value:.3f}"
    return f"{value:.{2 if size < 100 else 1}f}" if size < 1000 else f"{value:.3g}"


def emphasis(row: Row) -> Emphasis:
    """Return how a row stands out."""
    if row.flags:
        return "flagged"
    return "reference" if row.is_reference else ""


def flagged(row: Row) -> str:
    """Return a row's name, marked where it may have collapsed."""
    return f"{row.name} {FLAG}" if row.flags else row.name


def first_header(comparison: Comparison) -> str:
    """Return the header of the first column."""
    return "reward model" if comparison.kind == "rm" else "policy"


def _with_difference(cell: Cell | None) -> str:
    found = None if cell is None else cell.difference
    return with_interval(cell) if found is None else f"{with_interval(cell)}\nΔ {_signed(found)}"


def _signed(found: Interval, between: str = " ") -> str:
    sign = "" if found.mean < 0 else "+"
    return f"{sign}{number(found.mean)}" + ("" if found.half is None else f"{between}±{number(found.half)}")


def _width(comparison: Comparison, shown: Sequence[Column]) -> int:
    """Return how many characters the table needs, a space after each column."""
    names = [flagged(row) for row in comparison.rows] + [run.name for run in comparison.stopped]
    first = max(map(len, [first_header(comparison), *names, "10 seeds"]))
    widths = [min(first, NAME_WIDTH), len("rank")]
    for column in shown:
        cells = [_stacked(column.header), *(_narrow(text(row, column)) for row in comparison.rows)]
        widths.append(max(len(line) for cell in cells for line in cell.split("\n")))
    return sum(widths) + len(widths) - 1


def _stacked(header: str) -> str:
    return header.replace(" vs ", "\nvs ").replace(" wins", "\nwins")


def _narrow(cell: str) -> str:
    """Return a cell whose interval takes two lines, so that a column stays as narrow as one number."""
    return cell.replace(", ", ",\n")


def _dimmed(cell: str) -> str:
    from rich.markup import escape

    mean, _, spread = _narrow(cell).partition("\n")
    return f"{mean}\n[dim]{escape(spread)}[/dim]"


def _attempt(run: Stopped) -> str:
    return run.state if run.seed is None else f"{run.state}, seed {run.seed}"


def _seeds(count: int) -> str:
    return f"{count} seed" if count == 1 else f"{count} seeds"
