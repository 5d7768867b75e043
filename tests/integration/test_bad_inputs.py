"""A user's mistake: one line that says what to do, exit code 2, and nothing half-written."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_jobs import SMALL, SURVEY, files, job, nothing_half_trained, read_json, refused, spoil_scores, write_lines
from typer.testing import Result

Rlhf = Callable[..., Result]
ROWS = [{"prompt": f"Question {i}?", "chosen": f"good answer {i}", "rejected": f"bad reply {i}"} for i in range(40)]
ASK = [{"role": "user", "content": "Ask"}]
EQUAL = [{**row, "rejected": row["chosen"]} for row in ROWS]
TEXT = ["dataset=preferences", "dataset.path=rows.jsonl", "trainer.sft.batch_size=4"]


@pytest.fixture
def align(rlhf: Rlhf) -> Callable[..., Result]:
    return lambda *overrides: rlhf("align", *SMALL, "run_dir=run", "store_dir=store", *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algo=ppm"], "algo=ppm does not exist. The nearest choice is pm. Choose from"),
        (
            ["algo=pm", "algo.bta=1"],
            "unknown key algo.bta (set on the command line). The nearest valid key is algo.beta",
        ),
        (
            ["algo=pm", "+algo.bta=1"],
            "unknown key algo.bta (set on the command line). The nearest valid key is algo.beta",
        ),
        (["algo=pm", "algo.beta=0"], "algo.beta=0.0 (set on the command line) is out of range. It must be > 0"),
        (
            ["algo=pm", "algo.alpha=2"],
            "algo.alpha=2.0 (set on the command line) is out of range. It must be > 0 and <= 1",
        ),
        (["trainer.online.max_steps=-1"], "trainer.online.max_steps=-1 (set on the command line) is out of range"),
        (["algo.beta==1"], "cannot read 'algo.beta==1'"),
        (["algo.beta=[1"], "cannot read 'algo.beta=[1'"),
        (["dataset.questions=1000"], "dataset.questions is 1000. the question bank holds"),
        (["dataset.demonstrations=8"], "8 demonstrations are too few for one batch of 16"),
        (["dataset=preferences"], "dataset.path is null, and dataset=preferences reads a file"),
        (["dataset=preferences", "dataset.path=rows.jsonl", "reward=gold"], "reward=gold needs dataset=survey"),
        (["seed=4294967296"], "seed=4294967296 (set on the command line) is out of range"),
        (
            ["dataset.closed_vocabulary=true", "generation.engine=generate"],
            "dataset.closed_vocabulary=true does not go with generation.engine=generate",
        ),
        (["generation=vllm"], "generation=vllm needs vLLM, which is not installed"),
        (["run_dir=file/run"], "run_dir=file/run cannot be a folder"),
        (["store_dir=file/store"], "store_dir=file/store cannot be a folder"),
        (["run_dir=folder"], "run_dir=folder is in use. it holds files (notes.txt …) and is not a run folder"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_a_value_that_cannot_be(align: Callable[..., Result], overrides: list[str], message: str) -> None:
    Path("file").write_text("not a folder")
    Path("folder").mkdir()
    Path("folder/notes.txt").write_text("mine")
    write_lines(Path("rows.jsonl"), ROWS)
    assert message in refused(align(*overrides))
    assert files(Path()) - {"store"} == {"file", "folder", "rows.jsonl"}
    assert files(Path("folder")) == {"notes.txt"}
    nothing_half_trained(Path("store"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "dataset.path=rows.jsonl does not exist. did you mean row.jsonl?"),
        ([], "rows.jsonl is empty"),
        ([*ROWS, {"prompt": "a", "chosen": "b"}], "rows.jsonl, line 41: no column rejected"),
        (EQUAL, "no usable row in rows.jsonl. all 40 rows were left out: chosen_equals_rejected 40"),
        (ROWS[:3], "rows.jsonl has 3 usable prompts"),
        (ROWS[:8], "too few for one batch of"),
        (
            [{"question": "a", "better": "b", "worse": "c"}],
            "line 1: no column prompt or chosen or rejected. the row's columns are: question, better, worse. give "
            "every row prompt, chosen, rejected, or say what they are called: dataset.columns.prompt=COLUMN",
        ),
        (
            [*ROWS, {"prompt": ASK, "chosen": "a", "rejected": "b"}],
            "line 41: a conversation in a file of plain texts. the rows of one file are all messages or all plain text",
        ),
        (
            [{"prompt": ASK, "chosen": "a", "rejected": "b"}, *ROWS],
            "line 2: plain text in a file of conversations. the rows of one file are all messages or all plain text",
        ),
        (
            [{**row, "prompt": f"{i} " + "why " * 300} for i, row in enumerate(ROWS)],
            "fits the context. dataset.max_prompt_tokens=",
        ),
    ],
    ids=[
        "missing",
        "empty",
        "no-rejected",
        "all-equal",
        "three-prompts",
        "less-than-a-batch",
        "no-preferences",
        "plain-then-messages",
        "messages-then-plain",
        "all-too-long",
    ],
)
def test_a_file_that_cannot_be_used(
    rlhf: Rlhf, align: Callable[..., Result], rows: list[dict[str, Any]] | None, message: str
) -> None:
    write_lines(Path("row.jsonl" if rows is None else "rows.jsonl"), rows or [])
    before = files(Path())
    assert message in refused(align(*TEXT))
    assert files(Path()) - {"store"} == before
    nothing_half_trained(Path("store"))
    if message != "too few for one batch of":
        assert message in refused(rlhf("data", *TEXT)), "a look at the data says the same"


@pytest.mark.usefixtures("no_figures")
def test_equal_rows_are_left_out_and_counted(align: Callable[..., Result]) -> None:
    write_lines(Path("rows.jsonl"), [*ROWS, *EQUAL[:5]])
    result = align(*TEXT, "algo=dpo", "trainer.rm.batch_size=8", "trainer.pairwise.batch_size=8")
    assert result.exit_code == 0, result.output
    assert "left out: 5 rows (both responses are the same)" in result.output
    assert read_json(Path("run/metrics.json"))["data/dropped/chosen_equals_rejected"] == 5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algo=pm", "trainer.online.batch_size=96"], "15 prompts are too few for one batch of 24"),
        (["algo=dpo", "trainer.pairwise.batch_size=96"], "15 preference pairs are too few for one batch of 96"),
        (
            [
                "algo=dpo",
                *(f"trainer.{stage}.batch_size=96" for stage in ("rm", "pairwise")),
                "trainer.rm.micro_batch_size=32",
            ],
            "reward judgements are too few for one batch of 96; 15 preference pairs",
        ),
    ],
)
def test_too_few_rows_for_one_batch(align: Callable[..., Result], overrides: list[str], message: str) -> None:
    write_lines(Path("rows.jsonl"), ROWS)
    stages = [*TEXT, "trainer.rm.batch_size=8"]
    line = refused(align(*stages, *overrides))
    assert message in line
    assert not Path("run").exists()
    fitting = re.search(r"or set (.+) or less", line)
    assert fitting is not None
    assert align(*stages, *overrides, *fitting[1].split()).exit_code == 0, "the advice works, in the same folder"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(align: Callable[..., Result]) -> None:
    assert "device is cuda. PyTorch finds no CUDA GPU here" in refused(align("device=cuda"))
    assert files(Path()) == set()


@pytest.mark.parametrize("command", ["align", "evaluate"])
def test_a_reward_model_whose_rewards_are_not_finite(rlhf: Rlhf, tmp_path: Path, store: Path, command: str) -> None:
    job("train-rm", run_dir=tmp_path / "rm", store=store)
    spoil_scores(shutil.copytree(store, tmp_path / "store"))
    line = refused(rlhf(command, *SMALL, *SURVEY, "run_dir=run", "store_dir=store"))
    assert re.search(r"(\d+) of \1 rewards are not finite", line)
    assert not Path("run").exists()


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.sft.learning_rate=1e30"], "SFT diverged: after step"),
        (["trainer.rm.learning_rate=1e30"], "reward model diverged: after step"),
        (["algo=pm", "trainer.online.learning_rate=1e6", "algo.clip_range=1000"], "probabilities that are not finite"),
        (["algo=dpo", "trainer.pairwise.learning_rate=1e30"], "probabilities that are not finite"),
    ],
    ids=["sft", "rm", "online", "pairwise"],
)
def test_a_training_that_diverges(rlhf: Rlhf, overrides: list[str], message: str) -> None:
    line = refused(rlhf("align", *SMALL, *SURVEY, "run_dir=run", "store_dir=store", *overrides))
    assert message in line
    assert "lower the learning_rate of" in line
    broken = "sft" if "sft" in overrides[0] else "rm" if "rm" in overrides[0] else "none"
    assert not Path("store", broken).exists(), "what diverged is not published"


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("nowhere", "policy=nowhere is not a folder"),
        ("file", "policy=file is not a folder"),
        ("empty", "holds no model"),
    ],
)
def test_evaluate_needs_a_policy(rlhf: Rlhf, policy: str, message: str) -> None:
    Path("file").touch()
    Path("empty").mkdir()
    assert message in refused(rlhf("evaluate", *SMALL, *SURVEY, f"policy={policy}", "run_dir=run", "store_dir=store"))
    assert files(Path()) == {"file", "empty"}


@pytest.mark.parametrize("runs", [["nowhere"], ["empty"]])
def test_compare_needs_runs(rlhf: Rlhf, runs: list[str]) -> None:
    Path("empty").mkdir()
    assert f"{runs[0]} is not a run folder" in refused(rlhf("compare", *runs))
    assert files(Path()) == {"empty"}


def test_a_mistake_does_not_cost_the_folder_of_an_interrupted_run(
    align: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_cli.trainers.common import Reporter

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    write_lines(Path("rows.jsonl"), ROWS)
    stages = [*TEXT, "trainer.rm.batch_size=8", "algo=dpo", "trainer.pairwise.batch_size=8"]
    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "on_step_end", interrupt)
        assert align(*stages).exit_code == 130
    before = files(Path("run"))
    Path("rows.jsonl").rename("moved.jsonl")
    assert "dataset.path=rows.jsonl does not exist" in refused(align(*stages))
    assert files(Path("run")) == before
