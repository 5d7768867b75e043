"""Rows that are expensive to compute, kept in the store piece by piece: re-used later, gone on with after a crash."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from rlhf_cli import ranks
from rlhf_cli.store import Store

Row = dict[str, np.ndarray]  # a number or an array of any length by name
Compute = Callable[[list[int]], list[Row]]

FORMAT = 1  # raised when rows are computed or kept differently, so that old ones are not re-used


def token_hash(*columns: Sequence[Sequence[int]]) -> str:
    """Return the sha256 of lists of token ids, 64 hex digits: for the identity of what is computed from them."""
    digest = sha256()
    for rows in columns:
        digest.update(np.array([len(rows), *map(len, rows)], dtype=np.int64).tobytes())
        digest.update(np.fromiter(chain.from_iterable(rows), dtype=np.int64).tobytes())
    return digest.hexdigest()


class Memo:
    """Computes rows once.

    Args:
        store: where they are kept; None keeps nothing.
    """

    def __init__(self, store: Store | None) -> None:
        self.store = store

    def rows(
        self,
        what: str,
        identity: dict[str, Any],
        count: int,
        compute: Compute,
        *,
        order: Sequence[int] | None = None,
        piece: int = 256,
        label: str,
    ) -> list[Row]:
        """Return `count` rows in the order of their indices: those kept under this identity, the others computed.

        Args:
            what: the rows' name, a folder of the store.
            identity: everything that decides their values; values that json can hold.
            count: number of rows.
            compute: indices -> one row each; all rows have the same names, dtypes and numbers of dimensions.
            order: indices in the order in which they are computed, `piece` at a time; None: as they come.
            piece: rows that are computed and kept together, >= 1. `compute` sees the same pieces whatever was kept.
            label: what the progress bar counts.

        Raises:
            RunError: the store cannot be written.
            ValueError: `order` does not hold every index once, or `compute` returns another number of rows.
        """
        listed = list(range(count)) if order is None else list(order)
        if sorted(listed) != list(range(count)) or piece < 1:
            raise ValueError(f"order holds {len(listed)} indices for {count} rows in pieces of {piece}.")
        pieces = [listed[start : start + piece] for start in range(0, count, piece)]
        found: list[Row] = [{}] * count
        with self._folder(what, {"format": FORMAT, "count": count, "piece": piece, "of": identity}, pieces) as folder:
            for indices, rows in zip(pieces, _computed(pieces, compute, folder, label), strict=True):
                for index, row in zip(indices, rows, strict=True):
                    found[index] = row
        return found

    @contextmanager
    def _folder(self, what: str, identity: dict[str, Any], pieces: list[list[int]]) -> Iterator[Path | None]:
        """Provide the folder of the pieces; it is published once all of them are there."""
        if self.store is None or not pieces:
            yield None
            return
        with self.store.building_together(what, identity) as building:
            yield building.path
            for left in [] if building.ready else building.path.glob(".*.tmp"):  # of a killed process
                left.unlink()
            building.publish()


def _computed(pieces: list[list[int]], compute: Compute, folder: Path | None, label: str) -> Iterator[list[Row]]:
    """Yield the rows of each piece, computed by one of the ranks.

    The bar counts rows, those kept included, and shows where it is worth while.
    """
    paths = [None if folder is None else folder / f"{number:05d}.npz" for number in range(len(pieces))]
    # What rank 0 has: all ranks must ask for the same pieces.
    kept = ranks.on_main(lambda: [_load(path, indices) for path, indices in zip(paths, pieces, strict=True)])
    done = sum(len(rows) for rows in kept if rows is not None)
    fresh = ranks.dealt([piece for piece, rows in zip(pieces, kept, strict=True) if rows is None], compute)
    total, quiet = sum(map(len, pieces)), kept.count(None) < 2 or not ranks.is_main()
    with tqdm(total=total, initial=done, unit=f" {label}", mininterval=1, leave=False, delay=1, disable=quiet) as bar:
        for path, indices, known in zip(paths, pieces, kept, strict=True):
            rows = next(fresh) if known is None else known
            if known is None:
                if len(rows) != len(indices):
                    raise ValueError(f"{len(rows)} rows were computed for {len(indices)} indices.")
                if path is not None and ranks.is_main():
                    _save(path, indices, rows)
                bar.update(len(rows))
            yield rows


def _save(path: Path, indices: list[int], rows: list[Row]) -> None:
    """Write a piece so that a reader sees all of it or nothing: of each name the values end to end, and the shapes."""
    arrays: dict[str, np.ndarray] = {"indices": np.array(indices)}
    for name in rows[0]:
        values = [np.asarray(row[name]) for row in rows]
        arrays[f"values.{name}"] = np.concatenate([value.ravel() for value in values])
        arrays[f"shapes.{name}"] = np.array([value.shape for value in values], dtype=np.int64)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    os.replace(temporary, path)


def _load(path: Path | None, indices: list[int]) -> list[Row] | None:
    """Return a kept piece, or None where there is none, or it is damaged or of other indices."""
    if path is None or not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if arrays["indices"].tolist() != indices:
            return None
        columns = {
            name.removeprefix("values."): _split(values, arrays[name.replace("values.", "shapes.", 1)])
            for name, values in arrays.items()
            if name.startswith("values.")
        }
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return rows if len(rows) == len(indices) else None
    except Exception:  # a damaged archive can raise anything
        return None


def _split(values: np.ndarray, shapes: np.ndarray) -> list[np.ndarray]:
    ends = shapes.prod(-1).cumsum()
    return [part.reshape(shape) for part, shape in zip(np.split(values, ends[:-1]), shapes, strict=True)]
