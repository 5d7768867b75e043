"""Curves, tables and figures reach TensorBoard and an offline W&B run, whose files lie in the run folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_jobs import files, read_json, read_lines
from typer.testing import Result
from wandb_file import WandbFile

from rlhf_cli.config.schema import TrackerConfig
from rlhf_cli.run import Run

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


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B without an account, at home in the test's own folder."""
    for name in ("WANDB_API_KEY", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def final(summary: dict[str, Any], key: str) -> float:
    """Return the final number of a metric: KEY.last where it has a curve, else KEY."""
    value = summary[key]
    return float(value["last"] if isinstance(value, dict) else value)


@pytest.mark.usefixtures("offline")
def test_nothing_of_a_run_is_missing_in_its_offline_file(small: Small, tmp_path: Path) -> None:
    run_dir = small("align", "algo=rpo", "algo.eta=0.5", "tracker=wandb", "tracker.tags=[mine]")
    kept = WandbFile(run_dir)
    assert (kept.run.project, kept.run.run_group, kept.run.job_type) == ("rlhf", "rpo", "align")
    assert kept.run.display_name.startswith("rpo eta=0.5 ")
    assert kept.run.display_name.endswith(" seed=0 survey tiny")
    assert set(kept.run.tags) == {"mine", "align", "rpo", "survey", "tiny", "seed0", "bt"}
    assert (kept.config["algo"]["eta"], kept.config["algo"]["beta"]) == (0.5, 0.1), (
        "nested: axes are algo.eta, algo.beta"
    )

    metrics, log = read_json(run_dir / "metrics.json"), read_lines(run_dir / "training_log.jsonl")
    measured = {key: value for key, value in metrics.items() if value is not None}
    assert {key: final(kept.summary, key) for key in measured} == pytest.approx(measured)
    curve = [line["pm/tv"] for line in log if "pm/tv" in line]
    assert kept.summary["pm/tv"]["min"] == pytest.approx(min([*curve, metrics["pm/tv"]]))
    assert kept.summary["accuracy"]["max"] >= kept.summary["accuracy"]["last"]
    assert {name for name, metric in kept.metrics.items() if metric.step_metric == "step"} == {
        key for line in log for key in line if key != "step"
    }
    for line in log:
        (point,) = [point for point in kept.history if point.get("_step") == line["step"]]
        finite = {key: value for key, value in line.items() if value is not None}
        assert {key: point[key] for key in finite} == pytest.approx(finite)

    (table,) = [path for path in kept.media if path.name.startswith("completions")]
    rows = read_lines(run_dir / "completions.jsonl")
    content = read_json(table)
    assert [dict(zip(content["columns"], row, strict=True)) for row in content["data"]] == rows
    figures = {path.name: path.read_bytes() for path in run_dir.glob("*.png")}
    images = [path.read_bytes() for path in kept.media if path.suffix == ".png"]
    assert {f"figures/{Path(name).stem}" for name in figures} == {key for key in kept.summary if "figures/" in key}
    assert sorted(images) == sorted(figures.values())
    assert read_json(run_dir / "status.json")["state"] == "finished"
    assert files(tmp_path) <= {"run", "home"}


@pytest.mark.usefixtures("offline")
def test_the_stage_that_logs_no_table_keeps_its_final_numbers(small: Small) -> None:
    run_dir = small("train-sft", "tracker=wandb")
    kept, metrics = WandbFile(run_dir), read_json(run_dir / "metrics.json")
    assert {key: final(kept.summary, key) for key in metrics} == pytest.approx(metrics)
    assert (kept.run.job_type, kept.run.display_name[:10]) == ("train-sft", "train-sft ")


@pytest.mark.usefixtures("offline")
def test_a_final_number_wins_over_the_end_of_its_curve(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        run.log({"sft/loss": 0.7}, 2)
        run.log({"sft/loss": 0.9}, 4)
        run.write_metrics({"sft/loss": 0.8})
    assert WandbFile(tmp_path / "run").summary["sft/loss"] == {"min": 0.7, "last": 0.8}


@pytest.mark.usefixtures("offline")
def test_the_file_of_a_continued_run_holds_the_whole_run(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", "none")  # whatever an earlier process told a tracker is in another file
    run.log({"pm/tv": 0.5, "loss": math.nan}, 2)
    run.log({"pm/tv": 0.1}, 4)
    run.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    with open_run(tmp_path / "run") as run:
        run.rewind(2)  # the checkpoint
        run.log({"pm/tv": 0.1}, 4)
        run.log({"pm/tv": 0.3}, 6)
        run.write_metrics({"pm/tv": 0.3})
    kept = WandbFile(tmp_path / "run")
    assert [(point["_step"], point["pm/tv"]) for point in kept.history] == [(2, 0.5), (4, 0.1), (6, 0.3)]
    assert kept.summary["pm/tv"] == {"min": 0.1, "last": 0.3}


def open_run(directory: Path, tracker: str = "wandb") -> Run:
    cfg = TrackerConfig(name=tracker, project="p", entity=None, group=None, run_name=None, tags=[])
    return Run.open(directory, command="align", config={"seed": 0}, identity={"seed": 0}, tracker=cfg, group="pm")


@pytest.mark.usefixtures("offline")
def test_a_comparison_is_whole_in_its_offline_file(
    rlhf: Callable[..., Result], finished: Callable[[str], Path], tmp_path: Path
) -> None:
    result = rlhf("compare", str(finished("dpo")), str(finished("pm")), "--out", "out", "--wandb")
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    kept = WandbFile(out)
    assert (kept.run.project, kept.run.job_type) == ("rlhf", "compare")
    inside = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert kept.artifact_files("report") == {name: of for name, of in inside.items() if not name.startswith("wandb/")}
    (table,) = [path for path in kept.media if path.name.startswith("comparison")]
    content = read_json(table)
    policies = [row[content["columns"].index("policy")] for row in content["data"]]
    assert {"dpo", "pm"} <= {policy.split()[0] for policy in policies}
    images = {path.read_bytes() for path in kept.media if path.suffix == ".png"}
    assert images == {of for name, of in inside.items() if name.endswith(".png") and "wandb/" not in name}
    (page,) = [path for path in kept.media if path.suffix == ".html"]
    assert page.read_bytes() == inside["compare.html"]
    assert not (tmp_path / "home" / ".local").exists(), "what is to be uploaded is staged beside the run"
