"""Which GPUs there are for jobs and ranks."""

from __future__ import annotations

import os
from pathlib import Path

from filelock import FileLock, Timeout

VISIBLE = "CUDA_VISIBLE_DEVICES"

_held: list[FileLock] = []  # until this process ends: CUDA cannot move to another GPU once it is in use


def count() -> int:
    """Return how many CUDA GPUs this process may use."""
    import torch

    return torch.cuda.device_count()


def visible() -> list[str]:
    """Return the names of the GPUs this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    found = count()
    named = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    return named[:found] if named else [str(number) for number in range(found)]


def pin(gpus: list[str], wanted: int, folder: Path, *, wait: bool, number: int) -> list[str]:
    """Give this process GPUs of its own among those of a sweep, for good, and return them.

    Args:
        gpus: those of the sweep; none: nothing is done.
        wanted: how many a job needs.
        folder: where the sweep's processes see each other's locks.
        wait: whether to wait until enough are free; else, where there are more processes than GPUs, they share.
        number: of the job, by which shared GPUs are dealt out.
    """
    if not gpus or _held:
        return []
    wanted = min(wanted, len(gpus))
    with FileLock(folder / "gpus.lock"):  # one takes what it needs at a time, or two would wait for each other
        taken = _free(gpus, wanted, folder, wait=wait)
    if len(taken) < wanted:
        taken = [gpus[(number * wanted + offset) % len(gpus)] for offset in range(wanted)]
    os.environ[VISIBLE] = ",".join(taken)
    return taken


def _free(gpus: list[str], wanted: int, folder: Path, *, wait: bool) -> list[str]:
    taken: list[str] = []
    while True:
        for name in (name for name in gpus if name not in taken and len(taken) < wanted):
            lock = FileLock(folder / f"gpu-{name}.lock")
            try:
                lock.acquire(timeout=1 if wait else 0)
            except Timeout:
                continue
            _held.append(lock)
            taken.append(name)
        if len(taken) == wanted or not wait:
            return taken
