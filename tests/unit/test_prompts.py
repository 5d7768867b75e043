from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_cli import stages
from rlhf_cli.errors import ConfigError, DataError
from rlhf_cli.report.answers import show, side_by_side, stacked
from rlhf_cli.stages.finished_run import MARKER, prompt_form
from rlhf_cli.stages.prompts import Asked, as_text, gathered, read_file

USER, ASSISTANT = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_libraries_print_as_they_are_imported_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "noisy.py").write_text("print('[INFO] Running in WANDB offline mode')\nvalue = 5")
    monkeypatch.setattr(stages, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "rlhf_cli.stages.noisy", raising=False)
    assert stages.imported("noisy").value == 5
    assert capsys.readouterr().out == ""


def test_prompts_come_from_one_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert gathered(["a", "b"], None, Terminal()) == ["a", "b"]
    assert gathered([], tmp_path / "a.txt", Terminal()) == ["one", "two"]
    assert gathered([], None, io.StringIO("x\n\ny")) == ["x", "y"]
    assert gathered([], None, Terminal()) is None, "a person types them"
    with pytest.raises(ConfigError, match="prompts are given twice"):
        gathered(["a"], tmp_path / "a.txt", Terminal())
    with pytest.raises(DataError, match="a prompt is empty"):
        gathered(["a", " "], None, Terminal())
    with pytest.raises(DataError, match="standard input is empty"):
        gathered([], None, io.StringIO("\n"))


def test_rows_hold_a_text_or_messages(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a", "id": 1}, {"messages": [USER]}, {"prompt": [USER, ASSISTANT, USER]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_file(tmp_path / "a.jsonl") == ["a", [USER], [USER, ASSISTANT, USER]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"text": "b", "id": 1}',
            r"a.jsonl, line 2 holds no prompt. it has text, id\. write",
        ),
        ("a.jsonl", '{"prompt": ""}', r"line 1 holds no prompt"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', r"line 1 holds no prompt"),
        ("a.jsonl", "[1]", r"it is no object"),
        ("a.jsonl", "{", r"line 1 is not valid JSON"),
        ("a.txt", "\n", r"holds no prompt"),
        ("a.csv", "a", r"is neither .txt nor .jsonl"),
        ("a.txt", None, r"cannot be read. No such file"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_file(tmp_path / name)


def test_a_sentence_is_written_as_the_policy_was_trained() -> None:
    dialogue = "\n\nHuman: Hi?\n\nAssistant:"
    assert as_text("Hi?", "dialogue") == dialogue
    assert as_text(dialogue, "dialogue") == dialogue, "a dialogue stays"
    assert as_text("Hi?", "text") == as_text("Hi?", "chat") == "Hi?"
    assert as_text([USER], "text") == "Hi?"
    assert as_text([USER], "dialogue") == as_text([USER], "chat") == dialogue
    both = "\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: Hi?\n\nAssistant:"
    assert as_text([USER, ASSISTANT, USER], "text") == both
    with pytest.raises(DataError, match="end with the assistant's turn"):
        as_text([USER, ASSISTANT], "dialogue")
    with pytest.raises(DataError, match="no conversation"):
        as_text([USER, USER], "chat")


def test_the_form_is_found_out(tmp_path: Path) -> None:
    plain, chat = SimpleNamespace(chat_template=None), SimpleNamespace(chat_template="{{ messages }}")
    config = {"dataset": {"source": "preferences"}}
    assert prompt_form(config, plain, tmp_path) == "text"
    assert prompt_form(config, chat, tmp_path) == "chat"
    assert prompt_form({"dataset": {"source": "hh_rlhf"}}, plain, tmp_path) == "dialogue"
    (tmp_path / "completions.jsonl").write_text(json.dumps({"prompt": "\n\nHuman: a\n\nAssistant:"}) + "\n")
    assert prompt_form(config, plain, tmp_path) == "dialogue", "its data are conversations"
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / MARKER).write_text(json.dumps({"prompts": "dialogue"}))
    assert prompt_form({}, plain, tmp_path / "export") == "dialogue"


@pytest.mark.parametrize(
    ("key", "value", "option"),
    [
        ("samples", 0, "--samples 0"),
        ("max_new_tokens", 0, "--max-new-tokens 0"),
        ("temperature", -0.1, "--temperature -0.1"),
        ("top_p", 0.0, "--top-p 0.0"),
        ("top_p", 1.1, "--top-p 1.1"),
        ("seed", -1, "--seed -1"),
    ],
)
def test_numbers_have_ranges(key: str, value: float, option: str) -> None:
    with pytest.raises(ConfigError, match=f"{re.escape(option)} is out of range"):
        Asked(**{key: value})


# -- showing -----------------------------------------------------------------------------------------------------------

LINE: dict[str, Any] = {
    "prompt": "\n\nHuman: a\n\nAssistant:", "sample": 0, "samples": 2, "completion": "first\nline [b]", "ended": True,
    "reward": 0.25, "reference": "other", "reference_reward": -1.0, "reference_ended": False,
}  # fmt: skip


def test_answers_are_stacked_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show([LINE, {**LINE, "sample": 1}])
    first, second = capsys.readouterr().out.split("reference 1 (reward -1.000, cut)\n    other\n")
    assert first == "> Human: a\n  \n  Assistant:\npolicy 1 (reward 0.250)\n    first\n    line [b]\n"
    assert second.startswith("policy 2"), "a prompt is written once"
    alone = {key: value for key, value in LINE.items() if not key.startswith("ref") and key != "reward"}
    assert stacked({**alone, "samples": 1}).splitlines()[3] == "policy"


def test_answers_stand_side_by_side_on_a_wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    console.print(side_by_side(LINE))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    (row,) = [line for line in lines if "first" in line]
    assert row.index("other") >= 55
    assert any("line [b]" in line for line in lines), "no markup"
    assert any(line.index("reference 1") >= 55 for line in lines if "policy 1" in line)
