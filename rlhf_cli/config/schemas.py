"""Which structured config a block of values has: by the algorithm, the reward, the model, the adapters, the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from types import ModuleType
from typing import Any

from rlhf_cli.config.catalog import Catalog, advice
from rlhf_cli.config.generation import ENGINES, SCHEMAS
from rlhf_cli.config.inputs import DATASETS, PEFT
from rlhf_cli.config.schema import (
    AlgoConfig,
    CosinePrior,
    DatasetConfig,
    FixedPrior,
    GenerationConfig,
    LengthPrior,
    MadeModelConfig,
    ModelConfig,
    PeftConfig,
    Prior,
    RandomPrior,
    RewardConfig,
    TrainedRewardConfig,
)
from rlhf_cli.errors import ConfigError

PRIORS: dict[str, type[Prior]] = {
    "none": Prior,
    "length": LengthPrior,
    "cosine": CosinePrior,
    "fixed": FixedPrior,
    "random": RandomPrior,
}


def algo_schema(name: Any, catalog: Catalog) -> type[AlgoConfig]:
    """Return the `Config` class of rlhf_cli.algos.<name>.

    Raises:
        ConfigError: there is no such algorithm.
    """
    valid = catalog.choices("algo")
    if name not in valid:
        raise ConfigError(f"algo.name={name} does not name an algorithm", todo=advice(str(name), valid))
    found = module("rlhf_cli.algos", name)
    if found is None:
        raise ConfigError(
            f"algorithm '{name}' has no module rlhf_cli/algos/{name}.py (or algos/{name}.py under --config-dir)",
            todo=advice(name, [choice for choice in valid if choice != name]),
        )
    schema = getattr(found, "Config", None)
    if not (isinstance(schema, type) and issubclass(schema, AlgoConfig)):
        raise ConfigError(
            f"algorithm '{name}' has no Config class in {found.__file__}",
            todo="Define `@dataclass class Config(AlgoConfig)` there, one field a key of its yaml",
        )
    return schema


def reward_schema(name: Any, catalog: Catalog) -> type[RewardConfig]:
    """Return the config class of a reward: `CONFIGS[name]` or `Config` of rlhf_cli.rewards.<name or its first word>.

    Raises:
        ConfigError: there is no such reward.
    """
    valid = catalog.choices("reward")
    if name not in valid:
        raise ConfigError(f"reward.name={name} does not name a reward", todo=advice(str(name), valid))
    found = module("rlhf_cli.rewards", name) or module("rlhf_cli.rewards", name.partition("_")[0])
    if found is None:
        raise ConfigError(
            f"reward '{name}' has no module rlhf_cli/rewards/{name}.py (or rewards/{name}.py under --config-dir)",
            todo=advice(name, [choice for choice in valid if choice != name]),
        )
    family = getattr(found, "CONFIGS", {})  # pcrm_length_mine is a pcrm_length
    kin = [key for key in family if name == key or name.startswith(f"{key}_")]
    schema = family[max(kin, key=len)] if kin else getattr(found, "Config", None)
    base = RewardConfig if name == "gold" else TrainedRewardConfig
    if not (isinstance(schema, type) and issubclass(schema, base)):
        raise ConfigError(
            f"reward '{name}' has no Config(TrainedRewardConfig) class in {found.__file__}",
            todo="Define `@dataclass class Config(TrainedRewardConfig)` there, one field a key of its yaml",
        )
    return schema


def module(package: str, name: str) -> ModuleType | None:
    """Return <package>.<name>, or None where there is none; what fails inside it is not hidden."""
    module_name = f"{package}.{name}"
    try:
        return import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name:
            raise
        return None


def constraint_schema(block: Any, where: Callable[[str], str]) -> type[Prior]:
    if not isinstance(block, dict):
        raise ConfigError(
            f"algo.constraint={shown(block)} (set {where('algo.constraint')}) is not a block of keys",
            "A constraint is chosen with a slash",
            f"Write algo/constraint=CHOICE. Choose from {', '.join(PRIORS)}",
        )
    name = block.get("name")
    if name not in PRIORS:
        raise ConfigError(f"algo.constraint.name={name} is not a constraint", todo=advice(str(name), list(PRIORS)))
    return PRIORS[name]


def model_schema(block: dict[str, Any]) -> type[ModelConfig]:
    """Return the schema with sizes where the yaml describes a model that can be made here."""
    sizes = {field.name for field in fields(MadeModelConfig)} - {field.name for field in fields(ModelConfig)}
    return MadeModelConfig if sizes <= block.keys() else ModelConfig


def peft_schema(name: Any, catalog: Catalog) -> type[PeftConfig]:
    if name not in PEFT:
        raise ConfigError(f"peft.name={name} is not a choice", todo=advice(str(name), catalog.choices("peft")))
    return PEFT[name]


def generation_schema(block: dict[str, Any]) -> type[GenerationConfig]:
    """Return the schema of the engine that a `generation` block names.

    Raises:
        ConfigError: there is no such engine, or the block belongs to another and lacks its keys.
    """
    engine = block.get("engine")
    if engine not in ENGINES:
        raise ConfigError(f"generation.engine={shown(engine)} is not a choice", todo=advice(str(engine), list(ENGINES)))
    schema = SCHEMAS.get(engine, GenerationConfig)
    lacking = {field.name for field in fields(schema)} - block.keys()
    if lacking and schema is not GenerationConfig:
        raise ConfigError(
            f"generation.engine={engine} has keys that generation={block.get('name')} lacks: "
            + ", ".join(sorted(lacking)),
            todo=f"Choose it as a whole: generation={engine}",
        )
    return schema


def dataset_schema(source: Any) -> type[DatasetConfig]:
    if source not in DATASETS:
        raise ConfigError(f"dataset.source={source} is not a source", todo=advice(str(source), list(DATASETS)))
    return DATASETS[source]


def shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
