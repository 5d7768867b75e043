"""Memory of a stage, role by role and phase by phase, against sums by hand; what passes take is made up here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import OPTConfig

from rlhf_cli.models import dry_run
from rlhf_cli.models.dry_run import Holding, Work
from rlhf_cli.models.memory import EIGHT_BITS, FOUR_BITS, FOUR_BITS_DOUBLE, Estimate, Plan, RoleMemory, estimate
from rlhf_cli.models.shapes import CLASSIFIER, POLICY, Adapters, ModelShape

SHAPE = ModelShape.of(
    OPTConfig(
        vocab_size=40, hidden_size=8, word_embed_proj_dim=8, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12,
    )
)  # fmt: skip
OTHER = ModelShape.of(
    OPTConfig(
        vocab_size=60, hidden_size=4, word_embed_proj_dim=4, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12,
    )
)  # fmt: skip
ADAPTERS = Adapters(2, ("all-linear",))
N, R = SHAPE.sizes(POLICY).total, SHAPE.sizes(CLASSIFIER).total
LINEAR = SHAPE.sizes(POLICY).linear
A, B = SHAPE.sizes(POLICY, ADAPTERS).adapter, SHAPE.sizes(CLASSIFIER, ADAPTERS).adapter
FULL = Plan("online", Holding(torch.float32), 5, 4, 8, True, rollouts=64, critic=True)
LORA = replace(FULL, how=Holding(torch.bfloat16, adapters=ADAPTERS))

# name, bytes saved between forward and backward, peak, logits of it
WORKS = {
    "trained_policy": Work(100.0, 150.0, 30.0),
    "trained_values": Work(40.0, 90.0, 0.0),
    "trained_on_text": Work(70.0, 80.0, 5.0),
    "generated": Work(500.0, 510.0, 6.0),
    "compared": Work(0.0, 65.0, 60.0),
    "read": Work(0.0, 35.0, 20.0),
}


@pytest.fixture(autouse=True)
def sizes_asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[ModelShape, int]]:
    asked = {}

    def stands_for(name: str, work: Work) -> None:
        def given(shape: ModelShape, how: Holding, tokens: dry_run.Tokens) -> Work:
            asked[name] = (shape, tokens.rows)
            return work

        monkeypatch.setattr(dry_run, name, given)

    for name, work in WORKS.items():
        stands_for(name, work)
    return asked


def roles(found: Estimate) -> dict[str, RoleMemory]:
    return {role.role: role for role in found.roles}


def test_full_training_holds_four_models_and_two_optimizers() -> None:
    found = estimate(FULL, SHAPE)
    assert found.roles == [
        RoleMemory("policy", N, N, 4 * N, 8 * N, 4 * N),
        RoleMemory("reference", N, 0, 4 * N),
        RoleMemory("reward model", R, 0, 4 * R),
        RoleMemory("critic", R, R, 4 * R, 8 * R, 4 * R),
    ]
    assert found.held == 16 * N + 16 * R


def test_phases_of_online_training() -> None:
    found = {phase.phase: phase for phase in estimate(FULL, SHAPE).phases}
    generation, reading, training = found.values()
    assert list(found) == ["generation, 64 x 9 tokens", "reading, 8 x 9 tokens", "training, 8 x 9 tokens"]
    assert (generation.cache, generation.logits, generation.activations, generation.total) == (500.0, 6.0, 4.0, 510.0)
    assert (reading.logits, reading.activations) == (60.0, 5.0)
    # The critic reads while the activations of the policy wait: 100 + 90, which is above 150.
    assert training.total == 190.0 + 4 * (N + R)
    assert training.gradients == 4 * (N + R)


def test_the_peak_is_what_is_held_and_the_largest_phase() -> None:
    found = estimate(replace(FULL, critic=False), SHAPE)
    assert found.total == found.held + 150.0 + 4 * N
    assert found.largest.phase == "training, 8 x 9 tokens"


def test_gradients_of_a_single_micro_batch_come_as_activations_go() -> None:
    phases = estimate(replace(FULL, critic=False, accumulates=False), SHAPE).phases
    assert [(phase.phase, phase.total) for phase in phases[2:]] == [
        ("training, 8 x 9 tokens", 150.0),
        ("gradients", 50.0 + 4 * N),  # 150 - 100: the backward pass begins with what the forward pass left
    ]


def test_lora_freezes_the_base_in_its_number_format_and_has_no_second_one() -> None:
    found = roles(estimate(LORA, SHAPE))
    assert found["policy"] == RoleMemory("policy", N + A, A, 2 * N + 4 * A, 8 * A, 4 * A)
    assert found["reference"] == RoleMemory("reference", 0, 0, 0.0)
    assert found["reward model"] == RoleMemory("reward model", R + B, 0, 2 * R + 4 * B)
    assert found["critic"] == RoleMemory("critic", R + B, B, 2 * R + 4 * B, 8 * B, 4 * B)


def test_on_a_shared_base_reward_model_and_critic_are_adapters() -> None:
    found = estimate(replace(LORA, share_base=True), SHAPE)
    assert roles(found)["reward model"] == RoleMemory("reward model", B, 0, 4 * B)
    assert roles(found)["critic"] == RoleMemory("critic", B, B, 4 * B, 8 * B, 4 * B)
    assert found.held == 2 * N + 12 * A + 4 * B + 12 * B  # four roles where one was


@pytest.mark.parametrize("size", [FOUR_BITS, FOUR_BITS_DOUBLE, EIGHT_BITS])
def test_qlora_makes_linear_layers_of_trained_roles_small(size: float) -> None:
    found = roles(estimate(replace(LORA, weight_bytes=size), SHAPE))
    assert found["policy"].weights == 2 * (N - LINEAR) + size * LINEAR + 4 * A
    assert found["reward model"].weights == 2 * R + 4 * B  # it is only read
    assert 0.5 < FOUR_BITS_DOUBLE < FOUR_BITS < 0.6 < EIGHT_BITS


def test_several_reward_models_and_none() -> None:
    assert roles(estimate(replace(FULL, reward_models=3), SHAPE))["reward model"].weights == 12 * R
    assert "reward model" not in roles(estimate(replace(FULL, reward_models=0), SHAPE))


def test_reward_model_and_critic_of_another_shape(sizes_asked: dict[str, tuple[ModelShape, int]]) -> None:
    found = roles(estimate(FULL, SHAPE, OTHER))
    other = OTHER.sizes(CLASSIFIER).total
    assert (found["policy"].parameters, found["critic"].parameters) == (N, other)
    assert sizes_asked["trained_values"] == (OTHER, 8)
    assert sizes_asked["generated"] == (SHAPE, 64)


def test_pairs_are_two_sequences_and_the_reference_reads_them_between_forward_and_backward(
    sizes_asked: dict[str, tuple[ModelShape, int]],
) -> None:
    found = estimate(replace(FULL, stage="pairwise"), SHAPE)
    assert [role.role for role in found.roles] == ["policy", "reference"]
    assert sizes_asked["trained_policy"] == sizes_asked["read"] == (SHAPE, 16)
    assert found.largest.total == 150.0 + 4 * N  # 100 that wait and 35 of the reference are less


def test_sft_and_reward_model_train_one_model() -> None:
    sft = estimate(replace(FULL, stage="sft"), SHAPE)
    assert sft.roles == [RoleMemory("policy", N, N, 4 * N, 8 * N, 4 * N)]
    assert (sft.largest.phase, sft.largest.logits) == ("training, 8 x 9 tokens", 5.0)
    assert sft.total == 12 * N + 80.0 + 4 * N
    rm = estimate(replace(FULL, stage="rm"), SHAPE, OTHER)
    assert [role.parameters for role in rm.roles] == [OTHER.sizes(CLASSIFIER).total]
    assert rm.largest.phase == "training, 16 x 9 tokens"
