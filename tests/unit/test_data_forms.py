"""What a row may look like: TRL's formats, plain and conversational, choices, columns by other names."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data_configs import Row, dataset, judged, write

from rlhf_cli.data import load
from rlhf_cli.data.checked import checked_rows
from rlhf_cli.data.rows import Pair, Ranking
from rlhf_cli.errors import ConfigError, DataError

ASK = {"role": "user", "content": "Ask"}
TOOL = {"role": "tool", "content": "42"}
ASKED = "\n\nHuman: Ask\n\nAssistant:"


def say(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def read(
    tmp_path: Path, rows: list[Row], *overrides: str, form: str = "preferences"
) -> tuple[list[Any], dict[str, int]]:
    """Return the usable rows of a file and how many others there were, by reason."""
    dropped: Counter[str] = Counter()
    path = write(tmp_path / "rows.jsonl", rows)
    return list(checked_rows(dataset(form, f"path={path}", *overrides), dropped)), dict(dropped)


def only(tmp_path: Path, row: Row, *overrides: str, form: str = "preferences") -> Any:
    found, dropped = read(tmp_path, [row], *overrides, form=form)
    return found[0] if found else next(iter(dropped))


HUMAN_GPT = [{"from": "human", "value": "Ask"}, {"from": "gpt", "value": "yes"}]
FORMS: dict[str, Row] = {
    "prompt and last turns": {"prompt": [ASK], "chosen": [say("yes")], "rejected": [say("no")]},
    "prompt and whole conversations": {"prompt": [ASK], "chosen": [ASK, say("yes")], "rejected": [ASK, say("no")]},
    "text and last turns": {"prompt": "Ask", "chosen": [say("yes")], "rejected": [say("no")]},
    "text and whole conversations": {"prompt": "Ask", "chosen": [ASK, say("yes")], "rejected": [ASK, say("no")]},
    "messages and texts": {"prompt": [ASK], "chosen": "yes", "rejected": " no"},
    "prompt within": {"chosen": [ASK, say("yes")], "rejected": [ASK, say("no")]},
    "prompt null": {"prompt": None, "chosen": [ASK, say("yes")], "rejected": [ASK, say("no")]},
    "from and value": {"chosen": HUMAN_GPT, "rejected": [HUMAN_GPT[0], {"from": "gpt", "value": "no"}]},
    "empty system text": {"prompt": [{"role": "system", "content": ""}, ASK], "chosen": "yes", "rejected": "no"},
}


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_every_conversational_form_is_one_pair(tmp_path: Path, row: Row) -> None:
    assert only(tmp_path, row) == Pair(ASKED, "yes", "no")


def test_earlier_turns_stay_in_the_prompt(tmp_path: Path) -> None:
    start = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Hi"}, say("Hello."), ASK]
    expected = Pair(f"Brief.\n\nHuman: Hi\n\nAssistant: Hello.{ASKED}", "yes", "no")
    within: Row = {"chosen": [*start, say("yes")], "rejected": [*start, say("no")]}
    assert only(tmp_path, within) == expected
    assert only(tmp_path, within | {"prompt": "Hi"}) == expected
    assert only(tmp_path, {"prompt": start, "chosen": [say("yes")], "rejected": [say("no")]}) == expected
    goes_on: Row = {"prompt": start[:3], "chosen": [ASK, say("yes")], "rejected": [ASK, say("no")]}
    assert only(tmp_path, goes_on) == expected


@pytest.mark.parametrize(
    ("reason", "chosen", "rejected"),
    [
        ("last_turn_not_assistant", [ASK, say("a"), ASK], [ASK, say("b"), ASK]),
        ("last_turn_not_assistant", [], []),
        ("differ_before_last_turn", [ASK, say("a"), ASK, say("c")], [ASK, say("b"), ASK, say("d")]),
        ("roles_out_of_turn", [ASK, ASK, say("a")], [ASK, ASK, say("b")]),
        ("roles_out_of_turn", [ASK, TOOL, say("a")], [ASK, TOOL, say("b")]),
        ("marker_in_turn", [ASK, say("a\n\nHuman: b")], [ASK, say("b")]),
        ("empty_prompt", [say("a")], [say("b")]),
        ("empty_response", [ASK, say("a")], [ASK, say(" ")]),
        ("chosen_equals_rejected", [ASK, say("a")], [ASK, say("a ")]),
    ],
)  # fmt: skip
def test_useless_conversations_are_dropped_and_counted(
    tmp_path: Path, reason: str, chosen: list[Row], rejected: list[Row]
) -> None:
    assert read(tmp_path, [{"chosen": chosen, "rejected": rejected}]) == ([], {reason: 1})


BAD: dict[str, tuple[Row, str]] = {
    "no message": ({"chosen": [ASK, "yes"], "rejected": [ASK]}, r"chosen\[1\] is str, not a message"),
    "no content": ({"chosen": [{"role": "user"}], "rejected": [ASK]}, r"chosen\[0\] is a message without content"),
    "no role": ({"chosen": [{"content": "x"}], "rejected": [ASK]}, r"chosen\[0\] is a message without role"),
    "null": ({"chosen": [{"role": "user", "content": None}], "rejected": [ASK]}, r"chosen\[0\]\.content is null"),
    "text beside": (
        {"prompt": "a", "chosen": [ASK, say("b")], "rejected": "c"},
        "chosen is list, not text as rejected",
    ),
    "number beside": ({"prompt": "a", "chosen": [ASK], "rejected": 3}, "rejected is int, not text"),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_a_bad_conversation_is_named_by_file_line_and_place(tmp_path: Path, row: Row, message: str) -> None:
    good = FORMS["prompt within"]
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2: {message}") as caught:
        read(tmp_path, [good, row])
    assert "\n" not in str(caught.value)


def test_the_first_row_of_the_other_kind_is_named(tmp_path: Path) -> None:
    plain = {"prompt": "Ask", "chosen": "yes", "rejected": "no"}
    conversation = FORMS["text and last turns"]
    with pytest.raises(DataError, match=r"line 3: a conversation in a file of plain texts.*two files"):
        read(tmp_path, [plain, plain, conversation, plain])
    with pytest.raises(DataError, match=r"line 2: plain text in a file of conversations"):
        read(tmp_path, [conversation, plain])


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is green.", Pair("The sky is", "blue.", "green.")),
        ("The sky is blue.", "The sky is black.", Pair("The sky is", "blue.", "black.")),  # no word is cut in two
        ("Q: sky?\nblue", "Q: sky?\ngreen", Pair("Q: sky?\n", "blue", "green")),
        ("It is so", "It is so indeed", "empty_response"),
        ("blue", "black", "no_shared_prompt"),
    ],
)
def test_the_prompt_within_two_texts(tmp_path: Path, chosen: str, rejected: str, expected: Pair | str) -> None:
    assert only(tmp_path, {"chosen": chosen, "rejected": rejected}, "columns.prompt=null") == expected


def test_rankings_may_be_conversational(tmp_path: Path) -> None:
    expected = Ranking(ASKED, ("a", "b", "c"))
    replies = [[say(text)] for text in "abc"]
    assert only(tmp_path, {"prompt": [ASK], "responses": replies}) == expected
    assert only(tmp_path, {"prompt": "Ask", "responses": [[ASK, *reply] for reply in replies]}) == expected
    assert only(tmp_path, {"prompt": [ASK], "responses": ["a", "b", "c"]}) == expected


def test_columns_by_other_names_and_further_in(tmp_path: Path) -> None:
    row = {"data": {"ask": "Why?", "out": [{"text": "bad"}, {"text": "good"}]}, "p": 0.8, "by": 1.5, "label": "spam"}
    names = ["prompt=data.ask", "chosen=data.out.1.text", "rejected=data.out.0.text", "label=p", "margin=by"]
    pair = only(tmp_path, row, *(f"columns.{name}" for name in names))
    assert pair == Pair("Why?", "good", "bad", 0.8, 1.5)
    assert only(tmp_path, row, *(f"columns.{name}" for name in names[:3]), "columns.label=null").label == 1


def test_missing_columns_say_how_to_map(tmp_path: Path) -> None:
    row = {"question": "Why?", "better": "a", "worse": "b"}
    with pytest.raises(DataError, match=r"no column prompt or chosen or rejected.*question, better, worse") as caught:
        read(tmp_path, [row])
    assert "dataset.columns.chosen=COLUMN dataset.columns.rejected=COLUMN" in str(caught.value)
    with pytest.raises(DataError, match=r"no column data\.out\.7\.text"):
        read(tmp_path, [FORMS["messages and texts"] | {"data": {"out": []}}], "columns.chosen=data.out.7.text")
    with pytest.raises(DataError, match=r"no column prompt\. .*null where chosen and rejected begin with it"):
        read(tmp_path, [{"chosen": "a b", "rejected": "a c"}])


def choice(value: Any, **changes: Any) -> Row:
    return {"prompt": "Why?", "response_a": "A", "response_b": "B", "choice": value} | changes


@pytest.mark.parametrize("form", ["1", "true"])
@pytest.mark.parametrize(
    ("first", "second"), [(1, 0), (1, 2), ("1", "0"), (True, False), (1.0, 0.0), ("True", "False")]
)
def test_choices_are_compared_as_text(tmp_path: Path, form: str, first: Any, second: Any) -> None:
    found, _ = read(tmp_path, [choice(first), choice(second)], f"columns.first_value='{form}'", form="choices")
    assert found == [Pair("Why?", "A", "B"), Pair("Why?", "B", "A")]


def test_a_third_choice_is_refused_and_none_at_all_is_counted(tmp_path: Path) -> None:
    rows = [choice(0), choice(1), choice(None), choice("tie")]
    found, dropped = read(tmp_path, rows[:3], form="choices")
    assert (len(found), dropped) == (2, {"no_choice": 1})
    with pytest.raises(DataError, match=r"line 4: choice is tie\. so far 1 was the choice of response_b and 0 that of"):
        read(tmp_path, rows, form="choices")


def test_a_short_prompt_where_a_column_is_empty(tmp_path: Path) -> None:
    templates = ["columns.prompt='{q} ({about.0})'", "columns.short_prompt='{q}'"]
    for about, prompt in ((["x"], "Why? (x)"), ([""], "Why?"), ([None], "Why?"), ([7], "Why? (7)")):
        row = choice(0, q="Why?", about=about)
        assert only(tmp_path, row, *templates, form="choices").prompt == prompt
    assert only(tmp_path, choice(0, q=" ", about=[""]), *templates, form="choices") == "empty_prompt"
    with pytest.raises(DataError, match=r"line 1: no column about\.0\. .*braces in dataset\.columns\.prompt"):
        only(tmp_path, choice(0, q="Why?", about=[]), *templates, form="choices")


def test_a_prompt_without_a_column_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"columns\.prompt=history names no column.*columns\.prompt='\{history\}'"):
        dataset("choices", "path=FILE", "columns.prompt=history")


def test_missing_choice_columns_say_how_to_map(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column response_a or choice.*dataset\.columns\.first=COLUMN"):
        read(tmp_path, [{"prompt": "x", "response_b": "y", "winner": 0}], form="choices")


def test_2000_conversations_load_and_split_in_seconds(tmp_path: Path) -> None:
    rows = [{"prompt": f"Ask {i}", "chosen": [say("yes " * 200)], "rejected": [say("no " * 200)]} for i in range(2000)]
    cfg = dataset("preferences", f"path={write(tmp_path / 'rows.jsonl', rows)}")
    started = time.monotonic()
    assert len(judged(load(cfg))) == 2000
    assert time.monotonic() - started < 5
