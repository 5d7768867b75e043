"""An exported adapter is whole weights that plain transformers reads as the run does, in each kind of architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from miniatures import save_miniature
from tiny_roles import LORA, disturb
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_cli.data.encode import encode_prompt
from rlhf_cli.models.adapters import save_model, with_adapter
from rlhf_cli.models.classifier import load_reward_model, new_reward_model
from rlhf_cli.models.policy import load_policy, load_tokenizer
from rlhf_cli.stages.export import save_tokenizer, whole_model

# Embeddings of another width than the model; scaled and tied ones; tied ones with shared keys; a chat template.
FAMILIES = ("opt-350m", "gemma", "llama-3.2", "qwen2.5-instruct")
PROMPT = "How do I make tea?"


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_miniature(request.param, tmp_path_factory.mktemp("base") / request.param)


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits.float()


@pytest.mark.parametrize("reward", [False, True])
def test_a_merged_adapter_says_the_same(base: Path, tmp_path: Path, reward: bool) -> None:
    torch.manual_seed(0)
    fresh = new_reward_model(base, init_std=0.5) if reward else load_policy(base)
    adapted = with_adapter(fresh, LORA, base=base)
    disturb(adapted, seed=1, std=0.05)
    save_model(adapted, tmp_path / "adapter")
    ids = encode_prompt(load_tokenizer(base, training=False), PROMPT)
    load, plain = (
        (load_reward_model, AutoModelForSequenceClassification) if reward else (load_policy, AutoModelForCausalLM)
    )
    ours = logits(load(tmp_path / "adapter"), ids)
    exact = whole_model(tmp_path / "adapter", "float32", reward=reward)
    exact.save_pretrained(tmp_path / "exact")
    torch.testing.assert_close(logits(plain.from_pretrained(tmp_path / "exact"), ids), ours, atol=1e-5, rtol=0)
    assert (
        logits(new_reward_model(base, init_std=0.5) if reward else load_policy(base), ids) - ours
    ).abs().max() > 0.01
    rounded = whole_model(tmp_path / "adapter", "as_is", reward=reward)
    assert rounded.dtype is AutoModelForCausalLM.from_pretrained(base, dtype="auto").dtype
    assert rounded.config.tie_word_embeddings == exact.config.tie_word_embeddings


def test_the_tokenizer_gives_the_ids_of_training(base: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(base)
    ids = encode_prompt(tokenizer, PROMPT)
    save_tokenizer(tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    if tokenizer.chat_template is None:
        assert theirs(PROMPT)["input_ids"] == ids
    else:
        asked = [{"role": "user", "content": PROMPT}]
        assert theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False) == ids
    assert theirs.eos_token_id == tokenizer.eos_token_id
    assert theirs.pad_token_id == tokenizer.pad_token_id != theirs.eos_token_id
