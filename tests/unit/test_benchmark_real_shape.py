"""The benchmark of a real model's shape: its model and rows, and how it attributes memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import real_shape
import resident
from transformers import AutoConfig, AutoTokenizer

from rlhf_cli.data.dialogue import messages

TEXTS = [
    "\n\nHuman: where is the cat\n\nAssistant: the cat sat on the mat",
    "\n\nHuman: what is it\n\nAssistant: a dog",
]
SIZES = {"vocab_size": 300, "hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 8, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_shape.build(tmp_path_factory.mktemp("shape"), TEXTS, **SIZES, num_attention_heads=2)


def test_the_model_is_opts_but_for_its_weights(model: Path) -> None:
    config = AutoConfig.from_pretrained(model)
    assert (config.model_type, config.vocab_size, config.max_position_embeddings) == ("opt", 300, 2048)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer("the cat").input_ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.pad_token_id == 1
    assert tokenizer.decode(tokenizer("the cat sat").input_ids, skip_special_tokens=True) == "the cat sat"


def test_rows_fill_their_limits_and_are_not_too_long(model: Path, tmp_path: Path) -> None:
    file = real_shape.filled(tmp_path / "rows.jsonl", TEXTS * 200, model, rows=5, prompt=60, response=20)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert len(rows) == 5
    for row in rows:
        prompt, _, response = row["chosen"].rpartition("\n\nAssistant:")
        assert row["rejected"].startswith(prompt)
        assert len(messages(f"{prompt}\n\nAssistant:")) == 1
        assert (
            0.7 * 60 < len(tokenizer(f"{prompt}\n\nAssistant:").input_ids) < 1.6 * 60
        )  # markers are long in so few words
        assert len(tokenizer(response).input_ids) > 20


def test_what_a_part_takes_does_not_count_for_the_part_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = resident.Parts()
    kept = []

    def inner() -> None:
        kept.append(np.ones(40_000_000))  # 320 MB, all written

    def outer() -> None:
        np.ones(10_000_000)
        parts.watched("inner", inner)()
        kept.clear()

    parts.watched("outer", outer)()
    outer_peak, inner_peak = parts.found["outer"]["peak"], parts.found["inner"]["peak"]
    assert 0.9 * 320e6 < inner_peak - resident.resident() < 1.3 * 320e6
    assert outer_peak < inner_peak + 1e6
    assert set(parts.found["inner"]) == {"seconds", "processor", "peak"}


def test_the_difference_is_beside_what_the_process_held_before() -> None:
    found = real_shape.Measured(60.0, 110.0, 0.5e9, {"align": {"seconds": 50.0, "peak": 4.5e9}}, {"online": 5e9})
    row = real_shape.compared_row("align", ["algo=pm", "peft=lora"], "online", found)
    assert row == "| `rlhf align algo=pm peft=lora` | 5.00 | 4.00 | +25% |"


def test_the_table_of_a_whole_command() -> None:
    parts = {
        "sft": {"seconds": 10.4, "processor": 19.0, "peak": 3e9},
        "align": {"seconds": 50.0, "processor": 90.0, "peak": 4.5e9},
    }
    rows = real_shape.run_rows(real_shape.Measured(70.0, 125.0, 0.5e9, parts, {}))
    assert rows[2:] == [
        "| before weights are read | | | 0.50 |",
        "| SFT | 10 | 19 | 3.00 |",
        "| preference matching | 50 | 90 | 4.50 |",
        "| **whole command** | **70** | **125** | **4.50** |",
    ]
