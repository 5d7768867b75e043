"""What a model is before its weights are read: its exact sizes, from its config alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_cli.config.schema import LoraConfig
from rlhf_cli.models.adapters import HEAD, with_adapter
from rlhf_cli.models.loading import without_dropout

POLICY, CLASSIFIER = "policy", "classifier"
KINDS = {POLICY: AutoModelForCausalLM, CLASSIFIER: AutoModelForSequenceClassification}


@dataclass(frozen=True)
class ModelShape:
    """The config of a model, in json: two of equal content are equal.

    Args:
        content: config.json of a causal language model or of a classifier with its body.
    """

    content: str

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """Return the shape of a transformers config."""
        return cls(config.to_json_string(use_diff=False))

    @property
    def config(self) -> Any:
        """Return the config anew, dropout off and with one output where it is a classifier's."""
        values = json.loads(self.content)
        others = {key: value for key, value in values.items() if key not in ("model_type", "id2label", "label2id")}
        return without_dropout(AutoConfig.for_model(values["model_type"], **{**others, "num_labels": 1}))

    def sizes(self, kind: str, adapters: Adapters | None = None) -> Sizes:
        """Return how many parameters the model has as a `kind`, and how many `adapters` of it.

        Raises:
            ValueError: transformers has no such class for it, or its code is not part of transformers.
        """
        return _sizes(self, kind, adapters)


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters; tied ones count once.

    Args:
        total: of the model, without adapters.
        linear: of them, weights of linear layers of the body: what quantisation makes small.
        adapter: of the adapters, and of a head that is trained whole beside them; 0 without.
    """

    total: int
    linear: int
    adapter: int


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters: their rank, and the modules that get them (all-linear: every linear layer of the body)."""

    rank: int
    targets: tuple[str, ...]


@lru_cache(maxsize=64)
def _sizes(shape: ModelShape, kind: str, adapters: Adapters | None) -> Sizes:
    model = skeleton(shape, kind)
    total = sum(parameter.numel() for parameter in model.parameters())
    heads = (model.get_output_embeddings(), getattr(model, HEAD, None))
    body = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in heads]
    linear = sum(module.weight.numel() for module in body)
    adapter = 0
    if adapters is not None:
        weights = adapt(model, adapters).parameters()
        adapter = sum(parameter.numel() for parameter in weights if parameter.requires_grad)
    return Sizes(total, linear, adapter)


def skeleton(shape: ModelShape, kind: str, *, dtype: torch.dtype = torch.float32, attention: str = "auto") -> Any:
    """Return the model on the meta device: all of its modules, and no memory for its weights.

    Args:
        shape: of the model.
        kind: POLICY or CLASSIFIER.
        dtype: of its weights.
        attention: as in the config; flash attention saves what sdpa saves, and needs a GPU to be asked for.

    Raises:
        ValueError: transformers has no such class for it, or its code is not part of transformers.
    """
    chosen = {} if attention == "auto" else {"attn_implementation": attention.replace("flash_attention_2", "sdpa")}
    with torch.device("meta"):
        model = cast(Any, KINDS[kind]).from_config(shape.config, dtype=dtype, **chosen)
    if hasattr(model, HEAD):
        getattr(model, HEAD).float()
    return model


def decoder_layers(model: Any) -> nn.ModuleList | None:
    """Return the list of the decoder's layers; None where there is no such list."""
    depth = model.config.get_text_config().num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth)
    return next(lists, None)


def adapt(model: Any, adapters: Adapters) -> Any:
    """Return a skeleton, frozen, with adapters around it."""
    settings = LoraConfig(
        name="lora", rank=adapters.rank, alpha=1.0, targets=list(adapters.targets), learning_rate_factor=1.0
    )
    with torch.device("meta"):
        return with_adapter(model, settings, base=Path())
