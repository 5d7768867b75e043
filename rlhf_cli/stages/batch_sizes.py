"""Whether every stage of a command has enough rows for one batch, asked before the first of them trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_cli import algos
from rlhf_cli.config.schema import (
    AlignConfig,
    CommandConfig,
    EvaluateConfig,
    OnlineAlgoConfig,
    SplitConfig,
    StageTraining,
    TrainedRewardConfig,
    TrainRmConfig,
)
from rlhf_cli.data.rows import PreferenceData
from rlhf_cli.errors import DataError


@dataclass(frozen=True)
class Batch:
    """What a stage reads at a time, and what there is.

    Args:
        key: the stage's block of the config.
        block: its settings.
        rows: there are.
        needed: rows of one batch.
        what: the rows, in words.
        per_row: what batch_size counts of a row (responses of a prompt).
    """

    key: str
    block: StageTraining
    rows: int
    needed: int
    what: str
    per_row: float = 1

    def remedy(self) -> str:
        """Return the overrides with which the rows fill one batch."""
        size = max(1, int(self.rows * self.per_row))
        micro = self.block.micro_batch_size
        free = micro is not None and size % micro  # micro_batch_size has to divide batch_size
        return f"{self.key}.batch_size={size}" + (f" {self.key}.micro_batch_size=null" if free else "")


def require_batches(cfg: CommandConfig, data: PreferenceData) -> None:
    """Refuse data that does not fill one batch of each stage that `cfg` trains: nothing would be trained there.

    Args:
        cfg: of the command.
        data: rows that fit the context.

    Raises:
        DataError: naming every stage that is short of rows, and batch sizes that go with what there is.
    """
    short = [batch for batch in _batches(cfg, data) if batch.rows < batch.needed]
    if short:
        raise DataError(
            "; ".join(f"{batch.rows} {batch.what} are too few for one batch of {batch.needed}" for batch in short),
            "nothing would be trained",
            f"add data, or set {' '.join(batch.remedy() for batch in short)} or less",
        )


def _batches(cfg: CommandConfig, data: PreferenceData) -> Iterator[Batch]:
    sft = cfg.trainer.sft
    if sft.max_steps != 0:
        yield Batch("trainer.sft", sft, len(data.demonstrations), sft.batch_size, "demonstrations")
    if isinstance(cfg, TrainRmConfig) and isinstance(cfg.reward, TrainedRewardConfig):
        judged = len(data.reward_rankings) or len(data.reward_pairs)
        with_damaged = int(judged / (1 - cfg.reward.negative_share))
        yield Batch("trainer.rm", cfg.trainer.rm, with_damaged, cfg.trainer.rm.batch_size, "reward judgements")
    if isinstance(cfg, AlignConfig) and not isinstance(cfg, EvaluateConfig):
        yield from _alignment(cfg, data)


def _alignment(cfg: AlignConfig, data: PreferenceData) -> Iterator[Batch]:
    if algos.get(cfg.algo.name).family == "pairwise":
        block = cfg.trainer.pairwise
        yield Batch("trainer.pairwise", block, len(data.policy_pairs), block.batch_size, "preference pairs")
    elif isinstance(cfg.dataset, SplitConfig):  # the survey's few prompts repeat within a batch
        assert isinstance(cfg.algo, OnlineAlgoConfig)
        online, per_row = cfg.trainer.online, cfg.algo.num_generations / cfg.algo.minibatches
        needed = int(online.batch_size / per_row)
        yield Batch("trainer.online", online, len(data.prompts), needed, "prompts", per_row)
