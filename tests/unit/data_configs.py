"""Datasets as the shipped yaml describe them, and a cache of the Hub made by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_cli.config import compose
from rlhf_cli.config.inputs import SplitConfig
from rlhf_cli.data.rows import PreferenceData

Row = dict[str, Any]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def dataset(name: str, *overrides: str) -> Any:
    """Return the config of a shipped dataset, with keys of `dataset` changed."""
    found = compose.load("train-sft", [f"dataset={name}", *(f"dataset.{override}" for override in overrides)]).dataset
    assert isinstance(found, SplitConfig)
    return found


def write(path: Path, rows: list[Row]) -> Path:
    """Write rows as the name of the file says: JSON lines (also .gz), a JSON array, CSV (also .gz) or Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "csv":
        cells = [list(rows[0]), *(list(row.values()) for row in rows)]
        text = "".join(",".join('"' + str(cell).replace('"', '""') + '"' for cell in line) + "\n" for line in cells)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def cached(
    cache: Path, repository: str, files: dict[str, list[Row]], *, readme: str = "", revision: str = "main"
) -> Path:
    """Put a dataset of the Hub into a cache as a download leaves it, files as links to blobs; return its snapshot."""
    root = cache / f"datasets--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    (root / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(COMMIT)
    (root / "blobs").mkdir()
    for name, rows in files.items():
        blob = write(root / "blobs" / name.replace("/", "_"), rows)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    if readme:
        (snapshot / "README.md").write_text(readme)
    return snapshot


def judged(data: PreferenceData) -> dict[str, tuple[str, str | None]]:
    """Return (better response, worse one) by prompt; of demonstrations there is no worse one."""
    found: dict[str, tuple[str, str | None]] = {row.prompt: (row.response, None) for row in data.demonstrations}
    pairs = [*data.reward_pairs, *data.policy_pairs, *data.heldout_pairs]
    return found | {pair.prompt: (pair.chosen, pair.rejected) for pair in pairs}
