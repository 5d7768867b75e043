"""Miniatures of model families: laid out as published, told apart by their special tokens, and their checks notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from miniatures import FAMILIES, miniature_pairs, save_miniature
from model_readings import padding_gap, policy_reader
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

# bos, eos, pad as published; whether a template is there; what a text begins with
PUBLISHED: dict[str, tuple[str | None, str, str | None, bool, list[str]]] = {
    "opt": ("</s>", "</s>", "<pad>", False, ["</s>", "Hello"]),
    "opt-350m": ("</s>", "</s>", "<pad>", False, ["</s>", "Hello"]),
    "llama-2": ("<s>", "</s>", None, False, ["<s>", "▁Hello"]),
    "llama-3.2": ("<|begin_of_text|>", "<|end_of_text|>", None, False, ["<|begin_of_text|>", "Hello"]),
    "llama-3.1-instruct": ("<|begin_of_text|>", "<|eot_id|>", None, True, ["<|begin_of_text|>", "Hello"]),
    "qwen2.5": (None, "<|endoftext|>", "<|endoftext|>", True, ["Hello"]),
    "qwen2.5-instruct": (None, "<|im_end|>", "<|endoftext|>", True, ["Hello"]),
    "pythia": ("<|endoftext|>", "<|endoftext|>", "<|padding|>", False, ["Hello"]),
    "mistral-sft": ("<s>", "</s>", "</s>", True, ["<s>", "▁Hello"]),
    "gemma": ("<bos>", "<eos>", "<pad>", True, ["<bos>", "Hello"]),
    "gemma-sft": ("<bos>", "<eos>", "<pad>", True, ["<bos>", "Hello"]),
}
TEXTS = ["Hello, Zürich!", "\n\nHuman: Tea?\n\nAssistant:  two  spaces 日本"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_miniature_opens_as_its_family_does(name: str, tmp_path: Path) -> None:
    bos, eos, pad, template, first = PUBLISHED[name]
    folder = save_miniature(name, tmp_path / name)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (bos, eos, pad)
    assert bool(tokenizer.chat_template) is template
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Hello")["input_ids"])
    begin = [bos] if bos is not None and first[0] == bos else []
    assert tokens[: len(begin)] == begin
    assert "".join(tokens[len(begin) :]) == first[-1]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    assert type(model).__name__ == FAMILIES[name].architecture
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) + FAMILIES[name].spare
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied is (name in ("opt", "opt-350m", "llama-3.2", "qwen2.5", "gemma", "gemma-sft"))
    assert json.loads((folder / "config.json").read_text())["dtype"] in ("float16", "bfloat16")
    assert model.config.max_position_embeddings >= 128


def test_the_seed_decides_the_weights_and_the_global_random_state_is_kept(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    folders = [save_miniature("pythia", tmp_path / str(n), seed=seed) for n, seed in enumerate((0, 0, 1))]
    same, again, other = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert same == again
    assert same != other
    assert torch.equal(torch.get_rng_state(), state)


def test_opt_350m_is_post_norm_with_a_narrower_embedding_in_one_pickle(tmp_path: Path) -> None:
    folder = save_miniature("opt-350m", tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert model.model.decoder.project_in is not None
    assert not model.config.do_layer_norm_before
    assert {path.name for path in folder.glob("*.bin")} == {"pytorch_model.bin"}
    assert not list(folder.glob("*.safetensors"))
    assert not (folder / "tokenizer.json").exists()


def test_pairs_have_prompts_of_their_own(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in miniature_pairs(tmp_path / "pairs.jsonl", 30).read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == 30
    assert all(row["chosen"] != row["rejected"] for row in rows)


def test_the_padding_check_notices_a_model_that_counts_padding_as_positions(tmp_path: Path) -> None:
    sizes = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.3}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, **sizes)).eval()
    prompts, responses = [[4, 5, 6], [7], [8, 9]], [[5, 2], [6, 7, 8, 2], [3, 2]]
    assert padding_gap(policy_reader(model), prompts, responses, 1) < 1e-5
    forward = model.forward
    model.forward = lambda position_ids=None, **inputs: forward(**inputs)  # type: ignore[method-assign]
    assert padding_gap(policy_reader(model), prompts, responses, 1) > 1e-3
