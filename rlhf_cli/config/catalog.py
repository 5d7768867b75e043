"""What yaml there is: the built-in conf directory, a user's own directory, their groups and choices."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from rlhf_cli.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]


def conf_dir() -> Path:
    """Return the directory of the built-in yaml: inside the package when installed, beside it in a checkout."""
    installed = PACKAGE / "conf"
    return installed if installed.is_dir() else PACKAGE.parent / "conf"


def nearest(word: str, valid: list[str]) -> str | None:
    """Return the entry of `valid` most like `word`, or None if nothing is; last parts (a.B) count on their own."""

    def similarity(candidate: str) -> float:
        whole = SequenceMatcher(None, word, candidate).ratio()
        last = SequenceMatcher(None, word.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return max(whole, 0.6 * last + 0.4 * whole)

    best = max(valid, key=similarity, default=None)
    return best if best is not None and similarity(best) >= 0.6 else None


def advice(word: str, valid: list[str]) -> str:
    """Return what to do about a choice that does not exist: the nearest one and the list."""
    close = get_close_matches(word, valid, n=1, cutoff=0.4)
    listing = f"Choose from {', '.join(valid)}"
    return f"The nearest choice is {close[0]}. {listing}" if close else listing


@dataclass(frozen=True)
class Catalog:
    """The yaml that one command sees; a user's directory comes first.

    Args:
        command: `train-sft`, `train-rm`, `align` or `evaluate`.
        config_dir: a user's own directory, or None.

    Raises:
        ConfigError: config_dir is not a directory.
    """

    command: str
    config_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.config_dir is not None and not self.config_dir.is_dir():
            raise ConfigError(
                f"--config-dir {self.config_dir} is not a directory",
                todo="Name a directory that holds group folders such as algo/ or experiment/",
            )

    @property
    def directories(self) -> list[Path]:
        """Where yaml is looked for, first match wins."""
        own = [] if self.config_dir is None else [self.config_dir.resolve()]
        return [*own, conf_dir()]

    @property
    def primary(self) -> str:
        """The name of the command's own yaml."""
        return self.command.replace("-", "_")

    @cached_property
    def groups(self) -> dict[str, str | None]:
        """Each config group of the command, with its default choice.

        Groups of other commands stand in its yaml with null, so that one experiment serves all; they are left out.
        """
        found: dict[str, str | None] = {}
        for entry in self.read(self.primary).get("defaults") or []:
            if isinstance(entry, dict) and not (name := str(next(iter(entry)))).startswith("override "):
                group = name.removeprefix("optional ").strip().removeprefix("/").partition("@")[0]
                if entry[name] is not None or name.startswith("optional "):
                    found[group] = entry[name]
        return found

    def choices(self, group: str) -> list[str]:
        """Return the choices of one group, sorted."""
        found = {path.stem for directory in self.directories for path in (directory / group).glob("*.yaml")}
        return sorted(found)

    def path(self, name: str) -> Path | None:
        """Return the file of a yaml such as `algo/pm`, or None."""
        candidates = (directory / f"{name}.yaml" for directory in self.directories)
        return next((path for path in candidates if path.is_file()), None)

    def read(self, name: str) -> dict[str, Any]:
        """Return the content of a yaml such as `algo/pm`; empty if there is none.

        Raises:
            ConfigError: the file is not valid yaml.
        """
        path = self.path(name)
        if path is None:
            return {}
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not valid yaml", str(error)) from None
        return content if isinstance(content, dict) else {}

    def home(self, key: str) -> tuple[str, str]:
        """Return the group a dotted key belongs to (algo/constraint before algo), and the rest of the key."""
        nested = [group for group in self.groups if "/" in group and key.startswith(f"{group.replace('/', '.')}.")]
        group = max(nested, key=len, default=key.partition(".")[0])
        return group, key[len(group) + 1 :]

    def choices_with(self, key: str) -> list[str]:
        """Return the choices, as `algo=pm`, of the key's own group whose yaml has this dotted key."""
        group, rest = self.home(key)
        return [f"{group}={name}" for name in self.choices(group) if self.sets(group, name, rest)]

    def sets(self, group: str, name: str, key: str) -> bool:
        """Return whether the yaml of a choice, or one of its group that it builds upon, has a dotted key."""
        content = self.read(f"{group}/{name}")
        bases = [entry for entry in content.get("defaults") or [] if isinstance(entry, str) and entry != "_self_"]
        return has_key(content, key) or any(self.sets(group, base, key) for base in bases)


def has_key(content: Any, key: str) -> bool:
    """Return whether nested dicts hold a dotted key."""
    for part in key.split("."):
        if not isinstance(content, dict) or part not in content:
            return False
        content = content[part]
    return True
