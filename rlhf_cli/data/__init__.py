"""Sources of preference data: the survey world and local text files, checked and split (rows.py)."""

from __future__ import annotations

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
