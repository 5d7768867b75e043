"""A comparison as CSV: every metric of every row in long form, and every run with its settings and metrics."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from rlhf_cli.report.cells import metric_keys
from rlhf_cli.report.columns import columns
from rlhf_cli.report.comparison import Comparison, Row
from rlhf_cli.report.run_groups import settings

FIELDS = ["set", "policy", "status", "seeds", "metric", "mean", "lo", "hi", "half", "source", "baseline"]
FIELDS += ["difference", "difference_lo", "difference_hi", "improvement_percent", "rank", "flagged"]
FIELDS += ["rank_by", "n", "reason"]


def rows_csv(comparisons: Sequence[Comparison]) -> str:
    """Return every metric of every row, one line each; a run without numbers has one line."""
    lines: list[dict[str, Any]] = []
    for one in comparisons:
        for row in one.rows:
            lines += [{"set": one.title, "rank_by": one.rank_by, **line} for line in _lines(row)]
        for run in one.stopped:
            head = {"set": one.title, "policy": run.name, "status": run.state}
            lines.append({**head, "reason": " ".join(run.reason.split())})
    return _csv(FIELDS, lines)


def runs_csv(comparisons: Sequence[Comparison]) -> str:
    """Return one line a run: where it is, its state, each setting that differs between any two, every metric."""
    everyone = [run for one in comparisons for group in one.groups.values() for run in group]
    values = {id(run): settings(run) for run in everyone}
    found = sorted({key for of in values.values() for key in of})
    keys = [key for key in found if len({of.get(key) for of in values.values()}) > 1]
    metrics = metric_keys({key: value for run in everyone for key, value in run.metrics.items()})
    lines = []
    for one in comparisons:
        for name, group in one.groups.items():
            for run in group:
                head = {"path": run.path, "set": one.title, "policy": name, "seed": run.seed}
                head |= {"state": run.state, "reason": " ".join(run.reason.split())}
                lines.append({**head, **{key: values[id(run)].get(key, "") for key in keys}, **run.metrics})
    return _csv(["path", "set", "policy", "seed", "state", "reason", *keys, *metrics], lines)


def summaries(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return one dict a row, all with the same keys: names, rank, warnings, mean and half interval of each column."""
    found = []
    shown = list(dict.fromkeys(column.key for one in comparisons for column in columns(one)))
    for one in comparisons:
        for row in one.rows:
            line = {"set": one.title, "policy": row.name, "status": "finished", "seeds": len(row.runs)}
            line |= {"rank": row.rank, "flagged": "; ".join(row.flags), "baseline": row.baseline}
            for key in shown:
                cell = row.cells.get(key)
                line |= {
                    key: cell.mean if cell is not None and cell.finite else None,
                    f"{key} ±": None if cell is None else cell.half,
                }
            found.append(line)
        found += [
            {"set": one.title, "policy": run.name, "status": f"{run.state}: {run.reason}".rstrip(": ")}
            for run in one.stopped
        ]
    names = dict.fromkeys(name for line in found for name in line)
    return [{name: line.get(name) for name in names} for line in found]


def _lines(row: Row) -> list[dict[str, Any]]:
    lines = []
    for key, cell in sorted(row.cells.items()):
        if key.startswith("reference/"):  # the reference has a row of its own
            continue
        line = {"policy": row.name, "status": "finished", "seeds": cell.seeds, "metric": key, "mean": cell.mean}
        line |= {"lo": cell.low, "hi": cell.high, "half": cell.half, "source": cell.source, "baseline": row.baseline}
        if cell.difference is not None:
            line |= {"difference": cell.difference.mean}
            line |= {"difference_lo": cell.difference.low, "difference_hi": cell.difference.high}
        line |= {"improvement_percent": row.improvement.get(key), "rank": row.rank, "flagged": int(bool(row.flags))}
        line["n"] = cell.prompts
        lines.append(line)
    return lines


def _csv(fields: Sequence[str], lines: Iterable[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
