"""Two processes do what one does: the same curves, metrics and weights from the same global batches, in one folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_jobs import SMALL, SURVEY, files, gap, job, read_json, read_lines
from test_invariance import without_blind_directions

from rlhf_cli import ranks

LORA = ["peft=lora", "peft.rank=4"]
ROWS = ["dataset.demonstrations=250", "dataset.pairs=500"]  # no multiple of a batch
# What one process does: (command, overrides). Two get the same, and half the rows each.
CASES: dict[str, tuple[str, list[str]]] = {
    "pcrm": ("train-rm", ["reward=pcrm_cosine"]),
    "gae": ("align", ["algo=pm", "algo.minibatches=2", "algo.ppo_epochs=2", "trainer.online.micro_batch_size=4"]),
    "rloo": (
        "align",
        ["algo=kl_ppo", "algo.advantage=rloo", "algo.whiten_advantages=true", "algo.beta_schedule=adaptive"],
    ),
    "rpo": ("align", ["algo=rpo", "algo.sft_reduction=token_mean", "trainer.pairwise.micro_batch_size=4"]),
    "shared": ("align", [*LORA, "model.share_base=true", "algo=pm"]),
}
SLOW: dict[str, tuple[str, list[str]]] = {
    "sft": ("train-sft", ["trainer.sft.micro_batch_size=2", "trainer.sft.max_steps=40"]),
    "token_wise": ("train-rm", ["reward=bt", "reward.token_wise=true"]),
    "rankings": ("train-rm", ["dataset.ranking_size=3"]),
    "warm": ("train-rm", ["reward=warm", "reward.members=2"]),
    "dpm": ("align", ["algo=dpm"]),
    "dpo_lora": ("align", [*LORA, "algo=dpo"]),
    "pm_lora": ("align", [*LORA, "algo=pm", "model.gradient_checkpointing=true"]),
    "evaluate": ("evaluate", []),
}


def together(folder: Path, cases: dict[str, tuple[str, list[str]]], world: int = 2) -> None:
    """Run cases on several ranks, in `folder`/store and `folder`/CASE."""
    folder.mkdir()
    common = [*SMALL, *SURVEY, *ROWS, f"store_dir='{folder / 'store'}'"]
    plan = [(command, [*common, f"run_dir='{folder / name}'", *more]) for name, (command, more) in cases.items()]
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {ranks.LAUNCHED: "1", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    places |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(world)}
    started = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("rank_jobs.py")), str(folder / "plan.json")],
            env={**os.environ, **places, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=(folder / f"{number}.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        for number in range(world)
    ]
    try:
        codes = [process.wait(timeout=500) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0] * world, "\n".join((folder / f"{number}.log").read_text()[-3000:] for number in range(world))


def tensors(folder: Path) -> dict[str, Any]:
    """Return the weights of a model folder or of an adapter's, without those that no loss depends on."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return without_blind_directions(found)


def alike(one: Path, other: Path) -> None:
    """Require two run folders with the same files, curves, metrics and weights."""
    assert files(one) == files(other)
    for name in ("model", "best"):
        if (one / name).exists():
            assert files(one / name) == files(other / name)
            found = tensors(one / name), tensors(other / name)
            assert len(found[0]) > 2
            assert gap(*found) < 1e-5, name
    logs = [read_lines(run / "training_log.jsonl") if (run / "training_log.jsonl").exists() else [] for run in (one, other)]
    for line, beside in zip(*logs, strict=True):
        assert line.keys() == beside.keys()
        assert beside == pytest.approx(line, rel=1e-3, abs=1e-5)
    metrics = [read_json(run / "metrics.json") for run in (one, other)]
    assert metrics[0].keys() == metrics[1].keys()
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-3, abs=1e-4)
    assert read_json(other / "status.json")["state"] == "finished"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which two ranks did all of CASES."""
    folder = tmp_path_factory.mktemp("ranks") / "two"
    together(folder, CASES)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that does a case in this process: alone(name, cases)."""
    folder = tmp_path_factory.mktemp("alone")

    def run(name: str, cases: dict[str, tuple[str, list[str]]] = CASES) -> Path:
        command, more = cases[name]
        return job(command, *ROWS, *more, run_dir=folder / name, store=folder / "store")

    return run


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_end_where_one_process_does(name: str, both: Path, alone: Callable[..., Path]) -> None:
    alike(alone(name), both / name)


@pytest.mark.usefixtures("no_figures")
def test_two_ranks_leave_one_store(both: Path, alone: Callable[..., Path]) -> None:
    store, mine = both / "store", alone("gae").parent / "store"
    assert files(store / ".work") == set()
    for stage in ("sft", "rm"):
        for entry in (mine / stage).iterdir():
            assert files(store / stage / entry.name) == files(entry)
            assert gap(tensors(store / stage / entry.name / "model"), tensors(entry / "model")) < 1e-5
    assert {path.name for path in (store / "samples").iterdir()} >= {path.name for path in (mine / "samples").iterdir()}


def test_rank_0_alone_shows_progress(both: Path) -> None:
    first, second = ((both / f"{number}.log").read_text() for number in (0, 1))
    assert "100%" in first
    assert "step/s" not in second
