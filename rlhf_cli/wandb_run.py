"""A Weights & Biases run: started without a prompt, its curves, final numbers, tables, figures, pages and files."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_cli.metrics.glossary import describe, known

logger = logging.getLogger(__name__)

ONLINE_START_SECONDS = 6.0  # imports and the offline start come on top; together they must stay below 10
FINISH_SECONDS = 30.0  # how long an upload may hold up the end of a run; the rest stays on disk


class WandbTracker:
    """A Weights & Biases run, online or offline, that has been started.

    Args:
        run: wandb's own object.
        online: False where everything stays on disk until `wandb sync`.
        earlier: (metrics, step) that an earlier process logged to the same run. Offline they are logged again: each
            process has a file of its own, and of several files of one run the one that is synced last wins.
    """

    def __init__(self, run: Any, *, online: bool, earlier: Iterable[tuple[dict[str, float], int]] = ()) -> None:
        self._run = run
        self._folder = Path(run.dir).parent  # wandb's own folder of this run; run.dir is its files/
        self._best: dict[str, tuple[str, float]] = {}  # of each curve: min or max, and that value
        self._defined: set[str] = set()
        self.where = str(run.url) if online else f"offline; to upload: wandb sync {self._folder}"
        for metrics, step in earlier:
            self._note(metrics)
            if not online:
                self._run.log({"step": step, **metrics}, step=step)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Add a point to the curves, over the optimizer step; wandb drops a step it already has."""
        self._note(metrics)
        self._run.log({"step": step, **metrics}, step=step)

    def _note(self, metrics: dict[str, float]) -> None:
        """Define the axis and summary of each new curve, and keep the best of its finite values."""
        for key, value in metrics.items():
            better = {"lower": "min", "higher": "max"}.get(describe(key).better if known(key) else "none")
            if key not in self._defined:
                self._run.define_metric(key, step_metric="step", summary=f"{better},last" if better else None)
                self._defined.add(key)
            if better is not None and math.isfinite(value):
                self._best[key] = (
                    better,
                    (min if better == "min" else max)(value, self._best.get(key, (better, value))[1]),
                )

    def summary(self, metrics: dict[str, float]) -> None:
        """Set the final numbers: as KEY, or as KEY.last beside KEY.min or KEY.max where there was such a curve."""
        self._note({key: value for key, value in metrics.items() if key in self._best})  # may be the best yet
        self._run.log({})  # the last point of the curves waits for the next, and would overwrite the final numbers
        nested = {
            key: {side: value, "last": metrics[key]} for key, (side, value) in self._best.items() if key in metrics
        }
        self._run.summary.update({**metrics, **nested})

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Log a table; a row may lack a column."""
        import wandb

        columns: list[str | int] = list(dict.fromkeys(key for row in rows for key in row))
        data = [[row.get(str(column)) for column in columns] for row in rows]
        with _staging(self._folder):
            self._run.log({name: wandb.Table(columns=columns, data=data, allow_mixed_types=True)})

    def figure(self, name: str, path: Path) -> None:
        """Log an image."""
        import wandb

        self._run.log({f"figures/{name}": wandb.Image(str(path))})

    def page(self, name: str, path: Path) -> None:
        """Log an HTML page as it is."""
        import wandb

        self._run.log({name: wandb.Html(path.read_text(encoding="utf-8"), inject=False, data_is_not_path=True)})

    def files(self, name: str, kind: str, paths: dict[str, Path]) -> None:
        """Log files as one artifact; the keys are their names in it."""
        import wandb

        with _staging(self._folder):
            artifact = wandb.Artifact(name, type=kind)
            for inside, path in paths.items():
                artifact.add_file(str(path), name=inside)
            self._run.log_artifact(artifact)

    def close(self, *, failed: bool = False) -> None:
        """Finish the run; an upload gives up after FINISH_SECONDS."""
        self._run.finish(exit_code=int(failed))


def open_wandb(arguments: dict[str, Any], earlier: Iterable[tuple[dict[str, float], int]] = ()) -> WandbTracker | None:
    """Start a W&B run: online with an account, offline without one or without a network, never with a prompt.

    Args:
        arguments: those of wandb.init: project, dir, name, config and so on.
        earlier: what an earlier process logged to this run.

    Returns:
        The tracker, or None where the user has disabled wandb.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its upload can hold up the exit for 10 s without network
    import wandb

    # wandb's own process, which writes there, keeps the working directory of the first run.
    arguments = {**arguments, "dir": os.path.abspath(arguments["dir"])}
    mode = wandb.setup(settings=wandb.Settings(silent=True)).settings.mode
    if mode == "disabled":
        return None
    if mode not in ("offline", "dryrun"):
        try:
            if wandb.login(prompt=False, verify=False):
                run = wandb.init(**arguments, mode="online", resume="allow", settings=_wandb_settings())
                return WandbTracker(run, online=True, earlier=earlier)
        except Exception as error:
            logger.warning("W&B cannot be reached (%s); tracking offline", first_line(error))
            wandb.teardown()  # frees the run id
        # Stays for the process, so that the next jobs of a multirun do not try again.
        wandb.setup(settings=wandb.Settings(silent=True, mode="offline"))
    run = wandb.init(**arguments, mode="offline", settings=_wandb_settings())
    return WandbTracker(run, online=False, earlier=earlier)


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


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
