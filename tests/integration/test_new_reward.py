"""A new reward-model loss is one yaml and one module in a directory of the user's own; nothing else is touched."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_jobs import SMALL, SURVEY, gap, read_json, read_lines, weights
from typer.testing import Result

from rlhf_cli import rewards
from rlhf_cli.config.catalog import conf_dir

Rlhf = Callable[..., Result]

MODULE = '''
"""A smooth hinge: a pair is learned until its margin is about `gap`."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_cli.config.schema import TrainedRewardConfig, setting
from rlhf_cli.rewards.base import RewardLoss

SEEN = []


@dataclass
class Config(TrainedRewardConfig):
    gap: float = setting(gt=0)
    sharpness: float = setting(gt=0)


def _pair_loss(scores, cfg):
    SEEN.append((tuple(scores.chosen.shape), cfg.gap))
    short = cfg.sharpness * (cfg.gap - scores.chosen + scores.rejected)
    return short.logaddexp(short.new_zeros(())) / cfg.sharpness


LOSS = RewardLoss("hinge", _pair_loss)
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's directory: reward/hinge.yaml + rewards/hinge.py."""
    monkeypatch.setattr(rewards, "__path__", list(rewards.__path__))
    folder = tmp_path / "mine"
    for name in ("reward", "rewards"):
        (folder / name).mkdir(parents=True)
    bt = (conf_dir() / "reward" / "bt.yaml").read_text()
    (folder / "reward" / "hinge.yaml").write_text(bt.replace("name: bt", "name: hinge") + "gap: 1.0\nsharpness: 4.0\n")
    (folder / "rewards" / "hinge.py").write_text(MODULE)
    yield folder
    sys.modules.pop("rlhf_cli.rewards.hinge", None)


@pytest.fixture
def small(rlhf: Rlhf, own: Path, store: Path) -> Callable[..., Path]:
    """Return a function that runs a command on the user's directory and gives its run folder."""

    def run(command: str, name: str, *overrides: str) -> Path:
        places = ["--config-dir", str(own), f"store_dir={store}", f"run_dir={name}"]
        result = rlhf(command, *SMALL, *SURVEY, *places, *overrides)
        assert result.exit_code == 0, result.output
        return Path(name)

    return run


def seen() -> list[tuple[tuple[int, ...], float]]:
    """Return (shape of the scores, gap) of every call of the user's loss."""
    return sys.modules["rlhf_cli.rewards.hinge"].SEEN


@pytest.mark.usefixtures("no_figures")
def test_a_loss_of_the_users_own_trains_a_reward_model(small: Callable[..., Path], own: Path) -> None:
    run = small("train-rm", "hinge", "reward=hinge", "reward.gap=1.25")  # which no other test puts into the store
    assert seen() == [((16,), 1.25)] * 6  # every step, one loss a pair
    assert gap(weights(run / "model"), weights(small("train-rm", "bt", "reward=bt") / "model")) > 1e-4
    assert 0 <= read_json(run / "metrics.json")["rm/accuracy"] <= 1
    losses = [line["rm/loss"] for line in read_lines(run / "training_log.jsonl") if "rm/loss" in line]
    # log(1 + e^5) / 4 = 1.2517 at a margin of 0, where Bradley-Terry is at .69
    assert losses[0] == pytest.approx(1.2517, abs=0.15)
    assert read_json(run / "overrides.json")["config_dir"] == str(own)


@pytest.mark.usefixtures("no_figures")
def test_its_settings_and_those_of_every_loss_count(rlhf: Rlhf, small: Callable[..., Path], own: Path) -> None:
    base = weights(small("train-rm", "base", "reward=hinge") / "model")
    for name, override in {"wide": "reward.gap=3", "centred": "reward.centering=5"}.items():
        changed = weights(small("train-rm", name, "reward=hinge", override) / "model")
        assert gap(base, changed) > 1e-5, override
    assert {value for _, value in seen()} == {3.0, 1.0}
    wrong = rlhf("train-rm", "--config-dir", str(own), "reward=hinge", "reward.gap=0", "run_dir=wrong")
    assert wrong.exit_code == 2
    assert "reward.gap=0.0 (set on the command line) is out of range. It must be > 0" in wrong.stderr


@pytest.mark.usefixtures("no_figures")
def test_a_policy_is_aligned_to_it(small: Callable[..., Path], trained: list[str]) -> None:
    model = small("train-rm", "rm", "reward=hinge")
    trained.clear()
    run = small("align", "pm", "algo=pm", "reward=hinge")
    assert len(trained) == 1  # the policy alone: SFT policy and reward model come from the store
    identities = [read_json(folder / "manifest.json")["identity"]["reward"] for folder in (model, run)]
    assert identities[0] == identities[1]
    assert identities[0]["name"] == "hinge"
    assert 0 <= read_json(run / "metrics.json")["pm/tv"] <= 1


def test_help_and_multirun_know_it(rlhf: Rlhf, own: Path) -> None:
    assert "hinge" in rlhf("train-rm", "--config-dir", str(own), "--help").output
    result = rlhf("train-rm", "-m", "--config-dir", str(own), "--cfg", "job", "reward=bt,hinge")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("name: hinge") == 1


def test_an_edited_loss_is_another_reward_model_and_another_run(rlhf: Rlhf, own: Path) -> None:
    command = ["train-rm", "reward=hinge", "--config-dir", str(own), *SMALL, *SURVEY, "store_dir=store"]
    assert rlhf(*command).exit_code == 0
    module = own / "rewards" / "hinge.py"
    module.write_text(module.read_text().replace("/ cfg.sharpness", "* cfg.sharpness"))
    sys.modules.pop("rlhf_cli.rewards.hinge")  # as in another process
    assert rlhf(*command).exit_code == 0
    assert len(list(Path("store/rm").iterdir())) == 2
    assert len(list(Path("store/sft").iterdir())) == 1
    assert len(list(Path("runs").glob("rm-*"))) == 2
