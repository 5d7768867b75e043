"""Tokenizers as published models bring them, made fit for training: padding, the end of a turn, the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from rlhf_cli.errors import RunError
from rlhf_cli.models.loading import reason

FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
# Tokens that some families keep for padding, or for nothing, without naming one as their padding token.
UNUSED = ["<|finetune_right_pad_id|>", "<|padding|>", "<pad>", "[PAD]", "<|pad|>", "<|fim_pad|>", "<|vision_pad|>"]
UNUSED += ["<|reserved_special_token_0|>", "<unused0>", "<|endoftext|>"]
NEW_PAD = "<|rlhf_pad|>"  # where a vocabulary has no such token
PROBE = "pr0be"


def has_tokenizer(folder: Path) -> bool:
    """Return whether the model in `folder` brings a tokenizer of its own."""
    return any((folder / name).is_file() for name in FILES)


def load_tokenizer(path: Path | str, *, training: bool = True, chat_template: str = "auto") -> PreTrainedTokenizerBase:
    """Return the tokenizer in `path`, with a padding token that differs from end-of-sequence.

    Padding is the tokenizer's own token if it is another one, else one that its family does not use, else <unk>, else a
    new one, for which `fit_embedding` makes room. Where a chat template ends the assistant's turn with another special
    token than end-of-sequence (Llama-3's <|eot_id|>), that becomes end-of-sequence: one token ends a response.

    Args:
        path: model folder.
        training: False where models are only read: padding is masked there, and any token will do for it.
        chat_template: auto: the tokenizer's own, if it has one; none: plain dialogue text; or a file, Jinja.

    Raises:
        RunError: the folder holds no tokenizer that transformers can open, it has no end-of-sequence, or its template
            or the given one cannot be used.
    """
    if Path(path).is_dir() and not has_tokenizer(Path(path)):  # transformers would make up an empty one
        raise RunError(
            f"no tokenizer could be opened in {path}",
            f"none of its files is there: {', '.join(FILES)}",
            "put those that it was published with beside the model",
        )
    try:
        tokenizer = cast(Any, AutoTokenizer.from_pretrained(path, trust_remote_code=False))
    except Exception as error:  # missing and damaged files show in many ways
        raise RunError(f"no tokenizer could be opened in {path}", reason(error)) from error
    if tokenizer.eos_token_id is None:
        raise RunError(
            f"the tokenizer in {path} has no end-of-sequence token",
            "every response ends with it",
            'name one of its tokens in tokenizer_config.json, such as "eos_token": "</s>"',
        )
    _set_template(tokenizer, path, chat_template)
    if training and tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        _set_padding(tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return cast(PreTrainedTokenizerBase, tokenizer)


def _set_padding(tokenizer: Any) -> None:
    known = tokenizer.get_vocab()
    taken = (tokenizer.eos_token, tokenizer.bos_token)
    unused = next((token for token in (*UNUSED, tokenizer.unk_token) if token in known and token not in taken), None)
    tokenizer.add_special_tokens({"pad_token": unused or NEW_PAD})


# -- chat templates ----------------------------------------------------------------------------------------------------


def _set_template(tokenizer: Any, path: Path | str, given: str) -> None:
    """Give `tokenizer` the template that is asked for, and the token that ends its turns as end-of-sequence."""
    source = f"the chat template of {path}"
    if given == "none":
        tokenizer.chat_template = None
    elif given != "auto":
        source = f"model.chat_template={given}"
        try:
            tokenizer.chat_template = Path(given).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{source} cannot be read", reason(error), "give auto, none, or a Jinja file") from error
    if not tokenizer.chat_template:
        return
    tokenizer.split_special_tokens = False  # the template's own are tokens; data/turns.py keeps those in texts apart
    todo = "give a template that writes a user's and an assistant's message, or model.chat_template=none"
    try:
        tokenizer.chat_template = tokenizer.get_chat_template()  # the default one, where a model brings several
        conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
        written = tokenizer.apply_chat_template(conversation, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise RunError(f"{source} cannot be used", reason(error), todo) from error
    if PROBE not in written:
        raise RunError(f"{source} cannot be used", "it leaves out what the assistant says", todo)
    tail = written.rpartition(PROBE)[2]
    specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = [(tail.index(token), -len(token), token) for token in specials if token in tail]
    if found and min(found)[2] != tokenizer.eos_token:
        tokenizer.add_special_tokens({"eos_token": min(found)[2]})


# -- models ------------------------------------------------------------------------------------------------------------


def fit_embedding(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make `model` one for `tokenizer`: room for a new padding token, and its special tokens in the model's configs.

    One token ends a response, the tokenizer's: other ends and sampling settings in the published generation config
    would let samples end, or be drawn, where log-probs and metrics know nothing of it.

    Raises:
        RunError: the vocabulary is larger than the embedding.
    """
    known = model.get_input_embeddings().weight.shape[0]
    needed = max(tokenizer.get_vocab().values()) + 1
    new_pad = tokenizer.pad_token == NEW_PAD and tokenizer.pad_token_id == needed - 1
    if needed > known and new_pad and needed == known + 1:
        model.resize_token_embeddings(needed, mean_resizing=False)
    elif needed > known:
        raise RunError(
            f"the tokenizer in {tokenizer.name_or_path} has {needed - new_pad} tokens, the model's embedding {known}",
            "tokens beyond it cannot be read",
            "give a model folder whose tokenizer is the model's own",
        )
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    for name, value in ids.items():
        setattr(model.config, name, value)
    if model.can_generate():
        model.generation_config = GenerationConfig(**ids)
