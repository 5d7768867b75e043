"""The prompts that `rlhf generate` answers: from the command line, a file or standard input; and what it is asked.

Nothing heavy is imported here, so that a mistake is answered at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from rlhf_cli.data.dialogue import HUMAN, render
from rlhf_cli.errors import ConfigError, DataError
from rlhf_cli.store import check_folder

SUFFIXES = (".txt", ".jsonl")
Prompt = str | list[dict[str, str]]  # a text, or the messages of a conversation


@dataclass(frozen=True)
class Asked:
    """How answers are sampled and shown.

    Args:
        samples: answers a prompt, >= 1.
        max_new_tokens: answers are cut here, >= 1; None: as in the run's training.
        temperature: divides the logits, >= 0; 0: the most likely token each time. None: as in the run's training, or 1.
        top_p: nucleus, in (0, 1].
        seed: the same seed and prompts give the same answers, >= 0.
        reference: whether the reference policy answers too.
        reward: whether the run's reward model scores the answers.
        checkpoint: last or best.
        device: auto, cpu or cuda.

    Raises:
        ConfigError: a number is out of its range.
    """

    samples: int = 1
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float = 1.0
    seed: int = 0
    reference: bool = True
    reward: bool = False
    checkpoint: str = "last"
    device: str = "auto"

    def __post_init__(self) -> None:
        bounds = {
            "--samples": (self.samples, self.samples >= 1, ">= 1"),
            "--max-new-tokens": (self.max_new_tokens, self.max_new_tokens is None or self.max_new_tokens >= 1, ">= 1"),
            "--temperature": (self.temperature, self.temperature is None or self.temperature >= 0, ">= 0"),
            "--top-p": (self.top_p, 0 < self.top_p <= 1, "in (0, 1]"),
            "--seed": (self.seed, 0 <= self.seed < 2**32, "in [0, 2^32)"),
        }
        for option, (value, holds, allowed) in bounds.items():
            if not holds:
                raise ConfigError(f"{option} {value} is out of range", f"it must be {allowed}")


def gathered(given: Sequence[str], file: Path | None, stdin: TextIO) -> list[Prompt] | None:
    """Return the prompts of the command line, of `file`, or of the lines of `stdin`; None where a person types them.

    Raises:
        ConfigError: both a file and prompts are given.
        DataError: the file cannot be read, or there is no prompt at all.
    """
    if given and file is not None:
        raise ConfigError("prompts are given twice", f"on the command line and by --file {file}", "Leave one out")
    if file is not None:
        return read_file(file)
    if given:
        found: list[Prompt] = [text for text in given if text.strip()]
        if len(found) < len(given):
            raise DataError("a prompt is empty", "", "leave it out")
        return found
    if stdin.isatty():
        return None
    lines: list[Prompt] = [line.rstrip("\n") for line in stdin if line.strip()]
    if not lines:
        raise DataError("there is no prompt", "standard input is empty", "give prompts as arguments, or by --file")
    return lines


def check_out(out: Path, file: Path | None) -> None:
    """Refuse a file for answers that cannot be written, or that holds something else.

    Args:
        out: where answers go; those of an earlier command are replaced.
        file: of the prompts, or None.

    Raises:
        ConfigError: saying which.
        RunError: its folder cannot be made or written.
    """
    if out.suffix != ".jsonl" or os.path.isdir(out):
        raise ConfigError(f"--out {out} is no .jsonl file", "answers are written one a line", "Name a FILE.jsonl")
    check_folder(out.parent, "--out")
    if not os.path.exists(out):  # a name too long is told when it is written
        return
    if file is not None and file.exists() and out.samefile(file):
        raise ConfigError(f"--out {out} is the file of the prompts", "", "Choose another file")
    if not _holds_answers(out):
        raise ConfigError(f"--out {out} holds something else than answers", "It would be replaced", "Choose another")


def _holds_answers(path: Path) -> bool:
    """Return whether the first line of a file is an answer; nothing does as well."""
    try:
        with path.open(encoding="utf-8") as file:
            first = file.readline()
        return not first or {"prompt", "sample", "completion"} <= json.loads(first).keys()
    except (OSError, ValueError, AttributeError):
        return False


def read_file(path: Path) -> list[Prompt]:
    """Return the prompts in a .txt (one a line) or a .jsonl (`prompt` or `messages`).

    Raises:
        DataError: it cannot be read, a line holds no prompt, or no line does.
    """
    if path.suffix not in SUFFIXES:
        todo = "give a .txt with one prompt a line, or a .jsonl with prompt or messages"
        raise DataError(f"--file {path} is neither .txt nor .jsonl", "", todo)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--file {path} cannot be read", getattr(error, "strerror", None) or str(error)) from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise DataError(f"--file {path} holds no prompt")
    if path.suffix == ".txt":
        return [line for _, line in numbered]
    return [_of_row(line, f"{path}, line {number}") for number, line in numbered]


def _of_row(line: str, where: str) -> Prompt:
    """Return the prompt of one line of json.

    Raises:
        DataError: there is none.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not valid JSON", str(error)) from None
    found = (row.get("messages") or row.get("prompt")) if isinstance(row, dict) else None
    if isinstance(found, str) and found.strip():
        return found
    if _is_conversation(found):
        return cast(Prompt, found)
    keys = f"it has {', '.join(row) or 'no keys'}" if isinstance(row, dict) else "it is no object"
    todo = 'write {"prompt": "TEXT"} or {"messages": [{"role": "user", "content": "TEXT"}]}'
    raise DataError(f"{where} holds no prompt", keys, todo)


def _is_conversation(found: Any) -> bool:
    parts = ("role", "content")
    return isinstance(found, list) and bool(found) and all(
        isinstance(turn, dict) and all(isinstance(turn.get(part), str) for part in parts) for turn in found
    )  # fmt: skip


def as_text(prompt: Prompt, form: str) -> str:
    """Return a prompt as the policy was trained to read it, before its tokenizer.

    Args:
        prompt: text or messages.
        form: dialogue: a plain sentence becomes a human's turn. text, chat: it stays, a chat template does the rest.

    Raises:
        DataError: the messages are no conversation that asks for a response.
    """
    if isinstance(prompt, str):
        plain = form == "dialogue" and HUMAN not in prompt
        return render([{"role": "user", "content": prompt}]) if plain else prompt
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in prompt]
    if form == "text" and [turn["role"] for turn in turns] == ["user"]:
        return turns[0]["content"]
    if turns[-1]["role"] != "user":
        raise DataError("the messages of a prompt end with the assistant's turn", "", "end with the user's")
    try:
        return render(turns)
    except ValueError as error:
        raise DataError("the messages of a prompt are no conversation", str(error)) from None
