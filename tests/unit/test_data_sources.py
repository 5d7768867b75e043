"""Where rows may lie on a disk: files of every kind, folders, what the datasets library saved; and what is refused."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from data_configs import Row, dataset, judged, write
from typer.testing import Result

from rlhf_cli.data import check, content, load
from rlhf_cli.data.checked import checked_rows
from rlhf_cli.data.sources import read_rows
from rlhf_cli.errors import DataError

ROWS: list[Row] = [{"prompt": f"Why {i}?", "chosen": f"good, {i}\n", "rejected": 'the "bad" é'} for i in range(12)]


def preferences(path: Path, *overrides: str) -> Any:
    return dataset("preferences", f"path='{path}'", *overrides)


def pairs(path: Path, *overrides: str) -> list[str]:
    return [row.prompt for row in checked_rows(preferences(path, *overrides), Counter())]


KINDS = ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_every_kind_hold_the_same_rows(tmp_path: Path, kind: str) -> None:
    data = load(preferences(write(tmp_path / f"rows.{kind}", ROWS)))
    expected = {row["prompt"]: (row["chosen"].strip(), row["rejected"]) for row in ROWS}
    found = judged(data)
    assert {prompt: better for prompt, (better, _) in found.items()} == {
        prompt: better for prompt, (better, _) in expected.items()
    }
    assert {worse for _, worse in found.values() if worse} == {'the "bad" é'}


@pytest.mark.parametrize("kind", ["json", "json.gz"])
def test_a_json_array_is_read_piece_by_piece(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_cli.data.files.CHUNK", 16)
    text = "\ufeff \n" + json.dumps(ROWS, indent=1, ensure_ascii=False)
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    assert [row for _, row in read_rows(preferences(path))] == ROWS


def test_numbers_of_a_table_may_be_missing(tmp_path: Path) -> None:
    rows = [row | {"label": label, "margin": 0.5} for row, label in zip(ROWS, [None, 0.75] * 6, strict=True)]
    cells = [row | {"label": "" if row["label"] is None else row["label"]} for row in rows]
    for path in (write(tmp_path / "rows.parquet", rows), write(tmp_path / "rows.csv", cells)):
        found: list[Any] = list(checked_rows(preferences(path), Counter()))
        assert [(row.label, row.margin) for row in found] == [(1, 0.5), (0.75, 0.5)] * 6
    spoilt = write(tmp_path / "spoilt.csv", [ROWS[0] | {"label": "0.5"}, ROWS[1] | {"label": "spam"}])
    with pytest.raises(DataError, match=r'spoilt\.csv, line 5: label is "spam".*dataset\.columns\.label=null'):
        pairs(spoilt)


def test_max_rows_bounds_what_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    path.write_text(path.read_text() + "spoilt\n")
    assert len(pairs(path, "max_rows=12")) == 12
    with pytest.raises(DataError, match=r"rows\.jsonl, line 13: not JSON"):
        pairs(path)


def test_rows_are_read_one_by_one(tmp_path: Path) -> None:
    for kind in ("jsonl", "jsonl.gz"):
        path = write(tmp_path / f"rows.{kind}", ROWS)
        rows = read_rows(preferences(path))
        assert [where for where, _ in islice(rows, 2)] == [f"{path}, line 1", f"{path}, line 2"]


def test_a_folder_of_files(tmp_path: Path) -> None:
    write(tmp_path / "two" / "part-1.jsonl", ROWS[:5])
    write(tmp_path / "two" / "part-2.jsonl", ROWS[5:])
    assert pairs(tmp_path / "two") == [row["prompt"] for row in ROWS]
    places = [where for where, _ in read_rows(preferences(tmp_path / "two"))]
    assert places[4:6] == [f"{tmp_path}/two/part-1.jsonl, line 5", f"{tmp_path}/two/part-2.jsonl, line 1"]
    write(tmp_path / "splits" / "train.csv", ROWS[:5])
    write(tmp_path / "splits" / "test.csv", ROWS[5:])
    assert pairs(tmp_path / "splits", "split=test") == [row["prompt"] for row in ROWS[5:]]


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list([row | {"label": None} for row in ROWS])
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=whole.select(range(5)), test=whole.select(range(5, 12))).save_to_disk(tmp_path / "two")
    assert pairs(tmp_path / "one") == [row["prompt"] for row in ROWS]
    assert pairs(tmp_path / "two", "split=test") == [row["prompt"] for row in ROWS[5:]]
    places = [where for where, _ in read_rows(preferences(tmp_path / "two"))]
    assert places[-1] == f"{tmp_path}/two (train), row 5"
    with pytest.raises(DataError, match=r"two is a folder without a split dev\. it has: test, train"):
        pairs(tmp_path / "two", "split=dev")
    assert content(preferences(tmp_path / "two")) != content(preferences(tmp_path / "one"))
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"spoilt")
    with pytest.raises(DataError, match=r"one cannot be read after row 0\..*save it again"):
        pairs(tmp_path / "one")


def test_content_follows_the_rows_not_the_place(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name / "rows.jsonl", ROWS) for name in ("a", "b"))
    same = content(preferences(first))
    assert same == content(preferences(second))
    assert content(preferences(first.parent)) == content(preferences(second.parent))
    before = os.stat(first)
    first.write_text(first.read_text().replace("Why 3?", "Why 4?"))
    os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert content(preferences(first)) != same
    assert content(preferences(first.parent)) != content(preferences(second.parent))


CHECK = "check(compose.load('train-sft', ['dataset=hh_rlhf', 'dataset.path=x.jsonl']).dataset)"
GOOD = json.dumps(ROWS[0])
SPOILT: dict[str, tuple[bytes, str]] = {
    "cut.parquet": (b"PAR1 and no more", r"cut\.parquet cannot be read after row 0\..*fetch it again"),
    "array.json": (f"[{GOOD}, {GOOD[:9]}".encode(), r"array\.json, row 2: not JSON"),
    "numbers.json": (b"[1, 2]", r"numbers\.json, row 1: a JSON int, not an object"),
    "latin.json": ('[{"a": "é"}]'.encode("latin-1"), r"latin\.json, after line 0: not UTF-8 text"),
    "more.csv": (b"prompt,chosen\na,b,c\n", r"more\.csv, line 2: more cells than columns"),
    "fewer.csv": (b"prompt,chosen\na\n", r"fewer\.csv, line 2: fewer cells than columns"),
    "quote.csv": (b'prompt,chosen\n"a"b,c\n', r"quote\.csv, after line 1: not CSV"),
    "empty.csv": (b"prompt,chosen\n", r"empty\.csv is empty"),
    "plain.csv.gz": (b"prompt,chosen\n", r"plain\.csv\.gz cannot be decompressed after line 0"),
    "folder/notes.txt": (b"x", r"holds notes\.txt\. files that are read end in \.jsonl"),
    "nothing/.hidden": (b"x", r"nothing is a folder without data files"),
    "script/script.py": (b"x = 1", r"script is a loading script.*dataset\.revision=refs/convert/parquet"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    spoilt, message = SPOILT[name]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(spoilt)
    with pytest.raises(DataError, match=message) as caught:
        load(preferences(path.parent if "/" in name else path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused_before_anything_is_imported(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", ROWS)
    with pytest.raises(DataError, match=r"trian\.parquet does not exist\. did you mean .*train\.parquet\?"):
        check(preferences(tmp_path / "trian.parquet"))
    with pytest.raises(DataError, match=r"dataset\.path=data/rows\.csv does not exist\. there is no folder data"):
        check(dataset("preferences", "path=data/rows.csv"))
    asked = f"import sys\nfrom rlhf_cli.config import compose\nfrom rlhf_cli.data import check\ntry:\n    {CHECK}\n"
    asked += "except Exception as error:\n    print(error, {'torch', 'datasets', 'pyarrow'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout
    assert said == "dataset.path=x.jsonl does not exist. correct the path. set()\n"


def test_the_data_command_shows_places_counts_and_a_pair(tmp_path: Path, rlhf: Callable[..., Result]) -> None:
    rows = [row | {"chosen": "very long " * 200, "label": 0.75} for row in ROWS] + [{**ROWS[0], "chosen": " "}]
    write(tmp_path / "own" / "train.jsonl", rows)
    said = rlhf("data", "dataset=preferences", "dataset.path=own")
    assert said.exit_code == 0, said.output
    assert said.stdout.startswith("preferences\nfrom own, split train\n\n        2  demonstrations  SFT\n")
    assert "        1  left out        a response is empty\n" in said.stdout
    assert re.search(r"\ntokens of all 12 rows .*\nprompts .*\nresponses .* cut\n\nprompt:\n  Why ", said.stdout)
    assert "chosen:\n  very long very" in said.stdout
    assert '[1,399 letters more]\nrejected:\n  the "bad" é\nlabel: 0.75\n' in said.stdout
    parts = rlhf("data", "dataset=mixture", "dataset.parts=[own,own/train.jsonl]")
    assert parts.stdout.startswith("mixture\nfrom own, split train\nfrom own/train.jsonl\n")
    assert "       12  rows of         own/train.jsonl\n" in parts.stdout


def test_rows_of_a_folder_may_stay_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    many = [row | {"prompt": f"{copy} {row['prompt']}"} for copy in range(20) for row in ROWS]
    write(tmp_path / "own" / "rows.parquet", many)
    data = load(preferences(tmp_path / "own", "streaming=true"))
    assert set(judged(data)) == {row["prompt"] for row in many}
    assert not isinstance(data.reward_pairs, list)
