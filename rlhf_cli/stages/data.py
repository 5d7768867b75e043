"""Say what a dataset is, or write its pairs into a file; nothing heavy is imported for the survey world."""

from __future__ import annotations

from pathlib import Path

from rlhf_cli.config.schema import CommandConfig, SplitConfig, SurveyConfig
from rlhf_cli.data import check
from rlhf_cli.errors import ConfigError


def run(cfg: CommandConfig, out: Path | None = None) -> str:
    """Return the text that describes the dataset of `cfg`; or write its pairs to `out`, and return what was written.

    Raises:
        UserError: the data or the model's tokenizer cannot be read, `out` cannot be written, or launch is not local.
    """
    if cfg.launch.name != "local":
        raise ConfigError(f"launch={cfg.launch.name} does not go with data", "It reads in one process", "Leave it out")
    check(cfg.dataset)
    if out is not None:
        from rlhf_cli.data.pairs_file import write_pairs

        count, dropped = write_pairs(cfg.dataset, out)
        return f"{out}: {count:,} rows" + (f", {sum(dropped.values()):,} left out" if dropped else "")
    if isinstance(cfg.dataset, SurveyConfig):
        from rlhf_cli.data.survey import describe_world, make_world

        return describe_world(make_world(cfg.dataset))
    from rlhf_cli.stages.description import description

    assert isinstance(cfg.dataset, SplitConfig)
    return description(cfg.dataset, cfg.model)
