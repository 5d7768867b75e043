"""Rollouts are dealt out so that an optimizer step has the same ones whatever the number of ranks and micro-batches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli import ranks
from rlhf_cli.config.schema import StageTraining
from rlhf_cli.errors import ConfigError
from rlhf_cli.store import Store
from rlhf_cli.trainers.common import WholeBatches, share_of_batch
from rlhf_cli.trainers.rollouts import Rollouts, dealt

TOKENS = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4])


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(ranks, "rank", lambda: rank)
    monkeypatch.setattr(ranks, "world", lambda: world)


def rollouts() -> dict[str, Tensor]:
    """Return twelve rollouts by number: two tokens of a prompt, and 1 to 8 of a response."""
    mask = torch.arange(8) < TOKENS[:, None]
    rows = torch.arange(12)[:, None].expand(-1, 8)
    seen = torch.cat([torch.tensor([[False, True, True]]).expand(12, -1), mask], 1)
    ids = torch.cat([torch.zeros(12, 3, dtype=torch.long), rows], 1)
    return {"row": rows, "input_ids": ids, "attention_mask": seen, "response_ids": rows, "response_mask": mask}


def steps(monkeypatch: pytest.MonkeyPatch, world: int, size: int, key: tuple[int, ...] = (0, 0)) -> list[set[int]]:
    """Return the rollouts of each of two optimizer steps, over all ranks."""
    count = 12 // (size * world)
    found: list[set[int]] = [set(), set()]
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        parts = dealt(rollouts(), key=key, size=size, count=count, per_step=count // 2)
        for number, part in enumerate(parts):
            found[number // (count // 2)] |= set(part["row"][:, 0].tolist())
    return found


@pytest.mark.parametrize(("world", "size"), [(1, 3), (1, 1), (2, 3), (2, 1), (3, 2), (6, 1)])
def test_a_step_has_the_same_rollouts_for_any_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch, world: int, size: int
) -> None:
    expected = steps(monkeypatch, 1, 6)
    assert expected[0] | expected[1] == set(range(12))
    assert steps(monkeypatch, world, size) == expected


def test_another_pass_has_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert steps(monkeypatch, 1, 6, (0, 1)) != steps(monkeypatch, 1, 6)


@pytest.mark.parametrize(("world", "size"), [(1, 6), (1, 2), (2, 3), (3, 1)])
def test_shares_make_a_mean_over_the_tokens_of_a_step(monkeypatch: pytest.MonkeyPatch, world: int, size: int) -> None:
    count = 12 // (size * world)
    sums = [0.0, 0.0]
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        for number, part in enumerate(dealt(rollouts(), key=[3], size=size, count=count, per_step=count // 2)):
            values = part["row"][part["response_mask"]].float()
            sums[number // (count // 2)] += float(part["share"] * values.mean()) / (count // 2) / world
    for found, rows in zip(sums, steps(monkeypatch, 1, 6, (3,)), strict=True):
        chosen = torch.tensor(sorted(rows))
        assert found == pytest.approx(float((chosen * TOKENS[chosen]).sum() / TOKENS[chosen].sum()))


def test_micro_batches_of_a_step_go_from_long_to_short_without_needless_padding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        parts = dealt(rollouts(), key=[3], size=1, count=6, per_step=3)
        widths = [part["response_mask"].shape[1] for part in parts]
        assert widths == [int(part["response_mask"].sum()) for part in parts]
        assert all(part["input_ids"].shape[1] == width + 2 for part, width in zip(parts, widths, strict=True))
        assert widths[:3] == sorted(widths[:3], reverse=True)
        assert widths[3:] == sorted(widths[3:], reverse=True)


def test_rollouts_that_cannot_be_dealt_are_refused() -> None:
    with pytest.raises(ValueError, match="12 rollouts are no 5 micro-batches of 2 on 1 ranks"):
        dealt(rollouts(), key=[0], size=2, count=5, per_step=5)


def test_the_rollouts_of_all_ranks_are_padded_to_one_width(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Rollouts([[1]], [[2, 3]], torch.tensor([0.5]), {"logps": torch.tensor([[-1.0, -2.0]])}, [[-1.0, -2.0]])
    theirs = ([[4, 5]], [[6, 7, 8]], torch.tensor([1.5]), {"logps": torch.tensor([[-3.0, -4.0, -5.0]])}, [[-3.0] * 3])
    as_rank(monkeypatch, 0, 2)
    monkeypatch.setattr(ranks, "gather", lambda own: [own, theirs])
    whole = mine.of_all_ranks()
    assert (whole.prompts, whole.responses) == ([[1], [4, 5]], [[2, 3], [6, 7, 8]])
    assert whole.scores.tolist() == [0.5, 1.5]
    assert whole.columns["logps"].tolist() == [[-1, -2, 0], [-3, -4, -5]]
    assert whole.engine_logps == [[-1.0, -2.0], [-3.0] * 3]
    assert whole.batch(0).input_ids.tolist() == [[0, 1, 2, 3, 0], [4, 5, 6, 7, 8]]


# -- batches of rows ---------------------------------------------------------------------------------------------------


def block(batch: int, micro: int | None) -> StageTraining:
    return StageTraining(
        max_steps=1, epochs=None, batch_size=batch, micro_batch_size=micro, learning_rate=1e-3, lr_scheduler="constant",
        warmup_fraction=0.0, adam_beta2=0.99, weight_decay=0.0, max_grad_norm=1.0, log_every_steps=1,
        save_every_steps=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "micro", "world", "expected"),
    [(16, None, 1, (16, 1)), (16, 4, 1, (4, 4)), (16, None, 4, (4, 1)), (16, 2, 4, (2, 2)), (16, 16, 4, (4, 1))],
)
def test_ranks_share_a_batch(
    monkeypatch: pytest.MonkeyPatch, batch: int, micro: int | None, world: int, expected: tuple[int, int]
) -> None:
    as_rank(monkeypatch, 0, world)
    assert share_of_batch(block(batch, micro), "sft") == expected


def test_a_batch_that_ranks_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 0, 3)
    with pytest.raises(ConfigError, match=r"^trainer\.rm\.batch_size=16 cannot be shared equally by 3 processes\. .*3"):
        share_of_batch(block(16, None), "rm")
    with pytest.raises(ConfigError, match=r"^trainer\.rm\.micro_batch_size=2 does not divide the 3 rows"):
        share_of_batch(block(9, 2), "rm")


@pytest.mark.parametrize(("rows", "size", "accumulated", "world"), [(20, 8, 1, 1), (20, 2, 2, 2), (24, 4, 2, 1)])
def test_every_step_of_a_pass_has_a_whole_batch(rows: int, size: int, accumulated: int, world: int) -> None:
    args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "world_size": world}
    trainer: Any = SimpleNamespace(args=SimpleNamespace(**args), train_dataset=range(rows))
    order = list(WholeBatches._get_train_sampler(trainer))
    assert len(order) == 24
    assert sorted(order[:rows]) == list(range(rows)), "each row once, before any comes again"
    assert set(order[rows:]) <= set(range(rows))


# -- folders -----------------------------------------------------------------------------------------------------------


def test_another_rank_than_0_leaves_nothing_in_the_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.building_together("sft", {"seed": 0}) as first:
        (first.path / "model").write_text("of rank 0")
        work = first.path
        as_rank(monkeypatch, 1, 2)
        monkeypatch.setattr(ranks, "broadcast", lambda _: (False, work))
        monkeypatch.setattr(ranks, "barrier", lambda: None)
        with store.building_together("sft", {"seed": 0}) as second:
            (second.path / "model").write_text("of rank 1")
            assert second.path != work
            assert ranks.shared(second.path / "checkpoints" / "checkpoint-4") == work / "checkpoints" / "checkpoint-4"
            as_rank(monkeypatch, 0, 2)
            published = first.publish()
            as_rank(monkeypatch, 1, 2)
            assert second.publish() == published
    assert (published / "model").read_text() == "of rank 0"
    assert ranks.shared(tmp_path / "x") == tmp_path / "x"
