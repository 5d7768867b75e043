"""Lengths of prompts and responses in tokens: exact on few rows, sampled on many, and the table that shows them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlhf_cli.config.schema import DatasetConfig
from rlhf_cli.data import statistics
from rlhf_cli.data.encode import fit_to_context
from rlhf_cli.data.rows import Demonstration, Pair, PreferenceData
from rlhf_cli.data.statistics import token_statistics
from rlhf_cli.data.tokenizer import word_tokenizer

TOKENIZER = word_tokenizer(["a b c d e f g h"])
CONFIG = DatasetConfig(source="preferences", max_prompt_tokens=4, max_completion_tokens=3)
# Prompts of 2, 3, 5 and 3 tokens, beginning-of-sequence included; responses of 2; 2, 4; 3, 2; 3, 4 with their end.
DATA = PreferenceData(
    [Demonstration("a", "b")],
    [Pair("b c", "a", "b c d")],
    [Pair("c d e f", "a b", "c")],
    ["c d e f", "a b c d e"],
    [Pair("d e", "a b", "f g h")],
    dropped={"empty_prompt": 3},
)


def test_lengths_are_those_before_anything_is_cut() -> None:
    found = token_statistics(DATA, TOKENIZER, CONFIG)
    assert (found.prompts.mean, found.prompts.median, found.prompts.longest) == (13 / 4, 3, 5)
    assert found.prompts.p95 == pytest.approx(4.7)  # 3 + 0.85 * 2, between the third and the fourth of 2, 3, 3, 5
    assert (found.prompts.limit, found.prompts.over) == (4, 1 / 4)
    assert (found.responses.mean, found.responses.median, found.responses.longest) == (20 / 7, 3, 4)
    assert (found.responses.limit, found.responses.over) == (3, 2 / 7)
    assert found.sample == 4


def test_rows_and_counts_are_of_what_is_left() -> None:
    data = replace(DATA, policy_pairs=[*DATA.policy_pairs, Pair("a", "b", "c")], prompts=["a", *DATA.prompts])
    found = token_statistics(data, TOKENIZER, CONFIG, fit_to_context(data, TOKENIZER, CONFIG))
    assert found.rows == {
        "demonstrations": 1, "reward_pairs": 1, "policy_pairs": 1, "prompts": 1, "heldout_pairs": 1,
    }  # fmt: skip
    assert found.dropped == {"empty_prompt": 3, "prompt_too_long": 1, "response_truncated": 2}
    assert found.lines() == [
        "tokens of all 5 rows               mean  median   95 %  longest  limit",
        "prompts                               3       3      5        5      4  20.0% left out",
        "responses                             3       2      4        4      3  22.2% cut",
        "rows: SFT 1, reward model 1, alignment 1, alignment prompts 1, held out 1",
        "left out: empty_prompt 3, prompt_too_long 1, responses cut 2",
    ]


def test_many_rows_are_sampled_evenly_from_all_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "SAMPLE", 300)
    short = [Pair("a", "b", "c")] * 2_000
    long = [Pair("a b c d", "b", "c")] * 1_000
    data = PreferenceData([Demonstration("a b c d", "b")] * 1_000, short, long, [], long)
    first, again = (token_statistics(data, TOKENIZER, CONFIG) for _ in range(2))
    assert first == again
    assert first.sample == 300
    # 3 of 5 rows have 5 tokens, the others 2; of 300, a standard deviation of 0.03 in their share
    assert first.prompts.over == pytest.approx(3 / 5, abs=0.1)
    assert first.prompts.mean == pytest.approx(2 + 3 * first.prompts.over)
    assert "a sample of 300 rows" in first.lines()[0]


def test_the_sample_is_drawn_by_place_not_by_split() -> None:
    data = replace(DATA, reward_pairs=[], policy_pairs=[])
    found = token_statistics(data, TOKENIZER, CONFIG)
    assert found.sample == 2
    np.testing.assert_allclose([found.prompts.mean, found.responses.mean], [2.5, 3.0])
