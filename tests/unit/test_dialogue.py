from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.data.dialogue import MARKER, messages, render


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def test_a_conversation_in_text_form() -> None:
    turns = [system("Be brief."), user("Hi"), assistant("Hello."), user("And now?")]
    text = "Be brief.\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: And now?\n\nAssistant:"
    assert render(turns) == text
    assert messages(text) == turns
    assert render([user("Hi"), assistant("Hello.")]) == "\n\nHuman: Hi\n\nAssistant: Hello."


PIECES = st.sampled_from(["Human", "Assistant", "\n", ":", " ", "é", "a"])
TURN = st.lists(PIECES, max_size=12).map("".join).filter(lambda text: not MARKER.search(text))


@given(st.none() | TURN.filter(str.strip), st.lists(TURN, min_size=1, max_size=5))
def test_messages_are_what_was_rendered(opening: str | None, contents: list[str]) -> None:
    turns = [(user, assistant)[i % 2](content) for i, content in enumerate(contents)]
    if not turns[-1]["content"].strip():
        turns[-1]["content"] += "x"
    turns = ([] if opening is None else [system(opening)]) + turns
    assert messages(render(turns)) == turns


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("TL;DR this", [user("TL;DR this")]),
        ("Human: no blank lines before", [user("Human: no blank lines before")]),
        ("Why?\n\nAssistant:", [user("Why?")]),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant:", [user("a\n\nb")]),
        ("\n\nAssistant: Hi!\n\nHuman: a\n\nAssistant: ", [assistant("Hi!"), user("a")]),
        ("\n\nHuman: a\n\nAssistant: b\n\nAssistant:", [user("a"), assistant("b")]),
        ("\n\nHuman:\n\nAssistant:", [user("")]),
    ],
    ids=["plain", "no marker", "no human", "neighbours", "assistant first", "asked twice", "empty"],
)
def test_any_text_has_messages(text: str, expected: list[dict[str, str]]) -> None:
    assert messages(text) == expected


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([user("a\n\nHuman: b")], "a turn contains"),
        ([system("x\n\nAssistant: y"), user("a")], "a turn contains"),
        ([user("a"), user("b")], "turn 2 is the user's, not the assistant's"),
        ([assistant("a")], "turn 1 is the assistant's, not the user's"),
        ([user("a"), {"role": "tool", "content": "b"}], "turn 2 is the tool's"),
        ([system("a")], "no user's turn"),
        ([system(" "), user("a")], "the system message is empty"),
        ([user("a"), assistant(" ")], "the last turn is empty"),
        ([], "no user's turn"),
    ],
)
def test_what_has_no_text_form_is_refused(turns: list[dict[str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(turns)
