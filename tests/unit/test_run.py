from __future__ import annotations

import json
import logging
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from rlhf_cli import run as run_module
from rlhf_cli.config.schema import TrackerConfig
from rlhf_cli.errors import DataError, RunError
from rlhf_cli.provenance import PACKAGES
from rlhf_cli.run import Run, default_name, latest_checkpoint, mark_complete, seed_everything

CONFIG = {"seed": 0, "device": "cpu", "algo": {"name": "pm", "alpha": None, "beta": 1.0}}
IDENTITY = {"seed": 0, "algo": {"name": "pm", "alpha": None, "beta": 1.0}}
NO_TRACKER = TrackerConfig(name="none", project="rlhf", entity=None, group=None, tags=[])


class Recorder:
    """A tracker that remembers what it was told."""

    where = "nowhere"

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append((name, *args, *kwargs.values()))


def open_run(directory: Path, **changes: Any) -> Run:
    arguments = {"command": "align", "config": CONFIG, "identity": IDENTITY, "tracker": NO_TRACKER, "group": "pm"}
    return Run.open(directory, **(arguments | changes))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    tracker = Recorder()

    def fake(cfg: TrackerConfig, **arguments: Any) -> Recorder:
        tracker.calls.append(("open", arguments))
        return tracker

    monkeypatch.setattr(run_module, "open_tracker", fake)
    return tracker


def status(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "status.json").read_text())


def fail(directory: Path, error: BaseException) -> None:
    with open_run(directory):
        raise error


def test_default_name_ends_in_eight_digits_of_the_hash() -> None:
    name = default_name("pm", dataset="survey", model="org/tiny", seed=0, identity={"b": None, "a": 1})
    # printf '{"a":1,"b":null}' | sha256sum
    assert name == "pm-survey-org-tiny-seed0-46e0ff59"


def test_a_new_run_describes_itself(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "run"
    with open_run(directory, overrides=["algo=pm"], config_dir="mine") as run:
        assert not run.finished
        now = status(directory)
        assert now.pop("started")
        assert now == {"state": "running", "ended": None, "error": None}
        assert run.path("x") == directory / "x"
    assert yaml.safe_load((directory / "config.yaml").read_text()) == CONFIG
    asked = json.loads((directory / "overrides.json").read_text())
    assert asked == {"command": "align", "overrides": ["algo=pm"], "config_dir": "mine"}
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["identity"] == IDENTITY
    assert manifest["argv"] == sys.argv
    assert manifest["device"] == "cpu"
    assert manifest["cpu_count"] == os.cpu_count()
    assert manifest["versions"]["torch"] == torch.__version__
    assert set(manifest["versions"]) == {"python", *PACKAGES}
    assert {path.name for path in directory.iterdir()} - {".lock"} == {
        "config.yaml",
        "overrides.json",
        "manifest.json",
        "status.json",
    }


def test_the_manifest_holds_the_git_commit_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with open_run(tmp_path / "a"):
        assert json.loads((tmp_path / "a" / "manifest.json").read_text())["git_commit"] is None
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(["git", *author, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    with open_run(tmp_path / "b"):
        assert json.loads((tmp_path / "b" / "manifest.json").read_text())["git_commit"] == head


def test_the_end_is_written_and_the_tracker_closed(tmp_path: Path, recorder: Recorder) -> None:
    with open_run(tmp_path / "run", tags=["x"]):
        pass
    assert status(tmp_path / "run")["state"] == "finished"
    assert status(tmp_path / "run")["ended"] >= status(tmp_path / "run")["started"]
    assert recorder.calls[-1] == ("close", False)
    opened = recorder.calls[0][1]
    assert opened["run_dir"] == tmp_path / "run"
    assert (opened["name"], opened["group"], opened["tags"]) == ("run", "pm", ["align", "x"])


@pytest.mark.parametrize(
    ("error", "state", "text"),
    [
        (ValueError("bad"), "failed", "ValueError: bad"),
        (DataError("rows are empty", "", "add rows"), "failed", "rows are empty. add rows."),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
    ],
)
def test_a_failure_is_written_and_goes_on_up(
    tmp_path: Path, recorder: Recorder, error: BaseException, state: str, text: str
) -> None:
    with pytest.raises(type(error), match=str(error) or "^$"):
        fail(tmp_path, error)
    assert (status(tmp_path)["state"], status(tmp_path)["error"]) == (state, text)
    assert recorder.calls[-1] == ("close", True)


def test_the_tracker_is_closed_though_the_disk_is_full(
    tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    run = open_run(tmp_path)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"), run:
        pass
    assert recorder.calls[-1] == ("close", False)
    monkeypatch.undo()
    with open_run(tmp_path) as again:
        assert not again.finished


def test_an_interrupted_tracker_start_leaves_a_folder_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "open_tracker", interrupt)
    with pytest.raises(KeyboardInterrupt, match="^$"):
        open_run(tmp_path)
    assert status(tmp_path)["state"] == "interrupted"
    monkeypatch.undo()
    with open_run(tmp_path) as run:
        assert not run.finished


def test_a_finished_run_is_told_and_left_as_it_is(tmp_path: Path, recorder: Recorder) -> None:
    with open_run(tmp_path) as run:
        run.write_metrics({"pm/tv": 0.25})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    recorder.calls.clear()
    with open_run(tmp_path, identity={"algo": {"beta": 1, "alpha": None, "name": "pm"}, "seed": 0}) as run:
        assert run.finished
        assert run.metrics() == {"pm/tv": 0.25}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert recorder.calls == []


def test_an_unfinished_run_goes_on_as_the_same_tracker_run(tmp_path: Path, recorder: Recorder) -> None:
    with pytest.raises(ValueError, match="crash"):
        fail(tmp_path, ValueError("crash"))
    started = status(tmp_path)["started"]
    with open_run(tmp_path) as run:
        assert not run.finished
        assert status(tmp_path) == {"state": "running", "started": started, "ended": None, "error": None}
    with open_run(tmp_path / "other"):
        pass
    ids = [call[1]["run_id"] for call in recorder.calls if call[0] == "open"]
    assert ids[0] == ids[1] != ids[2]


def test_a_run_with_another_config_is_refused_and_untouched(tmp_path: Path) -> None:
    with open_run(tmp_path):
        pass
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = {"seed": 0, "algo": {"name": "pm", "alpha": 0.1, "beta": 1.0}}
    with pytest.raises(RunError, match=r"another config\. algo\.alpha was null, is now 0\.1\. choose another run_dir"):
        open_run(tmp_path, identity=other)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with open_run(tmp_path) as run:  # the lock is free again
        assert run.finished


@pytest.mark.parametrize("manifest", [None, "{", '{"name": "web app"}'])
def test_a_folder_of_something_else_is_refused_and_untouched(tmp_path: Path, manifest: str | None) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RunError, match="is not a run folder. choose a new or an empty run_dir"):
        open_run(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match="run_dir=.* cannot be a folder"):
            open_run(path)
    assert (tmp_path / "file").read_text() == "x"


def test_an_unwritable_run_dir_is_refused_and_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(RunError, match="cannot be written. no write permission in .*. choose another run_dir"):
        open_run(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def open_elsewhere(directory: Path) -> subprocess.CompletedProcess[str]:
    """Open and leave a run in another process, which prints the heavy modules it has imported by then."""
    script = """
import sys
from pathlib import Path
from rlhf_cli.config.schema import TrackerConfig
from rlhf_cli.errors import RunError
from rlhf_cli.run import Run
tracker = TrackerConfig(name="none", project="p", entity=None, group=None, tags=[])
config = {"device": "cpu"}
try:
    with Run.open(Path(sys.argv[1]), command="c", config=config, identity={}, tracker=tracker, group="g"):
        pass
except RunError as error:
    sys.exit(str(error))
print([name for name in ("torch", "transformers", "trl", "wandb", "datasets", "numpy") if name in sys.modules])
"""
    command = [sys.executable, "-c", script, str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_run_that_is_open_elsewhere_is_refused_at_once(tmp_path: Path) -> None:
    with open_run(tmp_path):
        done = open_elsewhere(tmp_path)
        assert status(tmp_path)["state"] == "running"
    assert done.returncode == 1
    assert "is open in another process. one process writes a run folder at a time" in done.stderr


def test_opening_a_run_on_the_cpu_imports_nothing_heavy(tmp_path: Path) -> None:
    done = open_elsewhere(tmp_path)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_a_run_opened_twice_in_one_process_is_refused(tmp_path: Path) -> None:
    with open_run(tmp_path), pytest.raises(RunError, match="is open in another process"):
        open_run(tmp_path)


def read_log(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "training_log.jsonl").read_text().splitlines()]


def test_log_lines_are_appended_and_tracked(tmp_path: Path, recorder: Recorder) -> None:
    with open_run(tmp_path) as run:
        run.log({"loss": np.float32(0.5), "n": 3}, 1)
        run.log({"loss": math.nan}, 2)
        assert read_log(tmp_path) == [{"step": 1, "loss": 0.5, "n": 3}, {"step": 2, "loss": None}]
    assert ("log", {"loss": 0.5, "n": 3.0}, 1) in recorder.calls


def test_rewinding_drops_later_and_broken_lines(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.rewind(0)  # nothing logged yet
        for step in (0, 5, 10, 15):
            run.log({"loss": float(step)}, step)
        with (tmp_path / "training_log.jsonl").open("a") as file:
            file.write('{"step": 5, "lo')
        run.rewind(10)
        run.log({"loss": -1.0}, 15)
        assert [(line["step"], line["loss"]) for line in read_log(tmp_path)] == [(0, 0), (5, 5), (10, 10), (15, -1)]
        run.rewind(-1)
        assert read_log(tmp_path) == []


def test_metrics_that_are_not_finite_are_null_with_a_warning(
    tmp_path: Path, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), open_run(tmp_path) as run:
        run.write_metrics({"pm/tv": 0.5, "reward/mean": math.inf, "kl": math.nan})
        assert run.metrics() == {"pm/tv": 0.5, "reward/mean": None, "kl": None}
    assert "2 metrics are not finite and are written as null: reward/mean, kl" in caplog.text
    assert ("summary", {"pm/tv": 0.5}) in recorder.calls


def test_completions_and_figures_are_written_and_tracked(tmp_path: Path, recorder: Recorder) -> None:
    rows = [{"prompt": "Welche?", "completion": "grün\nblau", "reward": 0.5}]
    with open_run(tmp_path) as run:
        run.write_completions(rows)
        run.add_figure(run.path("collapse.png"))
        lines = (tmp_path / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert ("table", "completions", rows) in recorder.calls
    assert ("figure", "collapse", tmp_path / "collapse.png") in recorder.calls


def test_the_highest_whole_checkpoint_is_the_latest(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "missing") is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-200", "checkpoint-x", "other-300"):
        (tmp_path / name).mkdir()
    assert latest_checkpoint(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "other-300"):
        mark_complete(tmp_path / name)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_a_seed_repeats_every_generator() -> None:
    def draw(seed: int) -> tuple[float, float, float]:
        seed_everything(seed)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    big = 2**40
    assert draw(big) == draw(big)
    assert all(first != second for first, second in zip(draw(0), draw(1), strict=True))
