"""The curves of a stage in the store: written beside its model, and handed on to whoever asked for the stage."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_cli.store import write_json, write_text
from rlhf_cli.trainers.common import Log


class StageLog:
    """training_log.jsonl and metrics.json of a stage's folder; `also` gets every line as it comes."""

    def __init__(self, folder: Path, also: Log | None = None) -> None:
        self.folder, self.also = folder, also
        self.path = folder / "training_log.jsonl"

    def __call__(self, metrics: dict[str, float], step: int) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self.also is not None:
            self.also(metrics, step)

    def rewind(self, step: int) -> None:
        """Drop the lines after `step`: the stage goes on from there; -1 drops all."""
        kept = [line for line in self._lines() if line["step"] <= step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def replay(self, log: Log) -> None:
        """Hand every line to `log`."""
        for line in self._lines():
            log({key: value for key, value in line.items() if key != "step"}, line["step"])

    def write_metrics(self, metrics: dict[str, float]) -> None:
        """Write the stage's final metrics."""
        write_json(self.folder / "metrics.json", metrics)

    def _lines(self) -> list[dict]:
        if not self.path.exists():
            return []
        lines = []
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:  # the line a crash cut short
                break
        return lines
