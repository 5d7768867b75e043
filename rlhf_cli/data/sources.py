"""Where the rows of a dataset lie: a file, a folder, or a dataset of the Hub; and what identifies them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import file_digest, sha256
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_cli import hub
from rlhf_cli.config.schema import TextConfig
from rlhf_cli.data import layouts
from rlhf_cli.data.files import SUFFIXES, read_file
from rlhf_cli.errors import DataError


@dataclass(frozen=True)
class Place:
    """A file or a folder of rows.

    Args:
        path: where it is.
        name: what messages call it: the path, or the id on the Hub.
        commit: of a dataset of the Hub, the commit that was fetched.
    """

    path: Path
    name: str
    commit: str | None = None


def find(cfg: TextConfig) -> Place:
    """Return where the rows lie; a dataset of the Hub is fetched unless it is in the cache.

    Raises:
        DataError: there is nothing at the path, or no path.
        UserError: the Hub, or the dataset on it, cannot be reached.
    """
    if not cfg.path:
        raise DataError(
            "dataset.path is not set", "this dataset reads a file, a folder or the Hub", "add dataset.path="
        )
    path = Path(cfg.path).expanduser()
    if path.exists():
        return Place(path, str(path))
    if hub.is_id(cfg.path) and not cfg.path.endswith(SUFFIXES):
        folder = hub.local_folder("dataset.path", cfg.path, kind="dataset", revision=cfg.revision)
        return Place(folder, cfg.path, folder.name if folder.parent.name == "snapshots" else None)
    if not path.parent.is_dir():
        why = f"there is no folder {path.parent}"
        raise DataError(f"dataset.path={cfg.path} does not exist", why, "correct the path")
    near = difflib.get_close_matches(path.name, sorted(entry.name for entry in path.parent.iterdir()), n=1)
    todo = f"did you mean {path.parent / near[0]}?" if near else "correct the path"
    raise DataError(f"dataset.path={cfg.path} does not exist", "", todo)


def read_rows(cfg: TextConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where it is, row) for the rows of the dataset, `cfg.max_rows` at most; files are read as far as needed.

    Raises:
        DataError: there is nothing to read, or something in it is no row.
        UserError: the Hub, or the dataset on it, cannot be reached.
    """
    place = find(cfg)
    return islice(_all_rows(place, cfg), cfg.max_rows)


def content(cfg: TextConfig) -> str:
    """Return what identifies the rows wherever they lie: a file's sha256, that of all files of a folder, or a commit.

    Raises:
        DataError: there is nothing to read.
        UserError: the Hub, or the dataset on it, cannot be reached.
    """
    place = find(cfg)
    if place.commit is not None:
        return f"{place.name}@{place.commit}"
    if place.path.is_file():
        return _digest(place.path)
    if layouts.is_saved(place.path):
        folder = layouts.saved_split(place.path, place.name, cfg.split)
        files = sorted(path for path in folder.iterdir() if path.suffix in (".arrow", ".json"))
    else:
        files = layouts.data_files(place.path, place.name, cfg.subset, cfg.split)
    return sha256("\n".join(f"{path.name} {_digest(path)}" for path in files).encode()).hexdigest()


def _all_rows(place: Place, cfg: TextConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    if place.path.is_file():
        yield from read_file(place.path, place.name)
    elif layouts.is_saved(place.path):
        folder = layouts.saved_split(place.path, place.name, cfg.split)
        name = place.name if folder == place.path else f"{place.name} ({cfg.split})"
        yield from layouts.saved_rows(folder, name)
    else:
        for path in layouts.data_files(place.path, place.name, cfg.subset, cfg.split):
            inner = path.relative_to(place.path.resolve()) if path.is_absolute() else path
            yield from read_file(path, f"{place.name}/{inner}")


def _digest(path: Path) -> str:
    found = path.stat()
    return _digest_of(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=256)
def _digest_of(path: Path, size: int, changed: int) -> str:
    """Return the sha256 of a file, read once for as long as size and time of change (ns) stay."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
