"""Batches that fit the memory there is: equal lengths together, as many rows as fit, fewer where they do not."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

COPIES, BYTES = 4, 4  # logits, log-probs and temporaries of a forward, in float32
SHARE = 4  # a batch takes at most this fraction of the free memory: what it needs is an estimate
MOST = 512  # rows; more are not faster
UNKNOWN = 2 * 2**30  # bytes, where the system does not say what is free
MEMORY_FILE = Path("/proc/meminfo")
CGROUP_FILE, CGROUP_ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
V2 = ("memory.max", "memory.current")


def by_length(lengths: Sequence[int]) -> list[int]:
    """Return the indices of `lengths`, longest first, equal ones in their order, (N,).

    Rows of one batch are then about equally long, and a batch that does not fit fails at once.
    """
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


def rows_that_fit(width: int, vocab_size: int, device: torch.device | str) -> int:
    """Return how many sequences one forward can take, a power of two in [1, 512].

    A power of two, so that a little more or less free memory does not change the batches.

    Args:
        width: tokens of a sequence, padding included.
        vocab_size: numbers a token.
        device: cpu or cuda.
    """
    need = max(1, width * vocab_size * COPIES * BYTES)
    fitting = min(max(free_memory(device) // SHARE // need, 1), MOST)
    return 1 << (fitting.bit_length() - 1)


def free_memory(device: torch.device | str) -> int:
    """Return the free memory of `device` in bytes; what PyTorch holds of a GPU without using it counts as free.

    In a container its limit counts, where that leaves less than the machine has.
    """
    place = torch.device(device)
    if place.type == "cuda":
        held = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
        return int(torch.cuda.mem_get_info(place)[0] + held)
    machine = _of_machine("MemAvailable", "SC_AVPHYS_PAGES")
    return min([machine, *(max(limit - used, 0) for limit, used in _limits())])


def total_memory(device: torch.device | str) -> int:
    """Return the memory of `device` in bytes, used or not; of a container, its limit."""
    place = torch.device(device)
    if place.type == "cuda":
        return int(torch.cuda.mem_get_info(place)[1])
    return min([_of_machine("MemTotal", "SC_PHYS_PAGES"), *(limit for limit, _ in _limits())])


def _of_machine(name: str, pages: str) -> int:
    """Return a number of bytes that the system says: a line of /proc/meminfo, elsewhere a number of pages."""
    try:
        lines = MEMORY_FILE.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration):  # not Linux
        pass
    try:
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return UNKNOWN


def _limits() -> list[tuple[int, int]]:
    """Return limit and use in bytes of the control groups that bound this process; none outside a container.

    Use without the page cache that the kernel gives back when asked (inactive_file), as container runtimes count it.
    """
    found = []
    for folder, names in _groups():
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            limit, used = (int((folder / name).read_text(encoding="utf-8")) for name in names)
            found.append((limit, max(used - _inactive_file(folder), 0)))
    return found


def _groups() -> list[tuple[Path, tuple[str, str]]]:
    """Return the memory groups of this process and of all above it, with their files for limit and use, v2 and v1.

    A container sees its own group as the root, or is told a path that is not there: then the root is what bounds it.
    """
    try:
        lines = CGROUP_FILE.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (CGROUP_ROOT / "memory", V1) if controllers else (CGROUP_ROOT, V2)
        folder = root / path.lstrip("/")
        found += [(above, names) for above in (folder, *folder.parents) if above.is_relative_to(root)]
    return found


def _inactive_file(folder: Path) -> int:
    """Return the page cache of a group and those in it that is not in use, bytes; 0 where the system does not say."""
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
        return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))  # v1, v2
    except (OSError, ValueError):
        return 0


def in_batches(indices: Sequence[int], compute: Callable[[list[int]], list[T]], size: int) -> list[T]:
    """Return what `compute` returns for all `indices`, in their order, called with at most `size` at a time, (N,).

    Where the GPU's memory does not do, batches are halved and computed again.

    Args:
        indices: of rows.
        compute: indices of a batch -> one result each.
        size: >= 1.

    Raises:
        ValueError: size below 1, or another number of results than indices.
        torch.OutOfMemoryError: one row alone does not fit.
    """
    if size < 1:
        raise ValueError(f"batches of {size} rows: at least 1 is needed.")
    found: list[T] = []
    while len(found) < len(indices):
        part = list(indices[len(found) : len(found) + size])
        rows = _unless_full(compute, part)
        if rows is None:
            size = len(part) // 2
            torch.cuda.empty_cache()
        elif len(rows) == len(part):
            found += rows
        else:
            raise ValueError(f"{len(rows)} results for {len(part)} rows: one each is needed.")
    return found


def _unless_full(compute: Callable[[list[int]], list[T]], part: list[int]) -> list[T] | None:
    """Return the results, or None where the memory does not do: the tensors of the failed try are then gone."""
    try:
        return compute(part)
    except torch.OutOfMemoryError:
        if len(part) == 1:
            raise
        return None
