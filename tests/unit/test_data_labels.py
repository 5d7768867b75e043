"""Labels, margins and rankings in preference files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_data_text import Row, all_pairs, config, plain_rows, split_prompts, write

from rlhf_cli.data.rows import Demonstration, Pair, PreferenceData
from rlhf_cli.data.text import load_text
from rlhf_cli.errors import DataError


def load(path: Path, rows: list[Row], **changes: Any) -> PreferenceData:
    return load_text(replace(config(write(path / "rows.jsonl", rows)), **changes))


def only_pair(path: Path, **columns: Any) -> Pair:
    """Return the pair made of a row with these columns, wherever the split puts its prompt."""
    rows = [row | columns for row in plain_rows(20)]
    return next(pair for pair in load(path, rows).reward_pairs)


def test_without_the_columns_a_pair_is_certain_and_names_no_margin(tmp_path: Path) -> None:
    assert {(pair.label, pair.margin) for pair in all_pairs(load(tmp_path, plain_rows(20)))} == {(1.0, 0.0)}


@pytest.mark.parametrize(("label", "margin"), [(1, 0), (0.75, 2.5), (0.6, 3)])
def test_label_and_margin_are_read(tmp_path: Path, label: float, margin: float) -> None:
    pair = only_pair(tmp_path, label=label, margin=margin)
    assert (pair.label, pair.margin) == (label, margin)
    assert isinstance(pair.label, float)
    assert isinstance(pair.margin, float)
    assert (pair.chosen[:4], pair.rejected[:3]) == ("good", "bad")


@pytest.mark.parametrize(("label", "turned"), [(0, 1.0), (0.25, 0.75)])
def test_a_label_below_one_half_swaps_the_pair_and_keeps_its_margin(
    tmp_path: Path, label: float, turned: float
) -> None:
    pair = only_pair(tmp_path, label=label, margin=0.5)
    assert (pair.label, pair.margin) == (turned, 0.5)
    assert (pair.chosen[:3], pair.rejected[:4]) == ("bad", "good")


def test_a_swapped_pair_demonstrates_the_better_response(tmp_path: Path) -> None:
    data = load(tmp_path, [row | {"label": 0.1} for row in plain_rows(20)])
    assert data.demonstrations
    assert all(row.response.startswith("bad") for row in data.demonstrations)


def test_a_label_of_one_half_is_for_the_reward_model_alone(tmp_path: Path) -> None:
    even = [row | {"chosen": f"even {i}", "label": 0.5} for i, row in enumerate(plain_rows(100))]
    data = load(tmp_path, plain_rows(100) + even)
    # 10 of 100 prompts held out; of the other 90: 18 for SFT, 36 for the reward model, 36 for alignment
    assert len(data.reward_pairs) == 72
    assert [pair.label for pair in data.reward_pairs].count(0.5) == 36
    assert (len(data.demonstrations), len(data.policy_pairs), len(data.heldout_pairs)) == (18, 36, 10)
    assert {pair.label for pair in data.policy_pairs + data.heldout_pairs} == {1.0}
    assert all(row.response.startswith("good") for row in data.demonstrations)
    assert data.dropped == {"no_direction": 18 + 36 + 10}


def test_a_prompt_to_sample_needs_no_direction(tmp_path: Path) -> None:
    rows = plain_rows(100)
    aligned = load(tmp_path, rows).prompts
    even = [row | {"label": 0.5} if row["prompt"] in aligned[1:] else row for row in rows]
    data = load(tmp_path, even)
    assert data.prompts == aligned
    assert [pair.prompt for pair in data.policy_pairs] == aligned[:1]


def test_a_split_without_any_direction_is_refused(tmp_path: Path) -> None:
    rows = plain_rows(100)
    heldout = {pair.prompt for pair in load(tmp_path, rows).heldout_pairs}
    even = [row | {"label": 0.5} if row["prompt"] in heldout else row for row in rows]
    with pytest.raises(DataError, match=r"every row of the heldout split of .*rows\.jsonl has label 0\.5.*split_seed"):
        load(tmp_path, even)


BAD_NUMBERS = [
    ("label", "true", r"label is true\. it must be a number from 0 to 1"),
    ("label", '"0.7"', r"label is \"0\.7\""),
    ("label", "1.0001", r"label is 1\.0001.*correct it, or leave label out"),
    ("label", "-0.1", r"label is -0\.1"),
    ("label", "NaN", r"label is NaN"),
    ("label", "null", r"label is null"),
    ("label", "[0.7]", r"label is \[0\.7\]"),
    ("margin", "false", r"margin is false\. it must be a finite number, 0 or more"),
    ("margin", '"wide"', r"margin is \"wide\""),
    ("margin", "-1e-9", r"margin is -1e-09.*or leave margin out"),
    ("margin", "NaN", r"margin is NaN"),
    ("margin", "Infinity", r"margin is Infinity"),
    ("margin", "1" + 400 * "0", r"margin is 1000"),
]


@pytest.mark.parametrize(("column", "value", "message"), BAD_NUMBERS)
def test_a_bad_number_is_named_by_file_line_and_value(tmp_path: Path, column: str, value: str, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", plain_rows(1))
    with path.open("a") as file:
        file.write(f'{{"prompt": "p", "chosen": "a", "rejected": "b", "{column}": {value}}}\n')
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2: {message}") as caught:
        load_text(config(path))
    assert "\n" not in str(caught.value)


def test_the_dialogue_form_has_no_labels(tmp_path: Path) -> None:
    dialogues: list[Row] = [
        {"chosen": f"\n\nHuman: {i}\n\nAssistant: a", "rejected": f"\n\nHuman: {i}\n\nAssistant: b", "label": "n/a"}
        for i in range(10)
    ]
    data = load_text(config(write(tmp_path / "rows.jsonl", dialogues), "hh_rlhf"))
    assert {pair.label for pair in all_pairs(data)} == {1.0}


def rankings(count: int, responses: int = 3) -> list[Row]:
    return [{"prompt": f"Question {i}?", "responses": [f"{i} is {k}." for k in range(responses)]} for i in range(count)]


def test_rankings_give_all_their_pairs_and_the_best_as_demonstration(tmp_path: Path) -> None:
    data = load(tmp_path, rankings(100, responses=4))
    # 10 of 100 prompts held out; of the other 90: 18 for SFT, 36 for the reward model, 36 for alignment
    assert len(data.reward_rankings) == 36
    assert [len(data.reward_pairs), len(data.policy_pairs), len(data.heldout_pairs)] == [36 * 6, 36 * 6, 10 * 6]
    assert data.reward_pairs == [pair for row in data.reward_rankings for pair in row.pairs()]
    assert len(set().union(*split_prompts(data))) == 100
    first = data.reward_rankings[0]
    number = first.prompt.split()[1][:-1]
    assert first.responses == tuple(f"{number} is {k}." for k in range(4))
    assert len(data.demonstrations) == 18
    assert all(row == Demonstration(row.prompt, f"{row.prompt.split()[1][:-1]} is 0.") for row in data.demonstrations)
    assert all(pair.chosen < pair.rejected for pair in all_pairs(data))  # "i is 0." before "i is 1."
    assert data.dropped == {}


def test_files_of_pairs_have_no_rankings(tmp_path: Path) -> None:
    assert load(tmp_path, plain_rows(20)).reward_rankings == []


def test_a_row_of_a_pair_may_carry_other_columns(tmp_path: Path) -> None:
    assert only_pair(tmp_path, responses=["x", "y"], source="web").chosen.startswith("good")


def test_useless_rankings_are_dropped_and_counted(tmp_path: Path) -> None:
    repeated: list[Row] = [{"prompt": f"P{i}?", "responses": ["a", " b ", "b", "a ", "c"]} for i in range(10)]
    odd: list[Row] = [
        {"prompt": "p", "responses": ["same", " same", "same "]},
        {"prompt": "p", "responses": ["one"]},
        {"prompt": "p", "responses": []},
        {"prompt": "p", "responses": ["a", " ", "b"]},
        {"prompt": " ", "responses": ["a", "b"]},
    ]
    data = load(tmp_path, repeated + odd)
    assert {row.responses for row in data.reward_rankings} == {("a", "b", "c")}
    assert data.dropped == {
        "duplicate_in_ranking": 20, "too_few_responses": 3, "empty_response": 1, "empty_prompt": 1,
    }  # fmt: skip


def test_a_file_without_a_usable_ranking_is_refused_with_the_counts(tmp_path: Path) -> None:
    rows: list[Row] = [{"prompt": "p", "responses": ["a", "a"]}, {"prompt": "p", "responses": ["", "b"]}]
    with pytest.raises(DataError, match="all 2 rows were left out: too_few_responses 1, empty_response 1"):
        load(tmp_path, rows)


BAD_RANKINGS = [
    ('{"prompt": "p", "responses": "a, b"}', r"line 2: responses is str, not a list.*best first"),
    ('{"prompt": "p", "responses": null}', r"line 2: responses is null, not a list"),
    ('{"prompt": "p", "responses": ["a", 2]}', r"line 2: responses\[1\] is int, not text"),
    ('{"prompt": "p", "responses": ["a", "\\ud800"]}', r"line 2: responses\[1\] is not valid Unicode"),
    ('{"prompt": 3, "responses": ["a", "b"]}', r"line 2: prompt is int, not text"),
    ('{"question": "p", "responses": ["a", "b"]}', r"line 2: no column prompt.*question, responses"),
    ('{"prompt": "p", "responses": ["a", "b"], "label": 0.7}', r"line 2: label beside responses.*leave it out"),
    ('{"prompt": "p", "chosen": "a", "rejected": "b"}', r"line 2: a pair in a file of rankings.*two files"),
    ('{"prompt": "p", "chosen": "a", "rejected": "a"}', r"line 2: a pair in a file of rankings"),
]


@pytest.mark.parametrize(("line", "message"), BAD_RANKINGS)
def test_a_bad_ranking_is_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(rankings(1)[0])}\n{line}\n")
    with pytest.raises(DataError, match=message) as caught:
        load_text(config(path))
    assert "\n" not in str(caught.value)


def test_a_ranking_among_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl, line 4: a ranking in a file of pairs"):
        load(tmp_path, plain_rows(3) + rankings(1))


def test_rankings_under_the_dialogue_form_name_the_dataset_to_use(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", rankings(5))
    with pytest.raises(DataError, match=r"no column chosen or rejected.*look like dataset=preferences"):
        load_text(config(path, "hh_rlhf"))
