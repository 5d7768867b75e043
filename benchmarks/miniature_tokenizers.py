"""Tokenizers of the kinds that published models have, trained on a few lines of text and written as on the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import miniature_text as text
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

MERGES = 180  # tokens that are learned, beside specials and bytes
QWEN_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"]
QWEN_SPECIALS += ["<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"]
QWEN_SPECIALS += ["<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_PLAIN = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"]
QWEN_PLAIN += ["<|repo_name|>", "<|file_sep|>"]  # added tokens that decoding does not skip
LLAMA3_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"]
LLAMA3_SPECIALS += ["<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>"]
LLAMA3_SPECIALS += ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
TEXTS = [*text.TEXT.splitlines(), text.QWEN_SYSTEM, text.LLAMA_SYSTEM, "user system assistant model\n"] * 4


def opt(folder: Path) -> dict[str, int]:
    """Write GPT-2's byte-level BPE as OPT has it, vocab.json and merges.txt, and return the vocabulary.

    </s> begins and ends a text (ids 2), <pad> is 1; there is no tokenizer.json, as in the published repositories.
    """
    core = _byte_level(["<s>", "<pad>", "</s>", "<unk>"], pre_tokenizers.ByteLevel(add_prefix_space=False))
    core.model.save(str(folder))
    end, pad = ({"__type": "AddedToken", **_token(name, normalized=True)} for name in ("</s>", "<pad>"))
    config = {"errors": "replace", "add_prefix_space": False, "add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"}
    named = {"unk_token": end, "bos_token": end, "eos_token": end, "pad_token": pad}
    _write(folder / "tokenizer_config.json", {**config, **named})
    _write(folder / "special_tokens_map.json", {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"})
    return core.get_vocab()


def llama2(folder: Path) -> dict[str, int]:
    """Write Llama-2's sentencepiece BPE with a space in front and no padding token, and return the vocabulary."""
    return _sentencepiece(folder, {"legacy": False, "model_max_length": 10**30, "pad_token": None})


def mistral_sft(folder: Path) -> dict[str, int]:
    """Write Mistral's sentencepiece BPE, whose SFT pads with </s> and has Zephyr's template; return the vocabulary."""
    config = {"legacy": True, "model_max_length": 2048, "pad_token": "</s>", "truncation_side": "left"}
    return _sentencepiece(folder, {**config, "chat_template": text.ZEPHYR_TEMPLATE})


def llama3(folder: Path) -> dict[str, int]:
    """Write Llama-3's byte-level BPE without padding token and template, and return the vocabulary."""
    return _llama3(folder, {"eos_token": "<|end_of_text|>"})


def llama3_instruct(folder: Path) -> dict[str, int]:
    """Write the same tokenizer as the instruct models have it: <|eot_id|> ends, with a template."""
    return _llama3(folder, {"eos_token": "<|eot_id|>", "chat_template": text.LLAMA3_TEMPLATE})


def qwen(folder: Path) -> dict[str, int]:
    """Write Qwen2.5's byte-level BPE, whose base models end and pad with <|endoftext|>, yet bring a template."""
    return _qwen(folder, "<|endoftext|>", text.QWEN_BASE_TEMPLATE)


def qwen_instruct(folder: Path) -> dict[str, int]:
    """Write the same tokenizer as the instruct models have it: <|im_end|> ends, <|endoftext|> pads."""
    return _qwen(folder, "<|im_end|>", text.QWEN_TEMPLATE)


def pythia(folder: Path) -> dict[str, int]:
    """Write GPT-NeoX's byte-level BPE: <|endoftext|> is everything, <|padding|> there but not named; runs of spaces."""
    core = _byte_level(["<|endoftext|>", "<|padding|>"], pre_tokenizers.ByteLevel(add_prefix_space=False))
    core.normalizer = normalizers.NFC()
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    core.add_tokens([AddedToken(" " * width, normalized=True) for width in range(8, 1, -1)])
    core.save(str(folder / "tokenizer.json"))
    named = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    _write(
        folder / "tokenizer_config.json", {"add_prefix_space": False, "tokenizer_class": "GPTNeoXTokenizer", **named}
    )
    _write(folder / "special_tokens_map.json", named)
    return core.get_vocab()


def gemma(folder: Path) -> dict[str, int]:
    """Write Gemma's sentencepiece BPE: no space in front, four specials of its own, turns between two more."""
    return _gemma(folder, ["<start_of_turn>", "<end_of_turn>"], text.GEMMA_TEMPLATE)


def gemma_sft(folder: Path) -> dict[str, int]:
    """Write the same tokenizer with ChatML's turns in their place; a conversation that is over ends with <eos> too."""
    return _gemma(folder, ["<|im_start|>", "<|im_end|>"], text.CHATML_TEMPLATE)


def _llama3(folder: Path, config: dict[str, Any]) -> dict[str, int]:
    core = _byte_level([], _split(LLAMA3_SPLIT))
    core.add_special_tokens(LLAMA3_SPECIALS)
    begin = "<|begin_of_text|>"
    front = processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, core.token_to_id(begin))])
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), front])
    core.save(str(folder / "tokenizer.json"))
    named = {"bos_token": begin, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 131072}
    reading = {"clean_up_tokenization_spaces": True, "model_input_names": ["input_ids", "attention_mask"]}
    _write(folder / "tokenizer_config.json", {**named, **reading, **config})
    _write(folder / "special_tokens_map.json", {"bos_token": begin, "eos_token": config["eos_token"]})
    return core.get_vocab()


def _qwen(folder: Path, eos: str, template: str) -> dict[str, int]:
    core = _byte_level([], _split(QWEN_SPLIT))
    core.normalizer = normalizers.NFC()
    core.add_special_tokens(QWEN_SPECIALS)
    core.add_tokens([AddedToken(token, normalized=False) for token in QWEN_PLAIN])
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    core.save(str(folder / "tokenizer.json"))
    decoder = {
        str(core.token_to_id(token)): _token(token) | {"special": token in QWEN_SPECIALS}
        for token in [*QWEN_SPECIALS, *QWEN_PLAIN]
    }
    config = {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": decoder,
        "additional_special_tokens": QWEN_SPECIALS[1:], "bos_token": None, "chat_template": template,
        "clean_up_tokenization_spaces": False, "eos_token": eos, "errors": "replace", "model_max_length": 131072,
        "pad_token": "<|endoftext|>", "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }  # fmt: skip
    _write(folder / "tokenizer_config.json", config)
    return core.get_vocab()


def _sentencepiece(folder: Path, config: dict[str, Any]) -> dict[str, int]:
    specials = ["<unk>", "<s>", "</s>"]
    core = _byte_fallback(specials)
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(content=" ", left=1, right=0)
    spaces = decoders.Replace("▁", " ")
    core.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), strip])
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    core.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    adds = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "sp_model_kwargs": {}}
    _write(folder / "tokenizer_config.json", {**named, **adds, **config})
    _write(folder / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    return core.get_vocab()


def _gemma(folder: Path, turns: list[str], template: str) -> dict[str, int]:
    core = _byte_fallback(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<unused0>", *turns])
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    core.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {
        **named, "add_bos_token": True, "add_eos_token": False, "additional_special_tokens": turns,
        "chat_template": template, "clean_up_tokenization_spaces": False, "model_max_length": 10**30,
        "sp_model_kwargs": {}, "spaces_between_special_tokens": False, "tokenizer_class": "GemmaTokenizer",
    }  # fmt: skip
    _write(folder / "tokenizer_config.json", config)
    _write(folder / "special_tokens_map.json", {**named, "additional_special_tokens": turns})
    return core.get_vocab()


def _split(pattern: str) -> Any:
    pieces = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _byte_level(specials: list[str], splitter: Any) -> Tokenizer:
    """Return a byte-level BPE tokenizer with the specials first."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = splitter, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(specials) + len(alphabet) + MERGES,
        special_tokens=specials, initial_alphabet=alphabet, show_progress=False,
    )  # fmt: skip
    core.train_from_iterator(TEXTS, trainer)
    return core


def _byte_fallback(specials: list[str]) -> Tokenizer:
    """Return a BPE tokenizer as sentencepiece has them: specials, a token a byte, then pieces; "▁" is a space."""
    taught = Tokenizer(models.BPE())
    taught.pre_tokenizer = pre_tokenizers.Metaspace()
    first = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    size = len(first) + 60 + MERGES  # 60: about the characters of the text
    taught.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=size, special_tokens=first, show_progress=False))
    model = json.loads(taught.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    core = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.add_special_tokens(specials)
    return core


def _token(content: str, *, normalized: bool = False) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}
    return {"content": content, **flags}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
