"""Finished stages by content hash: trained once, published atomically, re-used by every later run and process.

Under the root: `<stage>/<hash>` is a published stage (recognised by its identity.json), `.work/<stage>-<hash>` one
that is being trained, or that a crash left to go on with, and `.locks/` lets one process at a time train a stage.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rlhf_cli import ranks
from rlhf_cli.errors import RunError

logger = logging.getLogger(__name__)

HASH_LENGTH = 16  # hex digits of a content hash in a folder name; find() compares the whole identity


def content_hash(identity: dict[str, Any]) -> str:
    """Return the sha256 of an identity in canonical json, 64 hex digits.

    Keys are sorted, tuples are lists, and 1 and 1.0 are one number, so that a config hashes the same after json.

    Raises:
        TypeError: a value that json cannot hold.
    """
    text = json.dumps(_canonical(identity), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def identity_difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return which keys of two identities differ, with both values: the first three, and how many more."""
    before, after = _flatten(_canonical(old)), _flatten(_canonical(new))
    keys = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    parts = [f"{key} was {before.get(key, 'absent')}, is now {after.get(key, 'absent')}" for key in keys[:3]]
    return "; ".join([*parts, *([f"and {len(keys) - 3} more"] if len(keys) > 3 else [])])


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): json.dumps(value, ensure_ascii=False)}
    flat: dict[str, str] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}{key}.")
    return flat


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write a json file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a json file, or None where there is no such file or it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def check_folder(path: Path, key: str) -> None:
    """Refuse a folder that cannot be created or written, before anything is.

    Args:
        path: the folder, which need not exist.
        key: the config key it comes from, for the message.

    Raises:
        RunError: the path or an ancestor is a file, or the nearest existing folder is not writable.
    """
    nearest = path.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise RunError(f"{key}={path} cannot be a folder", f"{nearest} is a file", f"choose another {key}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"{key}={path} cannot be written", f"no write permission in {nearest}", f"choose another {key}")


def make_folder(path: Path, key: str) -> None:
    """Create a folder and its parents.

    Raises:
        RunError: the folder cannot be created or written.
    """
    check_folder(path, key)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(f"{key}={path} cannot be created", reason, f"choose another {key}") from error


@dataclass
class Building:
    """A stage that is being provided: published already (`ready`), or to be built in `path` and then published.

    Args:
        path: the published folder, or the work folder, which may hold what an interrupted process left.
        ready: True where there is nothing left to train.
        together: whether all ranks build it; what others than rank 0 have in `path` vanishes.
    """

    path: Path
    ready: bool
    _identity: dict[str, Any] = field(repr=False)
    _target: Path = field(repr=False)
    together: bool = False

    def publish(self) -> Path:
        """Move the work folder to its place in the store in one step and return that place."""
        if self.ready:
            return self.path
        if ranks.is_main() or not self.together:
            self._move()
        if self.together:
            ranks.barrier()
        self.path, self.ready = self._target, True
        return self.path

    def _move(self) -> None:
        write_json(self.path / "identity.json", self._identity)
        if self._target.exists():  # damaged, else it would have been found under the lock
            shutil.rmtree(self._target)
        self._target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.path, self._target)


class Store:
    """The folder of finished stages."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, stage: str, identity: dict[str, Any]) -> Path | None:
        """Return the published folder of a stage with this identity, or None."""
        folder = self._folder(stage, identity)
        found = read_json(folder / "identity.json")
        return folder if found is not None and content_hash(found) == content_hash(identity) else None

    @contextmanager
    def building(self, stage: str, identity: dict[str, Any]) -> Iterator[Building]:
        """Provide a stage: hand out the published one, or a work folder that no other process has.

        A work folder that is not published is kept, so that the stage can go on from its last checkpoint.

        Raises:
            RunError: the root cannot be written.
        """
        folder = self._folder(stage, identity)
        if found := self.find(stage, identity):
            yield Building(found, True, identity, folder)
            return
        label = f"{stage}-{folder.name}"
        make_folder(self.root / ".locks", "store_dir")
        with _locked(self.root / ".locks" / f"{label}.lock", stage):
            if found := self.find(stage, identity):
                yield Building(found, True, identity, folder)
                return
            work = self.root / ".work" / label
            make_folder(work, "store_dir")
            try:
                yield Building(work, False, identity, folder)
            finally:
                if work.is_dir() and not any(work.iterdir()):  # refused before anything was trained
                    work.rmdir()

    @contextmanager
    def building_together(self, stage: str, identity: dict[str, Any]) -> Iterator[Building]:
        """Provide a stage that all ranks build with the same code: rank 0 finds, locks and publishes it.

        Raises:
            RunError: the root cannot be written.
        """
        if not ranks.is_main():
            ready, path = ranks.broadcast((False, Path()))
            folder = path if ready else ranks.private(path)
            yield Building(folder, ready, identity, self._folder(stage, identity), together=True)
            return
        with self.building(stage, identity) as building:
            building.together = ranks.world() > 1
            ranks.broadcast((building.ready, building.path.absolute()))
            yield building

    def _folder(self, stage: str, identity: dict[str, Any]) -> Path:
        return self.root / stage / content_hash(identity)[:HASH_LENGTH]


@contextmanager
def _locked(path: Path, stage: str) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("waiting for another process that trains the %s ...", stage)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
