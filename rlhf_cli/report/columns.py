"""The columns of the comparison table, and what is said below it: meanings, baseline, intervals, warnings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf_cli.metrics.glossary import describe
from rlhf_cli.report.comparison import Comparison
from rlhf_cli.report.run_groups import Kind

REASON_CHARACTERS = 100


@dataclass(frozen=True)
class Column:
    """A metric of the table, or what it changes from the baseline; a header is short, so that many fit.

    `versus`: the relative improvement. `difference`: the paired difference.
    """

    key: str
    header: str
    versus: bool = False
    difference: bool = False


SURVEY = (
    Column("pm/tv", "TV"),
    Column("pm/tv", "TV vs B", versus=True),
    Column("pm/tv_max", "worst"),
    Column("pm/kl_rm_policy", "KL"),
    Column("pm/minority_mass", "minority"),
    Column("pm/minority_mass_target", "target"),
    Column("pm/offset_mass", "off-set"),
    Column("optimum/tv", "optimum"),
    Column("gold/tv", "people"),
    Column("pm/divergence", "diverg."),
    Column("pm/divergence", "div vs B", versus=True),
    Column("reward/mean", "reward"),
    Column("kl/sequence", "drift"),
    Column("win_rate/gold", "gold wins"),
    Column("win_rate/llm", "judge wins"),
)
TEXT = (
    Column("pm/tv", "TV"),
    Column("pm/tv", "TV vs B", versus=True),
    Column("pm/kl_rm_policy", "KL"),
    Column("pm/rank_correlation", "order"),
    Column("pm/pair_tv", "pairs"),
    Column("pm/divergence", "diverg."),
    Column("pm/divergence", "div vs B", versus=True),
    Column("reward/mean", "reward"),
    Column("kl/sequence", "drift"),
    Column("distinct_2", "variety"),
    Column("win_rate/rm", "wins"),
    Column("win_rate/llm", "judge wins"),
    Column("entropy/per_token", "entropy"),
    Column("length/mean", "length"),
    Column("eos_rate", "ends"),
)
REWARD = (
    Column("rm/accuracy", "right"),
    Column("rm/log_loss", "loss"),
    Column("rm/ece", "ECE"),
    Column("rm/margin/std", "scale"),
    Column("rm/bound/half", "δ*/2"),
    Column("rm/length_correlation", "length"),
    Column("rm/negative_accuracy", "damage"),
    Column("rm/gold_tv", "people"),
    Column("rm/score_policy_beyond", "beyond"),
)
COLUMNS: dict[Kind, tuple[Column, ...]] = {"exact": SURVEY, "text": TEXT, "rm": REWARD}
DIVERGENCE = ("diverg.", "div vs B")
# What a narrow terminal goes without, first to last; those of one tuple go together.
EXPENDABLE: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "exact": (
        *(("judge wins",), ("gold wins",), ("optimum",), ("worst",), DIVERGENCE),
        *(("people",), ("target",), ("drift",), ("KL",)),
    ),
    "text": (
        *(("judge wins",), ("entropy",), ("ends",), ("length",), DIVERGENCE),
        *(("KL",), ("drift",), ("variety",)),
    ),
    "rm": (("beyond",), ("damage",), ("scale",)),
}
# A policy that collapsed has next to no divergence, so it is shown only beside what tells of a collapse.
BESIDE_DIVERGENCE: dict[Kind, tuple[str, ...]] = {
    "exact": ("TV", "KL", "minority", "off-set"),
    "text": ("TV", "KL"),
    "rm": (),
}


def columns(comparison: Comparison) -> list[Column]:
    """Return the columns for which any row has a number."""

    def there(column: Column) -> bool:
        cells = [row.cells[column.key] for row in comparison.rows if column.key in row.cells]
        # A row that collapsed has no share of the baseline's divergence: the column says so.
        return any(cell.difference is not None for cell in cells) if column.versus else bool(cells)

    return [column for column in COLUMNS[comparison.kind] if there(column)]


def file_columns(comparison: Comparison) -> list[Column]:
    """Return the columns of files: those of the terminal, and the paired difference of the ranking metric."""
    shown, key = columns(comparison), comparison.rank_by
    rows = [row for row in comparison.rows if key in row.cells]
    if key is None or not any(row.cells[key].difference for row in rows):
        return shown
    places = [place for place, column in enumerate(shown) if column.key == key]
    header = next((shown[place].header for place in places if not shown[place].versus), key)
    after = places[-1] + 1 if places else 0
    return [*shown[:after], Column(key, f"Δ{header}", difference=True), *shown[after:]]


def fitting(comparison: Comparison, width: Callable[[Sequence[Column]], int], limit: int) -> list[Column]:
    """Return the columns of a table no wider than `limit`, as far as there are columns to go without."""
    shown = columns(comparison)
    for headers in EXPENDABLE[comparison.kind]:
        if width(shown) <= limit:
            break
        shown = [column for column in shown if column.header not in headers]
    if not {column.header for column in shown}.issuperset(BESIDE_DIVERGENCE[comparison.kind]):
        shown = [column for column in shown if column.header not in DIVERGENCE]
    return shown


def meaning(column: Column, comparison: Comparison) -> str:
    """Return what a column says, with unit and direction."""
    metric = describe(column.key)
    if column.difference:
        direction = f" [{better(metric.better)}]" if metric.better != "none" else ""
        return f"{column.key} minus the baseline's over the seeds that both have{direction}"
    if column.versus:
        return f"{column.key} lower than the baseline's, relative to it [%, higher is better]"
    on_pools = comparison.kind == "text" and column.key.startswith(("pm/tv", "pm/kl_"))
    where = " over the candidate pools" if on_pools else ""
    notes = [part for part in (metric.unit, better(metric.better)) if part]
    return f"{metric.meaning}{where}" + (f" [{', '.join(notes)}]" if notes else "")


def better(direction: str) -> str:
    """Return a metric's direction in words, empty where it has none."""
    return "" if direction == "none" else f"{direction} is better"


def legend(comparison: Comparison, shown: Sequence[Column]) -> list[str]:
    """Return one line per column: header and meaning."""
    return [f"{column.header}: {meaning(column, comparison)}." for column in shown]


def notes(comparison: Comparison) -> list[str]:
    """Return what to know about a table: rank, baseline, intervals, collapsed rows, runs without numbers."""
    lines = []
    if comparison.rank_by is not None:
        lines.append(f"rank: by {comparison.rank_by}, {better(describe(comparison.rank_by).better)}.")
    lines += _baseline(comparison) + _intervals(comparison) + _sampler(comparison) + comparison.notes
    lines += [f"! {row.name} may have collapsed: {'; '.join(row.flags)}." for row in comparison.rows if row.flags]
    for run in comparison.stopped:
        seed = "" if run.seed is None else f", seed {run.seed}"
        lines.append(f"{run.name}{seed}: {run.state}" + (f": {shortened(run.reason)}" if run.reason else "."))
    return lines


def shortened(reason: str) -> str:
    """Return the start of a reason, on one line."""
    line = " ".join(reason.split())
    return line if len(line) <= REASON_CHARACTERS else f"{line[: REASON_CHARACTERS - 2]} …"


def _baseline(comparison: Comparison) -> list[str]:
    names = comparison.baselines
    compared = [row for row in comparison.rows if row.baseline is not None]
    if not compared:
        return []
    if len(names) == 1:
        line = f"B, the baseline: {names[0]}."
    else:
        line = f"B, the baseline: the one of nearest beta of {', '.join(names)}; compare.csv names it for each row."
    if any(row.improvement for row in compared):
        line += " vs B: over the seeds that both have."
    lines = [line]
    if any(row.cells[key].unsure for row in compared for key in row.improvement):
        lines.append("~: the 95 % interval of the paired difference from B contains 0.")
    return lines


def _sampler(comparison: Comparison) -> list[str]:
    """Return what the samples are, where they are not the policy's own."""
    keys = ("sampler/temperature", "sampler/top_p")
    found = {key: row.cells[key].mean for row in comparison.rows for key in keys if key in row.cells}
    words = ", ".join(f"{key.partition('/')[2]} {value:g}" for key, value in found.items() if value != 1)
    return [f"Sampled with {words}: metrics that need the policy's own samples are left out."] if words else []


def _intervals(comparison: Comparison) -> list[str]:
    sources = {cell.source for row in comparison.rows for cell in row.cells.values()}
    lines = []
    if "seeds" in sources:
        lines.append("±: half of the 95 % interval of the mean over training seeds (Student's t).")
    if "prompts" in sources:
        lines.append("[low, high]: one seed alone, bootstrap 95 % interval over prompts; other seeds may differ more.")
    if not all(cell.finite for row in comparison.rows for cell in row.cells.values()):
        lines.append("∞: not finite in a seed at least, so without an interval and a rank.")
    return lines
