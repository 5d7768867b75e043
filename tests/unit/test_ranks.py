"""Values between ranks: two real processes over gloo agree; one process alone needs nobody."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_cli import ranks, run
from rlhf_cli.config import compose
from rlhf_cli.errors import RunError


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each of two processes found."""
    folder, script = tmp_path_factory.mktemp("ranks"), Path(__file__).with_name("rank_checks.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {ranks.LAUNCHED: "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            env={**os.environ, **common, "RANK": str(number), "LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (0, 1)
    ]
    ended = [process.communicate(timeout=100) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    return [json.loads(out) for out, _ in ended]


def test_each_knows_its_place(found: list[dict[str, Any]]) -> None:
    places = [{key: each[key] for key in ("rank", "local_rank", "world", "is_main")} for each in found]
    assert places == [
        {"rank": 0, "local_rank": 0, "world": 2, "is_main": True},
        {"rank": 1, "local_rank": 1, "world": 2, "is_main": False},
    ]


def test_accelerate_sees_the_same_group(found: list[dict[str, Any]]) -> None:
    assert [(each["backend"], each["accelerate"], each["left"]) for each in found] == [("gloo", 2, True)] * 2


def test_values_are_those_of_rank_0(found: list[dict[str, Any]]) -> None:
    assert [each["broadcast"] for each in found] == [{"run": "a"}] * 2
    assert [each["on_main"] for each in found] == [40, 40]


def test_gathered_values_are_in_the_order_of_ranks(found: list[dict[str, Any]]) -> None:
    assert [each["gather"] for each in found] == [["of 0", "of 1"]] * 2


def test_a_mean_is_weighted_and_over_those_that_have_the_metric(found: list[dict[str, Any]]) -> None:
    # weights 1 and 3: (1 * 1 + 3 * 2) / 4
    assert [each["average"] for each in found] == [{"loss": 1.75, "only_0": 5.0, "only_1": 5.0}] * 2
    assert [each["idle"] for each in found] == [{"loss": 3.0}] * 2, "what counts nothing is not even looked at"


def test_a_barrier_waits_for_the_slowest(found: list[dict[str, Any]]) -> None:
    assert [each["after_barrier"] for each in found] == [True, True]


def test_rank_0_goes_first(found: list[dict[str, Any]]) -> None:
    assert [each["main_first"] for each in found] == ["0", "0"]


def test_a_part_is_computed_by_one_rank_as_if_it_were_alone(found: list[dict[str, Any]]) -> None:
    assert [each["dealt"] for each in found] == [[[n**2, 1, 0, n] for n in range(5)]] * 2
    assert [each["mine"] for each in found] == [[0, 2, 4], [1, 3]]
    assert [each["after"] for each in found] == [2, 2]


def test_kept_rows_are_computed_by_one_rank(found: list[dict[str, Any]]) -> None:
    assert [each["asked"] for each in found] == [[[6, 5], [2, 1]], [[4, 3], [0]]], "whole pieces, once"
    assert [each[f"rows {again}"] for each in found for again in (0, 1)] == [list(range(7))] * 4


def test_where_models_are_split_each_rank_computes_every_part(
    asked: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "gather", lambda _: pytest.fail("nothing is dealt out"))
    asked("fsdp2")
    assert list(ranks.dealt([1, 2, 3], lambda part: (part, ranks.world()))) == [(1, 2), (2, 2), (3, 2)]


def test_one_process_is_rank_0_whatever_a_cluster_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ranks.LAUNCHED, raising=False)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (ranks.rank(), ranks.local_rank(), ranks.world(), ranks.is_main()) == (0, 0, 1, True)
    ranks.barrier()
    assert ranks.broadcast("mine") == "mine"
    assert ranks.gather("mine") == ["mine"]
    assert ranks.on_main(lambda: 1) == ranks.main_first(lambda: 1) == 1
    assert ranks.average({"loss": 2.0}, weight=7) == {"loss": 2.0}
    assert list(ranks.dealt("ab", str.upper)) == ["A", "B"]
    with pytest.raises(ValueError, match="must be >= 0"):
        ranks.average({}, weight=-1)


def test_asking_for_the_rank_imports_no_torch() -> None:
    code = "import sys; from rlhf_cli import ranks; ranks.broadcast(ranks.rank()); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# -- the strategy in force --------------------------------------------------------------------------------------------


class Accelerator:
    """What accelerate reports of a strategy."""

    def __init__(self, kind: str, processes: int = 2, **plugins: object) -> None:
        self.distributed_type, self.num_processes, self.device = f"DistributedType.{kind}", processes, "cuda:0"
        self.state = SimpleNamespace(**plugins)


FSDP2 = {"fsdp_plugin": SimpleNamespace(fsdp_version=2)}
ZERO3 = {"deepspeed_plugin": SimpleNamespace(zero_stage=3)}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that makes this process a rank of two with a strategy."""

    def ask(strategy: str) -> None:
        values = {ranks.LAUNCHED: "1", "RANK": "0", "WORLD_SIZE": "2", ranks.STRATEGY: strategy}
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return ask


@pytest.mark.parametrize(
    ("strategy", "accelerator"),
    [
        ("ddp", Accelerator("MULTI_CPU")),
        ("ddp", Accelerator("MULTI_GPU", fsdp_plugin=None)),
        ("fsdp2", Accelerator("FSDP", **FSDP2)),
        ("zero3", Accelerator("DEEPSPEED", **ZERO3)),
    ],
)
def test_the_strategy_asked_for_passes(asked: Callable[[str], None], strategy: str, accelerator: Accelerator) -> None:
    asked(strategy)
    ranks.check_strategy(accelerator)


@pytest.mark.parametrize(
    ("strategy", "accelerator", "found"),
    [
        ("fsdp2", Accelerator("MULTI_CPU"), "ddp"),  # what accelerate does on CPUs
        ("fsdp2", Accelerator("FSDP", fsdp_plugin=SimpleNamespace(fsdp_version=1)), "fsdp1"),
        ("zero2", Accelerator("DEEPSPEED", **ZERO3), "zero3"),
        ("ddp", Accelerator("FSDP", **FSDP2), "fsdp2"),
        ("ddp", Accelerator("NO"), "none"),
    ],
)
def test_another_strategy_stops(
    asked: Callable[[str], None], strategy: str, accelerator: Accelerator, found: str
) -> None:
    asked(strategy)
    with pytest.raises(RunError, match=f"launch.strategy={strategy} is not in force, {found} is"):
        ranks.check_strategy(accelerator)


def test_processes_that_accelerate_does_not_see_stop(asked: Callable[[str], None]) -> None:
    asked("ddp")
    with pytest.raises(RunError, match="2 processes were launched and accelerate sees 1"):
        ranks.check_strategy(Accelerator("MULTI_CPU", processes=1))


def test_one_process_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ranks.LAUNCHED, raising=False)
    ranks.check_strategy(Accelerator("NO", processes=1))


# -- a run ------------------------------------------------------------------------------------------------------------


def test_another_rank_than_0_opens_no_tracker_and_leaves_no_folder(
    asked: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked("ddp")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(ranks, "gather", lambda value: [value] * 2)
    monkeypatch.setattr(ranks, "broadcast", lambda _: False)
    monkeypatch.setattr(run, "open_tracker", lambda *_, **__: pytest.fail("rank 0 tells the tracker"))
    cfg = compose.load("train-sft", ["tracker=wandb"]).tracker
    told: dict[str, Any] = {"command": "train-sft", "config": {}, "identity": {}, "tracker": cfg, "group": "sft"}
    with run.Run.open(tmp_path / "run", **told) as opened:
        opened.log({"loss": 1.0}, 1)
        assert opened.tracker.where == ""
    ranks.drop_private()
    assert not opened.directory.exists()
    assert list(tmp_path.iterdir()) == []
