"""Conversational rows: lists of messages, in either spelling, to a prompt in text form and the replies to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_cli.data.columns import ABSENT, text
from rlhf_cli.data.dialogue import MARKER, render
from rlhf_cli.errors import DataError

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
Message = dict[str, str]


def read_messages(value: Any, name: str, *, where: str) -> list[Message]:
    """Return messages as `role` (user, assistant, system, or another that no conversation has) and `content`.

    Both spellings are read, role and content, and from (human, gpt) and value. An empty system message is left out.

    Raises:
        DataError: something in the list is no message.
    """
    found = []
    for i, message in enumerate(value):
        place = f"{name}[{i}]"
        if not isinstance(message, dict):
            kind = "null" if message is None else type(message).__name__
            raise DataError(f"{where}: {place} is {kind}, not a message", "", "give messages with role and content")
        role, content = (
            next((message[key] for key in keys if key in message), ABSENT)
            for keys in (("role", "from"), ("content", "value"))
        )
        if role is ABSENT or content is ABSENT:
            raise DataError(
                f"{where}: {place} is a message without {'role' if role is ABSENT else 'content'}",
                f"it has: {', '.join(message) or 'nothing'}",
                "give every message role and content, or from and value",
            )
        role = text(role, f"{place}.role", where=where)
        content = text(content, f"{place}.content", where=where)
        if role != "system" or content.strip():
            found.append({"role": ROLES.get(role, role), "content": content})
    return found


def prompt_and_replies(prompt: str | list[Message] | None, completions: Sequence[list[Message]]) -> Any:
    """Return (prompt as text, replies), the prompt with all turns before the last; or why the row is of no use.

    Args:
        prompt: what the user says, or the conversation so far; None: it is within each of the completions.
        completions: of each response the whole conversation, or what follows the prompt; the last turn is the reply.
    """
    start = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    whole = [turns if _holds(turns, start) else [*start, *turns] for turns in completions]
    if any(not turns or turns[-1]["role"] != "assistant" for turns in whole):
        return "last_turn_not_assistant"
    context = whole[0][:-1]
    if any(turns[:-1] != context for turns in whole):
        return "differ_before_last_turn"
    replies = [turns[-1]["content"] for turns in whole]
    if any(MARKER.search(content) for content in [*(turn["content"] for turn in context), *replies]):
        return "marker_in_turn"
    if not any(turn["content"].strip() for turn in context if turn["role"] == "user"):
        return "empty_prompt"
    if context[-1]["role"] != "user":
        return "roles_out_of_turn"
    try:
        return render(context), replies
    except ValueError:
        return "roles_out_of_turn"


def _holds(turns: list[Message], start: list[Message]) -> bool:
    """Return whether turns are a whole conversation, not the continuation of `start`."""
    if not start or turns[: len(start)] == start:
        return True
    # Nobody but the assistant goes on after the user; another first turn begins the conversation anew.
    return start[-1]["role"] == "user" and bool(turns) and turns[0]["role"] != "assistant"
