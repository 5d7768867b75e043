"""WARM: members of one initialisation through the store, their weights or their predictions averaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_jobs import files, gap, job, read_json, read_lines, weights
from test_resume import interrupted_at

from rlhf_cli.data.encode import encode_prompt, encode_response
from rlhf_cli.models.policy import load_tokenizer
from rlhf_cli.models.reward import EnsembleReward, ModelReward

Small = Callable[..., Path]
WARM = ["reward=warm", "reward.members=3"]

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of this module's own: what is in it was asked for here."""
    return tmp_path_factory.mktemp("warm") / "store"


@pytest.fixture(scope="module")
def warm(store: Path) -> Path:
    """The run of three members, trained when a `bt` model of the same seed was there already."""
    job("train-rm", "reward=bt", run_dir=store.parent / "bt", store=store)
    return job("train-rm", *WARM, run_dir=store.parent / "warm", store=store)


def kept(store: Path) -> dict[str, Path]:
    """Return the reward models in the store with the default learning rate: bt, bt 1, bt 2 (members), warm."""
    found = {}
    for folder in (store / "rm").iterdir():
        what = read_json(folder / "identity.json")
        if what["reward"]["name"] == "bt" or what["reward"]["members"] == 3:
            found[" ".join(str(part) for part in (what["reward"]["name"], what.get("member")) if part)] = folder
    return found


def test_members_come_from_the_store_and_the_first_is_the_bt_model(warm: Path, store: Path) -> None:
    folders = kept(store)
    assert sorted(folders) == ["bt", "bt 1", "bt 2", "warm"]
    assert len(files(store / "rm")) == 4
    assert len(files(store / "sft")) == 1
    bt = weights(store.parent / "bt" / "model")
    assert gap(weights(folders["bt"] / "model"), bt) == 0
    assert gap(weights(folders["warm"] / "model"), weights(warm / "model")) == 0
    members = [weights(folders[name] / "model") for name in ("bt", "bt 1", "bt 2")]
    mean = {name: torch.stack([member[name] for member in members]).mean(0) for name in bt}
    assert gap(weights(warm / "model"), mean) < 2e-7
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert gap(members[one], members[other]) > 1e-4


@pytest.mark.slow
def test_the_first_member_is_not_trained_again(small: Small, tmp_path: Path, trained: list[str]) -> None:
    own = tmp_path / "store"
    small("train-rm", "reward=bt", name="bt", store=own)
    assert trained == ["DemonstrationTrainer", "LossRewardTrainer"]
    small("train-rm", "reward=warm", "reward.members=2", name="two", store=own)
    assert trained[2:] == ["LossRewardTrainer"]
    small("train-rm", *WARM, name="three", store=own)
    assert trained[3:] == ["LossRewardTrainer"], "members are shared by ensembles of other sizes"
    small("train-rm", *WARM, "seed=1", name="seed", store=own)
    assert trained[4:] == ["DemonstrationTrainer"] + ["LossRewardTrainer"] * 3


@pytest.mark.slow
def test_members_start_from_one_initialisation(small: Small, tmp_path: Path) -> None:
    own = tmp_path / "store"
    small("train-rm", *WARM, "trainer.rm.learning_rate=1e-12", store=own)
    members = [weights(folder / "model") for folder in (own / "rm").iterdir()]
    assert len(members) == 4
    assert all(gap(members[0], other) < 1e-9 for other in members[1:]), "body and head"
    assert members[0]["score.weight"].abs().max() > 1e-3


def test_disagreement_and_the_prediction_ensemble_are_reported(warm: Path, store: Path) -> None:
    metrics = read_json(warm / "metrics.json")
    assert metrics["rm/disagreement"] > 0
    assert 0 <= metrics["rm/member_flip"] <= 1
    assert metrics["rm/member_accuracy/min"] <= metrics["rm/member_accuracy/mean"] <= metrics["rm/member_accuracy/max"]
    for key in ("rm/ensemble_accuracy", "rm/ensemble_ece", "rm/member_ece/mean"):
        assert 0 <= metrics[key] <= 1
    assert metrics["rm/ensemble_log_loss"] <= metrics["rm/member_log_loss/mean"], "the loss is convex in the margin"
    member_logs = [read_lines(kept(store)[name] / "training_log.jsonl") for name in ("bt", "bt 1", "bt 2")]
    for number, line in enumerate(read_lines(warm / "training_log.jsonl")):
        losses = [log[number]["rm/loss"] for log in member_logs]
        assert line["rm/loss"] == pytest.approx(sum(losses) / 3)
        assert len(set(losses)) == 3, "each has its own data order"


@pytest.mark.parametrize("calibration", ["none", "length"])
def test_predictions_align_with_the_mean_of_the_members_rewards(
    warm: Path, store: Path, small: Small, trained: list[str], calibration: str
) -> None:
    before = files(store / "rm")
    read = f"reward.calibration={calibration}"
    trained.clear()
    run_dir = small("align", "algo=kl_ppo", *WARM, "reward.combine=predictions", read)
    assert trained == ["OnlineTrainer"]
    assert files(store / "rm") == before
    folders = [kept(store)[name] / "model" for name in ("bt", "bt 1", "bt 2")]
    members = [ModelReward(folder, 1, "cpu", calibration) for folder in folders]
    averaged = ModelReward(warm / "model", 1, "cpu", calibration)
    tokenizer = load_tokenizer(warm / "model")
    apart = 0.0
    for row in read_json(run_dir / "distributions.json"):
        answers = [encode_response(tokenizer, answer) for answer in row["answers"]]
        asked = ([encode_prompt(tokenizer, row["prompt"])] * len(answers), answers)
        mean = torch.stack([member(*asked) for member in members]).mean(0)
        torch.testing.assert_close(EnsembleReward(members)(*asked), mean, atol=1e-6, rtol=0)
        assert row["reward_model"] == pytest.approx(mean.softmax(-1).tolist(), abs=1e-4)
        apart = max(apart, float((mean - averaged(*asked)).abs().max()))
    assert apart > 1e-4, "not the reward of the averaged weights"


def test_an_interrupted_member_goes_on(warm: Path, small: Small, tmp_path: Path, trained: list[str]) -> None:
    own, command = tmp_path / "store", ["train-rm", *WARM, "trainer.rm.save_every_steps=2"]
    with interrupted_at(5, "reward model, member 1"), pytest.raises(KeyboardInterrupt, match="^$"):
        small(*command, store=own)
    assert len(files(own / "rm")) == 1
    trained.clear()
    run_dir = small(*command, store=own)
    assert trained == ["LossRewardTrainer"] * 2, "the first member and the SFT policy were finished"
    assert gap(weights(run_dir / "model"), weights(warm / "model")) == 0
    assert read_json(run_dir / "metrics.json") == read_json(warm / "metrics.json")
