"""Reads back what an offline W&B run wrote: what `wandb sync` has to upload."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7  # the log format of LevelDB, behind a header of as many bytes as that of a record


class WandbFile:
    """An offline run: its records, replayed.

    Args:
        folder: holds wandb/, whose latest run is read, once it is finished.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = (folder / "wandb" / "latest-run").resolve()
        (self.path,) = self.folder.glob("*.wandb")
        self.run: Any = None
        self.summary: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.metrics: dict[str, Any] = {}
        self.artifacts: dict[str, Any] = {}
        self.media: list[Path] = []
        for record in self._finished():
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
            elif kind == "metric":
                self.metrics[record.metric.name] = record.metric
            elif kind == "summary":
                _apply(record.summary.update, self.summary)
            elif kind == "history":
                self.history.append(_apply(record.history.item, {}))
            elif kind == "artifact":
                self.artifacts[record.artifact.type] = record.artifact
            elif kind == "files":
                self.media += [self.folder / "files" / file.path for file in record.files.files if "media" in file.path]

    @property
    def config(self) -> dict[str, Any]:
        return {item.key: json.loads(item.value_json) for item in self.run.config.update}

    def artifact_files(self, kind: str) -> dict[str, bytes]:
        """Return the content of each file of the artifact of a type, by its name in it."""
        return {file.path: Path(file.local_path).read_bytes() for file in self.artifacts[kind].manifest.contents}

    def _finished(self) -> list[Any]:
        """Return all records; W&B's own process writes the last of them a moment after the run ended."""
        deadline = time.monotonic() + 10
        while True:
            records = list(_records(self.path.read_bytes()))
            if records and records[-1].WhichOneof("record_type") == "exit":
                return records
            assert time.monotonic() < deadline, f"{self.path} has no end"
            time.sleep(0.02)


def _records(data: bytes) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    assert data[:4] == b":W&B"
    position, begun = HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        length, kind = struct.unpack("<HB", data[position + 4 : position + HEADER])
        if left < HEADER or kind == 0:  # the rest of a block is filled up
            position += left
            continue
        part = data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        begun = part if kind in (1, 2) else begun + part  # 1 is whole; 2, 3 and 4: first, middle and last part
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(begun)
            yield record


def _apply(items: Any, target: dict[str, Any]) -> dict[str, Any]:
    for item in items:
        *above, last = list(item.nested_key) or [item.key]
        place = target
        for key in above:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return target
