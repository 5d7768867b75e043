"""Four roles on one base: the same training as on bases of their own, nothing frozen moves, nothing is held twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import BOS, EOS, PAD, tiny_policy
from tiny_roles import Trained, adapted_policy, curve, reward_adapter, trained_roles

from rlhf_cli.errors import RunError
from rlhf_cli.models import adapters
from rlhf_cli.models.adapters import WithoutAdapter, plain, save_model
from rlhf_cli.models.logps import frozen_token_logps
from rlhf_cli.models.policy import load_policy
from rlhf_cli.models.reward import Critic, new_reward_model, sequence_scores
from rlhf_cli.models.shared_base import SharedBase
from rlhf_cli.models.tokens import collate
from rlhf_cli.trainers.critic import CriticTraining

BATCH = collate([[BOS, 4, 5], [BOS, 6]], [[7, 8, EOS], [9, EOS]], PAD)
ROLES = ("default", "reward", "critic")
Run = Callable[..., Trained]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a policy's base and a reward model's adapter on it."""
    folder = tmp_path_factory.mktemp("places")
    adapted_policy(folder / "base")
    reward_adapter(folder / "base", folder / "rm")
    return folder


@pytest.fixture
def run(places: Path, tmp_path: Path) -> Run:
    """Return a function that trains and returns what was trained."""
    count = iter(range(9))

    def trained(**how: Any) -> Trained:
        found = trained_roles(places, tmp_path / str(next(count)), **how)
        found.trainer.train()
        return found

    return trained


def shared_base(places: Path) -> SharedBase:
    return SharedBase(adapted_policy(places / "base"), places / "base")


def by_role(policy: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Return copies of the weights of each adapter and of the base."""
    found: dict[str, dict[str, torch.Tensor]] = {role: {} for role in (*ROLES, "base")}
    for name, weight in policy.named_parameters():
        role = next((role for role in ROLES if f".{role}." in name), "base")
        found[role][name] = weight.detach().clone()
    return found


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[bool]:
    return [not torch.equal(before[name], after[name]) for name in before]


# -- roles ------------------------------------------------------------------------------------------------------------


def test_the_reward_model_on_the_shared_base_scores_as_in_a_model_of_its_own(places: Path) -> None:
    alone = plain(reward_adapter(places / "base", places / "rm")).eval()
    shared = shared_base(places)
    reward_model = shared.reward_model(places / "rm")
    assert torch.equal(sequence_scores(reward_model, BATCH), sequence_scores(alone, BATCH))
    assert not any(
        weight.requires_grad for weight in [*reward_model.parameters(), *reward_model.adapter_weights().values()]
    )


def test_the_critic_starts_as_a_copy_of_the_reward_model_and_shares_nothing_with_it_but_the_base(places: Path) -> None:
    shared = shared_base(places)
    reward_model = shared.reward_model(places / "rm")
    critic = shared.critic_like(reward_model)
    scores = sequence_scores(reward_model, BATCH)
    assert torch.equal(sequence_scores(critic, BATCH), scores)
    with torch.no_grad():
        for weight in [*critic.adapter_weights().values(), *critic.parameters()]:
            weight += 0.1
    assert torch.equal(sequence_scores(reward_model, BATCH), scores)
    assert not torch.equal(sequence_scores(critic, BATCH), scores)


def test_each_role_answers_with_its_own_adapter_whoever_was_asked_before(places: Path) -> None:
    shared = shared_base(places)
    policy = shared.policy
    how: Any = {"temperature": 1.0, "tree": None}
    ours = frozen_token_logps(policy, BATCH, **how)
    reward_model = shared.reward_model(places / "rm")
    shared.critic_like(reward_model)
    sequence_scores(reward_model, BATCH)
    assert torch.equal(frozen_token_logps(policy, BATCH, **how), ours)
    assert torch.equal(
        frozen_token_logps(WithoutAdapter(policy), BATCH, **how), frozen_token_logps(tiny_policy(), BATCH, **how)
    )


def test_a_fresh_critic_starts_from_the_base_with_a_head_of_the_asked_size(places: Path) -> None:
    shared = shared_base(places)
    torch.manual_seed(0)
    critic = shared.fresh_critic(init_std=0.5)
    base = load_policy(places / "base")
    hidden = base.model(
        input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask.long(), position_ids=BATCH.position_ids
    )
    expected = (hidden.last_hidden_state @ critic.score.weight.T).squeeze(-1)[:, -1]
    torch.testing.assert_close(sequence_scores(critic, BATCH)[0], expected[0])
    assert critic.score.weight.shape == (1, 16)
    assert 0.2 < critic.score.weight.std() < 1
    assert all(weight.requires_grad for weight in critic.adapter_weights().values())


@pytest.mark.parametrize("kind", ["whole", "policy", "elsewhere"])
def test_a_reward_model_that_is_no_adapter_on_the_base_is_refused(kind: str, places: Path, tmp_path: Path) -> None:
    if kind == "whole":
        new_reward_model(places / "base", init_std=0.5).save_pretrained(tmp_path / "rm")
        line = "is a whole model, not an adapter"
    elif kind == "policy":
        save_model(adapted_policy(places / "base"), tmp_path / "rm")
        line = "is a whole model, not an adapter"
    else:
        tiny_policy().save_pretrained(tmp_path / "other")
        reward_adapter(tmp_path / "other", tmp_path / "rm")
        line = "is an adapter on .*other"
    with pytest.raises(RunError, match=line):
        shared_base(places).reward_model(tmp_path / "rm")


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_sharing_the_base_changes_nothing_of_the_training(advantage: str, checkpointing: bool, run: Run) -> None:
    apart = run(shared=False, advantage=advantage, micro=4)
    one = run(shared=True, advantage=advantage, micro=4, gradient_checkpointing=checkpointing)
    assert len(curve(apart.trainer)) == 4
    for left, right in zip(curve(apart.trainer), curve(one.trainer), strict=True):
        assert left == pytest.approx(right, abs=1e-4)
        assert left["grad_norm"] > 1e-3
    start = [curve(found.trainer)[0]["kl/sequence"] for found in (apart, one)]
    assert start == [0.0, 0.0], "the policy starts as its reference"
    left, right = by_role(apart.policy)["default"], by_role(one.policy)["default"]
    for name, weight in left.items():
        torch.testing.assert_close(weight, right[name], atol=1e-5, rtol=0)
    if advantage == "gae":
        values = [Critic(found.critic)(BATCH) for found in (apart, one)]
        torch.testing.assert_close(values[0], values[1], atol=1e-4, rtol=0)


def test_policy_and_critic_move_and_nothing_that_is_frozen_does(places: Path, tmp_path: Path) -> None:
    found = trained_roles(places, tmp_path, shared=True)
    before, heads = by_role(found.policy), [found.reward_model.score.weight.clone(), found.critic.score.weight.clone()]
    found.trainer.train()
    after = by_role(found.policy)
    assert {role: set(moved(before[role], after[role])) for role in before} == {
        "default": {True}, "critic": {True}, "reward": {False}, "base": {False}
    }  # fmt: skip
    assert torch.equal(found.reward_model.score.weight, heads[0])
    assert not torch.equal(found.critic.score.weight, heads[1])
    assert "ref" not in found.policy.peft_config, "TRL's copy of the adapter is gone"


def test_the_base_is_held_once(places: Path, tmp_path: Path) -> None:
    found = trained_roles(places, tmp_path, shared=True)
    trainer = found.trainer
    assert isinstance(trainer.critic, Critic)
    modules: list[Any] = [trainer.model, trainer.critic, found.reward_model]
    held = {weight.untyped_storage().data_ptr(): weight.numel() for module in modules for weight in module.parameters()}
    base = load_policy(places / "base")
    adapter = sum(weight.numel() for name, weight in found.policy.named_parameters() if ".default." in name)
    heads = 2 * base.config.hidden_size
    assert sum(held.values()) == sum(weight.numel() for weight in base.parameters()) + 3 * adapter + heads
    assert trainer.reference.policy is found.policy


def test_the_policy_s_optimizer_and_clipping_know_nothing_of_the_critic(places: Path, tmp_path: Path) -> None:
    found = trained_roles(places, tmp_path, shared=True, steps=2)
    trainer, seen = found.trainer, []
    optimizer: Any = trainer.create_optimizer()
    critics: Any = trainer.critic_training
    ours = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    theirs = {id(weight) for group in critics.optimizer.param_groups for weight in group["params"]}
    names = {id(weight): name for name, weight in found.policy.named_parameters()}
    assert {names[one].split(".")[-2] for one in ours} == {"default"}
    assert {names.get(one, "head").rpartition(".weight")[0].rpartition(".")[2] for one in theirs} == {"critic", ""}
    clip = trainer.accelerator.clip_grad_norm_

    def clipped(parameters: Any, *rest: Any, **more: Any) -> Any:
        parameters = list(parameters)
        seen.append({names[id(weight)].split(".")[-2] for weight in parameters if weight.grad is not None})
        return clip(parameters, *rest, **more)

    trainer.accelerator.clip_grad_norm_ = clipped  # type: ignore[method-assign]
    trainer.train()
    assert seen == [{"default"}, {"default"}]


def test_gradients_of_micro_batches_add_up_while_they_are_held(places: Path, tmp_path: Path) -> None:
    found = trained_roles(places, tmp_path, shared=True)
    critics: CriticTraining = found.trainer.critic_training  # type: ignore[assignment]
    weight = next(iter(critics.inside.values()))
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        critics.hold_gradients()
        assert weight.grad is None
    assert [bool((gradient == 3).all()) for gradient in critics.held.values()] == [True]


# -- breaking it ------------------------------------------------------------------------------------------------------


def test_without_the_forward_s_adapter_in_the_backward_pass_training_would_differ(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap that `recomputing` is for is there: OPT's layers are run again with the adapter then in force."""
    right = run(shared=True, micro=4, gradient_checkpointing=True)
    monkeypatch.setitem(adapters.CHECKPOINTING, "context_fn", torch.utils.checkpoint.noop_context_fn)
    wrong = run(shared=True, micro=4, gradient_checkpointing=True)
    assert any(moved(by_role(right.policy)["critic"], by_role(wrong.policy)["critic"]))


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
def test_an_interrupted_run_goes_on_to_the_bit(shared: bool, places: Path, tmp_path: Path) -> None:
    whole = trained_roles(places, tmp_path, shared=shared)
    whole.trainer.train()
    again = trained_roles(places, tmp_path, shared=shared)
    again.trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert curve(again.trainer) == curve(whole.trainer)
    left, right = by_role(whole.policy), by_role(again.policy)
    assert {role: set(moved(left[role], right[role])) for role in left if left[role]} == {
        role: {False} for role in left if left[role]
    }
    one, other = (Critic(found.critic)(BATCH) for found in (whole, again))
    assert torch.equal(one, other)
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in names
    assert not names & {"reward", "critic", "ref", "README.md", "model.safetensors"}


# -- bfloat16 ---------------------------------------------------------------------------------------------------------


def test_in_bfloat16_nothing_moved_means_a_ratio_of_one(places: Path, tmp_path: Path) -> None:
    """Old log-probs are read under the same autocast as new ones."""
    found = trained_roles(places, tmp_path, shared=True, bf16=True)
    ratios: list[float] = []
    trainer = found.trainer
    compute = trainer._compute_loss

    def watched(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            batch = type(BATCH)(*(inputs[name] for name in BATCH.__dataclass_fields__))
            new = frozen_token_logps(model, batch, temperature=1.0, tree=None)
            gap = (new - inputs["old_logps"])[batch.response_mask].abs().max()
        ratios.append(float(gap))
        return compute(model, inputs)

    trainer._compute_loss = watched  # type: ignore[method-assign]
    trainer.train()
    assert ratios[0] == 0.0, "the first step of a rollout"
    assert ratios[1] > 0.0, "the second has left it"
    assert ratios[2] == 0.0
    for line in curve(trainer):
        assert all(torch.tensor(value).isfinite() for value in line.values())
    assert {weight.dtype for weight in found.policy.parameters() if weight.requires_grad} == {torch.float32}
