"""Which models take part in an evaluation: named ones, those of the config, those of the run that is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config import compose
from rlhf_cli.config.schema import EvaluateConfig
from rlhf_cli.errors import RunError
from rlhf_cli.stages import provide
from rlhf_cli.stages.roles import REFERENCE, REWARD, labels, of_config, of_evaluation, policy_in, reward_folder
from rlhf_cli.store import write_json

ROWS = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models lie in the working directory, and the Hub is out of reach."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def model(folder: str, kind: str) -> Path:
    """Make what tells one kind of model from another: its config."""
    write_json(made(folder) / "config.json", {"architectures": [f"OPTFor{kind}"]})
    return Path(folder)


def policy(folder: str) -> Path:
    return model(folder, "CausalLM")


def reward_model(folder: str) -> Path:
    return model(folder, "SequenceClassification")


def made(folder: str) -> Path:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


# -- labels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["runs/rm-v2"], ["rm-v2"]),
        (["runs/rm-seed1"], ["rm"]),
        (["runs/bt-survey-tiny-seed0-1a2b3c4d", "sweep/reward=bt,seed=2"], ["bt-survey-tiny", "reward-bt"]),
        (["a/rm-seed1", "a/rm-seed2"], ["rm", "rm-2"]),
        (["seed1", "runs/seedless"], ["judge", "seedless"]),
        (["runs/rm/"], ["rm"]),
        (["runs/rm/model", "runs/other/best"], ["rm", "other"]),
        (["OpenAssistant/reward-model"], ["reward-model"]),
        (["org/model"], ["org"]),
        (["runs/algo=rm,lr=0.1"], ["algo-rm-lr-0.1"]),
        (["a/rm", "b/rm", "c/rm"], ["rm", "rm-2", "rm-3"]),
        (["a/rm", "rm-2", "b/rm"], ["rm", "rm-2", "rm-3"]),
        (["rm-2", "a/rm", "b/rm"], ["rm-2", "rm", "rm-3"]),
        (["a/rm-2", "a/rm", "a/rm", "b/rm-2"], ["rm-2", "rm", "rm-3", "rm-2-2"]),
        (["Zürich/rm v2"], ["rm-v2"]),
        (["???"], ["judge"]),
        ([], []),
    ],
)
def test_labels_are_short_and_distinct(names: list[str], found: list[str]) -> None:
    assert labels(names) == found


def test_the_folder_one_stands_in_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made("runs/mine"))
    assert labels([".", "..", "model"]) == ["mine", "runs", "mine-2"]


# -- a policy by its name ----------------------------------------------------------------------------------------------


def test_a_policy_is_that_of_a_run_or_the_folder_itself() -> None:
    last, best, plain = policy("run/model"), policy("run/best"), policy("hf")
    assert policy_in("policy", "run") == last
    assert policy_in("policy", "run", "best") == best
    assert policy_in("policy", "run/best") == best
    for checkpoint in ("last", "best"):
        assert policy_in("policy", "hf", checkpoint) == plain
    assert policy_in("policy", str(Path("run").absolute())) == last.absolute()


def test_a_run_that_holds_no_policy_yet() -> None:
    made("run/checkpoints")
    with pytest.raises(RunError, match="^policy=run holds no model. neither model/config.json nor config.json is"):
        policy_in("policy", "run")
    policy("run/model")
    with pytest.raises(RunError, match="^policy=run holds no model. neither best/config.json nor config.json is"):
        policy_in("policy", "run", "best")


@pytest.mark.parametrize("given", ["rm", "rm/model"])
def test_a_reward_model_is_no_policy(given: str) -> None:
    reward_model("rm/model")
    with pytest.raises(RunError, match="^reference=rm/model holds a reward model, not a policy"):
        policy_in("reference", given)


@pytest.mark.parametrize("given", ["runs/typo", "nowhere"])
def test_a_folder_that_is_not_there(given: str) -> None:
    made("runs")
    with pytest.raises(RunError, match=f"^policy={given} is not a folder"):
        policy_in("policy", given)
    with pytest.raises(RunError, match=f"^reward_model={given} is not a folder"):
        reward_folder(given)


def test_a_hub_name_out_of_reach() -> None:
    with pytest.raises(RunError, match="^reward_model=nobody/has-this( is not in the cache|: the Hub has no)"):
        reward_folder("nobody/has-this")


# -- a reward model by its name ----------------------------------------------------------------------------------------


def test_a_reward_model_is_that_of_a_run_or_the_folder_itself() -> None:
    trained, plain = reward_model("run/model"), reward_model("hf")
    assert reward_folder("run") == trained
    assert reward_folder("run/model") == trained
    assert reward_folder("hf") == plain


def aligned(run: str, *, members: int = 0, reward: bool = True, **dataset: Any) -> dict[str, Path]:
    """Make a run folder as `rlhf align` leaves it, with its stages in a store; return them."""
    policy(f"{run}/model")
    stages = {REFERENCE: policy("store/sft/1/model").parent}
    names = [*(f"{REWARD} {number}" for number in range(members)), REWARD] if reward else []
    for name in names:
        stages[name] = reward_model(f"store/rm/{name.replace(' ', '-')}/model").parent
    write_json(Path(run) / "stages.json", {name: str(folder) for name, folder in stages.items()})
    cfg = evaluation(**dataset)
    identity = {**compose.identity(cfg), "data": provide.content(cfg.dataset)}
    write_json(Path(run) / "manifest.json", {"identity": identity})
    return stages


def test_of_a_run_that_was_aligned_the_reward_model_is_the_one_it_was_aligned_to() -> None:
    stages = aligned("pm")
    assert reward_folder("pm") == stages[REWARD] / "model"


def test_of_an_evaluation_it_is_the_reward_it_was_measured_with() -> None:
    named = reward_model("hf")  # stages.json names the model folder itself
    write_json(made("evaluation") / "stages.json", {REFERENCE: "somewhere", REWARD: str(named)})
    assert reward_folder("evaluation") == named


@pytest.mark.parametrize("given", ["sft", "sft/model", "empty", "gold"])
def test_where_there_is_no_reward_model(given: str) -> None:
    policy("sft/model")
    made("empty")
    aligned("gold", reward=False)
    with pytest.raises(RunError, match=f"^reward_model={given} holds no reward model. no config.json there names a"):
        reward_folder(given)


def test_a_reward_model_that_has_moved_is_named() -> None:
    aligned("pm")
    Path("store").rename("moved")
    with pytest.raises(RunError, match="holds no reward model. it was aligned to store/rm/reward-model, which is not"):
        reward_folder("pm")


# -- who takes part ----------------------------------------------------------------------------------------------------


def evaluation(dataset: str = "preferences", path: str = "rows.jsonl", **keys: Any) -> EvaluateConfig:
    """Return the config of an evaluation on a dataset, of the file at `path`; `dataset.x` as dataset__x."""
    Path("rows.jsonl").touch()
    overrides = [f"dataset={dataset}", *([f"dataset.path={path}"] if dataset != "survey" else []), "tracker=none"]
    return loaded((*overrides, *(f"{key.replace('__', '.')}={keys[key]}" for key in keys)))


@cache
def loaded(overrides: tuple[str, ...]) -> EvaluateConfig:
    cfg = compose.load("evaluate", list(overrides))
    assert isinstance(cfg, EvaluateConfig)
    return cfg


@pytest.fixture
def provided(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gains the stages that the store is asked for; it has one of each."""
    asked: list[str] = []

    def give(name: str, folder: Callable[[], Path]) -> Callable[..., Path]:
        def found(*_: object) -> Path:
            asked.append(name)
            return folder()

        return found

    monkeypatch.setattr(provide, "sft_policy", give("sft", lambda: policy("store/sft/own/model").parent))
    monkeypatch.setattr(provide, "reward_model", give("rm", lambda: reward_model("store/rm/own/model").parent))
    return asked


def test_without_names_all_are_those_of_the_config(provided: list[str]) -> None:
    cfg = evaluation()
    found = of_evaluation(cfg)
    assert found == of_config(cfg)
    assert found.reference == Path("store/sft/own/model")
    assert found.rewards == (Path("store/rm/own/model"),)
    assert found.stages == {REFERENCE: Path("store/sft/own"), REWARD: Path("store/rm/own")}
    assert found.judges == {}


def test_the_members_of_a_prediction_ensemble_are_the_reward_and_are_recorded(
    provided: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [Path("store/rm/a"), Path("store/rm/b")]
    monkeypatch.setattr(provide, "combined_members", lambda cfg: members)
    found = of_config(evaluation())
    assert found.rewards == (Path("store/rm/a/model"), Path("store/rm/b/model"))
    assert list(found.stages) == [REFERENCE, f"{REWARD} 0", f"{REWARD} 1", REWARD], "the last one's metrics win"


def test_the_gold_reward_needs_no_model(provided: list[str]) -> None:
    found = of_evaluation(evaluation("survey", reward="gold"))
    assert (found.rewards, provided) == ((), ["sft"])


def test_of_several_reward_models_the_first_is_the_reward_and_the_others_judge(provided: list[str]) -> None:
    a, b, c = reward_model("x/a"), reward_model("x/rm/model"), reward_model("y/rm/model")
    found = of_evaluation(evaluation(reward_model="[x/a,x/rm,y/rm]"))
    assert found.rewards == (a,)
    assert found.judges == {"rm": b, "rm-2": c}
    assert found.stages == {REFERENCE: Path("store/sft/own"), REWARD: a, "judge rm": b, "judge rm-2": c}
    assert provided == ["sft"], "no reward model is trained where one is named"


def test_where_all_are_named_nothing_is_trained(provided: list[str]) -> None:
    named, rm = policy("run/model"), reward_model("rm")
    found = of_evaluation(evaluation(reference="run", reward_model="rm"))
    assert (found.reference, found.rewards, provided) == (named, (rm,), [])


def test_beside_a_named_reference_the_reward_is_that_of_the_config(provided: list[str]) -> None:
    named = policy("run/model")
    found = of_evaluation(evaluation(reference="run"))
    assert found.reference == named
    assert found.rewards == (Path("store/rm/own/model"),)
    assert found.stages == {REFERENCE: named, REWARD: Path("store/rm/own")}


# -- other data than a run was aligned with ----------------------------------------------------------------------------


@pytest.mark.parametrize("members", [0, 2])
def test_on_other_data_a_run_keeps_its_own_reference_and_reward(provided: list[str], members: int) -> None:
    stages = aligned("run", members=members)
    Path("other.jsonl").write_text(ROWS)
    found = of_evaluation(evaluation(policy="run", path="other.jsonl"))
    assert found.reference == stages[REFERENCE] / "model"
    names = [f"{REWARD} {number}" for number in range(members)] or [REWARD]
    assert found.rewards == tuple(stages[name] / "model" for name in names)
    assert found.stages == stages
    assert provided == []


@pytest.mark.parametrize(
    "change",
    [
        {"dataset__max_completion_tokens": 5},
        {"dataset__split_seed": 1},
        {"dataset": "survey"},
        {"dataset": "hh_rlhf"},
    ],
    ids=str,
)
def test_other_rows_of_a_file_and_another_kind_of_data_are_other_data(
    provided: list[str], change: dict[str, Any]
) -> None:
    stages = aligned("run")
    assert of_evaluation(evaluation(policy="run", **change)).reference == stages[REFERENCE] / "model"
    assert provided == []


def test_an_edited_file_is_other_data(provided: list[str]) -> None:
    stages = aligned("run")
    cfg = evaluation(policy="run")
    assert of_evaluation(cfg).reference == Path("store/sft/own/model")
    provided.clear()
    Path("rows.jsonl").write_text(ROWS)
    assert of_evaluation(cfg).reference == stages[REFERENCE] / "model"
    assert provided == []


@pytest.mark.parametrize(
    "change",
    [
        {"dataset__eval_prompts": 3},
        {"dataset__eval_samples": 9},
        {"dataset__pool_samples": 0},
        {"path": "copy.jsonl"},
    ],
    ids=str,
)
def test_what_only_measures_and_where_the_file_lies_is_the_same_data(
    provided: list[str], change: dict[str, Any]
) -> None:
    aligned("run")
    Path("copy.jsonl").touch()
    assert of_evaluation(evaluation(policy="run", **change)).reference == Path("store/sft/own/model")
    assert provided == ["sft", "rm"]


def test_on_other_data_a_named_model_takes_the_place_of_the_run_s_own(provided: list[str]) -> None:
    stages, own, rm = aligned("run"), policy("other/model"), reward_model("rm")
    Path("other.jsonl").write_text(ROWS)
    changed = {"policy": "run", "path": "other.jsonl"}
    found = of_evaluation(evaluation(**changed, reference="other"))
    assert (found.reference, found.rewards) == (own, (stages[REWARD] / "model",))
    found = of_evaluation(evaluation(**changed, reward_model="rm"))
    assert (found.reference, found.rewards) == (stages[REFERENCE] / "model", (rm,))
    assert provided == []


def test_a_run_with_gold_reward_takes_the_reward_model_of_the_config_on_other_data(provided: list[str]) -> None:
    stages = aligned("run", reward=False)
    Path("other.jsonl").write_text(ROWS)
    found = of_evaluation(evaluation(policy="run", path="other.jsonl"))
    assert found.rewards == (Path("store/rm/own/model"),)
    assert found.reference == stages[REFERENCE] / "model"
    assert found.stages == {REFERENCE: stages[REFERENCE], REWARD: Path("store/rm/own")}


def test_a_store_that_has_moved_is_one_clear_line_and_its_advice_works(provided: list[str]) -> None:
    aligned("run")
    Path("store").rename("moved")
    Path("other.jsonl").write_text(ROWS)
    changed = {"policy": "run", "path": "other.jsonl"}
    with pytest.raises(RunError, match="the reference policy of policy=run is not in store/sft/1.*name it: reference="):
        of_evaluation(evaluation(**changed))
    with pytest.raises(RunError, match="the reward model of policy=run is not in store/rm/.*name it: reward_model="):
        of_evaluation(evaluation(**changed, reference="moved/sft/1"))
    found = of_evaluation(evaluation(**changed, reference="moved/sft/1", reward_model="moved/rm/reward-model"))
    assert found.reference == Path("moved/sft/1/model")
    assert found.rewards == (Path("moved/rm/reward-model/model"),)
    assert provided == []


def test_a_plain_model_folder_has_no_models_of_its_own(provided: list[str]) -> None:
    aligned("run")
    Path("other.jsonl").write_text(ROWS)
    found = of_evaluation(evaluation(policy="run/model", path="other.jsonl"))
    assert found.reference == Path("store/sft/own/model")


def test_a_damaged_record_is_no_record(provided: list[str]) -> None:
    aligned("run")
    Path("other.jsonl").write_text(ROWS)
    cfg = evaluation(policy="run", path="other.jsonl")
    for damaged in ("{", json.dumps({"identity": {}})):
        Path("run/manifest.json").write_text(damaged)
        assert of_evaluation(cfg).reference == Path("store/sft/own/model")
