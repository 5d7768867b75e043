"""Rows that are kept piece by piece: re-used, gone on with after an interruption, computed again where damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock, Timeout

from rlhf_cli.errors import RunError
from rlhf_cli.measure import memo as module
from rlhf_cli.measure.memo import Memo, Row, token_hash
from rlhf_cli.store import Store

ORDER = [4, 0, 3, 6, 2, 5, 1]
IDENTITY = {"policy": "abc", "seed": 0}


class Work:
    """Computes rows of unequal lengths and dtypes, and remembers what it was asked for; fails after `limit` pieces."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.asked = limit, []  # type: ignore[var-annotated]

    def __call__(self, indices: list[int]) -> list[Row]:
        if self.limit is not None and len(self.asked) == self.limit:
            raise KeyboardInterrupt
        self.asked.append(indices)
        return [row(index) for index in indices]


def row(index: int) -> Row:
    return {
        "ids": np.arange(index, dtype=np.int32),  # the first is empty
        "logp": np.float32(index / 3),
        "table": np.full((index, 2), index, dtype=np.float16),
    }


def rows_of(memo: Memo, work: Any, what: str = "samples", identity: Any = None, **changes: Any) -> list[Row]:
    settings = {"count": 7, "order": ORDER, "piece": 2, "label": "samples", **changes}
    return memo.rows(what, IDENTITY if identity is None else identity, compute=work, **settings)


def assert_right(found: list[Row], count: int = 7) -> None:
    assert len(found) == count
    for index, values in enumerate(found):
        assert values.keys() == row(index).keys()
        for name, value in row(index).items():
            assert values[name].dtype == value.dtype
            np.testing.assert_array_equal(values[name], value)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def pieces(store: Store) -> list[Path]:
    return sorted(store.root.glob("**/*.npz"))


def test_rows_come_by_index_and_are_computed_along_the_order(store: Store) -> None:
    work = Work()
    assert_right(rows_of(Memo(store), work))
    assert work.asked == [[4, 0], [3, 6], [2, 5], [1]]
    plain = Work()
    assert_right(rows_of(Memo(store), plain, order=None, piece=3))
    assert plain.asked == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_second_call_computes_nothing(store: Store) -> None:
    first, again = Work(), Work()
    rows_of(Memo(store), first)
    assert_right(rows_of(Memo(Store(store.root)), again))
    assert again.asked == []
    assert [path.parent.parent.parent for path in pieces(store)] == [store.root] * 4  # published, not in .work
    assert not list((store.root / ".work").iterdir())


def test_an_interruption_keeps_what_was_computed(store: Store) -> None:
    """Interrupted twice: each time the rest alone is computed, in the same pieces."""
    work = Work(limit=2)
    with pytest.raises(KeyboardInterrupt):
        rows_of(Memo(store), work)
    assert work.asked == [[4, 0], [3, 6]]
    work = Work(limit=1)
    with pytest.raises(KeyboardInterrupt):
        rows_of(Memo(store), work)
    assert work.asked == [[2, 5]]
    work = Work()
    assert_right(rows_of(Memo(store), work))
    assert work.asked == [[1]]


@pytest.mark.parametrize(
    "changes",
    [{"what": "scores"}, {"identity": {"policy": "abc", "seed": 1}}, {"piece": 3}, {"count": 5, "order": None}],
)
def test_other_rows_are_not_mixed_up(store: Store, changes: dict[str, Any]) -> None:
    rows_of(Memo(store), Work())
    work = Work()
    assert_right(rows_of(Memo(store), work, **changes), changes.get("count", 7))
    assert sum(map(len, work.asked)) == changes.get("count", 7)
    again = Work()
    rows_of(Memo(store), again)
    assert again.asked == []


def test_another_order_under_one_identity_is_seen(store: Store) -> None:
    rows_of(Memo(store), Work())
    work = Work()
    assert_right(rows_of(Memo(store), work, order=ORDER[::-1]))
    assert work.asked == [[1, 5], [2, 6], [3, 0], [4]]


def test_a_format_that_is_gone_is_not_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_of(Memo(store), Work())
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    work = Work()
    rows_of(Memo(store), work)
    assert len(work.asked) == 4


def test_damaged_pieces_are_computed_again(store: Store) -> None:
    rows_of(Memo(store), Work())
    whole = pieces(store)[1].read_bytes()
    damaged = [b"", b"PK", whole[: len(whole) // 2], b"\0" * len(whole), pieces(store)[0].read_bytes()]
    middle = len(whole) // 2
    damaged += [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in (70, middle)]
    for content in damaged:
        pieces(store)[1].write_bytes(content)
        work = Work()
        assert_right(rows_of(Memo(store), work))
        assert work.asked == [[3, 6]]
        after = Work()
        assert_right(rows_of(Memo(store), after))
        assert after.asked == []


def test_a_damaged_piece_of_an_interrupted_run_is_computed_again(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt):
        rows_of(Memo(store), Work(limit=2))
    pieces(store)[0].write_bytes(b"half a fi")
    work = Work()
    assert_right(rows_of(Memo(store), work))
    assert work.asked == [[4, 0], [2, 5], [1]]


def test_half_a_file_of_a_killed_process_is_not_published(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt):
        rows_of(Memo(store), Work(limit=1))
    left = pieces(store)[0].with_name(".00001.npz.999.tmp")
    left.write_bytes(b"half")
    rows_of(Memo(store), Work())
    assert not list(store.root.glob("**/*.tmp"))
    assert len(pieces(store)) == 4


def test_while_rows_are_computed_no_other_process_may(store: Store) -> None:
    locked = []

    def work(indices: list[int]) -> list[Row]:
        for path in (store.root / ".locks").glob("samples-*.lock"):
            with pytest.raises(Timeout, match="could not be acquired"):
                FileLock(path).acquire(timeout=0)
            locked.append(path)
        return [row(index) for index in indices]

    rows_of(Memo(store), work)
    assert len(locked) == 4


def test_without_a_store_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        work = Work()
        assert_right(rows_of(Memo(None), work))
        assert len(work.asked) == 4
    assert not list(tmp_path.iterdir())


def test_no_rows_need_no_work(store: Store) -> None:
    assert rows_of(Memo(store), None, count=0, order=[]) == []
    assert not store.root.exists()


@pytest.mark.parametrize("changes", [{"order": [0, 1, 2]}, {"order": [0] * 7}, {"piece": 0}])
def test_a_wrong_order_is_refused(store: Store, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"order holds \d indices for 7 rows in pieces of"):
        rows_of(Memo(store), Work(), **changes)


def test_a_wrong_number_of_rows_is_refused_and_not_kept(store: Store) -> None:
    with pytest.raises(ValueError, match="1 rows were computed for 2 indices"):
        rows_of(Memo(store), lambda indices: [row(0)])
    assert pieces(store) == []


def test_a_store_that_cannot_be_written_is_a_user_s_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(RunError, match="cannot be a folder"):
        rows_of(Memo(Store(tmp_path / "file")), Work())


def test_the_bar_counts_rows_and_is_hidden_for_one_piece(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[dict[str, Any]] = []
    real = module.tqdm

    def tqdm(**options: Any) -> Any:
        bars.append(options)
        return real(**{**options, "disable": True})

    monkeypatch.setattr(module, "tqdm", tqdm)
    with pytest.raises(KeyboardInterrupt):
        rows_of(Memo(store), Work(limit=2))
    rows_of(Memo(store), Work(), label="candidates")
    rows_of(Memo(store), Work())
    rows_of(Memo(None), Work(), piece=7)
    assert [(bar["initial"], bar["total"], bar["disable"]) for bar in bars] == [
        (0, 7, False),
        (4, 7, False),
        (7, 7, True),
        (0, 7, True),
    ]
    assert bars[1]["unit"].strip() == "candidates"
    assert all(bar["leave"] is False for bar in bars)


def test_token_hashes_tell_lists_apart() -> None:
    columns = [([[1], [2]],), ([[1, 2]],), ([[1], [2], []],), ([[1]], [[2]]), ([[2], [1]],), ([],)]
    assert len({token_hash(*lists) for lists in columns}) == len(columns)
    assert token_hash([[1, 2]], [[3]]) == token_hash(((1, 2),), ((3,),))
