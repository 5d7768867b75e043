r"""Conversations as one text and back: the form "\n\nHuman: …\n\nAssistant: …" of the HH data."""

from __future__ import annotations

import re
from collections.abc import Sequence

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
MARKERS = {"user": HUMAN, "assistant": ASSISTANT}
ROLES = {marker: role for role, marker in MARKERS.items()}
MARKER = re.compile(f"({HUMAN}|{ASSISTANT})")


def render(messages: Sequence[dict[str, str]]) -> str:
    r"""Return a conversation as text: system text, turns after their markers; after a user's turn, "\n\nAssistant:".

    `messages` below gives the same conversation back, to the last space.

    Args:
        messages: `role` and `content` each; an optional system message, then user and assistant in turns.

    Raises:
        ValueError: a turn contains a marker, roles are others or out of turn, or no user speaks.
    """
    turns = list(messages)
    text = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else ""
    _check([text] if len(turns) < len(messages) else [], turns)
    text += "".join(f"{MARKERS[turn['role']]} {turn['content']}" for turn in turns)
    return text + ASSISTANT if turns[-1]["role"] == "user" else text


def messages(prompt: str) -> list[dict[str, str]]:
    r"""Return the messages (`role`, `content`) of a text: of a rendered conversation, the ones it was rendered from.

    Any text will do. Text before the first marker is the system's if a human's turn follows, the user's if none does:
    a prompt without markers is one user message. Neighbouring turns of one role are joined, for chat templates want
    turns to alternate. An "\n\nAssistant:" at the end with nothing after it asks for a response: it is no message.
    """
    opening, *parts = MARKER.split(prompt)
    result: list[dict[str, str]] = []
    if opening.strip():
        result.append({"role": "system" if HUMAN in parts else "user", "content": opening})
    for marker, content in zip(parts[::2], parts[1::2], strict=True):
        role, text = ROLES[marker], content.removeprefix(" ")
        if result and result[-1]["role"] == role:
            result[-1]["content"] += "\n\n" + text
        else:
            result.append({"role": role, "content": text})
    if parts and result[-1]["role"] == "assistant" and not parts[-1].strip():
        # Joined to an earlier assistant's turn, an empty one has left nothing but the blank line.
        result[-1]["content"] = result[-1]["content"].removesuffix("\n\n" + parts[-1].removeprefix(" "))
        if not result[-1]["content"].strip():
            result.pop()
    return result


def _check(system: list[str], turns: list[dict[str, str]]) -> None:
    if any(not text.strip() for text in system):
        raise ValueError("the system message is empty")
    for i, turn in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if turn["role"] != expected:
            raise ValueError(f"turn {i + 1} is the {turn['role']}'s, not the {expected}'s")
    if not turns:
        raise ValueError("no user's turn")
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        raise ValueError("the last turn is empty")
    if any(MARKER.search(text) for text in [*system, *(turn["content"] for turn in turns)]):
        raise ValueError(f"a turn contains {HUMAN!r} or {ASSISTANT!r}")
