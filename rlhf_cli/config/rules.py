"""Rules between keys: values that are valid alone and not together."""

from __future__ import annotations

import re
from typing import Any

from rlhf_cli import ranks
from rlhf_cli.config.inputs import ChoiceColumns, ChoicesConfig
from rlhf_cli.config.launching import check_launch
from rlhf_cli.config.schema import (
    CorrectedGeneration,
    CosinePrior,
    DatasetConfig,
    GenerationConfig,
    MadeModelConfig,
    MixtureConfig,
    ModelConfig,
    OnlineAlgoConfig,
    OnlineTraining,
    PeftConfig,
    Prior,
    QLoraConfig,
    RandomPrior,
    SimilarityPrior,
    SplitConfig,
    StageTraining,
    SurveyConfig,
    TextConfig,
    VllmGeneration,
)
from rlhf_cli.errors import ConfigError


def check_rules(command: str, cfg: Any) -> None:
    """Refuse values that are valid alone and not together.

    Raises:
        ConfigError: naming the keys.
    """
    for stage in ("sft", "rm", "online", "pairwise"):
        _check_stage(f"trainer.{stage}", getattr(cfg.trainer, stage))
    _check_model(cfg.model, cfg.peft)
    if cfg.trainer.sft.max_steps == 0 and cfg.model.path is None:
        raise ConfigError(
            f"trainer.sft.max_steps=0 leaves model={cfg.model.name} untrained",
            "It takes a model as it is, and this one is made from nothing",
            "Train it, or name an SFT policy: model.path=FOLDER",
        )
    _check_dataset(cfg.dataset)
    if hasattr(cfg, "reward") and cfg.reward.name == "gold":
        _check_gold(command, cfg)
    if getattr(cfg, "stage", "policy") == "rm":
        _check_trust(cfg)
    if isinstance(getattr(cfg, "reward", None), Prior):
        _check_prior("reward", cfg.reward)
    if hasattr(cfg, "algo"):
        _check_prior("algo.constraint", cfg.algo.constraint)
    if getattr(cfg.model, "share_base", False):
        _check_shared(cfg)
    if isinstance(getattr(cfg, "algo", None), OnlineAlgoConfig):
        _check_online(cfg.algo, cfg.trainer.online)
    if hasattr(cfg, "generation"):
        _check_generation(cfg.generation, cfg.dataset, cfg.peft)
        _check_split(cfg.generation, cfg.launch)
    check_launch(cfg.launch, cfg.device)


def _check_model(model: ModelConfig, peft: PeftConfig) -> None:
    if isinstance(model, MadeModelConfig):
        if model.hidden_size % model.heads:
            raise ConfigError(
                f"model.hidden_size={model.hidden_size} is not divisible by model.heads={model.heads}",
                "Every head has the same width",
            )
    elif model.path is None:
        raise ConfigError(
            f"model.path is null, and model={model.name} is loaded from somewhere",
            todo="Name a folder in Hugging Face layout or a Hub id: model.path=ORG/NAME",
        )
    if model.reward_start == "base" and model.path is None and model.reward_path is None:
        raise ConfigError(
            f"model.reward_start=base needs a base, and model={model.name} is made from nothing",
            todo="Use model.reward_start=sft, or name one: model.reward_path=FOLDER",
        )
    if not model.share_base:
        return
    needed = "The roles share one base through adapters, each started from the SFT policy"
    if peft.name == "none":
        raise ConfigError("model.share_base=true needs adapters", needed, "Add peft=lora")
    if model.reward_path is not None or model.reward_start != "sft":
        raise ConfigError(
            "model.share_base=true does not go with a reward model on another base",
            needed,
            "Use model.reward_path=null model.reward_start=sft",
        )


def _check_shared(cfg: Any) -> None:
    if getattr(getattr(cfg, "reward", None), "name", "") == "warm":
        raise ConfigError(
            "reward=warm does not go with model.share_base=true",
            "It averages whole models, not adapters",
            "Use model.share_base=false",
        )
    if getattr(cfg.launch, "strategy", "ddp") != "ddp":
        raise ConfigError(
            f"launch.strategy={cfg.launch.strategy} does not go with model.share_base=true",
            "The roles' adapters are stepped apart, and would lie in one model that is split",
            "Use launch.strategy=ddp, or model.share_base=false",
        )


def _check_mixture(dataset: MixtureConfig) -> None:
    if len(dataset.parts) != len(dataset.weights) or not dataset.parts:
        raise ConfigError(
            f"dataset.parts has {len(dataset.parts)} datasets and dataset.weights {len(dataset.weights)} numbers",
            "Every part has one weight",
        )
    if any(not 0 < weight < float("inf") for weight in dataset.weights):
        raise ConfigError(f"dataset.weights={dataset.weights} has a weight that is not a number > 0")


def _check_trust(cfg: Any) -> None:
    """Refuse what is for policies alone where a reward model is judged."""
    given = {
        "reward_model=": cfg.reward_model,
        "reference=": cfg.reference is not None,
        f"sampler.temperature={cfg.sampler.temperature}": cfg.sampler.temperature != 1,
        f"sampler.top_p={cfg.sampler.top_p}": cfg.sampler.top_p != 1,
        f"judge={cfg.judge.name}": cfg.judge.name != "none",
    }
    for what in (name for name, found in given.items() if found):
        raise ConfigError(
            f"{what} does not go with stage=rm",
            "The trust report judges the reward model of the config, or of the run that policy= names",
            "Use policy=RUN_DIR, its run folder, or stage=policy",
        )


def _check_prior(key: str, prior: Prior) -> None:
    if isinstance(prior, SimilarityPrior) and (least := prior.beta1 / (1 + prior.beta2) + prior.beta3) <= 0:
        raise ConfigError(
            f"{key}.beta1={prior.beta1}, beta2={prior.beta2}, beta3={prior.beta3} bound equal responses by {least:g}",
            "beta1 / (1 + beta2) + beta3 must be > 0, or the rejected response is trained to win",
            f"Raise {key}.beta3 or {key}.beta1",
        )
    if isinstance(prior, RandomPrior) and prior.low > prior.high:
        raise ConfigError(f"{key}.low={prior.low} is above {key}.high={prior.high}")
    if isinstance(prior, CosinePrior) and prior.encoder == "sft" and prior.pooling == "cls":
        raise ConfigError(
            f"{key}.pooling=cls does not go with {key}.encoder=sft",
            "The first token of a causal language model sees nothing of the response",
            f"Use {key}.pooling=mean, or an encoder such as {key}.encoder=bert-base-uncased",
        )


def _check_generation(generation: GenerationConfig, dataset: DatasetConfig, peft: PeftConfig) -> None:
    engine = generation.engine
    if getattr(dataset, "closed_vocabulary", False) and engine != "lean":
        raise ConfigError(
            f"dataset.closed_vocabulary=true does not go with generation.engine={engine}",
            "Only our own sampler restricts itself to the valid answers",
            "Use generation=default",
        )
    cap = generation.correction_cap if isinstance(generation, CorrectedGeneration) else None
    if cap is not None and generation.top_p < 1:
        raise ConfigError(
            f"generation.correction_cap={cap} does not go with generation.top_p={generation.top_p}",
            "The engine's log-probs are then those within the nucleus, and training's those of the whole policy",
            "Use generation.top_p=1, or generation.correction_cap=null",
        )
    if not isinstance(generation, VllmGeneration):
        return
    if generation.mode == "server" and generation.server_url is None:
        raise ConfigError(
            "generation.mode=server needs generation.server_url",
            todo="Start a server (docs/generation.md) and name it: generation.server_url=http://localhost:8000",
        )
    if isinstance(peft, QLoraConfig):
        raise ConfigError(
            "generation=vllm does not go with peft=qlora",
            "To send vLLM a policy its adapter is added to the base, and a base in few bits would be rounded each time",
            "Use peft=lora, or generation=default or continuous",
        )


def _check_split(generation: GenerationConfig, launch: Any) -> None:
    strategy = getattr(launch, "strategy", "ddp")
    if generation.engine == "continuous" and strategy in ranks.SHARDING:
        raise ConfigError(
            f"generation=continuous does not go with launch.strategy={strategy}",
            "Each process makes as many forward passes as its own responses need, and split weights need all of them",
            "Use generation=default or vllm",
        )


def _check_stage(key: str, stage: StageTraining) -> None:
    if (stage.max_steps is None) == (stage.epochs is None):
        both = "both set" if stage.epochs is not None else "both null"
        raise ConfigError(
            f"{key}.max_steps and {key}.epochs are {both}",
            "Exactly one of them says how long to train",
            f"Set one and the other to null: {key}.max_steps=null {key}.epochs=1",
        )
    if stage.micro_batch_size is not None and stage.batch_size % stage.micro_batch_size:
        raise ConfigError(
            f"{key}.batch_size={stage.batch_size} is not divisible by {key}.micro_batch_size={stage.micro_batch_size}"
        )


def _check_dataset(dataset: DatasetConfig) -> None:
    if not isinstance(dataset, SplitConfig):
        return
    if isinstance(dataset, MixtureConfig):
        _check_mixture(dataset)
    if isinstance(dataset, TextConfig) and dataset.path is None:
        raise ConfigError(
            f"dataset.path is null, and dataset={dataset.name} reads a file, a folder or a dataset of the Hub",
            todo="Name it: dataset.path=FILE.jsonl",
        )
    if isinstance(dataset, ChoicesConfig):
        _check_templates(dataset.columns)
    if dataset.sft_fraction + dataset.rm_fraction >= 1:
        raise ConfigError(
            f"dataset.sft_fraction={dataset.sft_fraction} + dataset.rm_fraction={dataset.rm_fraction} is 1 or more",
            "The rest of the training prompts is for alignment",
        )


def _check_templates(columns: ChoiceColumns) -> None:
    for key in ("prompt", "short_prompt"):
        template = getattr(columns, key)
        if template is not None and not re.search(r"\{[^{}]+\}", template):
            raise ConfigError(
                f"dataset.columns.{key}={template} names no column, so all prompts would be the same",
                "It is text with column names in braces",
                f"Write them so: dataset.columns.{key}='{{{template}}}'",
            )


def _check_gold(command: str, cfg: Any) -> None:
    if command == "train-rm" or getattr(cfg, "stage", "policy") == "rm":
        asked = "train-rm reward=gold trains" if command == "train-rm" else "evaluate stage=rm reward=gold judges"
        raise ConfigError(
            f"{asked} nothing",
            "The gold reward is known exactly",
            "Use reward=bt, or align reward=gold",
        )
    if not isinstance(cfg.dataset, SurveyConfig):
        raise ConfigError(
            f"reward=gold needs dataset=survey, not {cfg.dataset.name}",
            "Only there the true reward is known",
            "Use reward=bt",
        )


def _check_online(algo: OnlineAlgoConfig, online: OnlineTraining) -> None:
    if algo.constraint.name != "none":
        raise ConfigError(
            f"algo/constraint={algo.constraint.name} does not go with algo={algo.name}",
            "It bounds the logit of preference pairs, and this algorithm learns from rewards",
            f"Use reward=pcrm_{algo.constraint.name}, or algo=dpo, rpo or dpm",
        )
    if algo.advantage == "rloo" and algo.num_generations < 2:
        raise ConfigError(
            "algo.advantage=rloo needs algo.num_generations >= 2",
            "Each response is compared with the others of its prompt",
        )
    rollouts = online.batch_size * algo.minibatches
    if rollouts % algo.num_generations:
        raise ConfigError(
            f"trainer.online.batch_size={online.batch_size} x algo.minibatches={algo.minibatches} = {rollouts} "
            f"rollouts is not divisible by algo.num_generations={algo.num_generations}",
            "Every prompt of a batch gets all its responses",
        )
