"""`rlhf compare`: runs side by side, as tables, figures and one HTML page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.errors import DataError, RunError
from rlhf_cli.stages.found_runs import Say, find_runs, load_run

if TYPE_CHECKING:
    from rich.console import Console

    from rlhf_cli.report.comparison import Comparison
    from rlhf_cli.report.page import Page
    from rlhf_cli.report.run_groups import Run
    from rlhf_cli.report.run_sets import RunSet

# Output goes to a file or a pipe as wide as the table needs, and no narrower.
PIPE_WIDTH = 100


def run(
    run_dirs: Sequence[str | Path],
    out: Path | None = None,
    *,
    baseline: str | None = None,
    rank: str | None = None,
    wandb: bool = False,
    failed: Sequence[tuple[str, str]] = (),
) -> Path:
    """Print a table of each set of comparable runs, and write tables, figures and compare.html.

    Args:
        run_dirs: run folders, folders that hold some at any depth, or globs; unfinished runs are listed as such.
        out: where the files go; None: `compare` beside the runs.
        baseline: the row that others are compared with; None: KL-PPO, or else the reference.
        rank: the metric that orders the rows; None: they keep their order, and the default metric ranks them.
        wandb: log the comparison to Weights & Biases, as a run of its own.
        failed: (name, reason) of jobs that left no run folder.

    Returns:
        The folder of the files.

    Raises:
        DataError: a path is no run folder, a file in it cannot be read, no finished run is left, or there is no such
            baseline or ranking metric.
        RunError: the folder cannot be written, or W&B failed.
    """
    console, notes = _consoles()

    def say(words: str) -> None:
        notes.print(words, highlight=False, markup=False, soft_wrap=True)

    sets = _load(find_runs(run_dirs, say), say)
    runs = [loaded for one in sets for loaded in one.runs]
    comparisons = _compare(sets, baseline, rank, failed)
    out = _beside(runs) if out is None else Path(out)
    page, written = _write(comparisons, runs, out, say)
    _print(comparisons, console)
    for path in written:
        console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    if wandb:
        from rlhf_cli.report.csv_tables import summaries
        from rlhf_cli.stages.compare_wandb import publish

        figures = [path for section in page.sections for _, path in section.figures]
        trackers = [loaded.config["tracker"] for loaded in runs if loaded.finished and "tracker" in loaded.config]
        where = publish(out, page.title, summaries(comparisons), figures, out / "compare.html", trackers)
        if where:
            console.print(f"W&B: {where}", highlight=False, markup=False, soft_wrap=True)
    return out


def _load(folders: Sequence[Path], say: Say) -> list[RunSet]:
    """Return the runs of the folders in sets that may be compared; of the same settings and seed, the latest.

    Raises:
        DataError: a file cannot be read, or no run is finished.
    """
    from rlhf_cli.report.run_sets import comparable_sets

    runs = [loaded for folder in folders if (loaded := load_run(folder, say)) is not None]
    if not any(loaded.finished for loaded in runs):
        states = ", ".join(sorted({loaded.state for loaded in runs}))
        raise DataError(
            f"None of the {len(folders)} run folders can be compared",
            "only finished runs of rlhf align, evaluate and train-rm hold a measured policy or reward model"
            + (f"; these are {states}" if states else ""),
            "Finish a run first: the same command goes on where it stopped",
        )
    sets = comparable_sets(runs)
    for other in (left for one in sets for left in one.left_out):
        say(f"left out {other.path}: a run with the same settings and seed ended after it.")
    return sets


def _compare(
    sets: Sequence[RunSet], baseline: str | None, rank: str | None, failed: Sequence[tuple[str, str]]
) -> list[Comparison]:
    """Return a comparison of each set of runs that may be compared.

    Raises:
        DataError: there is no such baseline or ranking metric.
    """
    from rlhf_cli.report.comparison import check_baseline, check_rank, compare
    from rlhf_cli.report.run_sets import titles

    if rank is not None:
        check_rank(rank, [loaded for one in sets for loaded in one.runs])
    comparisons = [
        # Jobs without a folder are of the sweep, whose runs are the most.
        compare(title, one.kind, one.runs, baseline=baseline, rank_by=rank, failed=failed if one is sets[0] else ())
        for title, one in zip(titles(sets), sets, strict=True)
    ]
    if baseline is not None:
        check_baseline(baseline, comparisons)
    return comparisons


def _beside(runs: Sequence[Run]) -> Path:
    return Path(os.path.commonpath([loaded.path.resolve().parent for loaded in runs])) / "compare"


def _write(comparisons: Sequence[Comparison], runs: Sequence[Run], out: Path, say: Say) -> tuple[Page, list[Path]]:
    """Write tables, figures and the page; return the page and the paths of all files.

    Raises:
        RunError: the folder cannot be written.
    """
    from rlhf_cli.report.csv_tables import rows_csv, runs_csv
    from rlhf_cli.report.html import write_html
    from rlhf_cli.report.tables import markdown
    from rlhf_cli.stages.compare_page import compare_page

    texts = {
        "compare.md": markdown(comparisons),
        "compare.csv": rows_csv(comparisons),
        "runs.csv": runs_csv(comparisons),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (out / name).write_text(text, encoding="utf-8")
        page = compare_page(comparisons, runs, out, say)
        write_html(page, out / "compare.html")
    except OSError as error:
        raise RunError(f"The comparison cannot be written to {out}", str(error), "Name another folder") from error
    figures = [path for section in page.sections for _, path in section.figures]
    return page, [*(out / name for name in texts), *figures, out / "compare.html"]


def _print(comparisons: Sequence[Comparison], console: Console) -> None:
    """Print each table with what is to know about it, no line twice; titles only where there are several tables."""
    from rlhf_cli.report.columns import columns, legend, notes
    from rlhf_cli.report.tables import WIDTH, to_rich

    said: set[str] = set()
    for one in comparisons:
        if len(comparisons) > 1:
            console.print(f"\n{one.title}", style="bold", highlight=False, markup=False)
        table, shown = to_rich(one, min(WIDTH, console.width))
        console.print(table)
        hidden = [column.header for column in columns(one) if column not in shown]
        lines = legend(one, shown) + notes(one)
        lines += [f"In the files, for want of width: {', '.join(hidden)}."] if hidden else []
        for line in lines:
            if line not in said:
                console.print(line, style="dim", highlight=False, markup=False)
        said |= set(lines)


def _consoles() -> tuple[Console, Console]:
    """Return the console of results (stdout) and that of notes (stderr)."""
    from rich.console import Console

    console = Console()
    return (console if console.is_terminal else Console(width=PIPE_WIDTH)), Console(stderr=True)
