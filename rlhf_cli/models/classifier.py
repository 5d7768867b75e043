"""Opening reward models: a causal body, with a fresh head or the one that was trained, in float32 whatever the body."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from rlhf_cli.errors import RunError
from rlhf_cli.models.adapters import HEAD, adapter_base, is_adapter, open_adapter, plain
from rlhf_cli.models.loading import REFUSALS, Loading, dealt_out, opened, reason
from rlhf_cli.models.tokenizers import fit_embedding, has_tokenizer, load_tokenizer


def new_reward_model(policy_path: Path | str, *, init_std: float, how: Loading | None = None) -> Any:
    """Return a reward model with the body of the model in `policy_path`, dropout off, and a fresh head in float32.

    Its padding token is that of the tokenizer beside the model, where there is one.

    Args:
        policy_path: folder of an SFT policy or of a base.
        init_std: of the head's weights, > 0.
        how: device, number format of the body and attention; None: in float32 on the CPU.

    Raises:
        RunError: the folder holds no model of a family with a reward head, read at one token (`score`).
    """
    model, missing = _classifier(policy_path, how or Loading())
    lacking = [name for name in missing if not name.startswith(f"{HEAD}.")]
    if lacking:
        raise RunError(f"the model in {policy_path} is damaged", f"its files lack {', '.join(lacking[:3])}")
    nn.init.normal_(model.score.float().weight, std=init_std)
    if has_tokenizer(Path(policy_path)):
        fit_embedding(model, load_tokenizer(policy_path))
    return model


def load_reward_model(path: Path | str, device: str = "cpu", how: Loading | None = None) -> Any:
    """Return the reward model in `path`, dropout off, its head in float32; of an adapter folder, with its base.

    Args:
        path: model folder.
        device: cpu or cuda, where `how` is not given: then weights are float32.
        how: device, number format of the body and attention.

    Raises:
        RunError: the folder holds no sequence classifier with one output, read at one token (`score`).
    """
    how = how or Loading(device)
    if is_adapter(path):  # the head comes with the adapter
        base = new_reward_model(adapter_base(path), init_std=1.0, how=how)
        return dealt_out(plain(open_adapter(base, path)), how)
    model, missing = _classifier(path, how)
    if missing:
        raise RunError(
            f"no reward model could be opened in {path}",
            f"its files lack {', '.join(missing[:3])}, and fresh weights would take their place",
        )
    return dealt_out(model, how)


def require_classifier(path: Path | str) -> None:
    """Refuse the model in `path` if its family has no sequence classifier: by its config, without its weights.

    Raises:
        RunError: it has none, or its config cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except REFUSALS as error:
        raise RunError(f"no reward model or critic can start from the model in {path}", reason(error)) from error
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise RunError(
            f"no reward model or critic can start from the model in {path}",
            f"transformers has no sequence classifier of the family {config.model_type}",
            "start them from another one: model.reward_path=FOLDER; algo.advantage=rloo needs no critic",
        )


def _classifier(path: Path | str, how: Loading) -> tuple[Any, list[str]]:
    """Return the sequence classifier with one output in `path`, and the names of the weights its files lack."""
    try:
        kind = AutoModelForSequenceClassification if how.dtype == torch.float32 else _with_exact_head(path)
        model, missing = opened(kind, path, how, num_labels=1)
    except REFUSALS as error:
        why = "its head has more than one output" if "mismatched" in str(error) else reason(error)
        raise RunError(f"no reward model could be opened in {path}", why) from error
    if not hasattr(model, HEAD):
        raise RunError(
            f"the reward model in {path} is a {type(model).__name__}",
            "rewards are read at the last token of a causal body, by a head named score",
            "give one with the body of a language model, such as OPT, Llama or Qwen",
        )
    return model, missing


def _with_exact_head(path: Path | str) -> Any:
    """Return the class of the sequence classifier in `path`, its head read in float32 whatever its body is read in."""
    config, known = AutoConfig.from_pretrained(path, trust_remote_code=False), MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if type(config) not in known:
        return AutoModelForSequenceClassification  # which says so
    kind: Any = known[type(config)]
    return type(kind.__name__, (kind,), {"_keep_in_fp32_modules_strict": {HEAD}})
