"""Structured configs of how a job is started: here, as several processes, or on a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from rlhf_cli.config.catalog import advice
from rlhf_cli.config.setting import setting
from rlhf_cli.errors import ConfigError

STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")


@dataclass
class LaunchConfig:
    """How a job is started; `local` is this process. None of it changes what a run is."""

    name: str = MISSING


@dataclass
class AccelerateConfig(LaunchConfig):
    """Several processes on this machine, and perhaps on others where the same command is run."""

    processes: int | None = setting(ge=1, identity=False)
    machines: int = setting(ge=1, identity=False)
    machine_rank: int = setting(ge=0, identity=False)
    main_address: str | None = setting(identity=False)
    main_port: int | None = setting(ge=1, le=65535, identity=False)
    strategy: str = setting(choices=STRATEGIES, identity=False)


@dataclass
class SlurmConfig(LaunchConfig):
    """A job that sbatch queues."""

    processes: int = setting(ge=1, identity=False)
    machines: int = setting(ge=1, identity=False)
    strategy: str = setting(choices=STRATEGIES, identity=False)
    partition: str | None = setting(identity=False)
    account: str | None = setting(identity=False)
    time: str = setting(identity=False)
    cpus_per_process: int = setting(ge=1, identity=False)
    memory: str | None = setting(identity=False)
    options: list[str] = setting(identity=False)
    setup: list[str] = setting(identity=False)
    log_dir: str = setting(identity=False)
    dry_run: bool = setting(identity=False)


@dataclass
class RayConfig(LaunchConfig):
    """A job that a Ray cluster runs on one of its machines."""

    processes: int = setting(ge=1, identity=False)
    strategy: str = setting(choices=STRATEGIES, identity=False)
    address: str = setting(identity=False)
    cpus_per_process: int = setting(ge=1, identity=False)
    options: list[str] = setting(identity=False)
    dry_run: bool = setting(identity=False)


LAUNCH: dict[str, type[LaunchConfig]] = {
    "local": LaunchConfig,
    "accelerate": AccelerateConfig,
    "slurm": SlurmConfig,
    "ray": RayConfig,
}


def launch_schema(name: Any) -> type[LaunchConfig]:
    """Return the schema of a way to start jobs.

    Raises:
        ConfigError: there is no such way.
    """
    if name not in LAUNCH:
        raise ConfigError(f"launch.name={name} is not a choice", todo=advice(str(name), list(LAUNCH)))
    return LAUNCH[name]


def check_launch(launch: Any, device: str) -> None:
    """Refuse a launch that cannot start, as far as the config alone tells.

    Raises:
        ConfigError: naming the key.
    """
    if launch.name == "local":
        return
    if launch.strategy != "ddp" and device == "cpu":
        raise ConfigError(
            f"launch.strategy={launch.strategy} does not go with device=cpu",
            "On CPUs, accelerate falls back to DDP without a word",
            "Use launch.strategy=ddp",
        )
    if launch.name == "accelerate":
        _check_accelerate(launch)


def _check_accelerate(launch: AccelerateConfig) -> None:
    if launch.machine_rank >= launch.machines:
        raise ConfigError(
            f"launch.machine_rank={launch.machine_rank} is not below launch.machines={launch.machines}",
            "Machines are counted from 0",
        )
    if launch.machines > 1 and launch.main_address is None:
        raise ConfigError(
            f"launch.main_address is null with launch.machines={launch.machines}",
            "The machines meet at machine 0",
            "Give its name or address: launch.main_address=HOST",
        )
    if launch.machines > 1 and launch.processes is None:
        raise ConfigError(
            f"launch.processes is null with launch.machines={launch.machines}",
            "Every machine must start as many",
            "Say how many each starts: launch.processes=8",
        )
