"""What every command does around its story: open the run folder, adopt a stage from the store, print the summary."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_cli.config.compose import as_dict, identity
from rlhf_cli.config.schema import AlignConfig, CommandConfig
from rlhf_cli.errors import DataError
from rlhf_cli.run import Run, default_name
from rlhf_cli.store import check_folder


class Session:
    """An open run folder with what commands do to it."""

    def __init__(self, run: Run) -> None:
        self.run, self.directory, self.finished, self.log = run, run.directory, run.finished, run.log

    def __enter__(self) -> Session:
        self.run.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.run.__exit__(*error)  # type: ignore[arg-type]

    def adopt(self, stage: Path, name: str) -> None:
        """Copy a finished stage from the store into the run folder: model/, metrics."""
        copy_model(stage / "model", self.directory / "model")
        self.run.write_metrics(json.loads((stage / "metrics.json").read_text(encoding="utf-8")))
        say(f"{name}: {stage}")


def open_run(cfg: CommandConfig, command: str, what: str, overrides: Sequence[str], config_dir: str | None) -> Session:
    """Return the open run folder of a command; a name is made from the config where run_dir is null.

    Raises:
        RunError: the folder cannot be written or belongs to another run.
    """
    check_folder(Path(cfg.store_dir), "store_dir")
    quiet_libraries()
    run_identity = {"command": command, **identity(cfg)}
    dataset = cfg.dataset.source
    name = default_name(what, dataset=dataset, model=cfg.model.name, seed=cfg.seed, identity=run_identity)
    run = Run.open(
        Path(cfg.run_dir) if cfg.run_dir else Path("runs") / name,
        command=command,
        config=as_dict(cfg),
        identity=run_identity,
        tracker=cfg.tracker,
        group=cfg.algo.name if isinstance(cfg, AlignConfig) else what,
        overrides=overrides,
        config_dir=config_dir,
        name=name if cfg.run_dir is None else None,
        tags=[dataset, cfg.model.name, f"seed{cfg.seed}"],
    )
    return Session(run)


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and notes about their defaults out of the user's terminal."""
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)


def copy_model(source: Path, target: Path) -> None:
    """Copy a model folder; the target appears whole or not at all."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def require_batch(rows: Sequence, batch: int, what: str, key: str) -> None:
    """Refuse data that does not fill one batch.

    Raises:
        DataError: fewer rows than `batch`.
    """
    if len(rows) < batch:
        raise DataError(
            f"{len(rows)} {what} are too few for one batch of {batch}",
            "nothing would be trained",
            f"add data or set {key}={max(1, len(rows))} or less",
        )


def summary(session: Session, keys: Sequence[str]) -> None:
    """Print where everything is and the numbers that matter."""
    metrics = session.run.metrics()
    if session.finished:
        say(f"already finished, nothing was trained: {session.directory}")
    for key in keys:
        value = metrics.get(key)
        if value is not None:
            worst = metrics.get(f"{key}_max")
            say(f"  {key:<24} {value:8.4f}" + (f"   worst {worst:.4f}" if worst is not None else ""))
    say(f"run folder: {session.directory}  (metrics.json, training_log.jsonl, model/)")
    where = session.run.tracker.where
    if where:
        say(f"tracker: {where}")


def say(line: str) -> None:
    """Print one line for the user."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
