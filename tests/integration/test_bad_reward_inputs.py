"""A user's mistake about a reward model: one line, exit code 2, and nothing half-written."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_jobs import SMALL, SURVEY, files, job, nothing_half_trained, refused, spoil_scores, write_lines
from typer.testing import Result

Rlhf = Callable[..., Result]
PLACES = ["run_dir=run", "store_dir=store"]
ROWS: list[dict[str, Any]] = [
    {"prompt": f"Question {i}?", "chosen": f"good answer {i}", "rejected": f"bad reply {i}"} for i in range(40)
]
EQUAL = [{**row, "rejected": row["chosen"]} for row in ROWS]
LONG = [{**row, "chosen": "a very long answer one", "rejected": "a very long answer two"} for row in ROWS]
TEXT = ["dataset=preferences", "dataset.path=rows.jsonl", "trainer.sft.batch_size=4", "trainer.rm.batch_size=4"]


@pytest.fixture
def train_rm(rlhf: Rlhf) -> Callable[..., Result]:
    return lambda *overrides: rlhf("train-rm", *SMALL, *PLACES, *overrides)


def nothing_is_left(*names: str) -> None:
    assert files(Path()) - {"store"} == set(names), "no run folder"
    nothing_half_trained(Path("store"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (EQUAL, "no usable row in rows.jsonl. all 40 rows were left out: chosen_equals_rejected 40"),
        ([*ROWS, {**ROWS[0], "label": 1.5}], "rows.jsonl, line 41: label is 1.5. it must be a number from 0 to 1"),
        ([*ROWS, {**ROWS[0], "label": -0.1}], "rows.jsonl, line 41: label is -0.1. it must be a number from 0 to 1"),
        ([*ROWS, {**ROWS[0], "margin": -1}], "rows.jsonl, line 41: margin is -1. it must be a finite number, 0 or"),
        (
            [{"prompt": "Question?", "responses": ["a", "b"]}, *ROWS],
            "rows.jsonl, line 2: a pair in a file of rankings",
        ),
        (
            [{"prompt": f"Question {i}?", "responses": ["same", "same "]} for i in range(40)],
            "no usable row in rows.jsonl",
        ),
    ],
    ids=["equal", "label-above-1", "label-below-0", "margin", "mixed", "equal-ranking"],
)
@pytest.mark.parametrize("reward", ["bt", "pcrm_length"])
def test_judgements_that_cannot_be_used(
    train_rm: Callable[..., Result], rows: list[dict[str, Any]], message: str, reward: str
) -> None:
    write_lines(Path("rows.jsonl"), rows)
    assert message in refused(train_rm(*TEXT, f"reward={reward}"))
    nothing_is_left("rows.jsonl")


def test_pairs_that_are_equal_once_cut(train_rm: Callable[..., Result]) -> None:
    """Their lengths after the first differing token are all zero."""
    write_lines(Path("rows.jsonl"), LONG)
    line = refused(train_rm(*TEXT, "reward=pcrm_length", "dataset.max_completion_tokens=2"))
    assert re.search(r"none of the \d+ reward pairs fits the context.*dataset\.max_completion_tokens=2", line)
    nothing_is_left("rows.jsonl")


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("nowhere/at/all", "reward.encoder=nowhere/at/all cannot be loaded. there is no nowhere/at/all"),
        ("./folder", "reward.encoder=./folder cannot be loaded. folder has no config.json"),
        ("unheard/of-encoder", "reward.encoder=unheard/of-encoder cannot be loaded."),
    ],
)
@pytest.mark.parametrize("command", ["train-rm", "align"])
def test_an_encoder_that_is_not_there(
    rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch, trained: list[str], command: str, encoder: str, message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("folder").mkdir()
    line = refused(rlhf(command, *SMALL, *SURVEY, *PLACES, "reward=pcrm_cosine", f"reward.encoder={encoder}"))
    assert message in line
    assert "give a folder in Hugging Face layout, a Hugging Face name when online, or reward.encoder=sft" in line
    assert trained == []
    nothing_is_left("folder")


def test_an_encoder_of_a_constraint_that_is_not_there(rlhf: Rlhf, trained: list[str]) -> None:
    constraint = ["algo=dpo", "algo/constraint=cosine", "algo.constraint.encoder=./nowhere"]
    line = refused(rlhf("align", *SMALL, *SURVEY, *PLACES, *constraint))
    assert "algo.constraint.encoder=./nowhere cannot be loaded. there is no nowhere" in line
    assert trained == []
    nothing_is_left()


@pytest.mark.parametrize("overrides", [[], ["reward.calibration=length"]])
def test_scores_that_are_not_finite(rlhf: Rlhf, tmp_path: Path, store: Path, overrides: list[str]) -> None:
    job("train-rm", run_dir=tmp_path / "rm", store=store)
    spoil_scores(shutil.copytree(store, tmp_path / "store"))
    line = refused(rlhf("evaluate", "stage=rm", *SMALL, *SURVEY, *PLACES, *overrides))
    assert re.search(r"(\d+) of \1 rewards are not finite", line)
    assert "train the reward model again with a lower trainer.rm.learning_rate" in line
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward=warm", "reward.members=1"], "reward.members=1 (set on the command line) is out of range. It must be"),
        (["reward=gold"], "train-rm reward=gold trains nothing"),
        (["reward.label_smoothing=0.5"], "reward.label_smoothing=0.5 (set on the command line) is out of range"),
        (["reward.calibration=lowess"], "reward.calibration=lowess"),
        (["reward=pcrm_length", "reward.beta3=-10"], "bound equal responses by -0.00999"),
        (["reward=pcrm_random", "reward.low=6"], "reward.low=6.0 is above reward.high=5.0"),
        (["reward=pcrm_fixed", "reward.delta=0"], "reward.delta=0.0 (set on the command line) is out of range"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_a_value_that_cannot_be(train_rm: Callable[..., Result], overrides: list[str], message: str) -> None:
    assert message in refused(train_rm(*SURVEY, *overrides))
    nothing_is_left()


def test_the_gold_reward_is_not_judged(rlhf: Rlhf) -> None:
    line = refused(rlhf("evaluate", *SMALL, *SURVEY, *PLACES, "stage=rm", "reward=gold"))
    assert "evaluate stage=rm reward=gold judges nothing. The gold reward is known exactly" in line
    nothing_is_left()


def test_a_reward_model_is_no_policy(rlhf: Rlhf, tmp_path: Path, store: Path) -> None:
    folder = job("train-rm", run_dir=tmp_path / "rm", store=store)
    for asked in (["policy=rm"], ["stage=rm", "policy=rm/model"]):
        line = refused(rlhf("evaluate", *SMALL, *SURVEY, f"store_dir={store}", *asked, "run_dir=run"))
        assert "rm/model holds a reward model, not a policy. give a policy, or judge a reward model" in line
    assert files(Path()) == {folder.name}


@pytest.mark.parametrize("command", ["train-rm", "align", "evaluate"])
def test_too_few_responses_to_fit_a_calibration(rlhf: Rlhf, trained: list[str], command: str) -> None:
    # 18 pairs of four wordings: two of each wording fit it, which are 16 responses.
    common = [command, *SMALL, *SURVEY, *PLACES, "dataset.heldout_pairs=18"]
    line = refused(rlhf(*common, "reward.calibration=length"))
    assert "16 held-out responses are too few to fit reward.calibration=length. it takes 20" in line
    assert trained == []
    nothing_is_left()


@pytest.mark.usefixtures("no_figures")
def test_without_calibration_the_same_data_will_do(rlhf: Rlhf, trained: list[str]) -> None:
    common = ["train-rm", *SMALL, *SURVEY, "store_dir=store", "dataset.heldout_pairs=18"]
    assert rlhf(*common, "run_dir=rm").exit_code == 0
    assert not list(Path("store/rm").glob("*/model/length_calibration.json"))
    trained.clear()
    line = refused(rlhf(*common, "run_dir=run", "reward.calibration=length"))
    assert "are too few to fit reward.calibration=length" in line
    assert trained == []
    assert not Path("run").exists()
