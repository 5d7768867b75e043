"""A named sweep with real jobs: one fails and leaves the others alone, a second run trains nothing, all are a group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small_jobs import SMALL, SURVEY, files, read_json
from typer.testing import Result
from wandb_file import WandbFile

from rlhf_cli import jobs

SWEEP = """
jobs:
  - algo=rpo algo.eta=0.5
  - algo=dpo
  - algo=dpo trainer.pairwise.batch_size=100000
rank: gold/tv
"""


@pytest.mark.usefixtures("no_figures")
def test_a_sweep_is_a_union_that_survives_a_failure_and_goes_on(
    rlhf: Callable[..., Result], store: Path, trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "own/sweep").mkdir(parents=True)
    (tmp_path / "own/sweep/mine.yaml").write_text(SWEEP)
    common = [text for text in SMALL if not text.startswith(("tracker=", "trainer.pairwise.batch_size="))]
    command = ["align", "-m", *common, *SURVEY, "sweep=mine", f"store_dir={store}", "--config-dir", "own"]
    result = rlhf(*command)
    assert result.exit_code == 2
    failed = "algo=dpo,trainer.pairwise.batch_size=100000"
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: 1 of 3 jobs failed: {failed}. ")
    assert "512 preference pairs are too few for one batch of 100000" in result.stderr
    assert "Traceback" not in result.output

    (out,) = Path("runs").glob("compare-*")
    table = (out / "compare.md").read_text()
    assert failed in table, "a failed job is in the table"
    assert "rank: by gold/tv" in table
    folders = [folder for folder in Path("runs").iterdir() if folder != out]
    assert len(folders) == 2
    assert all(read_json(folder / "status.json")["state"] == "finished" for folder in folders)
    told = [WandbFile(folder).run for folder in folders]
    assert {run.run_group for run in told} == {"mine"}
    assert {run.display_name for run in told} == {"rpo eta=0.5 seed=0 survey tiny", "dpo seed=0 survey tiny"}

    trained.clear()
    again = rlhf(*command)
    assert trained == []
    assert again.exit_code == 2
    assert again.output.count("already finished, nothing was trained") == 2
    assert files(Path("runs")) == {out.name, *(folder.name for folder in folders)}


@pytest.mark.usefixtures("no_figures")
def test_a_job_that_breaks_late_names_the_folder_it_left(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_cli.stages import align

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug\nin two lines")

    monkeypatch.setattr(align, "measure", broken)
    monkeypatch.chdir(tmp_path)
    sweep = jobs.plan("align", [*SMALL, *SURVEY, f"store_dir={store}", "algo=dpo", "algo.beta=0.1,0.2"], None)
    outcomes = jobs.multirun("align", sweep, None)
    folders = {path.as_posix() for path in Path("runs").iterdir()}
    assert {outcome["run_dir"] for outcome in outcomes} == folders
    assert [(outcome["failure"], outcome["reason"]) for outcome in outcomes] == [
        ("bug", "ZeroDivisionError: a bug")
    ] * 2
