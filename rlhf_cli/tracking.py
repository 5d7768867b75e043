"""Trackers: curves, tables, figures and final numbers outside the run folder. A tracker's failure never ends a run."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rlhf_cli.config.schema import TrackerConfig
from rlhf_cli.errors import RunError

logger = logging.getLogger(__name__)

ONLINE_START_SECONDS = 6.0  # imports and the offline start come on top; together they must stay below 10
FINISH_SECONDS = 30.0  # how long an upload may hold up the end of a run; the rest stays on disk


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
                logger.warning("the tracker failed and may miss data (%s); the run folder has everything", _text(error))
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


class WandbTracker:
    """A Weights & Biases run, online or offline, that has been started."""

    def __init__(self, run: Any, *, online: bool) -> None:
        self._run = run
        self._folder = Path(run.dir).parent  # wandb's own folder of this run; run.dir is its files/
        self.where = str(run.url) if online else f"offline; to upload: wandb sync {self._folder}"

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Add a point to the curves; wandb drops a step it already has."""
        self._run.log(metrics, step=step)

    def summary(self, metrics: dict[str, float]) -> None:
        """Set the run's summary."""
        self._run.summary.update(metrics)

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Log a table."""
        import wandb

        columns: list[str | int] = list(rows[0]) if rows else []
        data = [[row.get(str(column)) for column in columns] for row in rows]
        with _staging(self._folder):
            self._run.log({name: wandb.Table(columns=columns, data=data, allow_mixed_types=True)})

    def figure(self, name: str, path: Path) -> None:
        """Log an image."""
        import wandb

        self._run.log({f"figures/{name}": wandb.Image(str(path))})

    def close(self, *, failed: bool = False) -> None:
        """Finish the run; an upload gives up after FINISH_SECONDS."""
        self._run.finish(exit_code=int(failed))


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
        identity = {"project": cfg.project, "entity": cfg.entity, "group": cfg.group or group, "tags": labels}
        return _open_wandb({**identity, "dir": str(run_dir), "name": name, "config": config, "id": run_id})
    except Exception as error:
        logger.warning("tracker=%s could not start (%s); going on without it", cfg.name, _text(error))
        return NoTracker()


def _open_wandb(arguments: dict[str, Any]) -> Tracker:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its upload can hold up the exit for 10 s without network
    import wandb

    mode = wandb.setup(settings=wandb.Settings(silent=True)).settings.mode
    if mode == "disabled":
        return NoTracker()
    if mode not in ("offline", "dryrun"):
        try:
            if wandb.login(prompt=False, verify=False):
                run = wandb.init(**arguments, mode="online", resume="allow", settings=_wandb_settings())
                return ForgivingTracker(WandbTracker(run, online=True))
        except Exception as error:
            logger.warning("W&B cannot be reached (%s); tracking offline", _text(error))
            wandb.teardown()  # frees the run id
        # Stays for the process, so that the next jobs of a multirun do not try again.
        wandb.setup(settings=wandb.Settings(silent=True, mode="offline"))
    run = wandb.init(**arguments, mode="offline", settings=_wandb_settings())
    return ForgivingTracker(WandbTracker(run, online=False))


@contextmanager
def _staging(folder: Path) -> Iterator[None]:
    """Let wandb stage a table beside its run, not in the home folder, where a later `wandb sync` may miss it."""
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]


def _wandb_settings() -> Any:
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        x_disable_stats=True,
        save_code=False,
        init_timeout=ONLINE_START_SECONDS,
        finish_timeout=FINISH_SECONDS,
    )


def _text(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
