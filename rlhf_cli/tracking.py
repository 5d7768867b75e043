"""Trackers: curves, tables, figures and final numbers outside the run folder. A tracker's failure never ends a run."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rlhf_cli.config.schema import TrackerConfig
from rlhf_cli.errors import RunError
from rlhf_cli.wandb_run import first_line, open_wandb

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """What a run tells a tracker; `where` says where to look (empty: nowhere)."""

    where: str

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Add a point to the curves."""

    def summary(self, metrics: dict[str, float]) -> None:
        """Set the final numbers."""

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Show rows that share their keys."""

    def figure(self, name: str, path: Path) -> None:
        """Show a raster image."""

    def close(self, *, failed: bool = False) -> None:
        """Write what is left; `failed` marks a run that did not finish."""


class NoTracker:
    """The run folder alone."""

    where = ""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Do nothing."""

    def summary(self, metrics: dict[str, float]) -> None:
        """Do nothing."""

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Do nothing."""

    def figure(self, name: str, path: Path) -> None:
        """Do nothing."""

    def close(self, *, failed: bool = False) -> None:
        """Do nothing."""


class ForgivingTracker:
    """Another tracker whose failures are one warning: tracking must not cost a training run."""

    def __init__(self, tracker: Tracker) -> None:
        self.where = tracker.where
        self._tracker = tracker
        self._warned = False

    @contextmanager
    def _forgive(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._warned:
                logger.warning(
                    "the tracker failed and may miss data (%s); the run folder has everything", first_line(error)
                )
            self._warned = True

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Add a point to the curves."""
        with self._forgive():
            self._tracker.log(metrics, step)

    def summary(self, metrics: dict[str, float]) -> None:
        """Set the final numbers."""
        with self._forgive():
            self._tracker.summary(metrics)

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Show rows that share their keys."""
        with self._forgive():
            self._tracker.table(name, rows)

    def figure(self, name: str, path: Path) -> None:
        """Show a raster image."""
        with self._forgive():
            self._tracker.figure(name, path)

    def close(self, *, failed: bool = False) -> None:
        """Write what is left."""
        with self._forgive():
            self._tracker.close(failed=failed)


class TensorBoardTracker:
    """Event files in <run folder>/tensorboard."""

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run_dir / "tensorboard"
        self.where = f"tensorboard --logdir {folder}"
        self._writer = SummaryWriter(str(folder))
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2, default=str)}\n```")

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Add a point to each scalar."""
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def summary(self, metrics: dict[str, float]) -> None:
        """Write each final number as the scalar final/<key>."""
        for key, value in metrics.items():
            self._writer.add_scalar(f"final/{key}", value, 0)

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write the rows as a text panel, one json object a line."""
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        self._writer.add_text(name, f"```json\n{lines}\n```")

    def figure(self, name: str, path: Path) -> None:
        """Write an image panel."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), dataformats="HWC")

    def close(self, *, failed: bool = False) -> None:
        """Flush the event file."""
        self._writer.close()


def check_tracker(cfg: TrackerConfig) -> None:
    """Refuse a tracker whose package is missing; imports nothing.

    Raises:
        RunError: tensorboard is asked for and not installed.
    """
    if cfg.name == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        todo = "pip install rlhf-cli[tensorboard], or choose tracker=none"
        raise RunError("tracker=tensorboard cannot start", "the package tensorboard is not installed", todo)


def open_tracker(
    cfg: TrackerConfig,
    *,
    run_dir: Path,
    name: str,
    group: str,
    job_type: str,
    config: dict[str, Any],
    tags: list[str],
    run_id: str,
) -> Tracker:
    """Start the tracker of a run; one that cannot start is a warning.

    Args:
        cfg: which tracker, and its project, entity, group and tags.
        run_dir: the run folder, where every local file goes.
        name: the run's name.
        group: the group where cfg has none.
        job_type: what the run does: the command.
        config: the full config, shown beside the run.
        tags: labels added to those of cfg.
        run_id: stable over continuations of one run, so that they are one run in the tracker too.

    Raises:
        RunError: the tracker's package is not installed.
    """
    check_tracker(cfg)
    if cfg.name == "none":
        return NoTracker()
    try:
        if cfg.name == "tensorboard":
            return ForgivingTracker(TensorBoardTracker(run_dir, config))
        labels = list(dict.fromkeys([*cfg.tags, *tags]))
        place = {"project": cfg.project, "entity": cfg.entity, "dir": str(run_dir), "id": run_id}
        identity = {"group": cfg.group or group, "job_type": job_type, "name": name, "tags": labels, "config": config}
        tracker = open_wandb({**place, **identity}, _logged(run_dir / "training_log.jsonl"))
        return NoTracker() if tracker is None else ForgivingTracker(tracker)
    except Exception as error:
        logger.warning("tracker=%s could not start (%s); going on without it", cfg.name, first_line(error))
        return NoTracker()


def _logged(log: Path) -> list[tuple[dict[str, float], int]]:
    """Return (finite metrics, step) of each line of a training log, up to one that a crash cut short."""
    points = []
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else []:
        try:
            values = json.loads(line)
        except ValueError:
            break
        step = values.pop("step")
        points.append(({key: value for key, value in values.items() if value is not None}, step))
    return points
