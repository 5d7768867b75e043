"""Rows of one data file, one after the other: JSON lines, a JSON array, CSV or Parquet, the text ones also as .gz."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rlhf_cli.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")
CHUNK = 1 << 20  # characters of a JSON array that are read at a time
BATCH = 500  # rows of a Parquet file that are read at a time
BETWEEN = re.compile(r"[\s,]*")
ONE_A_LINE = "write one JSON object a line"


class Cells(dict[str, Any]):
    """A row of a table: a column that the row leaves out holds None (Parquet) or an empty text (CSV)."""


def read_file(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where it is, row) for each row of a file; a file of an unknown suffix is read as JSON lines.

    Args:
        name: what messages call the file.

    Raises:
        DataError: the file cannot be read, or something in it is no row.
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix == ".parquet":
        yield from _parquet(path, name)
        return
    read = {".csv": _csv, ".json": _json}.get(suffix, _json_lines)
    place = "line 0"
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            for place, row in read(stream, name):  # type: ignore[arg-type]
                yield f"{name}, {place}", row
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{name}, after {place}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{name} cannot be decompressed after {place}",
            f"it is not a whole gzip file ({error})",
            "fetch it again, or remove .gz from its name if it is plain text",
        ) from error
    except OSError as error:
        raise DataError(f"{name} cannot be read", error.strerror or str(error), "check its permissions") from error


def _json_lines(stream: IO[bytes], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            where = f"{name}, line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise _not_utf8(where) from error
            except (json.JSONDecodeError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
                raise DataError(f"{where}: not JSON ({reason})", "", ONE_A_LINE) from error
            yield f"line {number}", _object(row, where)


def _json(stream: io.BufferedReader, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a JSON array; without a bracket at its start the file holds JSON lines."""
    if not stream.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _json_lines(stream, name)
        return
    text = io.TextIOWrapper(stream, "utf-8-sig")
    decoder = json.JSONDecoder()
    buffer, number = text.read(CHUNK), 0
    position = buffer.index("[") + 1
    while True:
        position = BETWEEN.match(buffer, position).end()  # type: ignore[union-attr]
        if buffer.startswith("]", position):
            return
        where = f"{name}, row {number + 1}"
        try:
            row, position = decoder.raw_decode(buffer, position)
        except (json.JSONDecodeError, RecursionError) as error:
            # An object that goes on behind the buffer looks broken: read on before saying so.
            if not (more := text.read(CHUNK)):
                reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
                raise DataError(f"{where}: not JSON ({reason})", "", "mend the file") from error
            buffer, position = buffer[position:] + more, 0
            continue
        number += 1
        yield f"row {number}", _object(row, where)


def _csv(stream: IO[bytes], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a long dialogue is longer than the library's own limit
    rows = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), strict=True)
    try:
        for row in rows:
            # What the library makes of too many cells, and of too few.
            if None in row or None in row.values():
                kind = "more" if None in row else "fewer"
                raise DataError(
                    f"{name}, line {rows.line_num}: {kind} cells than columns",
                    "",
                    "put cells that hold commas, quotes or line breaks in double quotes",
                )
            yield f"line {rows.line_num}", Cells(row)
    except csv.Error as error:
        raise DataError(f"{name}, after line {rows.line_num}: not CSV ({error})", "", "mend the file") from error


def _parquet(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}, row {number}", Cells(row)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{name} cannot be read after row {number}", reason, "fetch it again") from error


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON {type(row).__name__}, not an object", "", ONE_A_LINE)
    return row


def _not_utf8(where: str) -> DataError:
    return DataError(f"{where}: not UTF-8 text", "", "convert the file to UTF-8, or name it .gz if it is compressed")
