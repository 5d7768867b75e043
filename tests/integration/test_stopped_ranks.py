"""Ctrl-C of a command that has started ranks: all end, it is said once, and the command goes on from a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_jobs import SMALL, SURVEY, job

from rlhf_cli.trainers import common

STEPS = ["trainer.sft.max_steps=200", "trainer.sft.save_every_steps=4"]


def test_ctrl_c_ends_all_ranks_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    places = ["run_dir=run", "store_dir=store", "launch=accelerate", "launch.processes=2"]
    line = [sys.executable, "-m", "rlhf_cli.cli", "train-sft", *SMALL, *SURVEY, *STEPS, *places]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "tmp")}
    started = subprocess.Popen(line, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not list(tmp_path.glob("store/.work/*/checkpoints/*/complete")):
        assert started.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    told = started.communicate(timeout=25)[1]
    assert started.returncode == 130, told
    assert told.splitlines()[-1] == "interrupted: run the same command again to go on"
    assert told.count("nterrupt") == 1
    assert "Traceback" not in told
    assert status(tmp_path) == "interrupted"
    assert list((tmp_path / "tmp").iterdir()) == []
    found: list[Any] = []
    latest = common.latest_checkpoint
    monkeypatch.setattr(common, "latest_checkpoint", lambda folder: found.append(latest(folder)) or found[-1])
    job("train-sft", *STEPS, run_dir=tmp_path / "run", store=tmp_path / "store")  # by one process: it is the same run
    assert found[0] is not None
    assert status(tmp_path) == "finished"


def status(folder: Path) -> str:
    return str(json.loads((folder / "run/status.json").read_text())["state"])
