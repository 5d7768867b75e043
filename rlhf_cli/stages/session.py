"""What every command does around its story: open the run folder, adopt a stage from the store, print the summary."""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_cli import ranks
from rlhf_cli.config.compose import as_dict, identity, own_modules
from rlhf_cli.config.schema import (
    AlignConfig,
    CommandConfig,
    EvaluateConfig,
    OnlineAlgoConfig,
    TrainedRewardConfig,
)
from rlhf_cli.data import content, load
from rlhf_cli.errors import RUN_FOLDER, UserError
from rlhf_cli.metrics.guard import crossed
from rlhf_cli.run import Run, default_name
from rlhf_cli.stages import priors
from rlhf_cli.stages.judgements import check_calibration
from rlhf_cli.store import check_folder, read_json
from rlhf_cli.trainers.common import resolve_device, share_of_batch

# Bytes. Larger tensors are returned when they are freed. Those of a pretrained model come in sizes that leave the heap
# in pieces: keeping them saves a seventh of the time for half as much memory again (benchmarks/results/real_shape.md).
MAPPED, MAPPED_PRETRAINED = 32 * 2**20, 2**20


class Session:
    """An open run folder with what commands do to it."""

    def __init__(self, run: Run, *, fresh: bool) -> None:
        self.run, self.directory, self.finished, self.log = run, run.directory, run.finished, run.log
        self.fresh = fresh  # made by this command

    def __enter__(self) -> Session:
        self.run.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Close the run; a new one that a user's mistake ended before anything was trained leaves no folder."""
        self.run.__exit__(kind, error, trace)
        if isinstance(error, UserError) and self.fresh and not self.run.path("training_log.jsonl").exists():
            shutil.rmtree(self.directory, ignore_errors=True)
        elif isinstance(error, Exception):  # not an interruption
            error.add_note(f"{RUN_FOLDER}{ranks.shared(self.directory)}")

    def adopt(self, stage: Path, name: str) -> None:
        """Copy a finished stage from the store into the run folder: model/, metrics."""
        if ranks.is_main():
            copy_model(stage / "model", self.directory / "model")
        self.run.write_metrics(json.loads((stage / "metrics.json").read_text(encoding="utf-8")))
        say(f"{name}: {stage}")


def open_run(
    cfg: CommandConfig,
    command: str,
    what: str,
    overrides: Sequence[str],
    config_dir: str | None,
    more_identity: dict[str, Any] | None = None,
) -> Session:
    """Return the open run folder of a command; a name is made from the config where run_dir is null.

    `more_identity` is what can change the result besides the config.

    Raises:
        RunError: the folder cannot be written or belongs to another run; the device does not exist.
        DataError: the dataset cannot be used.
    """
    check_folder(Path(cfg.store_dir), "store_dir")
    check_shares(cfg)
    quiet_libraries()
    keep_freed_memory(MAPPED if cfg.model.path is None else MAPPED_PRETRAINED)
    own = {**own_modules(cfg), **priors.encoders(cfg)}  # may change under the same config
    more = {**(more_identity or {}), **({"own": own} if own else {})}
    run_identity = {"command": command, **identity(cfg), "data": content(cfg.dataset), **more}
    dataset = cfg.dataset.name
    name = default_name(what, dataset=dataset, model=cfg.model.name, seed=cfg.seed, identity=run_identity)
    directory = Path(cfg.run_dir) if cfg.run_dir else Path("runs") / name
    check_folder(directory, "run_dir")
    if (read_json(directory / "status.json") or {}).get("state") != "finished":
        resolve_device(cfg.device)  # all refuse here, before anything is written or a tracker starts
        check_calibration(cfg, load(cfg.dataset))
        priors.check(cfg)
    fresh = ranks.is_main() and not directory.exists()
    run = Run.open(
        directory,
        command=command,
        config=as_dict(cfg),
        identity=run_identity,
        tracker=cfg.tracker,
        group=cfg.algo.name if isinstance(cfg, AlignConfig) else what,
        overrides=overrides,
        config_dir=config_dir,
        name=cfg.tracker.run_name or (name if cfg.run_dir is None else None),
        tags=_tags(cfg),
    )
    return Session(run, fresh=fresh)


def check_shares(cfg: CommandConfig) -> None:
    """Refuse batches that the processes cannot share, of any stage that may be trained.

    Raises:
        ConfigError: naming the batch.
    """
    names = [] if cfg.trainer.sft.max_steps == 0 else ["sft"]
    if isinstance(getattr(cfg, "reward", None), TrainedRewardConfig):
        names.append("rm")
    if isinstance(cfg, AlignConfig) and not isinstance(cfg, EvaluateConfig):
        names.append("online" if isinstance(cfg.algo, OnlineAlgoConfig) else "pairwise")
    for name in names:
        share_of_batch(getattr(cfg.trainer, name), name)


def _tags(cfg: CommandConfig) -> list[str]:
    """Return what runs are filtered by: algorithm, dataset, model, seed, reward."""
    algo, reward = (getattr(getattr(cfg, block, None), "name", None) for block in ("algo", "reward"))
    found = [algo, cfg.dataset.name, cfg.model.name, f"seed{cfg.seed}", reward]
    return [name for name in found if name is not None]


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and notes about their defaults out of the user's terminal."""
    import warnings

    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    hub_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)


def keep_freed_memory(mapped: int) -> None:
    """Let glibc keep freed tensors below `mapped` bytes: returning them costs page faults at every step.

    The same as MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_, which must be set before Python starts.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # not glibc
        return
    mallopt(trim_threshold, 256 * 2**20)
    mallopt(mmap_threshold, mapped)


def copy_model(source: Path, target: Path) -> None:
    """Copy a model folder; the target appears whole or not at all."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    replace_folder(partial, target)


def replace_folder(source: Path, target: Path) -> None:
    """Move a folder to the place of another, which may not exist."""
    shutil.rmtree(target, ignore_errors=True)
    source.rename(target)


def summary(session: Session, keys: Sequence[str], files: str = "metrics.json, training_log.jsonl, model/") -> None:
    """Print where everything is and the numbers that matter."""
    metrics = session.run.metrics()
    if session.finished:
        say(f"already finished, nothing was trained: {session.directory}")
    for key in keys:
        value = metrics.get(key)
        if value is not None:
            worst, low, high = (metrics.get(f"{key}{end}") for end in ("_max", "/lo", "/hi"))
            beside = f"   95 % {low:.4f} to {high:.4f}" if low is not None and high is not None else ""
            say(f"  {key:<24} {value:8.4f}{beside}" + (f"   worst {worst:.4f}" if worst is not None else ""))
    for line in warnings_of(metrics):
        say(f"  watch out: {line}")
    say(f"run folder: {session.directory}  ({files})")
    where = session.run.tracker.where
    if where:
        say(f"tracker: {where}")


def warnings_of(metrics: dict[str, float | None]) -> list[str]:
    """Return what a reader of these metrics should not overlook, one sentence each."""

    def value(key: str) -> float:
        return metrics.get(key) or 0.0

    on_pool = "pool/size" in metrics  # long responses differ by hundreds of nats there, in any policy
    worst_kl, worst_off = 0.0 if on_pool else value("pm/kl_rm_policy_max"), value("pm/offset_mass_max")
    endless = 1 - value("eos_rate") if metrics.get("eos_rate") is not None else 0.0
    found = {
        f"on its worst question {worst_off:.0%} of the policy's mass is on text that is no valid answer": worst_off
        > 0.1,
        f"on its worst question an answer people give is nearly gone (forward KL {worst_kl:.1f} nats)": worst_kl > 1,
        f"the log-prob of chosen responses fell by {-value('chosen_logps_change'):.1f} nats (known of DPO; algo=rpo "
        "holds it)": value("chosen_logps_change") < -1,
        f"{endless:.0%} of the responses do not end within dataset.max_completion_tokens": endless > 0.5,
    }
    return [sentence for sentence, holds in found.items() if holds] + crossed(metrics)


def say(line: str) -> None:
    """Print one line for the user."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
