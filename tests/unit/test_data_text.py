from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_cli.config.inputs import PairColumns, PreferencesConfig, TextConfig
from rlhf_cli.data.rows import Pair, PreferenceData
from rlhf_cli.data.text import load_text
from rlhf_cli.errors import ConfigError, DataError

Row = dict[str, object]


def config(path: Path | str | None, source: str = "preferences") -> TextConfig:
    values = {"source": source, "path": None if path is None else str(path), "subset": None, "revision": None}
    values |= {"split": "train", "max_rows": None, "streaming": False, "eval_prompts": 4, "eval_samples": 2}
    values |= {"max_prompt_tokens": 64, "max_completion_tokens": 16, "split_seed": 0}
    values |= {"sft_fraction": 0.2, "rm_fraction": 0.4, "heldout_fraction": 0.1}
    if source == "hh_rlhf":
        return TextConfig(**values)
    names = ("prompt", "chosen", "rejected", "label", "margin", "responses")
    return PreferencesConfig(**values, columns=PairColumns(**{name: name for name in names}))


def write(path: Path, rows: list[Row]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def plain_rows(count: int) -> list[Row]:
    return [{"prompt": f"Question {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(count)]


def dialogue_rows(count: int) -> list[Row]:
    start = "\n\nHuman: Hello\n\nAssistant: Hi!\n\nHuman: Question"
    return [
        {"chosen": f"{start} {i}?\n\nAssistant: good {i}", "rejected": f"{start} {i}?\n\nAssistant: bad {i}"}
        for i in range(count)
    ]


def all_pairs(data: PreferenceData) -> list[Pair]:
    return data.reward_pairs + data.policy_pairs + data.heldout_pairs


def split_prompts(data: PreferenceData) -> list[set[str]]:
    pairs = (data.reward_pairs, data.policy_pairs, data.heldout_pairs)
    return [{row.prompt for row in data.demonstrations}, *({pair.prompt for pair in rows} for rows in pairs)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_dialogues_are_split_at_the_last_assistant_turn(tmp_path: Path, name: str) -> None:
    data = load_text(config(write(tmp_path / name, dialogue_rows(20)), "hh_rlhf"))
    pairs = {pair.prompt: pair for pair in all_pairs(data)}
    expected = {f"\n\nHuman: Hello\n\nAssistant: Hi!\n\nHuman: Question {i}?\n\nAssistant:": i for i in range(20)}
    assert pairs
    for prompt, pair in pairs.items():
        number = expected[prompt]
        assert (pair.chosen, pair.rejected) == (f"good {number}", f"bad {number}")
    assert data.dropped == {}
    assert not data.word_level


def test_a_shared_start_of_both_replies_belongs_to_the_replies(tmp_path: Path) -> None:
    rows = dialogue_rows(10)
    prompt = "\n\nHuman: Well?\n\nAssistant:"
    rows += [{"chosen": prompt + " Yes, it is.", "rejected": prompt + " Yes, it is not."}] * 30
    data = load_text(config(write(tmp_path / "rows.jsonl", rows), "hh_rlhf"))
    texts = {(pair.prompt, pair.chosen, pair.rejected) for pair in all_pairs(data)}
    texts |= {(row.prompt, row.response, "Yes, it is not.") for row in data.demonstrations}
    assert (prompt, "Yes, it is.", "Yes, it is not.") in texts


def test_useless_dialogues_are_dropped_and_counted(tmp_path: Path) -> None:
    start, turn = "\n\nHuman: Hi", "\n\nAssistant:"
    odd = [
        ("empty_response", f"{start}{turn}  ", f"{start}{turn} no"),
        ("chosen_equals_rejected", f"{start}{turn} same", f"{start}{turn}  same "),
        ("differ_before_last_turn", f"{start}{turn} a", f"{start} there{turn} a"),
        ("differ_before_last_turn", f"{start}{turn} a", f"{start}{turn} b{start}{turn} c"),
        ("no_shared_prompt", "just text", f"{start}{turn} a"),
        ("last_turn_not_assistant", f"{start}{turn} a{start}", f"{start}{turn} b{start}"),
        ("empty_prompt", f"\n\nHuman: {turn} a", f"\n\nHuman: {turn} b"),
    ]
    rows = dialogue_rows(10) + [{"chosen": chosen, "rejected": rejected} for _, chosen, rejected in odd]
    data = load_text(config(write(tmp_path / "rows.jsonl", rows), "hh_rlhf"))
    assert data.dropped == {reason: [row[0] for row in odd].count(reason) for reason in {row[0] for row in odd}}
    assert len(all_pairs(data)) + len(data.demonstrations) == 10


def test_useless_plain_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = plain_rows(10)
    rows += [{"prompt": "p", "chosen": "same", "rejected": " same"}] * 2
    rows += [{"prompt": "p", "chosen": "a", "rejected": ""}, {"prompt": " \n", "chosen": "a", "rejected": "b"}]
    data = load_text(config(write(tmp_path / "rows.jsonl", rows)))
    assert data.dropped == {"chosen_equals_rejected": 2, "empty_response": 1, "empty_prompt": 1}


def test_no_prompt_is_in_two_splits_and_no_row_is_lost(tmp_path: Path) -> None:
    rows = [row | {"chosen": f"{row['chosen']} {copy}"} for row in plain_rows(100) for copy in range(3)]
    data = load_text(config(write(tmp_path / "rows.jsonl", rows)))
    splits = split_prompts(data)
    assert len(set().union(*splits)) == sum(map(len, splits)) == 100
    # 10 of 100 held out; of the other 90: 18 for SFT, 36 for the reward model, 36 for alignment
    assert [len(split) for split in splits] == [18, 36, 36, 10]
    assert len(data.demonstrations) + len(all_pairs(data)) == 300
    assert len(data.prompts) == 36
    assert set(data.prompts) == splits[2]
    assert all(row.response.startswith("good") for row in data.demonstrations)


def test_the_split_depends_on_prompts_and_seed_not_on_row_order(tmp_path: Path) -> None:
    rows = plain_rows(40)
    cfg = config(write(tmp_path / "rows.jsonl", rows))
    turned = config(write(tmp_path / "turned.jsonl", rows[::-1]))
    assert split_prompts(load_text(cfg)) == split_prompts(load_text(cfg)) == split_prompts(load_text(turned))
    assert split_prompts(load_text(cfg)) != split_prompts(load_text(replace(cfg, split_seed=1)))


def test_four_prompts_are_the_fewest(tmp_path: Path) -> None:
    data = load_text(config(write(tmp_path / "four.jsonl", plain_rows(4))))
    assert [len(split) for split in split_prompts(data)] == [1, 1, 1, 1]
    with pytest.raises(DataError, match=r"three\.jsonl has 3 usable prompts.*leave none for alignment"):
        load_text(config(write(tmp_path / "three.jsonl", plain_rows(3))))


def test_blank_lines_and_a_byte_order_mark_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in plain_rows(6)]
    path.write_text("\ufeff" + "\n\n".join(lines) + "\n\n", encoding="utf-8")
    assert sum(map(len, split_prompts(load_text(config(path))))) == 6


GOOD = json.dumps(plain_rows(1)[0])
BAD_LINES = [
    ('{"prompt": "a", "chosen": ', r"rows\.jsonl, line 2: not JSON"),
    ('["a", "b"]', r"line 2: a JSON list, not an object"),
    ('{"prompt": "a", "chosen": "b"}', r"line 2: no column rejected.*columns are: prompt, chosen"),
    ('{"question": "a", "chosen": "b"}', r"line 2: no column prompt or rejected.*question, chosen"),
    ("{}", r"line 2: no column prompt or chosen or rejected.*columns are: none"),
    ('{"prompt": "a", "chosen": null, "rejected": "b"}', r"line 2: chosen is null, not text"),
    ('{"prompt": "a", "chosen": [{"role": "user"}], "rejected": "b"}', r"line 2: chosen is list, not text"),
    ('{"prompt": "a", "chosen": "\\ud800", "rejected": "b"}', r"line 2: chosen is not valid Unicode"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(DataError, match=message) as caught:
        load_text(config(path))
    assert "\n" not in str(caught.value)


def test_rows_of_the_other_form_name_the_dataset_to_use(tmp_path: Path) -> None:
    dialogues = write(tmp_path / "dialogues.jsonl", dialogue_rows(5))
    with pytest.raises(DataError, match=r"no column prompt.*look like dataset=hh_rlhf"):
        load_text(config(dialogues))
    plain = write(tmp_path / "plain.jsonl", plain_rows(5))
    with pytest.raises(DataError, match=r"not dialogues.*look like dataset=preferences"):
        load_text(config(plain, "hh_rlhf"))


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "harmless.jsonl.gz", plain_rows(5))
    with pytest.raises(DataError, match=r"does not exist\. did you mean .*harmless\.jsonl\.gz\?"):
        load_text(config(tmp_path / "harmles.jsonl.gz"))
    with pytest.raises(DataError, match="there is no folder .*nowhere"):
        load_text(config(tmp_path / "nowhere" / "rows.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty is a folder without data files\. read are \.jsonl"):
        load_text(config(tmp_path / "empty"))
    with pytest.raises(DataError, match="dataset.path is not set"):
        load_text(config(None))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError, match=r"rows\.jsonl is empty"):
        load_text(config(path))


def test_a_broken_gzip_file_is_refused(tmp_path: Path) -> None:
    plain = tmp_path / "plain.jsonl.gz"
    plain.write_text(GOOD)
    with pytest.raises(DataError, match="cannot be decompressed after line 0.*not a whole gzip file"):
        load_text(config(plain))
    whole = write(tmp_path / "whole.jsonl.gz", plain_rows(50)).read_bytes()
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be decompressed after line"):
        load_text(config(cut))
    misnamed = tmp_path / "misnamed.jsonl"
    misnamed.write_bytes(whole)
    with pytest.raises(DataError, match="line 1: not UTF-8 text.*name it .gz"):
        load_text(config(misnamed))


def test_a_file_without_a_usable_row_is_refused_with_the_counts(tmp_path: Path) -> None:
    rows: list[Row] = [{"prompt": "p", "chosen": "same", "rejected": "same"}] * 3
    rows += [{"prompt": "p", "chosen": "", "rejected": "x"}]
    with pytest.raises(DataError, match="all 4 rows were left out: chosen_equals_rejected 3, empty_response 1"):
        load_text(config(write(tmp_path / "rows.jsonl", rows)))


def test_fractions_that_leave_nothing_for_alignment_are_refused(tmp_path: Path) -> None:
    cfg = replace(config(write(tmp_path / "rows.jsonl", plain_rows(9))), sft_fraction=0.7)
    with pytest.raises(ConfigError, match=r"sft_fraction \+ dataset\.rm_fraction = 1\.1.*below 1"):
        load_text(cfg)
