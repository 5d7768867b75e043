"""Sweeps through Hydra's launchers: jobs side by side on one store, and what is told of those that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_jobs import SMALL, SURVEY

WORDS = [*SMALL, *SURVEY, "store_dir=store"]


def sweep(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a sweep of two jobs in a process of its own: its launcher's workers outlive a test else."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    line = [sys.executable, "-m", "rlhf_cli.cli", "train-sft", "-m", *WORDS, *words]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300)


def finished(folder: Path) -> list[Path]:
    return sorted(file.parent for file in (folder / "runs").glob("*/metrics.json"))


def test_joblib_runs_two_jobs_on_one_store(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    # Two runs by name that need the same SFT policy: measuring alone depends on the key.
    words = ["dataset.closed_vocabulary=true,false", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = sweep(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert len(finished(tmp_path)) == 2
    assert len(list((tmp_path / "store/sft").iterdir())) == 1
    assert not list((tmp_path / "store/.work").iterdir())
    assert done.stderr.count("SFT: 100%") == 1, "one of them trained it, the other waited"
    assert not (tmp_path / "multirun").exists(), "Hydra leaves nothing beside the runs"


def test_submitits_local_jobs_finish_and_a_failed_one_says_why(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = ["trainer.sft.batch_size=16,100000", "hydra/launcher=submitit_local"]
    done = sweep(tmp_path, *words)
    assert done.returncode == 2
    assert len(finished(tmp_path)) == 1
    name = "error: trainer.sft.batch_size=100000: "
    said = [line for line in done.stderr.splitlines() if line.startswith(name)]
    assert len(said) == 1
    assert "are too few for one batch of 100000" in said[0]
    logs = "".join(file.read_text() for file in tmp_path.glob("multirun/**/*_log.err"))
    assert "SFT: 100%" in logs
    assert json.loads((finished(tmp_path)[0] / "status.json").read_text())["state"] == "finished"
