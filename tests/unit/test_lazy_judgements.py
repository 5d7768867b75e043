"""What a reward model learns from where its pairs lie on disk, beside what it learns from pairs in memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from test_lazy import TOKENIZER, in_memory, pair_rows, ranking_rows, streamed

from rlhf_cli import rewards
from rlhf_cli.config.compose import load as load_config
from rlhf_cli.config.schema import TrainRmConfig
from rlhf_cli.data.lazy import BATCH, LazyRows
from rlhf_cli.data.rows import PreferenceData
from rlhf_cli.models.encoder import Encoder
from rlhf_cli.stages import judgements, priors
from rlhf_cli.stages.judgements import Judgements, halves


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the rows within the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(judgements, "load_tokenizer", lambda *_, **__: TOKENIZER)


def config(*overrides: str) -> TrainRmConfig:
    limits = ["dataset.max_prompt_tokens=8", "dataset.max_completion_tokens=4", "reward.negative_share=0.4"]
    cfg = load_config("train-rm", [*limits, *overrides])
    assert isinstance(cfg, TrainRmConfig)
    return cfg


def training_set(
    cfg: TrainRmConfig, data: PreferenceData, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Judgements, Any]:
    monkeypatch.setattr(judgements, "load", lambda _: data)
    found = Judgements(cfg, folder)
    loss = rewards.get(cfg.reward.name)
    return found, found.training_set(loss, folder, np.random.default_rng(0), folder / "rows")


@pytest.mark.parametrize("reward", ["reward=bt", "reward=pcrm_length"])
@pytest.mark.parametrize("kind", ["pairs", "rankings"])
def test_judgements_on_disk_are_those_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, reward: str
) -> None:
    data = streamed(pair_rows(4 * BATCH) if kind == "pairs" else ranking_rows(2 * BATCH))
    cfg = config(reward)
    before, plain = training_set(cfg, in_memory(data), tmp_path, monkeypatch)
    after, lazy = training_set(cfg, data, tmp_path, monkeypatch)
    assert isinstance(lazy, datasets.Dataset)
    assert isinstance(plain, list)
    assert len(lazy) == len(plain)
    whole = kind == "rankings" and reward == "reward=bt"  # learns from rankings as they are
    people = len(after.data.reward_rankings if whole else after.pairs)
    assert people > 400
    assert list(lazy.select(range(people))) == plain[:people]
    damaged = list(lazy.select(range(people, len(lazy))))
    assert len(damaged) == pytest.approx(people * 0.4 / 0.6, abs=1)
    real: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for row in after.pairs:
        sides = (tuple(row["chosen_ids"]), tuple(row["rejected_ids"]))
        real.setdefault(tuple(row["prompt_ids"]), set()).update(sides)
    assert all(tuple(row["response_ids"][0]) in real[tuple(row["prompt_ids"])] for row in damaged)
    assert all(row["response_ids"][0] != row["response_ids"][1] for row in damaged)
    assert {(row["label"], row["margin"], row["bound"]) for row in damaged} == {(1.0, 0.0, float("inf"))}
    owners = Counter(tuple(row["prompt_ids"]) for row in damaged)
    assert len(owners) > len(real) / 4, "from everywhere in the data"
    assert (before.measuring, before.fitting) == (after.measuring, after.fitting)


def test_of_held_out_pairs_on_disk_the_first_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judgements, "MEASURED_PAIRS", 20)
    data = streamed(pair_rows(600))
    fitting, measuring = halves(data)
    assert len(data.heldout_pairs) > 40
    assert Counter(fitting + measuring) == Counter(data.heldout_pairs[:20])
    assert len(fitting) + len(measuring) == 20
    fitting, measuring = halves(in_memory(data))
    assert len(fitting) + len(measuring) == len(data.heldout_pairs)


def test_similarities_of_pairs_on_disk_are_computed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = streamed(pair_rows(400))
    sizes: list[int] = []

    def cosines(_: Encoder, texts: list[tuple[str, str, str]], *, embed_prompt: bool) -> Any:
        import torch

        sizes.append(len(texts))
        return torch.tensor([len(chosen) / (len(chosen) + len(rejected)) for _, chosen, rejected in texts]).double()

    monkeypatch.setattr(priors, "AT_ONCE", 50)
    monkeypatch.setattr(priors, "Encoder", lambda *_, **__: None)
    monkeypatch.setattr(priors, "pair_cosines", cosines)
    cfg = config("reward=pcrm_cosine", f"store_dir={tmp_path}/store")
    pairs = data.reward_pairs
    assert isinstance(pairs, LazyRows)
    found = priors.similarities(cfg.reward, pairs, cfg=cfg, sft=tmp_path)  # type: ignore[arg-type]
    assert max(sizes) == 50
    assert sum(sizes) == len(pairs) == len(found)
    parts = len(sizes)
    plain = priors.similarities(cfg.reward, list(pairs), cfg=cfg, sft=tmp_path)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, plain)
    again = priors.similarities(cfg.reward, pairs, cfg=cfg, sft=tmp_path)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, again)
    assert len(sizes) == parts + 1, "read from the store"
