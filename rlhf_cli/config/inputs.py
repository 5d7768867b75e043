"""Structured configs of what a run starts from: the model, its adapters, the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from rlhf_cli.config.setting import setting

DTYPES = ("auto", "float32", "bfloat16")
ATTENTION = ("auto", "eager", "sdpa", "flash_attention_2")


@dataclass
class ModelConfig:
    """The policy's base: a Hub id or a folder in `path`, and how it is held."""

    name: str = MISSING
    path: str | None = MISSING
    dtype: str = setting(choices=DTYPES)
    attention: str = setting(choices=ATTENTION, identity=False)
    gradient_checkpointing: bool = setting(identity=False)
    chat_template: str = setting()
    init_std: float = setting(gt=0)
    reward_path: str | None = setting()
    reward_start: str = setting(choices=["sft", "base"])
    share_base: bool = setting()
    prompt_tokens: int = setting(ge=1, identity=False)
    completion_tokens: int = setting(ge=1, identity=False)


@dataclass
class MadeModelConfig(ModelConfig):
    """A model that is made locally from these sizes, where `path` is null."""

    hidden_size: int = setting(ge=8)
    ffn_size: int = setting(ge=8)
    layers: int = setting(ge=1)
    heads: int = setting(ge=1)
    vocab_size: int = setting(ge=300)


@dataclass
class PeftConfig:
    """Which weights are trained: `none` means all of them."""

    name: str = MISSING


@dataclass
class LoraConfig(PeftConfig):
    """Low-rank adapters (arXiv 2106.09685); the base stays as it is, and is the reference."""

    rank: int = setting(ge=1)
    alpha: float = setting(gt=0)
    targets: list[str] = setting()
    learning_rate_factor: float = setting(gt=0)


@dataclass
class QLoraConfig(LoraConfig):
    """Low-rank adapters over a base held in 4 or 8 bits (arXiv 2305.14314)."""

    bits: str = setting(choices=["nf4", "fp4", "int8"])
    double_quant: bool = setting()


@dataclass
class DatasetConfig:
    """What every dataset has. `source` names the loader."""

    source: str = setting(choices=["survey", "hh_rlhf", "preferences", "choices", "mixture"])
    name: str = MISSING
    max_prompt_tokens: int = setting(ge=1)
    max_completion_tokens: int = setting(ge=1)


@dataclass
class SurveyConfig(DatasetConfig):
    """The survey world: opinion questions whose answers, shares and gold rewards are known exactly."""

    seed: int = setting(ge=0)
    questions: int = setting(ge=1)
    demonstrations: int = setting(ge=1)
    pairs: int = setting(ge=1)
    heldout_pairs: int = setting(ge=1)
    ranking_size: int = setting(ge=2, le=8)
    length_bias: float = setting()
    gold_offset_reward: float = setting(le=0)
    closed_vocabulary: bool = setting()


@dataclass
class SplitConfig(DatasetConfig):
    """Human preferences, split by prompt into held out, SFT, reward model and alignment."""

    split_seed: int = setting(ge=0)
    sft_fraction: float = setting(gt=0, lt=1)
    rm_fraction: float = setting(gt=0, lt=1)
    heldout_fraction: float = setting(gt=0, lt=1)
    max_rows: int | None = setting(ge=1)
    streaming: bool = setting()
    eval_prompts: int = setting(ge=1)
    eval_samples: int = setting(ge=2)
    pool_samples: int = setting(ge=0)


@dataclass
class TextConfig(SplitConfig):
    """Preferences in a file, a folder, or a dataset of the Hub; two dialogues a row where `source` is hh_rlhf."""

    path: str | None = MISSING
    subset: str | None = setting()
    revision: str | None = setting()
    split: str = setting()


@dataclass
class PairColumns:
    """The columns of a pair or a ranking; null where the data have none. A dot goes inwards: info.post."""

    prompt: str | None = setting()
    chosen: str = setting()
    rejected: str = setting()
    label: str | None = setting()
    margin: str | None = setting()
    responses: str | None = setting()


@dataclass
class PreferencesConfig(TextConfig):
    """Rows of a chosen and a rejected response, plain or conversational, the prompt apart or within both."""

    columns: PairColumns = field(default_factory=PairColumns)


@dataclass
class ChoiceColumns:
    """The columns of a choice between two responses. A dot goes inwards: summaries.0.text."""

    prompt: str = setting()
    short_prompt: str | None = setting()
    first: str = setting()
    second: str = setting()
    choice: str = setting()
    first_value: str = setting()


@dataclass
class ChoicesConfig(TextConfig):
    """Rows of two responses and the one that was chosen."""

    columns: ChoiceColumns = field(default_factory=ChoiceColumns)


@dataclass
class MixtureConfig(SplitConfig):
    """Several datasets mixed by weight. `sources` is what `parts` stand for; it is filled in, never given."""

    parts: list[str] = setting()
    weights: list[float] = setting()
    sources: list[dict[str, Any]] = field(default_factory=list, metadata={"derived": True})


DATASETS: dict[str, type[DatasetConfig]] = {
    "survey": SurveyConfig,
    "hh_rlhf": TextConfig,
    "preferences": PreferencesConfig,
    "choices": ChoicesConfig,
    "mixture": MixtureConfig,
}
PEFT: dict[str, type[PeftConfig]] = {"none": PeftConfig, "lora": LoraConfig, "qlora": QLoraConfig}
