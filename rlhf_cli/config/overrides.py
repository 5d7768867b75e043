"""Overrides as typed on the command line: read, checked, and handed to Hydra."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from rlhf_cli.config import validate
from rlhf_cli.config.catalog import Catalog, advice
from rlhf_cli.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

SWEEP = "sweep"  # the group of sweeps: no part of a run's config


def parse(overrides: list[str]) -> list[Override]:
    """Return the overrides in Hydra's parsed form.

    Raises:
        ConfigError: one is malformed.
    """
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(_with_path_quoted(text)))
        except HydraException as error:
            reason = str(error).split("\nSee https")[0].removeprefix(f"Error parsing override '{text}'")
            raise ConfigError(
                f"cannot read '{text}'", reason, "Write KEY=VALUE, and quote special characters: key='a,b'"
            ) from None
    return parsed


def _with_path_quoted(text: str) -> str:
    """Return the override with quotes if its value is a path that exists: run folders are named `algo=pm,seed=0`.

    A path in the home folder, existing or not, is written out: shells leave `key=~/x` as it is, and Hydra refuses it.
    """
    key, _, value = text.partition("=")
    if re.fullmatch(r"~/[\w./:@ =-]*", value):
        return "{}='{}'".format(key, os.path.expanduser(value).replace("'", "\\'"))
    if re.fullmatch(r"[\w./:@-]*", value) or "'" in value or not os.path.exists(value):
        return text
    return f"{key}='{value}'"


def is_hydra(key: str) -> bool:
    """Return whether a key configures Hydra itself (launcher, sweeper), not the run."""
    return key == "hydra" or key.startswith(("hydra.", "hydra/"))


def check_override(override: Override, catalog: Catalog) -> None:
    """Refuse deletions, packages, and choices that do not exist; values are judged after composition.

    Raises:
        ConfigError: naming the override.
    """
    key = override.key_or_group
    if not key or override.package is not None or override.is_delete():
        raise ConfigError(f"{override.input_line} is not possible", todo="Write KEY=VALUE with a key of the config")
    if key == "hydra.searchpath":
        raise ConfigError("hydra.searchpath is set by rlhf itself", todo="Use --config-dir for a directory of your own")
    if key == SWEEP:
        todo = f"Add -m: rlhf {catalog.command} -m {override.input_line}"
        raise ConfigError(f"{override.input_line} is a sweep, and this is one run", todo=todo)
    if is_hydra(key):
        return
    if key not in catalog.groups and ("/" in key or catalog.choices(key)):
        raise validate.unknown_key(key.replace("/", "."), catalog, [], "on the command line")
    if key not in catalog.groups or override.is_sweep_override():
        return
    value, valid = override.value(), catalog.choices(key)
    several = isinstance(value, list) and key == "experiment"
    for choice in value if several else [value]:  # type: ignore[union-attr]
        if choice not in valid and not (choice is None and catalog.groups[key] is None):
            shown = "null" if choice is None else choice
            raise ConfigError(f"{key}={shown} does not exist", todo=advice(str(choice), valid))


def hydra_form(override: Override, catalog: Catalog) -> str:
    """Return the override as Hydra shall see it: values are forced in, since the schema judges them afterwards."""
    key = override.key_or_group
    if is_hydra(key):
        return str(override.input_line)
    bare = plain(override)
    return bare if key in catalog.groups else f"++{bare}"


def plain(override: Override) -> str:
    """Return the override as typed, without `+` or `++`."""
    return str(override.input_line).lstrip("+")
