"""The policy: made locally from a config, or loaded from a folder in Hugging Face layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerBase,
)

from rlhf_cli.config.schema import MadeModelConfig
from rlhf_cli.errors import RunError


def make_policy(cfg: MadeModelConfig, tokenizer: PreTrainedTokenizerBase, *, max_positions: int) -> Any:
    """Return a freshly initialised OPT of the sizes in `cfg`, without dropout.

    Dropout is 0 in the model config: OPT's is functional, so switching modules off would leave it on.

    Args:
        cfg: sizes.
        tokenizer: gives the vocabulary and the special tokens.
        max_positions: longest prompt + response, tokens.
    """
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=cfg.hidden_size,
        word_embed_proj_dim=cfg.hidden_size,
        ffn_dim=cfg.ffn_size,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        max_position_embeddings=max_positions,
        init_std=cfg.init_std,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return OPTForCausalLM(config)


def load_policy(path: Path | str, device: str = "cpu") -> Any:
    """Return the causal language model in `path`, dropout off, in float32.

    Raises:
        RunError: the folder holds no model that transformers can open.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        for name, value in config.to_dict().items():  # before the layers copy it
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype="float32")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RunError(f"no policy could be opened in {path}", reason) from error
    return cast(Any, model).to(device)


def load_tokenizer(path: Path | str, *, training: bool = True) -> PreTrainedTokenizerBase:
    """Return the tokenizer in `path`, with a padding token that differs from end-of-sequence.

    Args:
        path: model folder.
        training: False where models are only read: padding is masked there, and any token will do for it.

    Raises:
        RunError: the folder holds no tokenizer that transformers can open, it has no end-of-sequence, or padding is
            missing or end-of-sequence while training.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise RunError(f"no tokenizer could be opened in {path}", str(error).splitlines()[0]) from error
    if tokenizer.eos_token_id is None:
        raise RunError(f"the tokenizer in {path} has no end-of-sequence token", "every response ends with it")
    if not training:
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    elif tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise RunError(
            f"the tokenizer in {path} has pad_token={tokenizer.pad_token!r} and eos_token={tokenizer.eos_token!r}",
            "a model never learns to stop if padding is end-of-sequence, and rewards are read at the wrong token",
            "give it a padding token of its own",
        )
    return tokenizer


def freeze(model: Any) -> Any:
    """Return `model` in evaluation mode with no gradients."""
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model
