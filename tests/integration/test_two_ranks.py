"""Two processes do what one does: the same curves, metrics and weights from the same global batches, in one folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
from small_jobs import SMALL, SURVEY, files, gap, job, read_json, read_lines
from test_invariance import without_blind_directions

from rlhf_cli import ranks
from rlhf_cli.measure import sampled
from rlhf_cli.run import latest_checkpoint

LORA = ["peft=lora", "peft.rank=4"]
ROWS = ["dataset.demonstrations=250", "dataset.pairs=500"]  # no multiple of a batch
CLOSED = ["dataset.closed_vocabulary=true"]  # a policy of a few steps else says nothing valid, and no step is best
GAE = [*CLOSED, "algo=pm", "algo.minibatches=2", "algo.ppo_epochs=2", "trainer.online.micro_batch_size=4"]
GAE += ["trainer.online.max_steps=12", "trainer.online.eval_every_steps=6"]
Cases = dict[str, tuple[str, list[str]]]
EVALUATED: Cases = {"evaluate": ("evaluate", ["reward=pcrm_cosine"])}
# What one process does: (command, overrides). Two get the same, and half the rows each.
CASES: Cases = {
    "pcrm": ("train-rm", ["reward=pcrm_cosine"]),
    "rpo": (
        "align",
        [*CLOSED, "reward=gold", "algo=rpo", "algo.sft_reduction=token_mean", "trainer.pairwise.micro_batch_size=4"],
    ),
    **EVALUATED,
    # A critic on the policy's base. Of two ranks one is killed before the second of three updates ends.
    "shared": (
        "align",
        [*LORA, *GAE, "model.share_base=true"],
    ),
}
KILLED, AT = "shared", 7
MORE: Cases = {
    "sft": ("train-sft", ["trainer.sft.micro_batch_size=2", "trainer.sft.max_steps=40"]),
    "token_wise": ("train-rm", ["reward=bt", "reward.token_wise=true"]),
    "rankings": ("train-rm", ["dataset.ranking_size=3"]),
    "warm": ("train-rm", ["reward=warm", "reward.members=2"]),
    "gae": ("align", GAE),
    "rloo": (
        "align",
        [*CLOSED, "algo=kl_ppo", "algo.advantage=rloo", "algo.whiten_advantages=true", "algo.beta_schedule=adaptive"],
    ),
    "dpo": ("align", [*CLOSED, "reward=gold", "algo=dpo"]),
    "dpm": ("align", [*CLOSED, "reward=gold", "algo=dpm"]),
    "dpo_lora": ("align", [*LORA, *CLOSED, "reward=gold", "algo=dpo"]),
    "pm_lora": ("align", [*LORA, *CLOSED, "algo=pm", "model.gradient_checkpointing=true"]),
    "evaluate_rm": ("evaluate", ["stage=rm"]),
}
SHARDED: Cases = {
    "bt": ("train-rm", []),
    "dpo": ("align", [*CLOSED, "reward=gold", "algo=dpo"]),
    # Of rank 1, so that one of two processes has nothing of some weights.
    "lora": ("align", [*LORA, "peft.rank=1", *CLOSED, "algo=pm", "algo.advantage=rloo"]),
    "dpo_lora": ("align", [*LORA, *CLOSED, "reward=gold", "algo=dpo"]),
    "gae": ("align", GAE),
}
# As accelerate reads launch/strategies/fsdp2.yaml.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_OFFLOAD_PARAMS": "false",
}  # fmt: skip


def together(
    folder: Path, cases: Cases, *, kill: tuple[str, int] | None = None, strategy: str = "ddp", world: int = 2
) -> list[int]:
    """Run cases on several ranks, in `folder`/store and `folder`/CASE, and return the exit codes of the ranks.

    Args:
        folder: made where it does not exist.
        cases: what is run, one after another.
        kill: title of a trainer and its step after which rank 1 is killed.
        strategy: ddp or fsdp2.
        world: number of ranks.
    """
    folder.mkdir(exist_ok=True)
    common = [*SMALL, *SURVEY, *ROWS, f"store_dir='{folder / 'store'}'"]
    plan = [(command, [*common, f"run_dir='{folder / name}'", *more]) for name, (command, more) in cases.items()]
    (folder / "plan.json").write_text(
        json.dumps({"jobs": plan, "kill": kill, "shard": strategy != "ddp"}), encoding="utf-8"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {ranks.LAUNCHED: "1", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    places |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(world)}
    places["TMPDIR"] = str(folder / "tmp")  # a killed rank leaves something there; launch= would remove it
    (folder / "tmp").mkdir(exist_ok=True)
    places |= {ranks.STRATEGY: strategy, **(FSDP2 if strategy == "fsdp2" else {})}
    logs = [(folder / f"{number}.log").open("a", encoding="utf-8") for number in range(world)]
    started = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("rank_jobs.py")), str(folder / "plan.json")],
            env={**os.environ, **places, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for number, log in enumerate(logs)
    ]
    try:
        return [process.wait(timeout=500) for process in started]
    finally:
        for process, log in zip(started, logs, strict=True):
            process.kill()
            log.close()


def said(folder: Path) -> str:
    """Return the end of what the ranks have printed."""
    return "\n".join(path.read_text(encoding="utf-8")[-3000:] for path in sorted(folder.glob("*.log")))


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
    logs = [
        read_lines(run / "training_log.jsonl") if (run / "training_log.jsonl").exists() else [] for run in (one, other)
    ]
    for line, beside in zip(*logs, strict=True):
        assert line.keys() == beside.keys()
        for of in (line, beside):
            of.pop("score/mean", None)  # no loss of differences sees it: Adam turns its rounding noise into steps
        assert beside == pytest.approx(line, rel=1e-3, abs=1e-4)
    metrics = [read_json(run / "metrics.json") for run in (one, other)]
    assert metrics[0].keys() == metrics[1].keys()
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-3, abs=1e-4)
    assert read_json(other / "status.json")["state"] == "finished"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which two ranks did all of CASES."""
    folder = tmp_path_factory.mktemp("ranks") / "two"
    codes = together(folder, CASES, kill=("pm", AT))
    assert codes[1] == -signal.SIGKILL, said(folder)
    assert codes[0] not in (0, None), "rank 0 cannot go on alone"
    assert latest_checkpoint(folder / KILLED / "checkpoints") == folder / KILLED / "checkpoints" / "checkpoint-4"
    assert together(folder, {KILLED: CASES[KILLED]}) == [0, 0], said(folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that does a case in this process: alone(name, cases)."""
    folder = tmp_path_factory.mktemp("alone")

    def run(name: str, cases: Cases = CASES) -> Path:
        command, more = cases[name]
        return job(command, *ROWS, *more, run_dir=folder / name, store=folder / "store")

    return run


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_end_where_one_process_does(name: str, both: Path, alone: Callable[..., Path]) -> None:
    alike(alone(name), both / name)


@pytest.mark.usefixtures("no_figures")
def test_what_ranks_deal_out_is_measured_as_by_one_process(
    both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same models, to the last digit: samples, their rewards, and every number that rests on them."""
    monkeypatch.setattr(sampled, "DRAWN", rank_jobs.DRAWN)
    for stage in ("sft", "rm"):
        shutil.copytree(both / "store" / stage, tmp_path / "store" / stage)
    command, more = EVALUATED["evaluate"]
    one = job(command, *ROWS, *more, run_dir=tmp_path / "run", store=tmp_path / "store")
    two = both / "evaluate"
    for name in ("completions.jsonl", "measured.json", "pairs.json", "metrics.json"):
        assert (one / name).read_text() == (two / name).read_text(), name
    kept = {path.relative_to(tmp_path): path.read_bytes() for path in (tmp_path / "store").rglob("*.npz")}
    assert len([path for path in kept if path.parts[1] == "samples"]) == 8, "four pieces of two policies"
    assert {path: (both / path).read_bytes() for path in kept} == kept


def test_one_rank_writes_the_store(both: Path) -> None:
    store = both / "store"
    assert files(store / ".work") == set()
    assert [len(list((store / stage).iterdir())) for stage in ("sft", "rm")] == [1, 2]  # one per reward
    for entry in (*(store / "sft").iterdir(), *(store / "rm").iterdir()):
        assert files(entry) == {"identity.json", "metrics.json", "model", "training_log.jsonl"}
    assert not list(store.rglob("*.tmp"))


def test_one_rank_shows_progress(both: Path) -> None:
    first, second = ((both / f"{number}.log").read_text(encoding="utf-8") for number in (0, 1))
    assert "12/12" in first
    assert "step/s" not in second


def test_sharded_models_are_parts_that_say_the_same(both: Path) -> None:
    for number in (0, 1):
        found = read_json(both / f"shards-{number}.json")
        assert found["share"] < 0.51, "each rank holds half"
        assert found["gathered"] == (0 if number else 36), "rank 0 alone gets the whole"
        assert found["before"] == (0 if number else 1), "rank 0 alone reads weights"
        assert number == 0 or found["most"] < 0.6, "half, and a layer"
        same = ("logps", "scores", "state", "averaged", "sharded", "resumed", "opened", "opened_scores")
        assert {name: found[name] for name in same} == pytest.approx(dict.fromkeys(same, 0.0), abs=1e-6)
        assert found["moved"] > 1e-3
        assert found["adapter"] > 1e-3


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which two ranks did all of MORE."""
    folder = tmp_path_factory.mktemp("ranks") / "more"
    assert together(folder, MORE) == [0, 0], said(folder)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("name", MORE)
def test_more_of_what_two_ranks_do_ends_where_one_process_does(
    name: str, more: Path, alone: Callable[..., Path]
) -> None:
    alike(alone(name, MORE), more / name)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which two ranks did all of SHARDED under FSDP2, the last one killed and gone on with."""
    folder = tmp_path_factory.mktemp("ranks") / "sharded"
    codes = together(folder, SHARDED, kill=("pm", AT), strategy="fsdp2")
    assert codes[1] == -signal.SIGKILL, said(folder)
    assert together(folder, {"gae": SHARDED["gae"]}, strategy="fsdp2") == [0, 0], said(folder)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("name", SHARDED)
def test_sharded_training_ends_where_one_process_does(name: str, sharded: Path, alone: Callable[..., Path]) -> None:
    """accelerate shards on GPUs alone: it is told that these are some, and everything but that is real."""
    alike(alone(name, SHARDED), sharded / name)


@pytest.mark.slow
def test_no_gradient_of_split_weights_is_ever_whole(sharded: Path) -> None:
    for number in (0, 1):
        held = (sharded / f"gradients-{number}.txt").read_text(encoding="utf-8").split()
        assert len(held) >= 12, "there are several micro-batches to a step"
        assert set(held) == {"0"}
