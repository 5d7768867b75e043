"""A dataset's pairs as a file, `rlhf data --out`: read back, it is the same data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_configs import Row, dataset, write
from typer.testing import Result

from rlhf_cli.config import compose
from rlhf_cli.data import load
from rlhf_cli.data.pairs_file import write_pairs
from rlhf_cli.data.rows import Pair
from rlhf_cli.data.text import usable_rows

Rlhf = Callable[..., Result]

DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why é {}?\n\nAssistant:"
ASK = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Why?\u2028"}]
FORMS: dict[str, tuple[list[str], list[Row]]] = {
    "dialogues": (
        ["hh_rlhf"],
        [{"chosen": f"{DIALOGUE.format(i)} yes\n\n{i}", "rejected": f"{DIALOGUE.format(i)} no"} for i in range(5)],
    ),
    "conversations": (
        ["preferences"],
        [{side: [*ASK, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}] * 5,
    ),
    "judged": (
        ["preferences"],
        [{"prompt": f"{i}?", "chosen": "a", "rejected": "b", "label": i / 4, "margin": i / 3} for i in range(5)],
    ),
    "rankings": (["preferences"], [{"prompt": f" {i}? ", "responses": ["a", "b ", "a", "c"]} for i in range(5)]),
    "within": (["preferences", "columns.prompt=null"], [{"chosen": "It is so", "rejected": "It is not"}] * 5),
}


def rows_of(cfg: Any) -> list[Any]:
    return list(usable_rows(cfg, Counter()))


@pytest.mark.parametrize(("form", "rows"), FORMS.values(), ids=FORMS)
def test_rows_of_every_form_come_back_as_they_are(tmp_path: Path, form: list[str], rows: list[Row]) -> None:
    useless = {name: "" if isinstance(value, str) else value for name, value in rows[0].items()}
    cfg = dataset(form[0], f"path={write(tmp_path / 'rows.jsonl', [*rows, useless])}", *form[1:])
    dropped: Counter[str] = Counter()
    expected = list(usable_rows(cfg, dropped))
    assert expected
    count, left_out = write_pairs(cfg, tmp_path / "new" / "pairs.jsonl")
    assert (count, left_out) == (len(expected), dict(dropped))
    again = dataset("preferences", f"path={tmp_path}/new/pairs.jsonl")
    assert rows_of(again) == expected
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["pairs.jsonl"]


def test_label_and_margin_are_written_where_they_say_something(tmp_path: Path) -> None:
    rows = [
        {"prompt": "?", "chosen": "a", "rejected": "b"},
        {"prompt": "?", "chosen": "a", "rejected": "b", "label": 0},
    ]
    write_pairs(dataset("preferences", f"path={write(tmp_path / 'rows.jsonl', rows)}"), tmp_path / "pairs.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert lines == [rows[0], {"prompt": "?", "chosen": "b", "rejected": "a"}], "the better one is chosen"


@pytest.mark.parametrize("ranking_size", [2, 4])
def test_the_survey_s_pairs_are_a_text_dataset(rlhf: Rlhf, ranking_size: int) -> None:
    world = [f"dataset.ranking_size={ranking_size}", "dataset.pairs=600", "dataset.heldout_pairs=60"]
    made = rlhf("data", "--out", "pairs.jsonl", *world)
    assert made.exit_code == 0, made.output
    survey = load(compose.load("train-sft", world).dataset)
    expected = [*survey.reward_pairs, *survey.heldout_pairs]
    assert made.stdout == f"pairs.jsonl: {len(expected)} rows\n"
    assert rows_of(dataset("preferences", "path=pairs.jsonl")) == expected
    text = load(dataset("preferences", "path=pairs.jsonl"))
    assert text.dropped == {}
    shown = rlhf("data", "dataset=preferences", "dataset.path=pairs.jsonl", "dataset.max_prompt_tokens=60")
    assert shown.exit_code == 0, shown.output
    assert f"{len(text.reward_pairs):>9}  reward_pairs " in shown.stdout
    assert "left out   " not in shown.stdout


def test_a_mixture_is_one_file(tmp_path: Path, rlhf: Rlhf) -> None:
    paths = [
        write(
            tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i}?", "chosen": "a", "rejected": "b"} for i in range(9)]
        )
        for name in "xy"
    ]
    result = rlhf("data", "dataset=mixture", f"dataset.parts=[{paths[0]},{paths[1]}]", "--out", "both.jsonl")
    assert result.stdout == "both.jsonl: 18 rows\n"
    found = rows_of(dataset("preferences", "path=both.jsonl"))
    assert set(found) == {Pair(f"{name} {i}?", "a", "b") for name in "xy" for i in range(9)}


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("there.jsonl", "--out=there.jsonl exists. it is not overwritten. choose another name, or remove it."),
        ("pairs.csv", "--out=pairs.csv is no .jsonl file. pairs are written as JSON lines. name it FILE.jsonl."),
        ("there.jsonl/pairs.jsonl", "--out=there.jsonl cannot be a folder."),
    ],
)
def test_a_file_that_cannot_be_made(rlhf: Rlhf, out: str, message: str) -> None:
    Path("there.jsonl").write_text("mine")
    result = rlhf("data", "dataset.pairs=9", "--out", out)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1
    assert Path("there.jsonl").read_text() == "mine"
    assert [path.name for path in Path().iterdir()] == ["there.jsonl"]


def test_bad_rows_leave_no_file(rlhf: Rlhf) -> None:
    Path("rows.jsonl").write_text('{"prompt": "?", "chosen": "a", "rejected": "b"}\nspoilt\n')
    result = rlhf("data", "dataset=preferences", "dataset.path=rows.jsonl", "--out", "pairs.jsonl")
    assert result.exit_code == 2
    assert "rows.jsonl, line 2: not JSON" in result.stderr
    missing = rlhf("data", "dataset=preferences", "dataset.path=row.jsonl", "--out", "new/pairs.jsonl")
    assert missing.exit_code == 2
    assert [path.name for path in Path().iterdir()] == ["rows.jsonl"]
