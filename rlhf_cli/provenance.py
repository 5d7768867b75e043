"""With what a run was made: command line, time, versions, commit, machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "datasets", "hydra-core", "wandb", "rlhf-cli")


def provenance(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a manifest says besides identity; values that json can hold.

    Args:
        config: the resolved config; its `device` is the one that is named.
    """
    return {
        "argv": sys.argv,
        "time": now(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git_commit": _git_commit(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "device": _device(config.get("device", "auto")),
    }


def now() -> str:
    """Return the time in UTC, to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _device(asked: str) -> str:
    if asked == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
