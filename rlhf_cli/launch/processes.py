"""Several ranks on this machine: accelerate says what each needs in its environment, torch's agent keeps them."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from rlhf_cli import ranks
from rlhf_cli.config.launching import AccelerateConfig
from rlhf_cli.errors import ConfigError, RunError
from rlhf_cli.launch import failures, gpus

ENTRY = "rlhf_cli.rank_job"
STRATEGIES = Path(__file__).with_name("strategies")
MAIN_PORT = 29500  # of torchrun and accelerate
LOCALHOST = "127.0.0.1"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def run(job: dict[str, Any], launch: AccelerateConfig, device: str) -> Path:
    """Run a job as ranks of this machine, wait for them, and return the run folder.

    Args:
        job: what rlhf_cli.rank_job reads.
        launch: how many, and where the others are.
        device: auto | cpu | cuda.

    Raises:
        ConfigError: there are fewer GPUs than processes, or the strategy cannot be had.
        UserError: a rank's own, of the rank that failed first.
        RankError: a rank failed otherwise.
    """
    on_cpu, count = placed(launch, device)
    with _scratch() as scratch:
        (scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")
        address = launch.main_address or LOCALHOST
        port = launch.main_port or (MAIN_PORT if launch.machines > 1 else free_port())
        first, world = count * launch.machine_rank, count * launch.machines
        others = f"; output of the others: {scratch}" if count > 1 or first else ""
        typer.echo(f"{world} processes ({launch.strategy}, {'CPU' if on_cpu else 'GPU'}){others}", err=True)
        with environment(launch, count, port, on_cpu=on_cpu):
            failed = _keep(launch, count, f"{address}:{port}", scratch)
        folder = Path(failures.settle(scratch, failed, machines=launch.machines))
        keep_output(scratch, folder)
    return folder


@contextmanager
def _scratch() -> Iterator[Path]:
    """Provide the folder where ranks find their job, have folders of their own and leave what they say.

    It is gone however this process ends, but where a rank has failed, what the ranks printed stays.
    """
    with _own_signals():
        _end_on_signals()
        folder = Path(tempfile.mkdtemp(prefix="rlhf-ranks-"))
        try:
            yield folder
        except failures.RankError:
            for left in [path for path in folder.iterdir() if path.is_dir()]:  # of ranks that were killed
                shutil.rmtree(left, ignore_errors=True)
            raise
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _end_on_signals() -> None:
    """Let signals that end this process raise, as Ctrl-C does: what it has made is then removed."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for number in {signal.SIGTERM, signal.SIGHUP} & _heard():
            signal.signal(number, end)


def _heard() -> set[signal.Signals]:
    """Return the signals that may end the job: none that is ignored, as nohup asks for."""
    return {number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}


def placed(launch: AccelerateConfig, device: str) -> tuple[bool, int]:
    """Return whether the ranks compute on CPUs, and how many there are on this machine.

    Raises:
        ConfigError: there are fewer GPUs than processes, or the strategy cannot be had.
    """
    found = 0 if device == "cpu" else gpus.count()
    if device == "cuda" and not found:
        raise RunError("device is cuda", "PyTorch finds no CUDA GPU here", "use device=cpu or device=auto")
    if launch.strategy != "ddp" and not found:
        raise ConfigError(
            f"launch.strategy={launch.strategy} needs GPUs, and PyTorch finds none here",
            "On CPUs, accelerate falls back to DDP without a word",
            "Use launch.strategy=ddp",
        )
    if launch.strategy.startswith("zero") and find_spec("deepspeed") is None:
        raise ConfigError(
            f"launch.strategy={launch.strategy} cannot start",
            "The package deepspeed is not installed",
            "pip install rlhf-cli[deepspeed], or use launch.strategy=fsdp2",
        )
    if launch.processes is None and not found:
        raise ConfigError(
            "launch.processes is null, which is one process for each GPU, and there is no GPU",
            todo="Say how many share the CPU: launch.processes=2",
        )
    if found and launch.processes is not None and launch.processes > found:
        raise ConfigError(
            f"launch.processes={launch.processes} is more than the GPUs of this machine: {found}",
            "Every process has a GPU of its own",
            f"Use launch.processes={found}, or device=cpu",
        )
    return not found, launch.processes or found


def free_port() -> int:
    """Return a port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def environment(launch: AccelerateConfig, count: int, port: int, *, on_cpu: bool) -> Iterator[None]:
    """Within it, os.environ is what the ranks shall inherit."""
    before = dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = {"OMP_NUM_THREADS": before.get("OMP_NUM_THREADS", str(max(1, cores // count)))}
    wanted |= {ranks.LAUNCHED: "1", ranks.STRATEGY: launch.strategy}
    wanted |= {"ACCELERATE_USE_CPU": "true"} if on_cpu else of_strategy(launch, count, port)
    try:
        os.environ.update(wanted)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def of_strategy(launch: AccelerateConfig, count: int, port: int) -> dict[str, str]:
    """Return the environment in which accelerate follows a strategy, as `accelerate launch` makes it."""
    from accelerate.commands import launch as command
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    words = ["--config_file", str(STRATEGIES / f"{launch.strategy}.yaml"), "--num_processes"]
    words += [str(count * launch.machines), "--num_machines", str(launch.machines)]
    words += ["--machine_rank", str(launch.machine_rank), "--main_process_port", str(port)]
    words += ["--main_process_ip", launch.main_address or LOCALHOST, "--module", ENTRY]
    before = dict(os.environ)
    try:
        args, defaults, _ = command._validate_launch_command(command.launch_command_parser().parse_args(words))
        if args.use_deepspeed:
            args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
            made = prepare_deepspeed_cmd_env(args)[1]
        else:
            made = prepare_multi_gpu_env(args)
    except ConnectionError as error:
        raise RunError(f"launch.main_port={port} is in use", str(error), "choose another launch.main_port") from None
    finally:
        os.environ.clear()
        os.environ.update(before)
    return {key: value for key, value in made.items() if before.get(key) != value and key != "PYTHONPATH"}


def _keep(launch: AccelerateConfig, count: int, endpoint: str, scratch: Path) -> dict[int, failures.Exit]:
    """Start the ranks of this machine, wait until all have ended or one has failed, and end the others then.

    Returns:
        How those ended that were found dead first, by rank; empty where all went well.

    Raises:
        KeyboardInterrupt: the user's, after all ranks have ended.
        SystemExit: this process was told to end, and so are the ranks.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=launch.machines,
        max_nodes=launch.machines,
        nproc_per_node=count,
        run_id="rlhf",
        rdzv_backend="static",
        rdzv_endpoint=endpoint,
        rdzv_configs={"rank": launch.machine_rank, "timeout": 900},
        max_restarts=0,
        monitor_interval=0.2,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        signals_to_handle=",".join(number.name for number in _heard()),
    )
    try:
        with _silent_agent(), _own_signals():
            elastic_launch(config, sys.executable)("-m", ENTRY, str(scratch))
    except ChildFailedError as error:
        return {rank: failures.Exit(found.exitcode, found.timestamp) for rank, found in error.failures.items()}
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + error.sigval) from None
    return {}


@contextmanager
def _silent_agent() -> Iterator[None]:
    """Within it, the agent's own account of a failure is not printed: the rank's is."""
    loggers = [logging.getLogger(name) for name in ("torch.distributed.elastic", "torch.distributed.run")]
    loggers += [
        log
        for name, log in logging.root.manager.loggerDict.items()
        if name.startswith("torch.distributed.elastic") and isinstance(log, logging.Logger)
    ]
    before = [(log, log.level) for log in loggers]
    for log in loggers:
        log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for log, level in before:
            log.setLevel(level)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Put back afterwards what this process does on signals: the agent takes them over."""
    before = [(number, signal.getsignal(number)) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in before:
            try:
                signal.signal(number, handler)
            except ValueError:  # not in the main thread: then the agent has taken none
                return


def keep_output(scratch: Path, folder: Path) -> None:
    """Move what the other ranks printed into the run folder's ranks/."""
    said = [file for file in scratch.glob("rank-*.log") if file.stat().st_size]
    if said and folder.is_dir():
        (folder / "ranks").mkdir(exist_ok=True)
        for file in said:
            shutil.move(file, folder / "ranks" / file.name)
