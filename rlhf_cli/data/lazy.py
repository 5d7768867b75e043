"""Rows that stay on disk: read-only sequences over memory-mapped Arrow files, and the files themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar, overload

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter

from rlhf_cli.data.rows import Demonstration, Pair, Ranking
from rlhf_cli.errors import RunError
from rlhf_cli.store import Building, Store, check_folder

Row = TypeVar("Row", covariant=True)
BATCH = 1_000  # rows read from disk, tokenised or written at a time

TEXT, IDS = pa.string(), pa.list_(pa.int32())
JUDGED = {"label": pa.float64(), "margin": pa.float64()}
DEMONSTRATION = pa.schema({"prompt": TEXT, "response": TEXT})
PAIR = pa.schema({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT, **JUDGED})
RANKING = pa.schema({"prompt": TEXT, "responses": pa.list_(TEXT)})
PROMPT = pa.schema({"prompt": TEXT})
KINDS: dict[str, tuple[pa.Schema, Callable[[dict[str, Any]], Any]]] = {
    "demonstration": (DEMONSTRATION, lambda row: Demonstration(**row)),
    "pair": (PAIR, lambda row: Pair(**row)),
    "ranking": (RANKING, lambda row: Ranking(row["prompt"], tuple(row["responses"]))),
    "prompt": (PROMPT, lambda row: row["prompt"]),
}


@dataclass(frozen=True)
class Encoded:
    """The token ids of lazy rows, row by row, and what they were made with.

    Args:
        rows: one row of ids for each row of text.
        key: tokenizer and limits; ids made with others are of no use.
    """

    rows: Dataset
    key: str


class LazyRows(Sequence[Row]):
    """Rows of an Arrow file, read as they are asked for. A slice is such a sequence again, and nothing is copied.

    Args:
        dataset: the rows on disk.
        make: turns a row of columns into what is handed out.
        source: what determines the content of the file; rows of one source and the same place are equal.
        encoded: the rows as token ids, where they have been made.
    """

    def __init__(
        self,
        dataset: Dataset,
        make: Callable[[dict[str, Any]], Row],
        *,
        source: str = "",
        encoded: Encoded | None = None,
    ) -> None:
        self.dataset, self.make, self.source, self.encoded = dataset, make, source, encoded

    def __len__(self) -> int:
        return len(self.dataset)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> LazyRows[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | LazyRows[Row]:
        """Return a row, or the rows of a slice as a lazy sequence."""
        if isinstance(place, slice):
            return self.take(range(*place.indices(len(self))))
        return self.make(self.dataset[int(place)])

    def __iter__(self) -> Iterator[Row]:
        for rows in self.batches():
            yield from rows

    def batches(self, size: int = BATCH) -> Iterator[list[Row]]:
        """Yield the rows in lists of at most `size`."""
        for columns in self.dataset.iter(size):
            names = list(columns)
            yield [self.make(dict(zip(names, row, strict=True))) for row in zip(*columns.values(), strict=True)]

    def take(self, places: Sequence[int] | np.ndarray) -> LazyRows[Row]:
        """Return the rows at these places, in their order, as a lazy sequence."""
        listed = places if isinstance(places, range) else np.asarray(places, np.int64)
        which = repr(listed) if isinstance(listed, range) else sha256(listed.tobytes()).hexdigest()
        encoded = self.encoded and Encoded(select(self.encoded.rows, listed), self.encoded.key)
        source = f"{self.source}, {which}"
        return LazyRows(select(self.dataset, listed), self.make, source=source, encoded=encoded)


def select(dataset: Dataset, places: Any) -> Dataset:
    """Return the rows at these places; the table of places is held in memory, 8 bytes a row, and written nowhere."""
    return dataset.select(places, keep_in_memory=True)


def lazy_rows(file: Path, kind: str, *, source: str, kept: np.ndarray | None = None) -> LazyRows[Any]:
    """Return the rows of a file written with the schema of `kind` (demonstration, pair, ranking, prompt).

    Args:
        source: what determines the file's content.
        kept: the places of the rows that count, in their order; None: all.
    """
    dataset = Dataset.from_file(str(file))
    return LazyRows(dataset if kept is None else select(dataset, kept), KINDS[kind][1], source=source)


class RowWriter:
    """Writes rows of one kind into an Arrow file, `BATCH` of them at a time. Leave it through `with`."""

    def __init__(self, file: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self.writer = ArrowWriter(path=str(file), schema=schema)
        self.columns: dict[str, list[Any]] = {name: [] for name in schema.names}
        self.count = 0

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()
        self.writer.finalize()

    def write(self, *values: Any) -> None:
        """Add a row, its values in the order of the schema."""
        for column, value in zip(self.columns.values(), values, strict=True):
            column.append(value)
        self.count += 1
        if self.count % BATCH == 0:
            self.flush()

    def flush(self) -> None:
        """Write out what is held."""
        if any(self.columns.values()):
            self.writer.write_table(pa.table(self.columns, schema=self.schema))
        self.columns = {name: [] for name in self.columns}


@contextmanager
def cached(what: str, identity: dict[str, Any]) -> Iterator[Building]:
    """Provide a folder in the cache of the datasets library (HF_DATASETS_CACHE), whole or to be written and published.

    Args:
        what: rows or tokens.
        identity: what determines the files in it.

    Raises:
        RunError: the cache cannot be written.
    """
    root = Path(datasets.config.HF_DATASETS_CACHE) / "rlhf"
    check_folder(root, "HF_DATASETS_CACHE")
    try:
        with Store(root).building(what, identity) as building:
            yield building
    except OSError as error:
        reason = error.strerror or str(error)
        todo = "free space, or set HF_DATASETS_CACHE to another folder"
        raise RunError(f"{what} cannot be written to {root}", reason, todo) from error
