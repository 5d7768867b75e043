"""Starting a job elsewhere than in this process: as several ranks, or on a cluster.

A way of starting is a config of the group `launch`; what a job is does not depend on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_cli import ranks
from rlhf_cli.config.launching import AccelerateConfig, RayConfig, SlurmConfig
from rlhf_cli.config.schema import CommandConfig
from rlhf_cli.errors import ConfigError


def is_elsewhere(cfg: CommandConfig) -> bool:
    """Return whether the job is for other processes than this one.

    Raises:
        ConfigError: something else than rlhf has started this one as a rank.
    """
    if ranks.launched():
        return False
    ranks.refuse_others()
    return cfg.launch.name != "local"


def is_submitted(cfg: CommandConfig) -> bool:
    """Return whether the job is for a cluster's queue: it is not done when the command ends."""
    return isinstance(cfg.launch, SlurmConfig | RayConfig)


def refuse_in_sweep(cfg: CommandConfig) -> None:
    """Refuse to queue the jobs of a sweep by `launch`, which would not wait for them.

    Raises:
        ConfigError: naming the launcher to use.
    """
    if is_submitted(cfg):
        raise ConfigError(
            f"launch={cfg.launch.name} is for one job, and -m is for many",
            "A sweep waits for its jobs and compares them",
            "Use hydra/launcher=submitit_slurm or hydra/launcher=ray, with launch=accelerate for several GPUs a job",
        )


def start(command: str, cfg: CommandConfig, overrides: list[str], config_dir: Path | None) -> Path:
    """Run a job as several ranks, and return its run folder.

    Raises:
        UserError: the job cannot be started so, or a rank's own mistake of the user.
        RankError: a rank failed otherwise.
    """
    from rlhf_cli.launch import processes

    assert isinstance(cfg.launch, AccelerateConfig)
    job: dict[str, Any] = {"command": command, "overrides": overrides}
    job["config_dir"] = None if config_dir is None else str(config_dir.resolve())
    job["tracker"] = {"group": cfg.tracker.group, "run_name": cfg.tracker.run_name}
    return processes.run(job, cfg.launch, cfg.device)


def submit(command: str, cfg: CommandConfig, overrides: list[str], config_dir: Path | None) -> str:
    """Hand a job to a cluster's queue, or only say how, and return what to tell the user.

    Raises:
        RunError: the queue cannot be reached or refuses the job.
    """
    from rlhf_cli.launch import ray, slurm

    words = [*overrides, *([] if config_dir is None else ["--config-dir", str(config_dir.resolve())])]
    if isinstance(cfg.launch, SlurmConfig):
        return slurm.submit(command, words, cfg.launch, cfg.device)
    assert isinstance(cfg.launch, RayConfig)
    return ray.submit(command, words, cfg.launch, cfg.device)
