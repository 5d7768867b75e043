"""How weights are held: device, number format, attention; and opening a folder so, or one line on why it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.integrations import deepspeed
from transformers.utils import is_flash_attn_2_available

from rlhf_cli import ranks
from rlhf_cli.config.schema import ModelConfig
from rlhf_cli.errors import RunError
from rlhf_cli.models.sharding import shard

# Of transformers, and of the readers of its files: a damaged one shows in many ways.
REFUSALS: tuple[type[Exception], ...] = (OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError)
REFUSALS += (UnpicklingError, SafetensorError, StrictDataclassError)


@dataclass(frozen=True)
class Loading:
    """How a model is opened.

    Args:
        device: cpu or cuda.
        dtype: of its weights.
        attention: implementation in transformers; auto: what it chooses.
        quantization: a quantization config of transformers; None: weights as they are.
        split: over all ranks: rank 0 alone reads weights, to the CPU, and `shard` deals them out.
        ready: dealt out when opened; else by who opens it, once its adapter is around it.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    attention: str = "auto"
    quantization: Any = None
    split: bool = False
    ready: bool = True

    def trained(self) -> Loading:
        """Return the same for weights that are trained: in float32, whatever the format of computation."""
        return replace(self, dtype=torch.float32, quantization=None)


def loading(model: ModelConfig, device: str) -> Loading:
    """Return how frozen weights are held on `device`; auto is bfloat16 where the GPU computes in it, else float32.

    Raises:
        RunError: FlashAttention is asked for, and is not installed or cannot be used.
    """
    dtype = torch.bfloat16 if model.dtype == "bfloat16" else torch.float32
    if model.dtype == "auto" and torch.device(device).type == "cuda" and _computes_in_bfloat16():
        dtype = torch.bfloat16
    if model.attention == "flash_attention_2":
        why = None if is_flash_attn_2_available() else "the package flash-attn is not installed, or there is no GPU"
        why = why or (None if dtype == torch.bfloat16 else "it computes in bfloat16, and model.dtype is float32")
        if why:
            raise RunError("model.attention=flash_attention_2 cannot be used", why, "set model.attention=sdpa")
    return Loading(device, dtype, model.attention, split=ranks.world() > 1 and ranks.strategy() == "fsdp2")


def opened(kind: Any, path: Path | str, how: Loading, **settings: Any) -> tuple[Any, list[str]]:
    """Return the model in `path`, dropout off, and the names of the weights that its files lack.

    Args:
        kind: auto class of transformers, or a model's own.
        path: model folder.
        how: device, number format, attention.
        settings: of its config, in place of what the folder says.

    Raises:
        RunError: a weight is not finite.
        one of REFUSALS: it cannot be opened.
    """
    config = without_dropout(AutoConfig.from_pretrained(path, trust_remote_code=False, **settings))
    more: dict[str, Any] = {}
    if how.attention != "auto":
        more["attn_implementation"] = how.attention
    if how.quantization is not None:
        more |= {"quantization_config": how.quantization, "device_map": {"": how.device}}
    elif how.split and not ranks.is_main():
        more["device_map"] = "meta"
    with _whole():
        model, info = kind.from_pretrained(path, config=config, dtype=how.dtype, output_loading_info=True, **more)
    model = model if how.quantization is not None or how.split else model.to(how.device)
    require_finite(model, path)
    return model, sorted(info["missing_keys"])


@contextmanager
def _whole() -> Iterator[None]:
    """Within it, models are opened whole: once a trainer has used ZeRO-3, transformers opens parts, of size 0."""
    trainers = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = trainers


def dealt_out(model: Any, how: Loading) -> Any:
    """Return `model`, just opened so, ready for use: where it is split over ranks, this rank's part."""
    return shard(model, how.device) if how.split and how.ready and how.quantization is None else model


def require_finite(model: torch.nn.Module, path: Path | str) -> None:
    """Refuse a model with NaN or infinite weights: training would fail later, and blame the learning rate.

    Raises:
        RunError: naming the first of them.
    """
    weights = [(name, weight) for name, weight in model.named_parameters() if weight.is_floating_point()]
    # The sum shows it without a copy of the weights; one of finite weights may overflow, so it only rouses suspicion.
    odd = [(name, weight) for name, weight in weights if not weight.is_meta and not weight.detach().sum().isfinite()]
    if name := next((name for name, weight in odd if not weight.detach().isfinite().all()), None):
        raise RunError(
            f"the weights of the model in {path} are not finite",
            f"{name} holds NaN or infinity",
            "copy or download it again, or name another model",
        )


def without_dropout(config: Any) -> Any:
    """Return `config` with every dropout at 0, whatever its family calls it, before the layers copy it."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def reason(error: BaseException) -> str:
    """Return what an error of transformers says, in one line: its first, with what follows a colon; or its name."""
    text = str(error)
    if "ignore_mismatched_sizes" in text:
        return "its weights have other shapes than its config.json says"
    if "Unrecognized configuration class" in text:
        return "its family has no model of this kind in transformers"
    if "custom code" in text:
        return "it brings Python code of its own, which is not run; transformers does not know its family"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__


def _computes_in_bfloat16() -> bool:
    """Return whether the GPU computes in bfloat16 itself; older ones emulate it, more slowly than float32."""
    return torch.cuda.is_bf16_supported(including_emulation=False)
