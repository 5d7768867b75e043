"""A base held in 4 or 8 bits while adapters are trained around it (QLoRA, arXiv 2305.14314), by bitsandbytes."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rlhf_cli.config.schema import PeftConfig, QLoraConfig
from rlhf_cli.errors import RunError

if TYPE_CHECKING:
    from rlhf_cli.models.loading import Loading


def check(peft: PeftConfig) -> None:
    """Refuse QLoRA where bitsandbytes is not installed; asked before anything is loaded, torch included.

    Raises:
        RunError: saying what to install.
    """
    if isinstance(peft, QLoraConfig) and find_spec("bitsandbytes") is None:
        raise RunError(
            "peft=qlora needs bitsandbytes, which is not installed",
            f"it holds the base in {8 if peft.bits == 'int8' else 4} bits",
            "pip install 'rlhf-cli[qlora]', or use peft=lora",
        )


def quantised(how: Loading, peft: PeftConfig) -> Loading:
    """Return how the base of an adapter is held: as `how` says, in few bits where `peft` is QLoRA.

    Raises:
        RunError: QLoRA is asked for and bitsandbytes is not installed.
    """
    if not isinstance(peft, QLoraConfig):
        return how
    check(peft)
    from transformers import BitsAndBytesConfig

    if peft.bits == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=peft.bits,
            bnb_4bit_use_double_quant=peft.double_quant,
            bnb_4bit_compute_dtype=how.dtype,
        )
    return replace(how, quantization=config)


def keep_trainable(model: Any) -> Any:
    """Return `model`: on CPUs with AVX512-BF16 its 4-bit weights, once read without gradient, could be trained no more.

    bitsandbytes packs them for reading alone, and does not unpack them for the next training step.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
    return model
