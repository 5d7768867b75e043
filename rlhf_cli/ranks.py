"""The processes of one job: which one this is, and small values sent between them.

A job that was not launched as several has one rank, 0, and nothing here then imports or waits for anything.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from rlhf_cli.errors import ConfigError, RunError

Value = TypeVar("Value")
Part = TypeVar("Part")

LAUNCHED = "RLHF_LAUNCHED"  # set in every process that `launch=` started
STRATEGY = "RLHF_STRATEGY"  # there, what launch.strategy asks for
SHARDING = ("fsdp2", "zero3")  # strategies under which no process holds a whole model
# One rank may wait for a lock that another job holds; ranks that die are ended by the launcher, not by this.
PATIENCE = timedelta(days=7)
# Between tensors of two ranks there is no such wait.
TIMEOUT = timedelta(hours=2)

_group: Any = None  # for small values, over gloo: it takes any object and needs no GPU
_private: dict[Path, Path] = {}  # a folder of this rank alone: the one that it stands for
_alone = False  # whether this process does its own part of something that was dealt out


def launched() -> bool:
    """Return whether this process is a rank that `launch=` started."""
    return os.environ.get(LAUNCHED) == "1"


def refuse_others() -> None:
    """Refuse a process that torchrun or `accelerate launch` has started as one of several: all would do the same job.

    Raises:
        ConfigError: saying how several are started.
    """
    if not launched() and "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"this is one of {os.environ['WORLD_SIZE']} processes that rlhf has not started",
            "Each would do the whole job",
            "Run rlhf itself, with launch=accelerate launch.processes=N",
        )


def rank() -> int:
    """Return the number of this process among all, 0 being the one that writes."""
    return int(os.environ.get("RANK", "0")) if launched() and not _alone else 0


def local_rank() -> int:
    """Return the number of this process on its machine: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else 0


def world() -> int:
    """Return how many processes there are, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1")) if launched() and not _alone else 1


def is_main() -> bool:
    """Return whether this is rank 0."""
    return rank() == 0


def connect() -> None:
    """Join the other ranks, through accelerate, so that trainers find the same process group; once, later calls pass.

    On GPUs each rank then has its own as the current device.
    """
    global _group
    if world() == 1 or _group is not None:
        return
    import torch.distributed as dist
    from accelerate import PartialState

    if not dist.is_initialized():
        PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true", timeout=TIMEOUT)
    _group = dist.new_group(backend="gloo", timeout=PATIENCE)


def disconnect() -> None:
    """Leave the other ranks, at the end of the process."""
    global _group
    if _group is not None:
        import torch.distributed as dist

        dist.destroy_process_group()
        _group = None


def barrier() -> None:
    """Wait until every rank is here."""
    gather(None)


def broadcast(value: Value) -> Value:
    """Return rank 0's value on every rank; what other ranks pass is ignored."""
    if world() == 1:
        return value
    import torch.distributed as dist

    connect()
    held = [value if is_main() else None]
    dist.broadcast_object_list(held, src=0, group=_group)
    return held[0]  # type: ignore[return-value]


def gather(value: Value) -> list[Value]:
    """Return the values of all ranks, in the order of ranks, on every rank."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    connect()
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value, group=_group)
    return found


def on_main(function: Callable[[], Value]) -> Value:
    """Return, on every rank, what `function` returns on rank 0; the others do not call it, and wait.

    What it raises ends rank 0, and by that the launcher ends the others.
    """
    return broadcast(function() if is_main() else None)  # type: ignore[return-value]


def main_first(function: Callable[[], Value]) -> Value:
    """Return what `function` returns on this rank; rank 0 calls it before the others: they find what it cached."""
    value = function() if is_main() else None
    barrier()
    return value if is_main() else function()  # type: ignore[return-value]


def dealt(parts: Sequence[Part], compute: Callable[[Part], Value]) -> Iterator[Value]:
    """Yield what `compute` returns for each part, in order, on every rank; each part is computed by one of them.

    All ranks take from it together. Where models are split over the ranks, a forward needs all of them, and each
    computes every part.

    Args:
        parts: the same on every rank.
        compute: may call what ranks else do together: within it, this process is the only one.
    """
    if world() == 1 or strategy() in SHARDING:
        yield from map(compute, parts)
        return
    for first in range(0, len(parts), world()):
        turn = parts[first : first + world()]
        mine = rank()
        with _by_itself():
            value = compute(turn[mine]) if mine < len(turn) else None
        yield from gather(value)[: len(turn)]  # type: ignore[misc]


@contextmanager
def _by_itself() -> Iterator[None]:
    """Within it, this process is rank 0 of one."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def private(folder: Path) -> Path:
    """Return where this rank writes what belongs into `folder`: rank 0 there, each other into one that vanishes.

    So that all ranks can run the same code, and one folder is left.
    """
    if is_main():
        return folder
    made = Path(tempfile.mkdtemp(prefix=f"rlhf-rank{rank()}-"))
    if not _private:
        atexit.register(drop_private)
    _private[made] = folder.absolute()
    return made


def drop_private() -> None:
    """Remove the `private` folders; call it where a process ends without Python's own end."""
    while _private:
        shutil.rmtree(_private.popitem()[0], ignore_errors=True)


def shared(path: Path) -> Path:
    """Return where rank 0 has what belongs to `path`, a path below a `private` folder; any other path as it is."""
    for made, folder in _private.items():
        if path.is_relative_to(made):
            return folder / path.relative_to(made)
    return path


def average(metrics: Mapping[str, float], weight: float = 1.0) -> dict[str, float]:
    """Return the weighted mean of each metric over the ranks that have it, the same numbers on every rank.

    Args:
        metrics: this rank's values.
        weight: what they count, such as the tokens they were computed from; >= 0.

    Raises:
        ValueError: a negative weight.
    """
    if weight < 0:
        raise ValueError(f"weight is {weight}, and must be >= 0")
    found = [(values, share) for values, share in gather((dict(metrics), float(weight))) if share > 0]
    totals: dict[str, tuple[float, float]] = {}
    for values, share in found:
        for key, value in values.items():
            total, shares = totals.get(key, (0.0, 0.0))
            totals[key] = (total + share * value, shares + share)
    return {key: total / shares for key, (total, shares) in totals.items()}


def strategy() -> str:
    """Return what is split over the ranks: ddp | fsdp2 | zero2 | zero3."""
    return os.environ.get(STRATEGY, "ddp") if launched() else "ddp"


def check_strategy(accelerator: Any) -> None:
    """Refuse to train with another strategy than the one asked for: accelerate falls back to DDP without a word.

    Args:
        accelerator: a trainer's, as it will be used.

    Raises:
        RunError: the strategy in force is another.
    """
    if world() == 1 and strategy() == "ddp":
        return
    found = _in_force(accelerator)
    if found != strategy():
        raise RunError(
            f"launch.strategy={strategy()} is not in force, {found} is",
            f"accelerate reports {accelerator.distributed_type} on {accelerator.device}",
            "use launch.strategy=ddp, or a machine and packages that have it",
        )
    if accelerator.num_processes != world():
        raise RunError(f"{world()} processes were launched and accelerate sees {accelerator.num_processes}")


def _in_force(accelerator: Any) -> str:
    """Return the strategy that an accelerator follows, in our names."""
    state = accelerator.state
    if (plugin := getattr(state, "deepspeed_plugin", None)) is not None:
        return f"zero{plugin.zero_stage}"
    if (plugin := getattr(state, "fsdp_plugin", None)) is not None:
        return f"fsdp{plugin.fsdp_version}"
    return "ddp" if str(accelerator.distributed_type).rpartition(".")[2].startswith("MULTI_") else "none"
