"""Which files of a folder hold the rows of a subset and a split; `datasets` knows the layouts of the Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_cli.data.files import BATCH, SUFFIXES, Cells
from rlhf_cli.errors import DataError

# What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` leave.
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
RED_TEAM = "red-team-attempts"  # folder of Anthropic/hh-rlhf with transcripts, which are no preferences


def data_files(folder: Path, name: str, subset: str | None, split: str) -> list[Path]:
    """Return the files that hold a split, in the order they are read.

    A subset is one that the folder's README.md lists under `configs`, else a folder within; a split is one that the
    README.md lists, else one that `datasets` sees in the names of files and folders, else a folder within.

    Args:
        folder: a folder of data files, or a dataset of the Hub as it was fetched.
        name: what messages call the folder.

    Raises:
        DataError: there is no such subset or split, or there are no data files.
    """
    configs = _configs(folder, name)
    if subset is not None and subset not in configs:
        inner = [entry.name for entry in sorted(folder.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
        known = [*(config for config in configs if configs != ["default"]), *inner]
        if subset not in inner:
            raise DataError(
                f"{name} has no subset {subset}", f"it has: {', '.join(known) or 'none'}", _set("subset", known)
            )
        folder, subset = folder / subset, None
    splits = _splits(folder, name, subset)
    if split in splits:
        files = splits[split]
    elif (folder / split).is_dir():
        files = [path for part in _splits(folder / split, name, None).values() for path in part]
    else:
        raise _no_split(name, split, list(splits))
    if not files:
        raise DataError(f"{name} has no preferences in its split {split}", "", "choose another dataset.subset")
    if odd := [path.name for path in files if not path.name.endswith(SUFFIXES)]:
        raise DataError(f"{name} holds {odd[0]}", f"files that are read end in {', '.join(SUFFIXES)}", "convert it")
    return files


def is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` of the datasets library wrote the folder."""
    return (folder / SAVED).is_file() or (folder / SAVED_SPLITS).is_file()


def saved_split(folder: Path, name: str, split: str) -> Path:
    """Return the folder of a split of what `save_to_disk` wrote; a single dataset has no splits to choose from.

    Raises:
        DataError: there is no such split.
    """
    if not (folder / SAVED_SPLITS).is_file():
        return folder
    splits = sorted(entry.parent.name for entry in folder.glob(f"*/{SAVED}"))
    if split not in splits:
        raise _no_split(name, split, splits)
    return folder / split


def saved_rows(folder: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where it is, row) for each row of a dataset that `save_to_disk` wrote; nothing is held in memory.

    Raises:
        DataError: the dataset is damaged.
    """
    import datasets
    import pyarrow as pa

    number = 0
    try:
        for batch in datasets.load_from_disk(str(folder)).with_format("arrow").iter(BATCH):
            for row in batch.to_pylist():
                number += 1
                yield f"{name}, row {number}", Cells(row)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name} cannot be read after row {number}", reason, "save it again") from error


def _configs(folder: Path, name: str) -> list[str]:
    import datasets

    try:
        return list(datasets.get_dataset_config_names(str(folder)))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise _unreadable(name, error) from error


def _splits(folder: Path, name: str, subset: str | None) -> dict[str, list[Path]]:
    import datasets

    try:
        # A builder makes room for what it would prepare; nothing is prepared here.
        with tempfile.TemporaryDirectory() as scratch:
            builder = datasets.load_dataset_builder(str(folder), subset, cache_dir=scratch)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise _unreadable(name, error) from error
    found = {str(split): [Path(path) for path in paths] for split, paths in builder.config.data_files.items()}
    return {split: [path for path in paths if path.parent.name != RED_TEAM] for split, paths in found.items()}


def _unreadable(name: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    if "scripts are no longer supported" in reason:
        return DataError(
            f"{name} is a loading script, not data",
            "the datasets library no longer runs scripts",
            "the Hub keeps a converted copy of most such datasets: dataset.revision=refs/convert/parquet",
        )
    if "Config name is missing" in reason:
        names = reason.partition("[")[2].partition("]")[0].replace("'", "").split(", ")
        return DataError(f"{name} has several subsets", f"they are: {', '.join(names)}", _set("subset", names))
    if "data files" in reason:
        return DataError(
            f"{name} is a folder without data files", f"read are {', '.join(SUFFIXES)}", "correct the path"
        )
    return DataError(f"{name} is a folder that cannot be read as a dataset", reason, "check its README.md")


def _no_split(name: str, split: str, splits: list[str]) -> DataError:
    what = f"{name} is a folder without a split {split}"
    return DataError(what, f"it has: {', '.join(splits) or 'none'}", _set("split", splits))


def _set(key: str, known: list[str]) -> str:
    return f"give dataset.{key}={known[0]}" if len(known) == 1 else f"give dataset.{key}=NAME"
