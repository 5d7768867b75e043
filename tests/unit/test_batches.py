"""Batches that fit the memory there is."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.models import batches
from rlhf_cli.models.batches import by_length, free_memory, in_batches, rows_that_fit

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


def test_free_memory_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "meminfo"
    told.write_text("MemTotal: 900 kB\nMemFree: 100 kB\nMemAvailable:     700 kB\n", encoding="utf-8")
    monkeypatch.setattr(batches, "MEMORY_FILE", told)
    assert free_memory("cpu") == 700 * 1024
    told.write_text("MemTotal: 900 kB\n", encoding="utf-8")  # an old kernel
    monkeypatch.setattr(batches.os, "sysconf", {"SC_AVPHYS_PAGES": 3, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert free_memory("cpu") == 3 * 4096
    told.unlink()

    def unknown(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(batches.os, "sysconf", unknown)
    assert free_memory("cpu") == 2 * GIB


def test_free_memory_of_a_gpu_counts_what_pytorch_holds_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"mem_get_info": (100, 900), "memory_reserved": 70, "memory_allocated": 50}.items():
        monkeypatch.setattr(torch.cuda, name, lambda place, value=value: value)
    assert free_memory("cuda") == 120
    assert free_memory("cuda:1") == 120


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
