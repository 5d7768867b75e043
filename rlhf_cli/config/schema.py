"""Structured configs: the type and range of every key. Values live in yaml (conf/), never here.

A field made with `setting` carries its range in the dataclass metadata; `validate.py` reads it. Nothing heavy is
imported here, so a config error is answered before torch is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from rlhf_cli.config.generation import CorrectedGeneration as CorrectedGeneration
from rlhf_cli.config.generation import GenerationConfig as GenerationConfig
from rlhf_cli.config.generation import VllmGeneration as VllmGeneration
from rlhf_cli.config.inputs import DatasetConfig as DatasetConfig
from rlhf_cli.config.inputs import LoraConfig as LoraConfig
from rlhf_cli.config.inputs import MadeModelConfig as MadeModelConfig
from rlhf_cli.config.inputs import MixtureConfig as MixtureConfig
from rlhf_cli.config.inputs import ModelConfig as ModelConfig
from rlhf_cli.config.inputs import PeftConfig as PeftConfig
from rlhf_cli.config.inputs import QLoraConfig as QLoraConfig
from rlhf_cli.config.inputs import SplitConfig as SplitConfig
from rlhf_cli.config.inputs import SurveyConfig as SurveyConfig
from rlhf_cli.config.inputs import TextConfig as TextConfig
from rlhf_cli.config.launching import LaunchConfig
from rlhf_cli.config.setting import setting as setting


@dataclass
class Prior:
    """A bound delta* on a pair's margin, known before training (arXiv 2404.00978); `none` bounds nothing."""

    name: str = MISSING


@dataclass
class SimilarityPrior(Prior):
    """delta* = beta1 / (similarity + beta2) + beta3: alike responses may not differ much."""

    beta1: float = setting(gt=0)
    beta2: float = setting(gt=0)
    beta3: float = setting()


@dataclass
class LengthPrior(SimilarityPrior):
    """Similarity is the ratio of the lengths after the first differing token."""


@dataclass
class CosinePrior(SimilarityPrior):
    """Similarity is that of a frozen encoder's embeddings: `sft`, a Hugging Face name or a folder."""

    similarity: str = setting(choices=["angle", "cosine"])
    encoder: str = setting()
    pooling: str = setting(choices=["mean", "cls"])
    embed_prompt: bool = setting()


@dataclass
class FixedPrior(Prior):
    """The same delta* for every pair: a control."""

    delta: float = setting(gt=0)


@dataclass
class RandomPrior(Prior):
    """delta* drawn from U[low, high], once for each pair: a control."""

    low: float = setting(gt=0)
    high: float = setting(gt=0)


@dataclass
class AlgoConfig:
    """What every algorithm has. `name` names the yaml, the module rlhf_cli/algos/<name>.py and the tracker group."""

    name: str = MISSING
    beta: float = setting(gt=0)
    constraint: Prior = field(default_factory=Prior)


@dataclass
class OnlineAlgoConfig(AlgoConfig):
    """Settings of the on-policy algorithms (arXiv 2405.16455 and its official code; docs/paper_index.md)."""

    advantage: str = setting(choices=["gae", "rloo"])
    gamma: float = setting(ge=0, le=1)
    lam: float = setting(ge=0, le=1)
    clip_range: float = setting(gt=0)
    value_clip_range: float = setting(gt=0)
    missing_eos_penalty: float | None = setting(ge=0)
    whiten_advantages: bool = MISSING
    ppo_epochs: int = setting(ge=1)
    minibatches: int = setting(ge=1)
    num_generations: int = setting(ge=1)
    beta_schedule: str = setting(choices=["fixed", "adaptive"])
    cost_target: float = setting(gt=0)
    cost_horizon: int = setting(ge=1)


@dataclass
class RewardConfig:
    """Where rewards come from. `name` names the yaml and the module rlhf_cli/rewards/<name>.py or its first word's.

    `clip` and `calibration` say how rewards are read, not how a model is trained: one model serves all their values.
    """

    name: str = MISSING
    clip: float | None = setting(gt=0, reading=True)


@dataclass
class TrainedRewardConfig(RewardConfig):
    """Settings of every reward model that is trained from preferences."""

    negative_share: float = setting(ge=0, lt=1)
    label_smoothing: float = setting(ge=0, lt=0.5)
    centering: float = setting(ge=0)
    token_wise: bool = setting()
    calibration: str = setting(choices=["none", "length"], reading=True)


@dataclass
class StageTraining:
    """How one stage is optimised. Exactly one of max_steps (optimizer steps) and epochs is given."""

    max_steps: int | None = setting(ge=1)
    epochs: float | None = setting(gt=0)
    batch_size: int = setting(ge=1)
    micro_batch_size: int | None = setting(ge=1)
    learning_rate: float = setting(gt=0)
    lr_scheduler: str = setting(choices=["constant", "linear", "cosine"])
    warmup_fraction: float = setting(ge=0, le=1)
    adam_beta2: float = setting(gt=0, lt=1)
    weight_decay: float = setting(ge=0)
    max_grad_norm: float = setting(gt=0)
    log_every_steps: int = setting(ge=1, identity=False)
    save_every_steps: int = setting(ge=1, identity=False)


@dataclass
class SftTraining(StageTraining):
    """How the SFT policy is optimised; max_steps 0 takes the model as it is, an SFT policy already."""

    max_steps: int | None = setting(ge=0)


@dataclass
class AlignTraining(StageTraining):
    """How a policy is aligned; `eval_every_steps` is how often its metrics are computed while it trains."""

    eval_every_steps: int = setting(ge=1, identity=False)


@dataclass
class OnlineTraining(AlignTraining):
    """On-policy alignment; batch_size counts rollouts per optimizer step."""

    critic_learning_rate: float = setting(gt=0)


@dataclass
class TrainerConfig:
    """The optimisation of each stage, one block a stage."""

    name: str = MISSING
    sft: SftTraining = field(default_factory=SftTraining)
    rm: StageTraining = field(default_factory=StageTraining)
    online: OnlineTraining = field(default_factory=OnlineTraining)
    pairwise: AlignTraining = field(default_factory=AlignTraining)


@dataclass
class TrackerConfig:
    """Where curves, tables and figures go besides the run folder."""

    name: str = setting(choices=["wandb", "tensorboard", "none"])
    project: str = MISSING
    entity: str | None = MISSING
    group: str | None = MISSING
    run_name: str | None = MISSING
    tags: list[str] = MISSING


@dataclass
class CommandConfig:
    """What every command has."""

    seed: int = setting(ge=0, le=2**32 - 1)
    run_dir: str | None = setting(identity=False)
    store_dir: str = setting(identity=False)
    device: str = setting(choices=["auto", "cpu", "cuda"], identity=False)
    model: ModelConfig = field(default_factory=ModelConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig, metadata={"identity": False})
    launch: LaunchConfig = field(default_factory=LaunchConfig, metadata={"identity": False})


@dataclass
class TrainSftConfig(CommandConfig):
    """`rlhf train-sft`."""


@dataclass
class TrainRmConfig(CommandConfig):
    """`rlhf train-rm`."""

    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass
class AlignConfig(TrainRmConfig):
    """`rlhf align`."""

    algo: AlgoConfig = field(default_factory=AlgoConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)


@dataclass
class SamplerConfig:
    """How `rlhf evaluate` samples, beside generation.temperature; 1 and 1 is the policy itself."""

    temperature: float = setting(gt=0)
    top_p: float = setting(gt=0, le=1)


@dataclass
class JudgeConfig:
    """A language model that judges completions, behind an OpenAI-compatible endpoint; `name` none asks nobody."""

    name: str = setting(choices=["none", "openai"])
    model: str | None = setting()
    base_url: str = setting()
    key_env: str = setting()
    prompts: int = setting(ge=1)
    retries: int = setting(ge=0, identity=False)
    timeout_seconds: float = setting(gt=0, identity=False)
    parallel: int = setting(ge=1, identity=False)


@dataclass
class EvaluateConfig(AlignConfig):
    """`rlhf evaluate`: policy, reference and reward models are run folders, model folders or Hub names.

    null (or no reward model) stands for those of the config.
    """

    stage: str = setting(choices=["policy", "rm"])
    policy: str | None = setting()
    checkpoint: str = setting(choices=["last", "best"])
    reference: str | None = setting()
    reward_model: list[str] = setting()
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
