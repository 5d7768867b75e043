"""The run folder: what was asked, with what, how far it came, and its numbers; one folder a run, resumable."""

from __future__ import annotations

import json
import logging
import math
import random
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from filelock import FileLock, Timeout

from rlhf_cli import ranks, store
from rlhf_cli.config.schema import TrackerConfig
from rlhf_cli.errors import RunError, UserError
from rlhf_cli.provenance import now, provenance
from rlhf_cli.tracking import NoTracker, Tracker, check_tracker, open_tracker

logger = logging.getLogger(__name__)


def default_name(what: str, *, dataset: str, model: str, seed: int, identity: dict[str, Any]) -> str:
    """Return the folder name of a run that was given none, e.g. pm-survey-tiny-seed0-1a2b3c4d.

    Args:
        what: the algorithm, or the command where there is none.
        identity: everything that can change the result; eight hex digits of its hash end the name.
    """
    name = f"{what}-{dataset}-{model}-seed{seed}-{store.content_hash(identity)[:8]}"
    return re.sub(r"[^\w.-]+", "-", name)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def mark_complete(folder: Path) -> None:
    """Mark a checkpoint as whole: call it after the checkpoint's last file is written."""
    store.write_text(folder / "complete", "")


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the whole checkpoint-<step> folder with the highest step, or None."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / "complete").is_file()]
    steps = {int(match[1]): path for path in whole if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    return steps[max(steps)] if steps else None


class Run:
    """An open run folder, made by `Run.open`. Leave it through `with`: that writes its status, closes its tracker.

    Where `finished` is True, the same run has ended before and nothing is written: read `metrics()`.
    """

    def __init__(self, directory: Path, lock: FileLock | None) -> None:
        self.directory = directory
        self.finished = False
        self.tracker: Tracker = NoTracker()
        self._lock = lock
        self._started = False

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        command: str,
        config: dict[str, Any],
        identity: dict[str, Any],
        tracker: TrackerConfig,
        group: str,
        overrides: Sequence[str] = (),
        config_dir: str | None = None,
        name: str | None = None,
        tags: Sequence[str] = (),
    ) -> Run:
        """Create the run folder, or open it again: finished where the same run is done, continued where it is not.

        Args:
            directory: the run folder, new, empty, or of the same run.
            command: the command's name, e.g. align.
            config: the resolved config, plain containers.
            identity: the part of the config that can change the result; another identity is another run.
            tracker: the tracker's config.
            group: the tracker's group where its config names none.
            overrides: the Hydra overrides as given.
            config_dir: the user's own config directory.
            name: the tracker's name of the run; the folder's name by default.
            tags: labels added to the tracker config's own.

        Raises:
            RunError: the folder cannot be written, is no run folder, is another run's or is in use.
        """
        check_tracker(tracker)
        if not ranks.is_main():
            return cls._joined(directory)
        _check_directory(directory)
        store.make_folder(directory, "run_dir")
        run = cls(directory, _lock(directory))
        try:
            run._recognise(identity)
            if not run.finished:
                asked = {"command": command, "overrides": list(overrides), "config_dir": config_dir}
                run._describe(asked, config, identity)
                run.tracker = open_tracker(
                    tracker,
                    run_dir=directory,
                    name=name or directory.resolve().name,
                    group=group,
                    job_type=command,
                    config=config,
                    tags=[command, *tags],
                    run_id=run._run_id,
                )
        except BaseException as error:
            run.__exit__(type(error), error, None)
            raise
        ranks.broadcast(run.finished)
        return run

    @classmethod
    def _joined(cls, directory: Path) -> Run:
        """Return the run as a rank beside rank 0 has it: what it writes goes to a folder of its own, and vanishes."""
        finished = ranks.broadcast(False)
        run = cls(directory if finished else ranks.private(directory), None)
        run.finished = finished
        return run

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                ranks.barrier()  # a run is finished once every rank is done
            if self._started:
                self._end(error)
        finally:
            try:
                self.tracker.close(failed=error is not None)
            finally:
                if self._lock is not None:
                    self._lock.release()

    def path(self, name: str) -> Path:
        """Return the path of a file in the run folder."""
        return self.directory / name

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Append one line to training_log.jsonl and to the tracker's curves; a number that is not finite is null."""
        with self.path("training_log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **_finite(metrics)}) + "\n")
        self.tracker.log({key: float(value) for key, value in metrics.items()}, step)

    def rewind(self, step: int) -> None:
        """Drop the log lines after a step: the run goes on from there. -1 drops all, to start over."""
        path = self.path("training_log.jsonl")
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            store.write_text(path, "".join(f"{line}\n" for line in lines if _is_until(line, step)))

    def write_metrics(self, metrics: dict[str, float]) -> None:
        """Write metrics.json (flat) and the tracker's summary; what is not finite is null, with a warning."""
        finite = _finite(metrics)
        if bad := [key for key, value in finite.items() if value is None]:
            logger.warning("%d metrics are not finite and are written as null: %s", len(bad), ", ".join(bad))
        store.write_json(self.path("metrics.json"), finite)
        self.tracker.summary({key: value for key, value in finite.items() if value is not None})

    def metrics(self) -> dict[str, float | None]:
        """Return the final metrics, empty where there are none yet."""
        return store.read_json(self.path("metrics.json")) or {}

    def write_completions(self, rows: list[dict[str, Any]]) -> None:
        """Write sampled completions, one json object a line, and the tracker's table."""
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        store.write_text(self.path("completions.jsonl"), "".join(lines))
        self.tracker.table("completions", rows)

    def add_figure(self, path: Path) -> None:
        """Show a figure, a raster image in the run folder, in the tracker."""
        self.tracker.figure(path.stem, path)

    def _recognise(self, identity: dict[str, Any]) -> None:
        manifest = _manifest(self.directory)
        if manifest is not None:
            if store.content_hash(manifest["identity"]) != store.content_hash(identity):
                what = f"run_dir={self.directory} belongs to a run with another config"
                todo = "choose another run_dir, or repeat the command with the old values to go on with that run"
                raise RunError(what, store.identity_difference(manifest["identity"], identity), todo)
            self.finished = (store.read_json(self.path("status.json")) or {}).get("state") == "finished"
        # Drawn when the folder is made: a continued run goes on with its curves, another run in its place does not.
        self._run_id = (manifest or {}).get("run_id") or uuid.uuid4().hex[:16]

    def _describe(self, asked: dict[str, Any], config: dict[str, Any], identity: dict[str, Any]) -> None:
        manifest = {"run_id": self._run_id, "identity": identity, **provenance(config)}
        store.write_json(self.path("manifest.json"), manifest)
        store.write_text(self.path("config.yaml"), yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        store.write_json(self.path("overrides.json"), asked)
        self._write_status("running")
        self._started = True

    def _end(self, error: BaseException | None) -> None:
        if error is None:
            self._write_status("finished")
        else:
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self._write_status(state, f"{name}{error}".rstrip(": "))

    def _write_status(self, state: str, error: str | None = None) -> None:
        path = self.path("status.json")
        started = (store.read_json(path) or {}).get("started") or now()
        ended = None if state == "running" else now()
        store.write_json(path, {"state": state, "started": started, "ended": ended, "error": error})


def _manifest(directory: Path) -> dict[str, Any] | None:
    manifest = store.read_json(directory / "manifest.json")
    return manifest if manifest and "identity" in manifest else None


def _check_directory(directory: Path) -> None:
    store.check_folder(directory, "run_dir")
    if directory.is_dir() and _manifest(directory) is None:
        others = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
        if others:
            why = f"it holds files ({others[0]} …) and is not a run folder"
            raise RunError(f"run_dir={directory} is in use", why, "choose a new or an empty run_dir")


def _lock(directory: Path) -> FileLock:
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        what = f"run_dir={directory} is open in another process"
        raise RunError(what, "one process writes a run folder at a time", "wait, or choose another run_dir") from None
    return lock


def _finite(metrics: dict[str, float]) -> dict[str, float | None]:
    return {key: _number(value) if math.isfinite(value) else None for key, value in metrics.items()}


def _number(value: float) -> float:
    return value if isinstance(value, int) else float(value)


def _is_until(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except ValueError:  # the line a crash cut short
        return False
