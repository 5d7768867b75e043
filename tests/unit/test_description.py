"""A dataset in the tokens of a model: the lines that `rlhf data` and the SFT stage print."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_cli.config.compose import load as load_config
from rlhf_cli.data import load
from rlhf_cli.data.encode import fit_to_context
from rlhf_cli.data.tokenizer import bpe_tokenizer, made_tokenizer, word_tokenizer
from rlhf_cli.stages.description import describe, say_statistics


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    lines = [f'{{"prompt": "Question {i}?", "chosen": "good {i}", "rejected": "bad {i}"}}' for i in range(50)]
    lines.append('{"prompt": "' + "why " * 300 + '", "chosen": "a", "rejected": "b"}')
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return ["dataset=preferences", f"dataset.path={tmp_path}/rows.jsonl"]


def test_a_dataset_is_described_with_the_tokenizer_that_is_made_from_it(overrides: list[str]) -> None:
    cfg = load_config("train-sft", overrides)
    lines = describe(cfg.dataset, cfg.model)
    assert lines[0].startswith("tokens of all 51 rows")
    assert lines[1].endswith(f"{cfg.dataset.max_prompt_tokens}  2.0% left out")  # 1 of 51
    assert "prompt_too_long 1" in lines[-1]
    assert len(lines) == 5


def test_a_dataset_is_described_with_the_model_s_own_tokenizer(overrides: list[str], tmp_path: Path) -> None:
    bpe_tokenizer([], 260).save_pretrained(tmp_path / "bytes")  # a byte is a token
    cfg = load_config("train-sft", [*overrides, f"model.path={tmp_path}/bytes"])
    lines = describe(cfg.dataset, cfg.model)
    assert lines[1].split()[4] == "1200", "beginning-of-sequence and 300 words of 4 letters, without the last space"


def test_the_sft_stage_says_it_of_text_alone(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cfg = load_config("train-sft", overrides)
    data = load(cfg.dataset)
    tokenizer = made_tokenizer(data, 300)
    say_statistics(data, tokenizer, cfg.dataset, fit_to_context(data, tokenizer, cfg.dataset))
    assert capsys.readouterr().out.startswith("tokens of all 51 rows")
    world = load_config("train-sft", ["dataset.demonstrations=8", "dataset.pairs=8", "dataset.heldout_pairs=8"])
    data = load(world.dataset)
    say_statistics(data, word_tokenizer(["a"]), world.dataset, data)
    assert capsys.readouterr().out == ""
