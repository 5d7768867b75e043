"""From composed yaml to a typed config: unknown keys, missing values, types, ranges, rules between keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from math import isfinite
from operator import attrgetter
from types import NoneType, UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_cli.config.catalog import Catalog, advice, has_key, nearest
from rlhf_cli.config.launching import launch_schema
from rlhf_cli.config.rules import check_rules
from rlhf_cli.config.schema import (
    AlignConfig,
    CommandConfig,
    EvaluateConfig,
    MixtureConfig,
    TrainRmConfig,
    TrainSftConfig,
)
from rlhf_cli.config.schemas import PRIORS as PRIORS
from rlhf_cli.config.schemas import algo_schema as algo_schema
from rlhf_cli.config.schemas import (
    constraint_schema,
    dataset_schema,
    generation_schema,
    model_schema,
    peft_schema,
    shown,
)
from rlhf_cli.config.schemas import module as module
from rlhf_cli.config.schemas import reward_schema as reward_schema
from rlhf_cli.errors import ConfigError

COMMANDS: dict[str, type[CommandConfig]] = {
    "train-sft": TrainSftConfig,
    "train-rm": TrainRmConfig,
    "align": AlignConfig,
    "evaluate": EvaluateConfig,
}
TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "gt": (">", lambda value, bound: value > bound),
    "ge": (">=", lambda value, bound: value >= bound),
    "lt": ("<", lambda value, bound: value < bound),
    "le": ("<=", lambda value, bound: value <= bound),
}


def typed(catalog: Catalog, values: dict[str, Any], where: Callable[[str], str]) -> CommandConfig:
    """Return the typed config of `values`, every rule checked.

    Args:
        catalog: of the command; for choices and neighbours named in messages.
        values: the composed config as plain nested dicts, interpolations resolved.
        where: dotted key -> where it was set, for messages ("on the command line", "in algo/pm.yaml").

    Raises:
        ConfigError: an unknown key, a key without a value, a wrong type, a value out of range, a broken rule.
    """
    command_schema = COMMANDS[catalog.command]
    blocks = _schemas(catalog, values, where)
    leaves = {key: (hint, field) for key, hint, field in _leaves(command_schema, blocks)}
    sources = _block(values, "dataset").pop("sources", [])  # what the parts of a mixture stand for
    for key in _flat(values, leaves):
        if key not in leaves:
            raise unknown_key(key, catalog, list(leaves), where(key))
    for key, (_, field) in leaves.items():
        if (field.default == MISSING and not has_key(values, key)) or (
            has_key(values, key) and _at(values, key) == MISSING
        ):
            raise ConfigError(f"{key} has no value", todo=f"Give one: {key}=VALUE on the command line or in its yaml")
    _make_lists(values, leaves, where)
    schema = OmegaConf.structured(command_schema)
    for name, block in blocks.items():
        group, _, inner = name.rpartition(".")
        (schema[group] if group else schema)[inner] = OmegaConf.structured(block)
    try:
        cfg = cast(CommandConfig, OmegaConf.to_object(OmegaConf.merge(schema, values)))
    except OmegaConfBaseException as error:
        key = str(error.full_key or "").partition("[")[0]  # of a list, not of what is in it
        raise _type_error(key, _at(values, key), leaves[key][0], where(key)) from None
    if isinstance(cfg.dataset, MixtureConfig):
        cfg.dataset.sources = sources
    for key, (_, field) in leaves.items():
        check_range(key, attrgetter(key)(cfg), field.metadata, where(key))
    check_rules(catalog.command, cfg)
    return cfg


def _schemas(catalog: Catalog, values: dict[str, Any], where: Callable[[str], str]) -> dict[str, type]:
    """Return the schema of every block that has several."""
    blocks: dict[str, type] = {
        "model": model_schema(_block(values, "model")),
        "peft": peft_schema(_block(values, "peft").get("name"), catalog),
        "dataset": dataset_schema(_block(values, "dataset").get("source")),
        "launch": launch_schema(_block(values, "launch").get("name")),
    }
    own = {field.name for field in fields(COMMANDS[catalog.command])}
    if "reward" in own:
        blocks["reward"] = reward_schema(_block(values, "reward").get("name"), catalog)
    if "generation" in own:
        blocks["generation"] = generation_schema(_block(values, "generation"))
    if "algo" in own:
        algo = _block(values, "algo")
        blocks["algo"] = algo_schema(algo.get("name"), catalog)
        blocks["algo.constraint"] = constraint_schema(algo.get("constraint"), where)
    return blocks


def _make_lists(
    values: dict[str, Any], leaves: Mapping[str, tuple[Any, Field[Any]]], where: Callable[[str], str]
) -> None:
    """Turn one value into a list of it, and null into an empty list, where the schema has a list.

    Raises:
        ConfigError: something in a list is no plain value.
    """
    for key in (key for key, (hint, _) in leaves.items() if get_origin(hint) is list and has_key(values, key)):
        block, _, name = key.rpartition(".")
        holder = _at(values, block) if block else values
        value = holder[name]
        single = (int, float) if get_args(leaves[key][0]) == (float,) else (str,)
        if value is None or isinstance(value, single):
            holder[name] = [] if value is None else [value]
        elif not isinstance(value, list) or any(item is None or isinstance(item, (list, dict)) for item in value):
            raise _type_error(key, value, leaves[key][0], where(key))


def unknown_key(key: str, catalog: Catalog, valid: list[str], where: str) -> ConfigError:
    """Return the refusal of a key that does not exist, with the nearest that does."""
    group = key.partition(".")[0]
    members = [leaf for leaf in valid if leaf.startswith(f"{key}.")]
    if members:
        return ConfigError(
            f"{key} (set {where}) is a block of keys, not a value", todo=f"Set one of them: {members[0]}=VALUE"
        )
    if group in catalog.groups or group == "experiment":
        # a yaml is no home of a key that is refused in it
        others = [name for name in catalog.choices_with(key) if where != f"in {catalog.path(name.replace('=', '/'))}"]
        if others:
            return ConfigError(f"{key} (set {where}) is not a key here", f"It is a key of {', '.join(others)}")
    else:
        homes = [name for name, schema in COMMANDS.items() if group in {field.name for field in fields(schema)}]
        if homes:
            return ConfigError(
                f"{key} (set {where}) is not a key of {catalog.command}", f"It belongs to {', '.join(homes)}"
            )
    close = nearest(key, [*valid, *catalog.groups])
    todo = f"The nearest valid key is {close}" if close else f"`rlhf {catalog.command} --cfg job` lists every key"
    return ConfigError(f"unknown key {key} (set {where})", todo=todo)


def _block(values: dict[str, Any], name: str) -> dict[str, Any]:
    block = values.get(name)
    return block if isinstance(block, dict) else {}


def _leaves(schema: type, blocks: Mapping[str, type], prefix: str = "") -> Iterator[tuple[str, Any, Field[Any]]]:
    """Yield (dotted key, type, field) of every value in a schema; `blocks` replaces top-level types by subclasses."""
    hints = get_type_hints(schema)
    for field in fields(schema):
        if field.metadata.get("derived"):
            continue
        key, hint = prefix + field.name, blocks.get(prefix + field.name, hints[field.name])
        if is_dataclass(hint):
            yield from _leaves(cast(type, hint), blocks, f"{key}.")
        else:
            yield key, hint, field


def _flat(values: dict[str, Any], leaves: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of nested dicts, stopping at keys the schema knows as values."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and key not in leaves:
            yield from _flat(value, leaves, f"{key}.")
        else:
            yield key


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _type_error(key: str, value: Any, hint: Any, where: str) -> ConfigError:
    return ConfigError(f"{key}={shown(value)} (set {where}) has the wrong type", f"It must be {_described(hint)}")


def _described(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_described(part) for part in get_args(hint))
    if get_origin(hint) is list:
        return "a list of numbers: [0.5,0.5]" if get_args(hint) == (float,) else "a list of texts: [a,b]"
    return TYPE_NAMES.get(hint, str(hint))


def check_range(key: str, value: Any, metadata: Mapping[str, Any], where: str) -> None:
    """Refuse a value outside the range of its field; null is never compared.

    Raises:
        ConfigError: out of range, not finite, or not one of the choices.
    """
    if value is None:
        return
    if isinstance(value, float) and not isfinite(value):
        raise ConfigError(f"{key}={value} (set {where}) is not a finite number")
    limits = [(BOUNDS[name], bound) for name, bound in metadata.items() if name in BOUNDS]
    if any(not holds(value, bound) for (_, holds), bound in limits):
        rule = " and ".join(f"{sign} {bound}" for (sign, _), bound in limits)
        raise ConfigError(f"{key}={value} (set {where}) is out of range", f"It must be {rule}")
    choices = metadata.get("choices")
    if choices is not None and value not in choices:
        raise ConfigError(f"{key}={value} (set {where}) is not a choice", todo=advice(str(value), list(choices)))
