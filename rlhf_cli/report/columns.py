"""The columns of the comparison table, and what is said below it: meanings, baseline, intervals, warnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_cli.metrics.glossary import describe
from rlhf_cli.report.comparison import Comparison
from rlhf_cli.report.run_groups import Kind

REASON_CHARACTERS = 100


@dataclass(frozen=True)
class Column:
    """A metric of the table, or its relative improvement over the baseline; a header is short, so that many fit."""

    key: str
    header: str
    versus: bool = False


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
# What a narrow terminal goes without, first to last.
EXPENDABLE: dict[Kind, tuple[str, ...]] = {
    "exact": ("optimum", "worst", "diverg.", "people", "target", "drift", "KL"),
    "text": ("entropy", "KL", "diverg.", "ends", "length", "drift", "variety"),
    "rm": ("beyond", "damage", "scale"),
}


def columns(comparison: Comparison) -> list[Column]:
    """Return the columns for which any row has a number."""

    def there(column: Column) -> bool:
        of = (row.improvement if column.versus else row.cells for row in comparison.rows)
        return any(column.key in found for found in of)

    return [column for column in COLUMNS[comparison.kind] if there(column)]


def meaning(column: Column, comparison: Comparison) -> str:
    """Return what a column says, with unit and direction."""
    metric = describe(column.key)
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
    return [line]


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
    return lines
