"""Sources of preference data: the survey world, files, folders and the Hub, checked and split (rows.py)."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

from rlhf_cli.config.schema import DatasetConfig, MixtureConfig, SplitConfig, SurveyConfig, TextConfig
from rlhf_cli.data.rows import PreferenceData

# What says where the rows lie, not which they are.
PLACE = {"path", "revision", "parts", "sources"}
# What a part of a mixture says about its rows.
OF_A_PART = ("source", "subset", "split", "columns", "max_rows")


def load(cfg: DatasetConfig) -> PreferenceData:
    """Return the rows of the dataset that `cfg` names.

    Raises:
        DataError: there is nothing to read, something in it is malformed, or too few rows are left.
        ConfigError: the survey world cannot be made that large.
        UserError: the Hub, or a dataset on it, cannot be reached.
    """
    if isinstance(cfg, SurveyConfig):
        from rlhf_cli.data.survey import load_survey

        return load_survey(cfg)
    from rlhf_cli.data.text import load_text, usable_rows

    assert isinstance(cfg, SplitConfig)
    if not cfg.streaming:
        return load_text(cfg)
    from rlhf_cli.data.stream import load_streamed

    return load_streamed(lambda dropped, parts: usable_rows(cfg, dropped, parts), cfg, rows_identity(cfg))


def check(cfg: DatasetConfig) -> None:
    """Refuse, before anything heavy is imported, what `load` would refuse at first sight; fetch what is on the Hub.

    Raises:
        DataError: there is nothing at the path.
        ConfigError: the survey world cannot be made that large.
        UserError: the Hub, or a dataset on it, cannot be reached.
    """
    if isinstance(cfg, SurveyConfig):
        from rlhf_cli.data.survey import make_world

        make_world(cfg)
    elif isinstance(cfg, MixtureConfig):
        from rlhf_cli.data import mixture

        mixture.check(cfg)
    elif isinstance(cfg, TextConfig):
        from rlhf_cli.data.sources import find

        find(cfg)


def content(cfg: DatasetConfig) -> str | None:
    """Return what identifies the data, None for a generated world: an edited file is other data.

    Of a file its sha256, of a folder that of its files, of a dataset of the Hub its commit, of a mixture all of them.

    Raises:
        UserError: the data cannot be reached.
    """
    if isinstance(cfg, MixtureConfig):
        from rlhf_cli.data import mixture

        said = [{key: part.get(key) for key in OF_A_PART} for part in cfg.sources]
        return sha256(repr([cfg.weights, mixture.content(cfg), said]).encode()).hexdigest()
    if isinstance(cfg, TextConfig):
        from rlhf_cli.data import sources

        return sources.content(cfg)
    return None


def rows_identity(cfg: SplitConfig) -> dict[str, Any]:
    """Return what determines the usable rows of a dataset, besides the settings of the split.

    Raises:
        UserError: the data cannot be reached.
    """
    said = {key: getattr(cfg, key) for key in ("source", "subset", "split") if hasattr(cfg, key)}
    columns = getattr(cfg, "columns", None)
    return {**said, "columns": None if columns is None else vars(columns), "content": content(cfg)}
