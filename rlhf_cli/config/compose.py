"""From overrides to a typed config: Hydra composes the yaml, validate.py checks it. The only DictConfig is here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from hashlib import sha256
from importlib import import_module, invalidate_caches
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from rlhf_cli.config import resolvers, validate
from rlhf_cli.config.catalog import PACKAGE, Catalog, advice, conf_dir, has_key
from rlhf_cli.config.overrides import SWEEP as SWEEP
from rlhf_cli.config.overrides import check_override as check_override
from rlhf_cli.config.overrides import hydra_form as hydra_form
from rlhf_cli.config.overrides import is_hydra as is_hydra
from rlhf_cli.config.overrides import parse as parse
from rlhf_cli.config.overrides import plain as plain
from rlhf_cli.config.schema import CommandConfig
from rlhf_cli.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.override_parser.types import Override

HYDRA_VERSION_BASE = "1.3"
RECORD_FILE = "overrides.json"


def load(command: str, overrides: list[str], config_dir: Path | None = None) -> CommandConfig:
    """Return the typed config of one run.

    Args:
        command: `train-sft`, `train-rm`, `align` or `evaluate` (underscores are accepted too).
        overrides: as typed: `algo=pm`, `algo.beta=0.5`; `+` and `++` in front change nothing.
        config_dir: a user's own directory with further yaml (and algos/*.py), or None.

    Raises:
        ConfigError: anything about it is not valid.
    """
    command = command.replace("_", "-")
    overrides, config_dir = with_base(command, overrides, config_dir)
    catalog = Catalog(command, config_dir)
    parsed = parse(overrides)
    for override in parsed:
        check_override(override, catalog)
        if override.is_sweep_override():
            raise ConfigError(
                f"{override.input_line} lists several values",
                "One run takes one",
                "Add -m to run one job for each, or quote the value if it is text with a comma",
            )
    _admit_user_modules(config_dir)
    values, chosen = _composed(catalog, [hydra_form(override, catalog) for override in parsed])
    values = {key: value for key, value in values.items() if not _is_foreign(key, command, parsed)}
    _fill_mixture(values, catalog)
    return validate.typed(catalog, values, _origin(catalog, parsed, chosen))


class UserDirectory(SearchPathPlugin):
    """Puts a user's own directory in front of ours on every search path Hydra makes."""

    directory: ClassVar[Path | None] = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the directory, if there is one."""
        if self.directory is not None:
            search_path.prepend("user", f"file://{self.directory.resolve()}", anchor="main")


@contextmanager
def search_path(catalog: Catalog) -> Iterator[str]:
    """Within it, Hydra also finds the user's yaml; the value is the directory of ours, Hydra's main one."""
    Plugins.instance().register(UserDirectory)
    before, UserDirectory.directory = UserDirectory.directory, catalog.config_dir
    running = GlobalHydra.instance()  # a job of a multirun composes while Hydra runs it
    outer, running.hydra = running.hydra, None
    try:
        yield str(conf_dir())
    finally:
        UserDirectory.directory, running.hydra = before, outer


def _fill_mixture(values: dict[str, Any], catalog: Catalog) -> None:
    """Put what the parts of a mixture stand for, the values of their own yaml, into the config.

    Raises:
        ConfigError: a part is neither a dataset with a source of rows nor a path.
    """
    block = values.get("dataset")
    if not isinstance(block, dict) or block.get("source") != "mixture":
        return
    if "sources" in block:
        raise ConfigError(
            "dataset.sources is not set by hand", "It is what dataset.parts stand for", "Set dataset.parts"
        )
    parts = block.get("parts")
    names = parts if isinstance(parts, list) else [parts]
    known = catalog.choices("dataset")
    block["sources"] = []
    for name in names:
        chosen = [f"dataset={name}"] if name in known else ["dataset=preferences", f"++dataset.path='{name}'"]
        part = _composed(catalog, chosen)[0]["dataset"]
        if part["source"] in ("survey", "mixture"):
            texts = [choice for choice in known if choice not in ("survey", "mixture")]
            raise ConfigError(f"dataset.parts has {name}, which cannot be mixed", todo=advice(str(name), texts))
        block["sources"].append(part)


def _composed(catalog: Catalog, overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the composed values as plain dicts, and the choice of each group."""
    resolvers.register()
    try:
        with search_path(catalog) as ours, initialize_config_dir(ours, version_base=HYDRA_VERSION_BASE):
            cfg = compose(catalog.primary, overrides, return_hydra_config=True)
        chosen = OmegaConf.to_container(cfg.hydra.runtime.choices)
        OmegaConf.set_struct(cfg, False)
        del cfg["hydra"]
        values = OmegaConf.to_container(cfg, resolve=True)
    except InterpolationResolutionError as error:
        raise ConfigError(f"{error.full_key} cannot be resolved", str(error.msg)) from None
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError("the configuration does not compose", hydra_reason(error)) from None
    return values, chosen  # type: ignore[return-value]


def hydra_reason(error: Exception) -> str:
    """Return what Hydra says is wrong, without its search path."""
    return str(error).split("Config search path")[0]


def _admit_user_modules(config_dir: Path | None) -> None:
    """Let rlhf_cli.algos and .rewards find the modules in config_dir/algos and /rewards: one yaml and one module."""
    if config_dir is None:
        return
    for name, package_name in (("algos", "rlhf_cli.algos"), ("rewards", "rlhf_cli.rewards")):
        folder, package = str(config_dir.resolve() / name), import_module(package_name)
        if folder not in package.__path__:
            package.__path__.append(folder)
    invalidate_caches()


def _is_foreign(key: str, command: str, parsed: list[Override]) -> bool:
    """Return whether a block is another command's and came from yaml: an experiment serves every command."""
    typed_here = any(override.key_or_group.split(".")[0] == key for override in parsed)
    own = {field.name for field in fields(validate.COMMANDS[command])}
    known = {field.name for schema in validate.COMMANDS.values() for field in fields(schema)}
    return not typed_here and key in known - own


def _origin(catalog: Catalog, parsed: list[Override], chosen: dict[str, Any]) -> Callable[[str], str]:
    """Return a function that says where a dotted key was set."""
    typed_keys = [override.key_or_group for override in parsed if override.key_or_group not in catalog.groups]

    read = cache(catalog.read)  # asked once a key
    experiments = next((item.value() for item in reversed(parsed) if item.key_or_group == "experiment"), None)

    def where(key: str) -> str:
        if any(f"{key}.".startswith(f"{typed}.") or typed.startswith(f"{key}.") for typed in typed_keys):
            return "on the command line"
        group, rest = catalog.home(key)
        for name in experiments if isinstance(experiments, list) else [experiments]:
            if has_key(read(f"experiment/{name}"), key):
                return f"in {catalog.path(f'experiment/{name}')}"
        name = f"{group}/{chosen[group]}" if chosen.get(group) and rest else catalog.primary
        return f"in {catalog.path(name) or name}"

    return where


def with_base(command: str, overrides: list[str], config_dir: Path | None) -> tuple[list[str], Path | None]:
    """Return the overrides of `evaluate policy=RUN_DIR` on top of those the run was made with; others as they are.

    Raises:
        ConfigError: the run's record is damaged.
    """
    parsed = parse(overrides)
    asked = [str(item.input_line) for item in parsed]
    policy = next((item for item in reversed(parsed) if item.key_or_group == "policy"), None)
    if command != "evaluate" or policy is None or policy.is_sweep_override() or policy.value() is None:
        return asked, config_dir
    record_file = Path(str(policy.value())) / RECORD_FILE
    if not record_file.is_file():
        return asked, config_dir
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        made_with, made_in = [str(text) for text in record["overrides"]], record.get("config_dir")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{record_file} is damaged", str(error), 'It should hold {"command": ..., "overrides": [...]}'
        ) from None
    replaced = {"run_dir", "launch", *(_dotted(item) for item in parsed)}
    base = [
        item
        for item in parse(made_with)
        if not is_hydra(item.key_or_group)
        and not any(f"{_dotted(item)}.".startswith(f"{key}.") for key in replaced)  # the key, or the block it lies in
    ]
    return [*(plain(item) for item in base), *asked], config_dir or (Path(made_in) if made_in else None)


def _dotted(override: Override) -> str:
    return str(override.key_or_group).replace("/", ".")


def as_dict(cfg: CommandConfig) -> dict[str, Any]:
    """Return a typed config as nested dicts, in the order of its schema."""
    return asdict(cfg)


def dump(cfg: CommandConfig) -> str:
    """Return a typed config as yaml, every value resolved, in the order of its schema."""
    return yaml.safe_dump(as_dict(cfg), sort_keys=False, allow_unicode=True)


def identity(obj: Any, *, training: bool = False) -> dict[str, Any]:
    """Return a config (or any block of it) as nested dicts without what cannot change the result.

    Left out are the fields whose metadata says identity=False, at every depth; with `training` also those that only
    say how a trained model is read.
    """
    kept = [field for field in fields(obj) if field.metadata.get("identity", True)]
    values = {
        field.name: getattr(obj, field.name) for field in kept if not (training and field.metadata.get("reading"))
    }
    return {
        name: identity(value, training=training) if is_dataclass(value) else value for name, value in values.items()
    }


def own_modules(cfg: CommandConfig) -> dict[str, str]:
    """Return {"algo" or "reward": sha256 of the source} of the user's own modules that `cfg` uses."""
    found = {}
    for package, block in (("rlhf_cli.algos", "algo"), ("rlhf_cli.rewards", "reward")):
        name = getattr(getattr(cfg, block, None), "name", None)
        if name is None:
            continue
        module = validate.module(package, name) or validate.module(package, name.partition("_")[0])
        file = Path(str(getattr(module, "__file__", None)))
        if file.is_file() and not file.resolve().is_relative_to(PACKAGE):
            found[block] = sha256(file.read_bytes()).hexdigest()
    return found
