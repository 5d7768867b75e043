"""Low-rank adapters (LoRA, arXiv 2106.09685): put around a base, stored beside it, switched off, merged into it.

An adapter folder holds adapter_config.json, which names the folder of its base, and the trained weights alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhf_cli import ranks
from rlhf_cli.config import schema
from rlhf_cli.errors import RunError
from rlhf_cli.hub import is_id, local_folder
from rlhf_cli.models.sharding import whole_state

ADAPTER_FILE = "adapter_config.json"
OWN = "default"  # an adapter's name where it is the only one, and the one that TRL looks for in a policy
HEAD = "score"  # of a sequence classifier: trained whole, and stored with its adapter
CLASSIFIER, CAUSAL = "SEQ_CLS", "CAUSAL_LM"


def with_adapter(model: Any, peft: schema.LoraConfig, *, base: Path) -> PeftModel:
    """Return `model`, frozen, with a fresh adapter in float32 around it: at first it says what it said before.

    Of a sequence classifier the head is trained whole.

    Args:
        model: causal language model or sequence classifier.
        peft: rank, alpha and the modules that get adapters.
        base: folder that `model` was loaded from; the adapter names it.

    Raises:
        RunError: a target matches no linear layer, or it is the one that gives the logits.
    """
    classifier = hasattr(model, HEAD)
    every = peft.targets == ["all-linear"]
    if not every:
        _require_targets(model, peft.targets)
    config = LoraConfig(
        r=peft.rank,
        lora_alpha=cast(int, peft.alpha),  # PEFT divides it by r: any number will do
        lora_dropout=0.0,
        target_modules="all-linear" if every else list(peft.targets),
        task_type=CLASSIFIER if classifier else CAUSAL,
        modules_to_save=[HEAD] if classifier else None,
    )
    adapted = cast(PeftModel, get_peft_model(model, config, adapter_name=OWN))
    adapted.peft_config[OWN].base_model_name_or_path = str(base.resolve())
    return adapted


def _require_targets(model: Any, targets: Sequence[str]) -> None:
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    head = HEAD if hasattr(model, HEAD) else "lm_head"
    output = None if hasattr(model, HEAD) else model.get_output_embeddings()
    if output is not None:
        head = next(name for name, module in model.named_modules() if module is output)
    known = sorted({name.rpartition(".")[2] for name in linear if name != head})
    for target in targets:
        matching = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not matching or head in matching:
            raise RunError(
                f"peft.targets={list(targets)}: {target} "
                + ("gives the logits" if matching else f"matches no linear layer of {type(model).__name__}"),
                f"its linear layers are called {', '.join(known)}",
                "name some of them, or use peft.targets=[all-linear]",
            )


def is_adapter(folder: Path | str) -> bool:
    """Return whether `folder` holds an adapter, not a whole model."""
    return (Path(folder) / ADAPTER_FILE).is_file()


def adapter_settings(folder: Path | str) -> dict[str, Any]:
    """Return what adapter_config.json in `folder` says.

    Raises:
        RunError: the file is damaged.
    """
    try:
        return dict(json.loads((Path(folder) / ADAPTER_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{Path(folder) / ADAPTER_FILE} is damaged", "", "train the adapter again") from error


def adapter_base(folder: Path | str) -> Path:
    """Return the folder of the model that the adapter in `folder` was trained on.

    Raises:
        RunError: it is not there, or its name stands for no model of the Hub within reach.
    """
    named = adapter_settings(folder).get("base_model_name_or_path")
    if named is not None and is_id(named):
        return local_folder("base_model_name_or_path", named)
    base = Path(str(named))
    if named is None or not (base / "config.json").is_file():
        raise RunError(
            f"the adapter in {folder} needs its base, and {named} holds no model",
            "",
            f"put it back, or name its new place as base_model_name_or_path in {Path(folder) / ADAPTER_FILE}",
        )
    return base


def open_adapter(base: Any, folder: Path | str, *, trainable: bool = False) -> PeftModel:
    """Return `base` with the adapter in `folder` around it, in float32.

    Args:
        base: what is in `adapter_base(folder)`, of the class that the adapter was trained with.
        folder: of the adapter.
        trainable: whether its weights have gradients.

    Raises:
        RunError: the adapter cannot be read or does not fit the base.
    """
    try:
        empty = base.device.type == "meta"  # a rank that gets its weights from rank 0
        device = "cpu" if empty else str(base.device)
        settings: dict[str, Any] = {"is_trainable": trainable, "torch_device": device, "low_cpu_mem_usage": empty}
        return PeftModel.from_pretrained(base, str(folder), adapter_name=OWN, **settings)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RunError(f"the adapter in {folder} could not be put on its base", reason) from error


def save_model(model: Any, folder: Path) -> None:
    """Write a model into `folder`: of one with an adapter, the adapter alone.

    All ranks call it, since each may hold a part; rank 0 writes, and all go on when it has.
    """
    held = whole_state(model)
    if ranks.is_main():
        write_model(model, folder, held)
    ranks.barrier()


def write_model(model: Any, folder: Path, held: dict[str, Any] | None = None) -> None:
    """Write a model as `save_model` does, from this process alone.

    Args:
        model: with an adapter or without.
        folder: where to.
        held: its weights, where the model itself holds only a part of them.
    """
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder), selected_adapters=[OWN], save_embedding_layers=False, state_dict=held)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    else:
        model.save_pretrained(folder, state_dict=held)
    for weights in folder.glob("*.safetensors"):  # written for the user alone; a store may be shared
        weights.chmod(folder.stat().st_mode & 0o666)


def merged(model: PeftModel) -> Any:
    """Return the model with its adapter added to its weights: an ordinary one, of the base's class and dtype."""
    return cast(Any, model).merge_and_unload()


def plain(model: Any) -> Any:
    """Return the transformers model, adapters in its layers, that a `PeftModel` wraps; any other model as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def trained_size(model: PeftModel) -> tuple[int, float]:
    """Return how many parameters are trained, and their share of all."""
    trained, total = model.get_nb_trainable_parameters()
    return trained, trained / total


# -- switching --------------------------------------------------------------------------------------------------------

_current: Switched | None = None  # the switch in force; a fresh model runs with OWN and without any


class Switched(AbstractContextManager[None]):
    """Within it, the adapter `name` answers in all layers of one model; None: none of them.

    PEFT's own switches also change which weights have gradients, and here others are being trained meanwhile.
    """

    def __init__(self, layers: Sequence[Any], name: str | None) -> None:
        self.layers, self.name = layers, name
        self.before: list[tuple[list[Any], Switched | None]] = []

    def __enter__(self) -> None:
        global _current
        self.before.append(([layer._active_adapter for layer in self.layers], _current))
        _current = self
        for layer in self.layers:
            layer._active_adapter = [] if self.name is None else [self.name]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        names, _current = self.before.pop()
        for layer, name in zip(self.layers, names, strict=True):
            layer._active_adapter = name


def adapter_layers(model: Any) -> list[Any]:
    """Return the layers of `model` that carry adapters."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def recomputing() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of a checkpointed forward and of its second run in the backward pass.

    The backward pass comes when the adapter of the forward is no longer the one in force. A function of the module,
    because training arguments are pickled into each checkpoint.
    """
    return nullcontext(), nullcontext() if _current is None else Switched(_current.layers, _current.name)


CHECKPOINTING: dict[str, Any] = {"use_reentrant": False, "context_fn": recomputing}


def recompute_activations(model: Any) -> None:
    """Have a model outside the trainer compute its activations again in the backward pass."""
    model = plain(model)
    enable: Callable[..., None] = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(CHECKPOINTING)
    model.enable_input_require_grads()  # else nothing in a frozen body asks for gradients
    model.train()


class WithoutAdapter:
    """A policy as it was before training: the same model, read with its adapters switched off.

    Args:
        policy: with an adapter.
    """

    def __init__(self, policy: PeftModel) -> None:
        self.policy, self.layers = policy, adapter_layers(policy)

    def __call__(self, **inputs: Any) -> Any:
        """Return the output of the base."""
        with Switched(self.layers, None):
            return self.policy(**inputs)

    @property
    def config(self) -> Any:
        """Return the config of the base."""
        return self.policy.config

    @property
    def device(self) -> torch.device:
        """Return where the base is."""
        return self.policy.device

    @property
    def training(self) -> bool:
        """Return the mode of the policy: they are one model."""
        return self.policy.training

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the weights of the base; it is frozen."""
        return (weight for name, weight in self.policy.named_parameters() if "lora_" not in name)

    def eval(self) -> WithoutAdapter:
        """Return this view, its policy in evaluation mode."""
        return self.train(False)

    def train(self, mode: bool = True) -> WithoutAdapter:
        """Return this view, its policy in training or evaluation mode."""
        self.policy.train(mode)
        return self
