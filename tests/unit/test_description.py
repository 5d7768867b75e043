"""A dataset in the tokens of a model: what `rlhf data` and the SFT stage print."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_cli.config.compose import load as load_config
from rlhf_cli.config.schema import SplitConfig
from rlhf_cli.data import load
from rlhf_cli.data.encode import fit_to_context
from rlhf_cli.data.tokenizer import bpe_tokenizer, made_tokenizer, word_tokenizer
from rlhf_cli.errors import DataError
from rlhf_cli.stages import description as stage
from rlhf_cli.stages.description import description, say_statistics


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    lines = [f'{{"prompt": "Question {i}?", "chosen": "good {i}", "rejected": "bad {i}"}}' for i in range(50)]
    lines.append('{"prompt": "' + "why " * 300 + '", "chosen": "a", "rejected": "b"}')
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return ["dataset=preferences", f"dataset.path={tmp_path}/rows.jsonl"]


def described(overrides: list[str]) -> str:
    cfg = load_config("train-sft", overrides)
    assert isinstance(cfg.dataset, SplitConfig)
    return description(cfg.dataset, cfg.model)


def test_a_dataset_is_described_with_the_tokenizer_that_is_made_from_it(overrides: list[str], tmp_path: Path) -> None:
    lines = described(overrides).splitlines()
    assert lines[:3] == ["preferences", f"from {tmp_path}/rows.jsonl", ""]
    rows = {line[11:26].strip(): int(line[:9]) for line in lines[3:9]}
    assert rows.pop("prompts") == rows["policy_pairs"]
    assert rows.pop("left out") == 1
    assert rows["heldout_pairs"] in (4, 5)
    assert sum(rows.values()) == 50, "the longest row is not counted where a run would not read it"
    assert lines[8] == "        1  left out        the prompt is longer than dataset.max_prompt_tokens"
    assert lines[10].startswith("tokens of all 51 rows ")
    assert lines[11].endswith(" 192  2.0% left out")  # 1 of 51
    assert lines[12].endswith(" 64  0.0% cut")
    assert lines[14] == "prompt:"


def test_a_dataset_is_described_with_the_model_s_own_tokenizer(overrides: list[str], tmp_path: Path) -> None:
    bpe_tokenizer([], 260).save_pretrained(tmp_path / "bytes")  # a byte is a token
    lines = described([*overrides, f"model.path={tmp_path}/bytes"]).splitlines()
    assert lines[11].split()[4] == "1200", "beginning-of-sequence and 300 words of 4 letters, without the last space"


def test_many_rows_are_sampled_and_not_fitted(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "FEW", 50)
    text = described(overrides)
    assert "prompts" in text
    assert "left out   " not in text, "nothing was counted"
    assert "2.0% left out" in text


def test_rows_of_which_none_fits_are_refused_with_what_they_need(overrides: list[str]) -> None:
    with pytest.raises(
        DataError,
        match=r"none of the \d+ demonstrations fits the context\. dataset\.max_prompt_tokens=2, and the shortest "
        r"prompt has (\d+) tokens\. set dataset\.max_prompt_tokens=\1 or more, or give shorter prompts\.$",
    ):
        described([*overrides, "dataset.max_prompt_tokens=2"])


def test_the_sft_stage_says_it_of_text_alone(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("rlhf_cli.stages.session.say", said.append)
    cfg = load_config("train-sft", overrides)
    data = load(cfg.dataset)
    tokenizer = made_tokenizer(data, 300)
    say_statistics(data, tokenizer, cfg.dataset, fit_to_context(data, tokenizer, cfg.dataset))
    assert said[0].startswith("tokens of all 51 rows")
    assert said[3].startswith("rows: SFT ")
    assert said[4:] == ["left out: prompt_too_long 1"]
    said.clear()
    world = load_config("train-sft", ["dataset.demonstrations=8", "dataset.pairs=8", "dataset.heldout_pairs=8"])
    data = load(world.dataset)
    say_statistics(data, word_tokenizer(["a"]), world.dataset, data)
    assert said == []
