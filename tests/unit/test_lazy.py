"""Rows on disk: the splits they fall into, the sequences they are, their token ids, beside those of rows in memory."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from rlhf_cli.config.schema import SplitConfig
from rlhf_cli.data import stream_tokens
from rlhf_cli.data.encode import (
    encode_demonstrations,
    encode_pairs,
    encode_prompts,
    encode_rankings,
    fit_to_context,
    trainer_rows,
)
from rlhf_cli.data.lazy import BATCH, LazyRows, RowWriter
from rlhf_cli.data.rows import Demonstration, Pair, PreferenceData, Ranking
from rlhf_cli.data.stream import load_streamed, split_of
from rlhf_cli.data.tokenizer import word_tokenizer
from rlhf_cli.errors import DataError, RunError

WORDS = [f"w{number}" for number in range(40)]
TOKENIZER = word_tokenizer([" ".join(WORDS)])
FIELDS = ("demonstrations", "reward_pairs", "policy_pairs", "prompts", "heldout_pairs", "reward_rankings")


def config(**changes: Any) -> SplitConfig:
    cfg = SplitConfig(
        source="preferences", max_prompt_tokens=8, max_completion_tokens=4, split_seed=0, sft_fraction=0.2,
        rm_fraction=0.4, heldout_fraction=0.1, max_rows=None, streaming=True, eval_prompts=4, eval_samples=2,
        pool_samples=2,
    )  # fmt: skip
    return replace(cfg, **changes)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the datasets library, and so the rows, are kept."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def words(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def pair_rows(count: int) -> list[Pair]:
    """Return pairs with repeated prompts, long prompts, long responses that begin alike, and undecided ones."""
    rng = random.Random(1)
    prompts = [words(rng, 1, 9) for _ in range(count // 2)]
    rows = []
    for number in range(count):
        start = words(rng, 4, 4) if number % 7 == 0 else ""
        chosen, rejected = (f"{start} {words(rng, 1, 5)}".strip() for _ in range(2))
        label = 0.5 if number % 10 == 0 else 0.9
        rows.append(Pair(rng.choice(prompts), chosen, f"{rejected} w1 w1", label, 0.25 * (number % 3)))
    return rows


def ranking_rows(count: int) -> list[Ranking]:
    rng = random.Random(2)
    rows = []
    for _ in range(count):
        start = words(rng, 4, 4)
        responses = [f"{start} w{i}" if rng.random() < 0.5 else f"w{i} {words(rng, 1, 4)}" for i in range(5)]
        rows.append(Ranking(words(rng, 1, 9), tuple(responses[: rng.randint(2, 5)])))
    return rows


def streamed(rows: Sequence[Any], cfg: SplitConfig | None = None, name: str = "rows") -> PreferenceData:
    return load_streamed(lambda *_: iter(rows), cfg or config(), {"name": name})


def in_memory(data: PreferenceData) -> PreferenceData:
    return replace(data, **{name: list(getattr(data, name)) for name in FIELDS})


# -- the split ---------------------------------------------------------------------------------------------------------


def test_every_row_is_in_exactly_one_split_and_none_is_lost() -> None:
    rows = pair_rows(2 * BATCH + 345)
    data = streamed(rows)
    directed = [row for row in rows if row.label > 0.5]
    splits = {"sft": data.demonstrations, "rm": data.reward_pairs, "align": data.policy_pairs}
    splits |= {"heldout": data.heldout_pairs}
    for name, found in splits.items():
        expected: list[Any] = [
            row for row in (rows if name == "rm" else directed) if split_of(row.prompt, config()) == name
        ]
        if name == "sft":
            expected = [Demonstration(row.prompt, row.chosen) for row in expected]
        assert list(found) == expected, "in the order of the file"
    undecided = sum(row.label <= 0.5 and split_of(row.prompt, config()) != "rm" for row in rows)
    assert undecided > 50
    assert data.dropped == {"no_direction": undecided}
    assert sum(map(len, splits.values())) + undecided == len(rows)
    prompts = [{row.prompt for row in rows} for rows in splits.values()]
    assert sum(map(len, prompts)) == len(set().union(*prompts)), "no prompt is in two"
    aligned = [row.prompt for row in rows if split_of(row.prompt, config()) == "align"]
    assert list(data.prompts) == list(dict.fromkeys(aligned)), "each prompt once"


def test_fractions_hold_and_another_seed_splits_otherwise() -> None:
    prompts = [f"question {number}" for number in range(20_000)]
    shares = Counter(split_of(prompt, config()) for prompt in prompts)
    # of 20,000: a standard deviation of 0.0035 at most
    expected = {"heldout": 0.1, "sft": 0.9 * 0.2, "rm": 0.9 * 0.4, "align": 0.9 * 0.4}
    assert {name: count / 20_000 for name, count in shares.items()} == pytest.approx(expected, abs=0.015)
    same = sum(split_of(prompt, config()) == split_of(prompt, config(split_seed=1)) for prompt in prompts) / 20_000
    assert same == pytest.approx(sum(share**2 for share in expected.values()), abs=0.02), "as if drawn anew"


def test_rankings_are_written_whole_and_as_the_pairs_they_imply() -> None:
    rows = ranking_rows(300)
    data = streamed(rows)
    of = {name: [row for row in rows if split_of(row.prompt, config()) == name] for name in ("rm", "sft", "align")}
    assert list(data.reward_rankings) == of["rm"]
    assert list(data.reward_pairs) == [pair for row in of["rm"] for pair in row.pairs()]
    assert list(data.policy_pairs) == [pair for row in of["align"] for pair in row.pairs()]
    assert list(data.demonstrations) == [Demonstration(row.prompt, row.responses[0]) for row in of["sft"]]


def test_rows_are_written_once_for_the_same_data_and_split() -> None:
    rows, read = pair_rows(200), []

    def source(dropped: Counter[str], parts: dict[str, int]) -> Iterator[Pair]:
        read.append(1)
        dropped["empty_prompt"] += 3
        parts["shp"] = 200
        yield from rows

    first = load_streamed(source, config(), {"content": "a"})
    again = load_streamed(source, config(eval_prompts=9), {"content": "a"})
    assert len(read) == 1
    assert list(again.reward_pairs) == list(first.reward_pairs)
    assert again.dropped == first.dropped
    assert again.dropped["empty_prompt"] == 3
    assert again.parts == {"shp": 200}
    for cfg, content in ((config(), "b"), (config(split_seed=1), "a"), (config(sft_fraction=0.3), "a")):
        load_streamed(source, cfg, {"content": content})
    assert len(read) == 4


def test_a_reader_that_fails_leaves_nothing_that_is_taken_for_whole() -> None:
    def broken(*_: Any) -> Iterator[Pair]:
        yield from pair_rows(100)
        raise DataError("rows.jsonl, line 101: not JSON", "", "")

    with pytest.raises(DataError, match="line 101: not JSON"):
        load_streamed(broken, config(), {"name": "rows"})
    data = streamed(pair_rows(300))
    assert len(data.reward_pairs) == sum(split_of(row.prompt, config()) == "rm" for row in pair_rows(300))


def test_data_that_leave_a_split_empty_are_refused() -> None:
    with pytest.raises(DataError, match="split has no row: 2 rows are usable.*set dataset.streaming=false"):
        streamed([Pair("a", "b", "c"), Pair("a", "b", "d")])
    with pytest.raises(DataError, match="every row for demonstrations has label 0.5"):
        streamed([replace(row, label=0.5) for row in pair_rows(100)])


def test_a_cache_that_cannot_be_written_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RowWriter, "flush", full)
        with pytest.raises(RunError, match="rows cannot be written to .*cache.*No space left.*set HF_DATASETS_CACHE"):
            streamed(pair_rows(100))
    shutil.rmtree(cache)
    cache.write_text("a file")
    with pytest.raises(RunError, match="HF_DATASETS_CACHE=.* cannot be a folder"):
        streamed(pair_rows(100))


# -- the sequence ------------------------------------------------------------------------------------------------------


def test_lazy_rows_are_a_sequence() -> None:
    rows: Any = streamed(pair_rows(3 * BATCH)).reward_pairs
    listed = list(rows)
    assert isinstance(rows, LazyRows)
    assert len(listed) == len(rows) > BATCH
    assert (rows[0], rows[-1], rows[7]) == (listed[0], listed[-1], listed[7])
    for part in (slice(3), slice(5, 400), slice(None, None, 7), slice(-4, None), slice(3, 3)):
        assert list(rows[part]) == listed[part]
        assert isinstance(rows[part], LazyRows)
    assert list(rows[10:500][5:9]) == listed[15:19]
    assert list(rows.take(np.array([9, 2, 2]))) == [listed[9], listed[2], listed[2]]
    assert [len(batch) for batch in rows[:250].batches(100)] == [100, 100, 50]
    with pytest.raises(IndexError, match="out of range|out of bounds"):
        rows[len(rows)]


def test_a_part_is_not_taken_for_the_whole() -> None:
    rows: Any = streamed(pair_rows(200)).reward_pairs
    sources = {rows.source, rows[:5].source, rows[1:6].source, rows.take([0, 2]).source, rows.take([0, 3]).source}
    assert len(sources) == 5
    assert rows[:5].source == rows[:5].source


# -- token ids ---------------------------------------------------------------------------------------------------------


def assert_same(lazy: PreferenceData, plain: PreferenceData, cfg: SplitConfig) -> None:
    """Assert that both hold the same rows, token ids and counts."""
    assert lazy.dropped == plain.dropped
    for name in FIELDS:
        assert list(getattr(lazy, name)) == getattr(plain, name), name
    encode: Iterable[tuple[Any, str]] = (
        (encode_demonstrations, "demonstrations"), (encode_pairs, "reward_pairs"), (encode_pairs, "policy_pairs"),
        (encode_pairs, "heldout_pairs"), (encode_prompts, "prompts"), (encode_rankings, "reward_rankings"),
    )  # fmt: skip
    for function, name in encode:
        found = function(getattr(lazy, name), TOKENIZER, cfg)
        assert list(found) == function(getattr(plain, name), TOKENIZER, cfg), name
        if len(found):
            assert isinstance(trainer_rows(found), datasets.Dataset)


def test_pairs_on_disk_are_fitted_and_encoded_as_in_memory() -> None:
    cfg = config()
    data = streamed(pair_rows(2 * BATCH + 50))
    lazy, plain = fit_to_context(data, TOKENIZER, cfg), fit_to_context(in_memory(data), TOKENIZER, cfg)
    assert min(plain.dropped[key] for key in ("prompt_too_long", "response_truncated", "equal_after_truncation")) > 20
    assert_same(lazy, plain, cfg)


def test_rankings_on_disk_are_fitted_and_encoded_as_in_memory() -> None:
    cfg = config()
    data = streamed(ranking_rows(BATCH + 200))
    lazy, plain = fit_to_context(data, TOKENIZER, cfg), fit_to_context(in_memory(data), TOKENIZER, cfg)
    assert min(plain.dropped[key] for key in ("prompt_too_long", "response_truncated", "equal_after_truncation")) > 20
    assert len(plain.reward_rankings) < len(data.reward_rankings)
    assert_same(lazy, plain, cfg)


def test_token_ids_are_made_once_for_a_tokenizer_and_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, made = config(), []
    make = stream_tokens.response_ids
    monkeypatch.setattr(stream_tokens, "response_ids", lambda *args: made.append(1) or make(*args))
    data = streamed(pair_rows(300))
    first = fit_to_context(data, TOKENIZER, cfg)
    count = len(made)
    assert count > 0
    again = fit_to_context(streamed(pair_rows(300)), TOKENIZER, cfg)
    assert len(made) == count
    assert again.dropped == first.dropped
    fit_to_context(data, TOKENIZER, config(max_completion_tokens=3))
    assert len(made) == 2 * count
    fit_to_context(data, word_tokenizer([" ".join(WORDS[:39])]), cfg)
    assert len(made) == 3 * count


def test_a_part_of_the_rows_brings_its_own_token_ids() -> None:
    cfg = config()
    data = fit_to_context(streamed(pair_rows(300)), TOKENIZER, cfg)
    whole = list(encode_pairs(data.reward_pairs, TOKENIZER, cfg))
    assert list(encode_pairs(data.reward_pairs[10:20], TOKENIZER, cfg)) == whole[10:20]


def test_lazy_rows_are_encoded_anew_for_another_tokenizer() -> None:
    cfg, other = config(), word_tokenizer(["extra", " ".join(reversed(WORDS))])
    other.add_tokens(["extra2"])
    rows = fit_to_context(streamed(pair_rows(300)), TOKENIZER, cfg).reward_pairs[:10]
    assert encode_pairs(rows, other, cfg) == encode_pairs(list(rows), other, cfg)
    assert list(encode_pairs(rows, other, cfg)) != list(encode_pairs(rows, TOKENIZER, cfg))


def test_lazy_rows_of_which_none_fits_are_refused() -> None:
    with pytest.raises(DataError, match=r"none of the \d+ demonstrations fits the context"):
        fit_to_context(streamed(pair_rows(100)), TOKENIZER, config(max_prompt_tokens=1))
