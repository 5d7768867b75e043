"""An algorithm is right when it reaches its own closed-form optimum: `make conformance` in short form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_cli import jobs

WORLD = ["dataset.questions=3", "dataset.demonstrations=2048", "dataset.pairs=4000", "dataset.heldout_pairs=256"]
STEPS = ["trainer.sft.max_steps=150", "trainer.online.max_steps=150", "trainer.online.eval_every_steps=50"]
CLOSED = ["algo=pm", "algo.alpha=null", "dataset.closed_vocabulary=true"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("conformance")


def aligned(folder: Path, *overrides: str) -> dict[str, float]:
    places = [f"store_dir={folder}/store", f"run_dir={folder}/{len(list(folder.iterdir()))}"]
    run = jobs.run_one("align", [*WORLD, *STEPS, "reward=gold", "tracker=none", *places, *overrides], None)
    return json.loads((run / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("advantage", ["gae", pytest.param("rloo", marks=pytest.mark.slow)])
def test_unconditional_pm_reaches_the_people_s_shares(folder: Path, advantage: str) -> None:
    found = aligned(folder, *CLOSED, f"algo.advantage={advantage}")
    assert found["pm/tv"] <= 0.02
    assert found["pm/tv"] == pytest.approx(found["gold/tv"], abs=1e-4)  # gold reward: both targets are the people
    assert found["reference/pm/tv"] > 0.2


def test_kl_ppo_reaches_its_own_biased_optimum_and_not_the_preferences(folder: Path) -> None:
    found = aligned(folder, "algo=kl_ppo")
    assert found["optimum/tv"] <= 0.06
    assert found["pm/tv"] > 0.15


def test_conditional_pm_matches_preferences_on_an_open_vocabulary(folder: Path) -> None:
    found = aligned(folder, "algo=pm")
    assert found["optimum/tv"] <= 0.08
    assert found["pm/tv"] <= 0.08
    assert found["pm/offset_mass"] <= 0.04
