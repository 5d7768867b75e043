"""Miniatures of the model families of conf/model: the real architecture, a tokenizer of its kind, random weights.

A folder is laid out as the family's repository on the Hub: weights in the published number format, a config with the
published special ids, a generation config with the published sampling settings, and the tokenizer's files. Sizes are
small: hidden 32, 2 layers, 512 positions, 400 to 600 tokens. Nothing is downloaded.

    from miniatures import FAMILIES, miniature_pairs, save_miniature
    folder = save_miniature("llama-2", tmp_path / "llama-2")
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import miniature_text as text
import miniature_tokenizers as tokens
import torch
import transformers
from transformers import GenerationConfig

POSITIONS = 512
# Attention shares keys and values between heads where the family does (GQA).
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "max_position_embeddings": POSITIONS, "rms_norm_eps": 1e-5}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
OPT = {"num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": POSITIONS}
WARM = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}  # what the Llamas' generation configs say


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Args:
        like: the repository on the Hub that a miniature is laid out as.
        architecture: class in transformers.
        config: what its config says, beside the vocabulary and the special tokens.
        write_tokenizer: writes the tokenizer's files into a folder and returns the number of tokens.
        specials: {"bos", "eos", "pad"} -> token or tokens, as config.json and generation_config.json have them.
        dtype: number format of the published weights.
        spare: rows of the embedding beyond the tokenizer's vocabulary.
        generation: what generation_config.json says beside the special tokens.
        safetensors: False: pytorch_model.bin, the only weights of some older repositories.
    """

    like: str
    architecture: str
    config: dict[str, Any]
    write_tokenizer: Callable[[Path], dict[str, int]]
    specials: dict[str, str | list[str]]
    dtype: torch.dtype = torch.bfloat16
    spare: int = 0
    generation: dict[str, Any] = field(default_factory=dict)
    safetensors: bool = True


END, TURN = "<|endoftext|>", "<|im_end|>"
OPT_IDS: dict[str, str | list[str]] = {"bos": "</s>", "eos": "</s>", "pad": "<pad>"}
SPM_IDS: dict[str, str | list[str]] = {"bos": "<s>", "eos": "</s>"}
LLAMA3_ENDS: list[str] = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
GEMMA_IDS: dict[str, str | list[str]] = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}
GQA = {"num_key_value_heads": 2}
QWEN_SAMPLING = {"do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20}

FAMILIES: dict[str, Family] = {
    "opt": Family(
        "facebook/opt-1.3b", "OPTForCausalLM",
        {**OPT, "hidden_size": 32, "word_embed_proj_dim": 32, "dropout": 0.1, "do_layer_norm_before": True},
        tokens.opt, OPT_IDS, torch.float16, spare=7,
    ),
    "opt-350m": Family(
        "facebook/opt-350m", "OPTForCausalLM",
        {**OPT, "hidden_size": 32, "word_embed_proj_dim": 16, "dropout": 0.1, "do_layer_norm_before": False},
        tokens.opt, OPT_IDS, torch.float16, spare=7, safetensors=False,
    ),
    "llama-2": Family(
        "meta-llama/Llama-2-7b-hf", "LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": False},
        tokens.llama2, SPM_IDS, torch.float16, generation=WARM,
    ),
    "llama-3.2": Family(
        "meta-llama/Llama-3.2-1B", "LlamaForCausalLM",
        {**LLAMA, **GQA, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
        tokens.llama3, {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"}, generation=WARM,
    ),
    "llama-3.1-instruct": Family(
        "meta-llama/Llama-3.1-8B-Instruct", "LlamaForCausalLM",
        {**LLAMA, **GQA, "tie_word_embeddings": False, "rope_parameters": {**LLAMA3_ROPE, "factor": 8.0}},
        tokens.llama3_instruct, {"bos": "<|begin_of_text|>", "eos": LLAMA3_ENDS}, generation=WARM,
    ),
    "qwen2.5": Family(
        "Qwen/Qwen2.5-0.5B", "Qwen2ForCausalLM", {**LLAMA, **GQA, "tie_word_embeddings": True},
        tokens.qwen, {"bos": END, "eos": END}, spare=40, generation={"do_sample": False, "max_new_tokens": 2048},
    ),
    "qwen2.5-instruct": Family(
        "Qwen/Qwen2.5-7B-Instruct", "Qwen2ForCausalLM", {**LLAMA, **GQA, "tie_word_embeddings": False},
        tokens.qwen_instruct, {"bos": END, "eos": TURN}, spare=40, generation=QWEN_SAMPLING,
    ),
    "pythia": Family(
        "EleutherAI/pythia-160m-deduped", "GPTNeoXForCausalLM",
        {**SIZES, "max_position_embeddings": POSITIONS, "use_parallel_residual": True, "tie_word_embeddings": False,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}},
        tokens.pythia, {"bos": END, "eos": END}, torch.float16, spare=27,
    ),
    "mistral-sft": Family(
        "HuggingFaceH4/mistral-7b-sft-beta", "MistralForCausalLM",
        {**LLAMA, **GQA, "tie_word_embeddings": False, "sliding_window": 4096},
        tokens.mistral_sft, SPM_IDS,
    ),
    "gemma": Family(
        "google/gemma-7b-it", "GemmaForCausalLM",
        {**LLAMA, "num_key_value_heads": 4, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh",
         "tie_word_embeddings": True},
        tokens.gemma, GEMMA_IDS,
    ),
    "gemma-sft": Family(
        "HuggingFaceH4/zephyr-7b-gemma-sft-v0.1", "GemmaForCausalLM",
        {**LLAMA, "num_key_value_heads": 4, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh",
         "tie_word_embeddings": True},
        tokens.gemma_sft, GEMMA_IDS,
    ),
}  # fmt: skip


def save_miniature(family: str, folder: Path, *, seed: int = 0) -> Path:
    """Return `folder`, filled with a miniature of a family of FAMILIES; the global random state is kept.

    Args:
        family: a key of FAMILIES.
        folder: made if it is not there.
        seed: of the weights.
    """
    kind = FAMILIES[family]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = kind.write_tokenizer(folder)
    ids = {f"{name}_token_id": _ids(token, vocabulary) for name, token in kind.specials.items()}
    model_class = getattr(transformers, kind.architecture)
    # weights five times wider than published ones, so that two layers tell tokens apart
    width = {"init_std": 0.1} if kind.architecture.startswith("OPT") else {"initializer_range": 0.1}
    config = model_class.config_class(vocab_size=len(vocabulary) + kind.spare, **kind.config, **width, **ids)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config).to(kind.dtype)
        model.config.dtype = kind.dtype
    model.generation_config = GenerationConfig(**ids, **kind.generation)
    model.save_pretrained(folder)
    if not kind.safetensors:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def _ids(token: str | list[str], vocabulary: dict[str, int]) -> int | list[int]:
    return vocabulary[token] if isinstance(token, str) else [vocabulary[one] for one in token]


def miniature_pairs(path: Path, rows: int = 64, *, seed: int = 0) -> Path:
    """Return `path`, filled with `rows` preference pairs (prompt, chosen, rejected), one a line; prompts differ."""
    rng = random.Random(seed)
    words = sorted({word.lower() for word in text.TEXT.split() if len(word) > 3 and word.isalpha()})
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            first, second, third = rng.sample(words, 3)
            row = {
                "prompt": f"What do you say about {first} and {second} {number}?",
                "chosen": f"I like {first}, and {third} too.",
                "rejected": rng.choice([f"{second}? No!", f"Ask a doctor about {second}, not me."]),
            }
            file.write(json.dumps(row) + "\n")
    return path
