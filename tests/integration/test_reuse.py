"""Finished work is never repeated: stages in the store, runs in their folders, jobs of a multirun."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small_jobs import ALGORITHMS, SMALL, SURVEY, files, gap, job, read_json, weights
from typer.testing import Result

Finished = Callable[[str], Path]
Small = Callable[..., Path]
Rlhf = Callable[..., Result]
ALIGNED = {"OnlineTrainer", "PairwiseTrainer"}


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_second_algorithm_finds_sft_policy_and_reward_model(
    small: Small, finished: Finished, store: Path, trained: list[str]
) -> None:
    finished("pm")
    trained.clear()
    before = times(store / "sft") | times(store / "rm")
    small("align", "algo=kl_ppo", "algo.beta=0.5")
    assert trained == ["OnlineTrainer"]
    assert times(store / "sft") | times(store / "rm") == before


@pytest.mark.parametrize(
    "change",
    ["reward.clip=4", "dataset.closed_vocabulary=true", "generation.temperature=0.9", "trainer.sft.log_every_steps=3"],
)
def test_settings_of_later_stages_do_not_train_earlier_ones_again(
    small: Small, finished: Finished, trained: list[str], change: str
) -> None:
    finished("pm")
    trained.clear()
    small("align", "algo=dpo", change)
    assert trained == ["PairwiseTrainer"]


@pytest.mark.parametrize(
    ("change", "stages"),
    [("reward.negative_share=0.1", ["LossRewardTrainer"]), ("trainer.rm.learning_rate=2e-3", ["LossRewardTrainer"])],
)
def test_a_setting_of_a_stage_trains_it_and_what_follows(
    small: Small, finished: Finished, trained: list[str], change: str, stages: list[str]
) -> None:
    finished("pm")
    trained.clear()
    small("align", "algo=dpo", change)
    assert trained == [*stages, "PairwiseTrainer"]


def test_the_same_command_again_trains_nothing(
    finished: Finished, store: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = finished("pm")
    trained.clear()
    before = times(run_dir)
    job("align", *ALGORITHMS["pm"], run_dir=run_dir, store=store)
    assert trained == []
    assert times(run_dir) == before
    assert "already finished, nothing was trained" in capsys.readouterr().out


def test_a_finished_run_is_recognised_without_its_store_and_its_data(
    tmp_path: Path, finished: Finished, trained: list[str]
) -> None:
    run_dir = finished("dpo")
    trained.clear()
    job("align", *ALGORITHMS["dpo"], run_dir=run_dir, store=tmp_path / "elsewhere")
    assert trained == []
    assert files(tmp_path) == set()


def test_another_config_in_the_same_folder_is_refused(rlhf: Rlhf, finished: Finished, store: Path) -> None:
    before = times(finished("pm"))
    places = [f"run_dir={finished('pm')}", f"store_dir={store}"]
    result = rlhf("align", *SMALL, *SURVEY, *places, "algo=pm", "algo.beta=0.5")
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "belongs to a run with another config. algo.beta was 1, is now 0.5" in line
    assert times(finished("pm")) == before


@pytest.mark.usefixtures("no_figures")
def test_without_run_dir_a_run_is_found_again_by_its_config(rlhf: Rlhf, trained: list[str], store: Path) -> None:
    command = ["align", *SMALL, *SURVEY, "algo=dpo", f"store_dir={store}"]
    assert rlhf(*command).exit_code == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("dpo-survey-tiny-seed0-")
    trained.clear()
    assert rlhf(*command).exit_code == 0
    assert trained == []
    assert rlhf(*command, "algo.beta=0.2").exit_code == 0
    assert len(files(Path("runs"))) == 2


@pytest.mark.usefixtures("no_figures")
def test_a_multirun_trains_each_stage_once_a_seed_and_compares_its_jobs(rlhf: Rlhf, trained: list[str]) -> None:
    short = ["trainer.online.max_steps=2", "trainer.pairwise.max_steps=2"]
    command = ["align", "-m", *SMALL, *SURVEY, *short, "run_dir=sweep", "store_dir=store"]
    result = rlhf(*command, "algo=kl_ppo,pm,dpo,rpo", "seed=0,1")
    assert result.exit_code == 0, result.output
    assert {name: trained.count(name) for name in set(trained)} == {
        "DemonstrationTrainer": 2,
        "LossRewardTrainer": 2,
        "OnlineTrainer": 4,
        "PairwiseTrainer": 4,
    }
    jobs = {f"algo={algo},seed={seed}" for algo in ("kl_ppo", "pm", "dpo", "rpo") for seed in (0, 1)}
    tables = {"compare.csv", "compare.html", "compare.md", "runs.csv"}
    assert files(Path("sweep")) == {*jobs, *tables, "compare.png", "curves.png", "frontier.png", "pairs.png"}
    assert files(Path("store/sft")) != set()
    assert (len(files(Path("store/sft"))), len(files(Path("store/rm")))) == (2, 2)
    for name in jobs:
        assert read_json(Path("sweep", name, "status.json"))["state"] == "finished"
        assert read_json(Path("sweep", name, "metrics.json"))["best/step"] == 2
    pm, other = (weights(Path("sweep", f"algo=pm,seed={seed}", "model")) for seed in (0, 1))
    assert gap(pm, other) > 1e-3, "another seed is another policy"
    assert "| pm ! | 2 |" in Path("sweep/compare.md").read_text(), "two steps leave text that is no answer"
    assert files(Path()) == {"sweep", "store"}

    trained.clear()
    before = times(Path("sweep", "algo=pm,seed=0"))
    again = rlhf(*command, "algo=pm,rpo", "seed=0,1")
    assert again.exit_code == 0, again.output
    assert again.output.count("already finished, nothing was trained") == 4
    assert trained == []
    assert times(Path("sweep", "algo=pm,seed=0")) == before


@pytest.mark.usefixtures("no_figures")
def test_a_failing_job_does_not_stop_its_siblings(rlhf: Rlhf, store: Path) -> None:
    command = ["align", "-m", *SMALL, *SURVEY, "run_dir=sweep", f"store_dir={store}", "algo=dpo"]
    command += ["trainer.pairwise.batch_size=100000,16"]
    result = rlhf(*command)
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 2
    assert "512 preference pairs are too few for one batch of 100000" in lines[0]
    assert "1 of 2 jobs failed: trainer.pairwise.batch_size=100000" in lines[1]
    assert [path.name for path in Path("sweep").iterdir() if path.is_dir()] == ["trainer.pairwise.batch_size=16"]
    assert "trainer.pairwise.batch_size=100000" in Path("sweep/compare.md").read_text(), "the table shows it as failed"
