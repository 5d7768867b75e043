"""The checks of model families notice what they are there for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from miniatures import save_miniature
from model_checks import check_numbers
from model_readings import agrees, greedy, probe
from model_weights import Outcome, adapters_moved, everything_moved, linear_layers_moved, weights_held
from models import Cell, Row, page

from rlhf_cli.config.schema import LoraConfig
from rlhf_cli.models.adapters import merged, with_adapter
from rlhf_cli.models.policy import load_policy, load_tokenizer

LORA = LoraConfig(name="lora", rank=2, alpha=4, targets=["all-linear"], learning_rate_factor=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_miniature("llama-3.2", tmp_path_factory.mktemp("family"))


@pytest.fixture
def found(tmp_path: Path) -> Outcome:
    return Outcome(tmp_path, [], 0.0)


@pytest.fixture
def adapted(folder: Path) -> Any:
    """A policy whose adapter has moved off 0."""
    model = with_adapter(load_policy(folder), LORA, base=folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight += 0.01
    return model


def test_a_tensor_that_was_not_trained_is_named(folder: Path, found: Outcome) -> None:
    before, model = load_policy(folder).state_dict(), load_policy(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name != "model.norm.weight":
                weight += 0.5
    everything_moved(found, before, model.state_dict())
    assert found.failures == ["not trained: ['model.norm.weight']"]
    assert found.measured["moved"] == pytest.approx(0.5)


def test_an_adapter_that_moved_on_a_base_that_did_not_is_fine(folder: Path, found: Outcome, adapted: Any) -> None:
    before = load_policy(folder).state_dict()
    adapters_moved(found, before, adapted)
    linear_layers_moved(found, before, merged(adapted))
    assert found.failures == []


def test_an_adapter_at_zero_and_a_base_that_changed_are_named(folder: Path, found: Outcome, adapted: Any) -> None:
    weights = dict(adapted.named_parameters())
    still = next(name for name in weights if "lora_B" in name)
    strayed = next(name for name in weights if name.endswith("input_layernorm.weight"))
    with torch.no_grad():
        weights[still].zero_()
        weights[strayed][0] += 1e-3
    adapters_moved(found, load_policy(folder).state_dict(), adapted)
    assert found.failures == [f"not trained: ['{still}']", f"the base changed: ['{strayed}']"]


def test_a_norm_that_changed_in_a_merged_model_is_named(folder: Path, found: Outcome, adapted: Any) -> None:
    model = merged(adapted)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    linear_layers_moved(found, load_policy(folder).state_dict(), model)
    assert found.failures == ["changed beside the adapters: ['model.norm.weight']"]


def test_a_token_that_is_not_the_most_likely_one_disagrees(folder: Path) -> None:
    model, tokenizer = load_policy(folder).eval(), load_tokenizer(folder)
    prompts, _ = probe(tokenizer)
    assert greedy(model, tokenizer, prompts)
    assert not agrees(model, prompts, [[5, 6], [7], [8]], tokenizer)


def test_weights_in_memory_are_counted_once(folder: Path, adapted: Any) -> None:
    one, other = load_policy(folder), load_policy(folder)
    numbers = sum(weight.numel() for weight in one.parameters())
    assert weights_held((one, one, adapted.get_base_model())) == 2 * numbers
    assert weights_held((one, other)) == 2 * numbers


def test_numbers_that_are_not_finite_or_not_known_are_named(found: Outcome) -> None:
    (found.folder / "metrics.json").write_text(json.dumps({"pm/tv": 0.1, "reward/mean": None, "surprise": 1.0}))
    (found.folder / "training_log.jsonl").write_text(json.dumps({"kl/sequence": 0.2}) + "\n")
    check_numbers(found)
    assert found.failures == [
        "unknown metrics ['surprise']",
        "not finite: ['reward/mean']",
        "KL at the start is 0.2, more than 0.0001",
    ]


def test_the_page_names_what_failed() -> None:
    row = Row("opt", {"laid out as": "`facebook/opt-1.3b`"})
    row.cells = {mode: {"SFT": Cell(1.0, {"moved": 0.002, "padding": 1e-7})} for mode in ("full", "lora", "shared")}
    assert "| opt | 2e-03 / 1e-07 / – / 1.0 s |" in page([row], 60.0)
    assert "All passed." in page([row], 60.0)
    row.cells["lora"]["SFT"].failures.append("padding is 1, more than 0.0001")
    assert "| opt | **failed** |" in page([row], 60.0)
    assert "- opt, lora, SFT: padding is 1, more than 0.0001" in page([row], 60.0)
