"""A comparison as a W&B run of its own: its table, figures and page, and all its files as one artifact."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_cli.errors import RunError
from rlhf_cli.wandb_run import first_line, open_wandb

JOB_TYPE = "compare"
PROJECT = "rlhf"  # where the runs name none: that of conf/tracker/wandb.yaml
LONGEST_NAME = 120  # W&B takes 128 characters


def publish(
    out: Path,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    figures: Sequence[Path],
    html: Path,
    trackers: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Log a finished comparison to Weights & Biases and return where it is; offline it stays in `out`/wandb.

    Args:
        out: the folder of the comparison; all its files become an artifact of type report.
        title: the run's name.
        rows: the table, one flat mapping a row.
        figures: raster images in `out`.
        html: the page.
        trackers: `tracker` of each compared run's config: project and entity are the first one's, the group is the one
            that all share, if they do.

    Returns:
        An address, or the command that uploads; empty where the user has disabled wandb.

    Raises:
        RunError: wandb failed; the files in `out` are complete.
    """
    first = trackers[0] if trackers else {}
    groups = {tracker.get("group") for tracker in trackers}
    arguments = {
        "project": first.get("project") or PROJECT,
        "entity": first.get("entity"),
        "group": groups.pop() if len(groups) == 1 else None,
        "job_type": JOB_TYPE,
        "name": title[:LONGEST_NAME],
        "tags": [JOB_TYPE],
        "dir": str(out),
        "id": uuid.uuid4().hex[:16],
        "config": {"out": str(out), "runs": len(trackers), "rows": len(rows)},
    }
    files = _files(out)  # before wandb writes there
    run = None
    try:
        run = open_wandb(arguments)
        if run is not None:
            run.table("comparison", [dict(row) for row in rows])
            for path in figures:
                run.figure(path.relative_to(out).with_suffix("").as_posix(), path)
            run.page("report", html)
            run.files(_artifact_name(title), "report", files)
            run.close()
    except Exception as error:
        with suppress(Exception):
            if run is not None:
                run.close(failed=True)
        todo = f"Its files are complete in {out}"
        raise RunError("the comparison could not be logged to W&B", first_line(error), todo) from error
    return "" if run is None else run.where


def _artifact_name(title: str) -> str:
    return re.sub(r"[^\w.-]+", "-", title, flags=re.ASCII).strip("-")[:LONGEST_NAME] or JOB_TYPE


def _files(folder: Path) -> dict[str, Path]:
    """Return every file of a comparison by its path in the folder, without those of earlier W&B runs."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {inside.as_posix(): path for inside, path in found.items() if inside.parts[0] != "wandb"}
