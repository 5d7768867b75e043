"""Curves, tables and figures reach TensorBoard and an offline W&B run, whose files lie in the run folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_jobs import files, read_json, read_lines

Small = Callable[..., Path]


def test_tensorboard(small: Small) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = small("align", "algo=dpo", "tracker=tensorboard")
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    tags = events.Tags()
    log = read_lines(run_dir / "training_log.jsonl")
    assert {key for line in log for key in line if key != "step"} <= set(tags["scalars"])
    curve = [(event.step, event.value) for event in events.Scalars("pm/tv")]
    assert curve == [(line["step"], pytest.approx(line["pm/tv"])) for line in log if "pm/tv" in line]
    metrics = read_json(run_dir / "metrics.json")
    assert events.Scalars("final/pm/tv")[0].value == pytest.approx(metrics["pm/tv"])
    assert {"preferences", "curves"} <= set(tags["images"])


def test_wandb_offline(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    run_dir = small("align", "algo=dpo", "tracker=wandb")
    (offline,) = (run_dir / "wandb").glob("offline-run-*")
    (record,) = offline.glob("*.wandb")
    deadline = time.monotonic() + 10  # W&B's own process writes the last of it
    while record.stat().st_size < 10_000 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(word in record.read_bytes() for word in (b"chosen_logps", b"pm/tv", b"best/step"))
    assert list(offline.rglob("*.table.json"))
    assert len(list(offline.rglob("*.png"))) == 2
    assert read_json(run_dir / "status.json")["state"] == "finished"
    assert files(tmp_path) <= {"run", "home"}
