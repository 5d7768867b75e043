"""Batches that fit the memory there is."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.models import batches
from rlhf_cli.models.batches import by_length, free_memory, in_batches, rows_that_fit, total_memory

GIB = 2**30


def test_longest_first_and_equal_ones_in_their_order() -> None:
    assert by_length([3, 1, 3, 5, 1]) == [3, 0, 2, 1, 4]
    assert by_length([]) == []


@pytest.mark.parametrize(
    ("free", "rows"),
    [
        (GIB, 64),  # 256 tokens x 1024 numbers x 4 copies x 4 bytes = 4 MiB a row, in a quarter of 1 GiB
        (1.9 * GIB, 64),  # 121 rows, rounded down
        (2 * GIB, 128),
        (0, 1),
        (1000 * GIB, 512),
    ],
)
def test_rows_that_fit_a_quarter_of_the_free_memory(monkeypatch: pytest.MonkeyPatch, free: float, rows: int) -> None:
    monkeypatch.setattr(batches, "free_memory", lambda device: int(free))
    assert rows_that_fit(256, 1024, "cpu") == rows


@given(st.integers(1, 10**5), st.integers(1, 10**6), st.integers(0, 10**13))
def test_rows_that_fit_is_a_power_of_two_in_range(width: int, vocab_size: int, free: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "free_memory", lambda device: free)
        rows = rows_that_fit(width, vocab_size, "cpu")
    assert 1 <= rows <= 512
    assert rows & (rows - 1) == 0
    assert rows == 1 or rows * width * vocab_size * 16 * 4 <= free


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return /proc/meminfo of a machine with 700 of 900 MB free; nothing bounds this process."""
    told = tmp_path / "meminfo"
    told.write_text("MemTotal: 900000 kB\nMemFree: 100 kB\nMemAvailable:     700000 kB\n", encoding="utf-8")
    monkeypatch.setattr(batches, "MEMORY_FILE", told)
    monkeypatch.setattr(batches, "CGROUP_FILE", tmp_path / "cgroup")
    monkeypatch.setattr(batches, "CGROUP_ROOT", tmp_path / "groups")
    return told


def test_memory_of_the_cpu(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (free_memory("cpu"), total_memory("cpu")) == (700_000 * 1024, 900_000 * 1024)
    machine.write_text("MemTotal: 900 kB\n", encoding="utf-8")  # an old kernel
    monkeypatch.setattr(batches.os, "sysconf", {"SC_AVPHYS_PAGES": 3, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert free_memory("cpu") == 3 * 4096
    machine.unlink()

    def unknown(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(batches.os, "sysconf", unknown)
    assert free_memory("cpu") == 2 * GIB


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n", encoding="utf-8")


V1_LIMIT, V1_USE = "memory__limit_in_bytes", "memory__usage_in_bytes"


def test_a_containers_limit_bounds_free_memory(machine: Path, tmp_path: Path) -> None:
    root = tmp_path / "groups"
    (tmp_path / "cgroup").write_text("0::/\n", encoding="utf-8")  # a container sees its own group as the root
    stat = "anon 5\ninactive_file 30000000\nactive_file 1"
    group(root, memory__max=500_000_000, memory__current=200_000_000, memory__stat=stat)
    assert free_memory("cpu") == 500_000_000 - (200_000_000 - 30_000_000)  # its page cache can be given back
    assert total_memory("cpu") == 500_000_000
    group(root, memory__max="max")
    assert (free_memory("cpu"), total_memory("cpu")) == (700_000 * 1024, 900_000 * 1024)
    group(root, memory__max=100, memory__current=200, memory__stat="")
    assert free_memory("cpu") == 0


def test_the_groups_above_bound_it_too(machine: Path, tmp_path: Path) -> None:
    root = tmp_path / "groups"
    (tmp_path / "cgroup").write_text("0::/jobs.slice/job.scope\n", encoding="utf-8")
    group(root / "jobs.slice" / "job.scope", memory__max="max", memory__current=10)
    group(root / "jobs.slice", memory__max=90_000_000, memory__current=40_000_000)
    assert (free_memory("cpu"), total_memory("cpu")) == (50_000_000, 90_000_000)
    (tmp_path / "cgroup").write_text("0::/docker/0123\n", encoding="utf-8")  # a path of the host, not there inside
    group(root, memory__max=60_000_000, memory__current=0)
    assert free_memory("cpu") == 60_000_000


def test_limits_of_version_1(machine: Path, tmp_path: Path) -> None:
    root = tmp_path / "groups" / "memory"
    lines = "9:name=systemd:/x\n5:cpu,cpuacct:/docker/01\n4:memory:/docker/01\n"
    (tmp_path / "cgroup").write_text(lines, encoding="utf-8")
    stat = "inactive_file 1\ntotal_inactive_file 20000000"
    group(root / "docker" / "01", **{V1_LIMIT: 300_000_000, V1_USE: 120_000_000}, memory__stat=stat)
    group(root, **{V1_LIMIT: 2**63 - 4096, V1_USE: 999_000_000})  # no limit
    assert (free_memory("cpu"), total_memory("cpu")) == (200_000_000, 300_000_000)


def test_free_memory_of_a_gpu_counts_what_pytorch_holds_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"mem_get_info": (100, 900), "memory_reserved": 70, "memory_allocated": 50}.items():
        monkeypatch.setattr(torch.cuda, name, lambda place, value=value: value)
    assert free_memory("cuda") == 120
    assert free_memory("cuda:1") == 120
    assert total_memory("cuda") == 900


def test_results_come_in_the_order_of_the_indices() -> None:
    seen: list[list[int]] = []

    def compute(part: list[int]) -> list[int]:
        seen.append(part)
        return [10 * index for index in part]

    assert in_batches([5, 3, 4, 1, 0], compute, 2) == [50, 30, 40, 10, 0]
    assert seen == [[5, 3], [4, 1], [0]]
    assert in_batches([], compute, 2) == []


class Gpu:
    """Room for so many rows; what a failed try had allocated must be gone when the next one begins."""

    def __init__(self, room: int) -> None:
        self.room, self.sizes, self.left = room, [], []  # type: ignore[var-annotated]

    def __call__(self, part: list[int]) -> list[int]:
        assert [tensor for tensor in self.left if tensor() is not None] == []
        held = torch.zeros(len(part))
        self.left.append(weakref.ref(held))
        self.sizes.append(len(part))
        if len(held) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [-index for index in part]


def test_batches_are_halved_where_the_memory_does_not_do() -> None:
    gpu = Gpu(room=3)
    assert in_batches(range(11), gpu, 8) == [-index for index in range(11)]
    assert gpu.sizes == [8, 4, 2, 2, 2, 2, 2, 1]
    last = Gpu(room=2)  # a last batch that is smaller than `size` is halved from its own length
    assert in_batches(range(5), last, 64) == [0, -1, -2, -3, -4]
    assert last.sizes == [5, 2, 2, 1]


def test_one_row_that_does_not_fit_is_an_error() -> None:
    gpu = Gpu(room=0)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        in_batches(range(3), gpu, 2)
    assert gpu.sizes == [2, 1]


def test_other_errors_are_not_tried_again() -> None:
    calls = []

    def broken(part: list[int]) -> list[int]:
        calls.append(part)
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        in_batches(range(4), broken, 4)
    assert len(calls) == 1


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="batches of 0 rows"):
        in_batches([1], lambda part: part, 0)
    with pytest.raises(ValueError, match="3 results for 2 rows"):
        in_batches([1, 2], lambda part: [*part, 3], 2)
