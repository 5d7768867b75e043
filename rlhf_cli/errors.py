"""Errors a user can cause: one line (what, why, what to do), exit code 2, never a traceback."""

from __future__ import annotations

RUN_FOLDER = "run folder: "  # begins the note on an error that names the folder a failed run left


class UserError(Exception):
    """A mistake the user can mend. Printed as one line; the command ends with exit code 2.

    Args:
        what: what is wrong, naming the key, file or row.
        why: the rule that is broken (may be empty).
        todo: what to do about it (may be empty).
    """

    def __init__(self, what: str, why: str = "", todo: str = "") -> None:
        self.what, self.why, self.todo = what, why, todo
        parts = [part.strip().rstrip(".") for part in (what, why, todo) if part]
        text = ". ".join(" ".join(part.split()) for part in parts)
        super().__init__(text if text.endswith(("?", "!")) else f"{text}.")


class ConfigError(UserError):
    """The configuration is not valid: an unknown key, a value out of range, a choice that does not exist."""


class DataError(UserError):
    """The data cannot be used: a missing or empty file, a row without its columns, too few prompts."""


class RunError(UserError):
    """The run cannot go on: an unwritable folder, a folder of another run, a reward that is not finite."""


class RankError(Exception):
    """A process of a launched job failed through no mistake of the user: printed as it is, exit code 1.

    Args:
        reason: what happened, in one line.
        text: what is printed: the line, or the failed process's traceback.
    """

    def __init__(self, reason: str, text: str | None = None) -> None:
        self.reason = reason
        super().__init__(text or f"error: {reason}")
