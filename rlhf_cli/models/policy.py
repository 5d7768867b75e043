"""The policy: made locally from a config, or loaded from a folder in Hugging Face layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerBase

from rlhf_cli.config.schema import MadeModelConfig
from rlhf_cli.errors import RunError
from rlhf_cli.models.adapters import adapter_base, is_adapter, open_adapter, plain
from rlhf_cli.models.loading import REFUSALS, Loading, dealt_out, opened, reason
from rlhf_cli.models.tokenizers import load_tokenizer

__all__ = ["freeze", "load_policy", "load_tokenizer", "make_policy"]


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


def load_policy(path: Path | str, device: str = "cpu", how: Loading | None = None, *, trained: bool = False) -> Any:
    """Return the causal language model in `path`, dropout off; of an adapter folder, its base with the adapter in it.

    Args:
        path: model folder.
        device: cpu or cuda, where `how` is not given: then weights are float32.
        how: device, number format and attention.
        trained: the weights will be trained, so they are float32.

    Raises:
        RunError: the folder holds no model that transformers can open, or one whose head was never trained.
    """
    how = how or Loading(device)
    if is_adapter(path):
        base = load_policy(adapter_base(path), how=replace(how, ready=False))
        return dealt_out(plain(open_adapter(base, path)), how)
    try:
        model, missing = opened(AutoModelForCausalLM, path, how.trained() if trained else how)
    except REFUSALS as error:
        raise RunError(f"no policy could be opened in {path}", reason(error)) from error
    if missing:
        raise RunError(
            f"the model in {path} is no causal language model: its files lack {', '.join(missing[:3])}",
            "fresh weights would take their place",
            "give one that was trained to predict the next token",
        )
    return dealt_out(model, how)


def freeze(model: Any) -> Any:
    """Return `model` in evaluation mode with no gradients."""
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model
