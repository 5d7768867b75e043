"""Every model of conf/model composes: dataset, trainer and lengths that fit it, no weights needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config import compose
from rlhf_cli.config.catalog import conf_dir
from rlhf_cli.errors import ConfigError
from rlhf_cli.hub import is_id

# model: dataset, longest prompt (and response) in tokens, whether activations are computed twice to fit a GPU
MODELS = {
    "opt-125m": ("hh_rlhf", 256, False),
    "opt-350m": ("hh_rlhf", 256, False),
    "opt-1.3b": ("hh_rlhf", 256, False),
    "opt-6.7b": ("hh_rlhf", 256, True),
    "llama-2-7b": ("hh_rlhf", 256, True),
    "llama-3.2-1b": ("tldr", 256, False),
    "llama-3.2-3b": ("tldr", 256, True),
    "llama-3.1-8b": ("hh_rlhf", 256, True),
    "llama-3.1-8b-instruct": ("ultrafeedback", 512, True),
    "qwen2.5-0.5b": ("hh_rlhf", 256, False),
    "qwen2.5-1.5b": ("hh_rlhf", 256, False),
    "qwen2.5-7b": ("hh_rlhf", 256, True),
    "qwen2.5-7b-instruct": ("ultrafeedback", 512, True),
    "pythia-160m": ("hh_rlhf", 256, False),
    "pythia-1b": ("tldr", 256, False),
    "pythia-2.8b": ("tldr", 256, True),
    "mistral-7b-sft": ("ultrafeedback", 512, True),
    "zephyr-7b-sft": ("ultrafeedback", 512, True),
    "gemma-7b-sft": ("dpo_mix", 512, True),
}


def test_the_table_names_every_model() -> None:
    assert {path.stem for path in (conf_dir() / "model").glob("*.yaml")} == {*MODELS, "tiny", "pretrained"}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_brings_what_fits_it(name: str) -> None:
    cfg: Any = compose.load("align", [f"model={name}"])
    dataset, tokens, checkpointing = MODELS[name]
    assert cfg.model.name == name
    assert is_id(cfg.model.path)
    assert (cfg.dataset.name, cfg.trainer.name) == (dataset, "pretrained")
    assert (cfg.dataset.max_prompt_tokens, cfg.dataset.max_completion_tokens) == (tokens, tokens)
    assert cfg.model.gradient_checkpointing is checkpointing
    assert cfg.trainer.online.learning_rate == 1e-6


def test_tiny_is_made_here_and_needs_nothing() -> None:
    cfg: Any = compose.load("align", [])
    assert (cfg.model.name, cfg.model.path, cfg.dataset.name) == ("tiny", None, "survey")


@pytest.mark.parametrize("command", ["train-sft", "train-rm"])
def test_the_stages_before_alignment_take_the_same_model(command: str) -> None:
    cfg: Any = compose.load(command, ["model=llama-3.2-3b"])
    assert (cfg.model.path, cfg.dataset.name) == ("meta-llama/Llama-3.2-3B", "tldr")


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("opt1.3b", "opt-1.3b"),
        ("llama2-7b", "llama-2-7b"),
        ("llama-3-8b", "llama-3.1-8b"),
        ("qwen-0.5b", "qwen2.5-0.5b"),
        ("zephyr", "zephyr-7b-sft"),
        ("mistral", "mistral-7b-sft"),
    ],
)
def test_a_name_that_is_nearly_right_finds_its_model(given: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model={given} does not exist. The nearest choice is {nearest}\. Choose"):
        compose.load("align", [f"model={given}"])


def test_a_folder_of_the_hub_s_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facebook").mkdir()
    assert not is_id("facebook/opt-1.3b")
