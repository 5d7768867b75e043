"""Fixtures that more than one test module uses."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from typer.testing import CliRunner, Result

from rlhf_cli import cli

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))  # for miniatures of model families
settings.register_profile("repeatable", derandomize=True)  # the same examples on every machine
settings.load_profile("repeatable")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command sets it, before torch is imported


@pytest.fixture
def rlhf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Return a function that runs the command line in this process, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLHF_CONFIG_DIR", raising=False)

    def run(*args: str) -> Result:
        return CliRunner().invoke(cli.app, list(args), prog_name="rlhf")

    return run
