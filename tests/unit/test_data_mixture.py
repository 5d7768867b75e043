from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data_configs import Row, dataset, judged, write

from rlhf_cli.config import compose
from rlhf_cli.data import content, load
from rlhf_cli.data.mixture import shares
from rlhf_cli.data.text import usable_rows
from rlhf_cli.errors import DataError


def rows(name: str, count: int) -> list[Row]:
    return [{"prompt": f"{name} {i}?", "chosen": "good", "rejected": "bad"} for i in range(count)]


def mixture(tmp_path: Path, counts: dict[str, int], *overrides: str) -> Any:
    paths = [write(tmp_path / f"{name}.jsonl", rows(name, count)) for name, count in counts.items()]
    return dataset("mixture", f"parts=[{','.join(map(str, paths))}]", *overrides)


def mixed(cfg: Any) -> list[str]:
    return [row.prompt for row in usable_rows(cfg, Counter())]


@pytest.mark.parametrize(
    ("usable", "weights", "most", "expected"),
    [
        ([100, 100], [0.5, 0.5], None, [100, 100]),
        ([100, 30], [0.7, 0.3], None, [70, 30]),
        ([100, 30], [7, 3], None, [70, 30]),
        ([70, 100], [0.7, 0.3], None, [70, 30]),
        ([100, 100, 10], [1, 2, 1], None, [10, 20, 10]),
        ([100, 100], [0.9, 0.1], 50, [45, 5]),
        ([100, 1], [1, 1], None, [1, 1]),
    ],
)
def test_shares_follow_the_weights_and_the_scarcest_part(
    usable: list[int], weights: list[float], most: int | None, expected: list[int]
) -> None:
    assert shares(usable, weights, most) == expected


def test_rows_are_drawn_without_replacement_and_interleaved(tmp_path: Path) -> None:
    cfg = mixture(tmp_path, {"a": 200, "b": 30}, "weights=[0.75,0.25]")
    found = mixed(cfg)
    assert len(set(found)) == len(found) == 120
    assert [sum(prompt.startswith("b") for prompt in found[start : start + 40]) for start in (0, 40, 80)] == [
        10,
        10,
        10,
    ]
    of_a = [int(prompt[2:-1]) for prompt in found if prompt.startswith("a")]
    assert of_a == sorted(of_a), "the order of the file is kept"
    assert max(of_a) > 150, "rows are drawn from the whole file"
    assert found == mixed(cfg)
    other = mixed(mixture(tmp_path, {"a": 200, "b": 30}, "weights=[0.75,0.25]", "split_seed=1"))
    assert len(other) == 120
    assert set(other) != set(found)


def test_a_prompt_of_two_parts_is_in_one_split(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", rows("same", 40)) for name in "ab"]
    data = load(dataset("mixture", f"parts=[{paths[0]},{paths[1]}]"))
    splits = [{row.prompt for row in part} for part in (data.demonstrations, data.reward_pairs, data.policy_pairs)]
    splits.append({pair.prompt for pair in data.heldout_pairs})
    assert sum(map(len, splits)) == len(set().union(*splits)) == 40
    assert data.parts == {str(path): 40 for path in paths}


def test_parts_are_read_in_their_own_form_and_counted(tmp_path: Path) -> None:
    own = tmp_path / "conf" / "dataset"
    own.mkdir(parents=True)
    votes = [{"q": f"votes {i}?", "a": "x", "b": "y", "won": i % 2} for i in range(20)] + [
        {"q": " ", "a": "x", "b": "y"}
    ]
    votes[-1]["won"] = 0
    path = write(tmp_path / "votes.jsonl", votes)
    columns = "{prompt: '{q}', first: a, second: b, choice: won, first_value: '1'}"
    (own / "votes.yaml").write_text(f"defaults: [choices, _self_]\nname: votes\npath: {path}\ncolumns: {columns}\n")
    plain = write(tmp_path / "plain.jsonl", rows("plain", 10))
    cfg = compose.load("train-sft", ["dataset=mixture", f"dataset.parts=[votes,{plain}]"], tmp_path / "conf").dataset
    data = load(cfg)
    assert data.parts == {"votes": 10, str(plain): 10}
    assert data.dropped == {"empty_prompt": 1}
    found = judged(data)
    assert {better for prompt, (better, _) in found.items() if prompt.startswith("votes")} == {"x", "y"}


def test_max_rows_bounds_the_mixture_and_its_parts(tmp_path: Path) -> None:
    cfg = mixture(tmp_path, {"a": 100, "b": 100}, "max_rows=20")
    found = mixed(cfg)
    assert Counter(prompt[0] for prompt in found) == {"a": 10, "b": 10}
    assert max(int(prompt[2:-1]) for prompt in found) < 20, "no part is read further than it can be needed"


def test_content_follows_parts_and_weights(tmp_path: Path) -> None:
    cfg = mixture(tmp_path, {"a": 20, "b": 20})
    before = content(cfg)
    assert content(mixture(tmp_path, {"a": 20, "b": 20}, "weights=[1,2]")) != before
    assert content(mixture(tmp_path, {"a": 21, "b": 20})) != before


def test_an_error_names_the_part(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", rows("good", 10))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "x"}\n')
    with pytest.raises(DataError, match=r"part \S*bad\.jsonl of the mixture: .*bad\.jsonl, line 1: no column prompt"):
        mixed(dataset("mixture", f"parts=[{good},{bad}]"))
    mend = r"called: columns.prompt=COLUMN columns.chosen=COLUMN columns.rejected=COLUMN in DIR/dataset/NAME.yaml with "
    mend += (
        r"defaults: \[preferences, _self_\] and path: \S*bad.jsonl, .*--config-dir DIR with NAME in dataset.parts.?$"
    )
    with pytest.raises(DataError, match=mend):
        mixed(dataset("mixture", f"parts=[{good},{bad}]"))
    write(bad, [{"prompt": "x", "chosen": "same", "rejected": "same"}])
    with pytest.raises(DataError, match=r"part \S*bad\.jsonl of the mixture: there is no usable row.*rejected 1"):
        mixed(dataset("mixture", f"parts=[{good},{bad}]"))
    write(bad, [{"prompt": "x", "responses": ["a", "b"]}])
    with pytest.raises(DataError, match=r"parts of the mixture do not go together\. .*bad\.jsonl has rankings"):
        mixed(dataset("mixture", f"parts=[{good},{bad}]"))
