"""Sources of preference data: the survey world and local text files, checked and split (rows.py)."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from rlhf_cli.config.schema import DatasetConfig, SurveyConfig, TextConfig
from rlhf_cli.data.rows import PreferenceData


def load(cfg: DatasetConfig) -> PreferenceData:
    """Return the rows of the dataset that `cfg` names.

    Raises:
        DataError: the file is missing, empty or malformed, or too few rows are left.
        ConfigError: the survey world cannot be made that large.
    """
    if isinstance(cfg, SurveyConfig):
        from rlhf_cli.data.survey import load_survey

        return load_survey(cfg)
    from rlhf_cli.data.text import load_text

    assert isinstance(cfg, TextConfig)
    return load_text(cfg)


def check(cfg: DatasetConfig) -> None:
    """Refuse, before anything heavy is imported, what `load` would refuse at first sight.

    Raises:
        DataError: the file is missing.
        ConfigError: the survey world cannot be made that large.
    """
    if isinstance(cfg, SurveyConfig):
        from rlhf_cli.data.survey import make_world

        make_world(cfg)
    elif isinstance(cfg, TextConfig):
        from rlhf_cli.data.text import existing_file

        existing_file(cfg.path)


def content(cfg: DatasetConfig) -> str | None:
    """Return the sha256 of the data file, None for a generated world: an edited file is other data."""
    path = cfg.path if isinstance(cfg, TextConfig) else None
    return sha256(Path(path).read_bytes()).hexdigest() if path else None
