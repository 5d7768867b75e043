"""Ranks of a dummy job, real processes: how they end well, and how each way to fail is told, once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_cli import launch as launching
from rlhf_cli import ranks
from rlhf_cli.config import compose
from rlhf_cli.config.launching import AccelerateConfig
from rlhf_cli.errors import ConfigError, RankError, RunError, UserError
from rlhf_cli.launch import failures, gpus, processes

HERE = Path(__file__).parent


def accelerate(*overrides: str) -> AccelerateConfig:
    launch = compose.load("train-sft", ["launch=accelerate", *overrides]).launch
    assert isinstance(launch, AccelerateConfig)
    return launch


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that runs the dummy job as two ranks."""
    monkeypatch.setattr(processes, "ENTRY", "rank_dummy")
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "job").mkdir()
    two = accelerate("launch.processes=2")
    return lambda what: processes.run({"command": what, "overrides": [str(tmp_path / "job")]}, two, "cpu")


def all_ended(folder: Path) -> bool:
    """Return whether no rank of the job is left."""
    return not any(Path(f"/proc/{file.read_text()}").exists() for file in folder.glob("pid-*"))


def scratch(folder: Path) -> list[Path]:
    return list(folder.glob("rlhf-ranks-*"))


def test_ranks_meet_and_only_rank_0_prints(
    run: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    before = dict(os.environ), signal.getsignal(signal.SIGINT)
    folder = run("connected")
    assert folder == tmp_path / "job"
    printed = capfd.readouterr()
    assert printed.out == "rank 0 has 3 threads\n"
    assert "2 processes (ddp, CPU)" in printed.err
    assert (folder / "ranks/rank-1.log").read_text() == "rank 1 has 3 threads\n"
    assert (dict(os.environ), signal.getsignal(signal.SIGINT)) == before
    assert scratch(tmp_path) == []


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("bug", "error: rank 1 failed as shown. All ranks were ended."),
        ("exit", "error: rank 1 ended with exit code 7 and said nothing. All ranks were ended."),
        ("connected kill", "error: rank 1 was killed by SIGKILL."),
    ],
)
def test_a_rank_that_breaks_ends_all_and_is_told_once(
    run: Callable[[str], Path], tmp_path: Path, what: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match="rank 1") as caught:
        run(what)
    assert time.monotonic() - began < 50
    text = str(caught.value)
    assert said in text.splitlines()[-1]
    assert text.count("Traceback") == (what == "bug")
    assert text.count("ZeroDivisionError: a bug\nin two lines") == (what == "bug")
    assert "Traceback" not in capfd.readouterr().err, "what others say of it is not printed"
    assert all_ended(tmp_path / "job")
    (left,) = [path for path in tmp_path.iterdir() if path.name != "job"]
    assert {path.suffix for path in left.iterdir()} <= {".log", ".json"}, "what they printed, and no folder of theirs"


@pytest.mark.parametrize("what", ["refuse", "both refuse"])
def test_a_users_mistake_is_one_line(run: Callable[[str], Path], tmp_path: Path, what: str) -> None:
    with pytest.raises(UserError, match=r"^there is no data\. the file is empty\. name another\.$"):
        run(what)
    assert all_ended(tmp_path / "job")
    assert scratch(tmp_path) == []


@pytest.mark.parametrize(
    ("told", "error", "code"), [(signal.SIGINT, KeyboardInterrupt, "^$"), (signal.SIGTERM, SystemExit, "^143$")]
)
def test_an_interruption_ends_all_ranks_and_leaves_nothing(
    run: Callable[[str], Path], tmp_path: Path, told: signal.Signals, error: type[BaseException], code: str
) -> None:
    def interrupt() -> None:
        while len(list((tmp_path / "job").glob("pid-*"))) < 2:
            time.sleep(0.05)
        began.append(time.monotonic())
        os.kill(os.getpid(), told)

    began: list[float] = []
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(error, match=code):
        run("wait")
    assert time.monotonic() - began[0] < 15, "they end by themselves, and are not killed"
    thread.join()
    assert all_ended(tmp_path / "job")
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


def test_a_job_that_is_told_to_end_before_its_ranks_start_leaves_nothing(
    run: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_keep", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        run("wait")
    assert [path.name for path in tmp_path.iterdir()] == ["job"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_closed_terminal_does_not_end_a_job_under_nohup(
    run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object) -> dict[int, failures.Exit]:
        os.kill(os.getpid(), signal.SIGHUP)
        return {0: failures.Exit(7, 0.0)}

    monkeypatch.setattr(processes, "_keep", closed)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in processes._heard()
        with pytest.raises(RankError, match="exit code 7"):
            run("wait")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in processes._heard()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_ranks_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"command": "wait", "overrides": [str(tmp_path)]}))
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-m', 'rank_dummy', {str(tmp_path)!r}])"
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", ranks.LAUNCHED: "1"}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    wait_for(lambda: bool(list(tmp_path.glob("pid-*"))))
    assert not all_ended(tmp_path)
    parent.kill()
    parent.wait()
    wait_for(lambda: all_ended(tmp_path))


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 40
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


# -- what can start ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "device", "found", "error", "message"),
    [
        (["launch.processes=3"], "auto", 2, ConfigError, "more than the GPUs of this machine: 2"),
        ([], "cpu", 2, ConfigError, "there is no GPU"),
        (["launch.strategy=fsdp2", "launch.processes=2"], "auto", 0, ConfigError, "needs GPUs, and PyTorch finds none"),
        (["launch.processes=2"], "cuda", 0, RunError, "PyTorch finds no CUDA GPU"),
        (["launch.strategy=zero3"], "auto", 2, ConfigError, "package deepspeed is not installed"),
    ],
)
def test_what_cannot_start_is_refused(
    overrides: list[str], device: str, found: int, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "count", lambda: found)
    monkeypatch.setattr(processes, "find_spec", lambda _: None)
    with pytest.raises(error, match=message):
        processes.placed(accelerate(*overrides), device)


def test_every_gpu_has_a_process_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "count", lambda: 4)
    assert processes.placed(accelerate(), "auto") == (False, 4)
    assert processes.placed(accelerate("launch.processes=2"), "auto") == (False, 2)
    assert processes.placed(accelerate("launch.processes=8"), "cpu") == (True, 8)


@pytest.mark.parametrize("command", ["train-sft", "train-rm", "align", "evaluate"])
def test_every_stage_can_be_done_by_several(command: str) -> None:
    assert launching.is_elsewhere(compose.load(command, ["launch=accelerate", "launch.processes=2"]))
    assert not launching.is_elsewhere(compose.load(command, []))


def test_ranks_of_another_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCAL_RANK": "1", "WORLD_SIZE": "4", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="one of 4 processes that rlhf has not started"):
        launching.is_elsewhere(compose.load("train-sft", []))


# -- what accelerate is told ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "told"),
    [
        ("ddp", {}),
        (
            "fsdp2",
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_RESHARD_AFTER_FORWARD": "true",
                "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
                "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
                "FSDP_OFFLOAD_PARAMS": "false",
            },
        ),
        ("zero2", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
        (
            "zero3",
            {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
            },
        ),
    ],
)
def test_accelerates_own_environment_for_a_strategy(strategy: str, told: dict[str, str]) -> None:
    before = dict(os.environ)
    port = processes.free_port()
    found = processes.of_strategy(accelerate(f"launch.strategy={strategy}"), 2, port)
    used = {key for key in found if key.startswith(("ACCELERATE_USE", "FSDP_", "ACCELERATE_DEEPSPEED"))}
    assert found.items() >= told.items()
    assert bool(used) == bool(told)
    assert found["ACCELERATE_MIXED_PRECISION"] == "no", "the trainer decides"
    assert dict(os.environ) == before


# -- one GPU a job of a sweep -----------------------------------------------------------------------------------------


@pytest.fixture
def unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_held", [])
    monkeypatch.setenv(gpus.VISIBLE, "GPU-a,GPU-b,GPU-c")


@pytest.mark.usefixtures("unpinned")
def test_jobs_have_gpus_of_their_own_and_share_when_there_are_too_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "count", lambda: 3)
    names = gpus.visible()
    assert names == ["GPU-a", "GPU-b", "GPU-c"]
    taken = []
    held = []  # by the processes of a sweep, each of which has its own list
    for number in range(4):
        taken.append(gpus.pin(names, 1, tmp_path, wait=False, number=number))
        held.append(gpus._held)
        assert os.environ[gpus.VISIBLE] == taken[-1][0]
        monkeypatch.setattr(gpus, "_held", [])
    assert taken == [["GPU-a"], ["GPU-b"], ["GPU-c"], ["GPU-a"]]


@pytest.mark.usefixtures("unpinned")
def test_a_process_keeps_its_gpu_and_a_job_of_two_gets_two(tmp_path: Path) -> None:
    names = ["0", "1", "2"]
    assert gpus.pin(names, 2, tmp_path, wait=False, number=0) == ["0", "1"]
    assert gpus.pin(names, 2, tmp_path, wait=False, number=5) == [], "CUDA cannot move"
    assert os.environ[gpus.VISIBLE] == "0,1"


def test_without_gpus_nothing_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    assert gpus.visible() == []
    assert gpus.pin([], 1, tmp_path, wait=True, number=0) == []
    assert gpus.VISIBLE not in os.environ
