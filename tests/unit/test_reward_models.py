from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_models import BOS, EOS, PAD, tiny_policy, tiny_reward_model
from transformers import AutoModelForSequenceClassification

from rlhf_cli.errors import RunError
from rlhf_cli.models.calibration import CALIBRATION_FILE, LengthCalibration
from rlhf_cli.models.reward import (
    Critic,
    EnsembleReward,
    GoldReward,
    ModelReward,
    load_centre,
    load_reward_model,
    new_reward_model,
    require_finite,
    save_centre,
    sequence_scores,
    token_values,
)
from rlhf_cli.models.tokens import collate, pad_right

PROMPTS = [[BOS, 4, 5, 6, 7], [BOS, 8], [BOS, 9, 4, 4]]
RESPONSES = [[5, EOS], [6, 7, 8, 9, 10, EOS], [11, 4, 4]]
BATCH = collate(PROMPTS, RESPONSES, PAD)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved reward model, centred on 0.75."""
    tiny_reward_model(tmp_path / "policy").save_pretrained(tmp_path / "rm")
    save_centre(tmp_path / "rm", 0.75)
    return tmp_path / "rm"


def test_a_new_reward_model_has_the_policy_s_body_and_a_fresh_head(tmp_path: Path) -> None:
    policy = tiny_policy()
    policy.save_pretrained(tmp_path)
    heads = []
    for seed, init_std in ((0, 0.5), (1, 0.5), (0, 1e-9)):
        torch.manual_seed(seed)
        model = new_reward_model(tmp_path, init_std=init_std)
        for name, weight in policy.model.state_dict().items():
            assert torch.equal(model.model.state_dict()[name], weight), name
        heads.append(model.score.weight)
    assert heads[0].shape == (1, 16)
    assert not torch.equal(heads[0], heads[1])
    assert heads[2].abs().max() < 1e-7


@torch.no_grad()
def test_a_saved_reward_model_scores_the_same(tmp_path: Path) -> None:
    model = tiny_reward_model(tmp_path / "policy")
    before = sequence_scores(model, BATCH)
    model.save_pretrained(tmp_path / "rm")
    assert torch.equal(sequence_scores(load_reward_model(tmp_path / "rm").eval(), BATCH), before)
    assert before.std() > 0.1  # scores that tell responses apart


@torch.no_grad()
def test_scores_are_those_of_transformers_on_right_padded_input(folder: Path) -> None:
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids, mask = pad_right([p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)], PAD)
    expected = theirs(input_ids=ids, attention_mask=mask.long()).logits.squeeze(-1)
    torch.testing.assert_close(sequence_scores(load_reward_model(folder).eval(), BATCH), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_neither_padding_nor_the_rest_of_the_batch_changes_a_score(folder: Path) -> None:
    model = load_reward_model(folder).eval()
    together = sequence_scores(model, BATCH)
    alone = [sequence_scores(model, collate([p], [r], PAD))[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    wider = collate([*PROMPTS, [BOS, *[4] * 7]], [*RESPONSES, [5] * 8], PAD)
    torch.testing.assert_close(torch.stack(alone), together, atol=1e-5, rtol=0)
    torch.testing.assert_close(sequence_scores(model, wider)[:3], together, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_last_token_counts_even_if_it_is_the_padding_token(folder: Path) -> None:
    model = load_reward_model(folder).eval()
    one, two = (sequence_scores(model, collate([[BOS, 4]], [ids], PAD)) for ids in ([5], [5, PAD]))
    assert (one - two).abs() > 1e-3


def test_model_rewards_are_centred_scores_in_any_micro_batch(folder: Path) -> None:
    with torch.no_grad():
        raw = sequence_scores(load_reward_model(folder).eval(), BATCH)
    for micro_batch in (1, 2, 256):
        found = ModelReward(folder, PAD, "cpu", micro_batch=micro_batch)(PROMPTS, RESPONSES)
        torch.testing.assert_close(found, raw - 0.75, atol=1e-5, rtol=0)
        assert not found.requires_grad


def test_calibrated_rewards_are_less_the_offset_at_the_length(folder: Path) -> None:
    with pytest.raises(RunError, match="has no length calibration"):
        ModelReward(folder, PAD, "cpu", "length")
    LengthCalibration((2.0, 6.0), (1.0, -3.0)).save(folder / CALIBRATION_FILE)
    raw = ModelReward(folder, PAD, "cpu")(PROMPTS, RESPONSES)
    # 2, 6 and 3 tokens, end-of-sequence included: 1, -3, and a quarter of the way between
    for micro_batch in (1, 256):
        found = ModelReward(folder, PAD, "cpu", "length", micro_batch)(PROMPTS, RESPONSES)
        torch.testing.assert_close(raw - found, torch.tensor([1.0, -3.0, 0.0]), atol=1e-5, rtol=0)


def test_an_ensemble_s_reward_is_the_mean(folder: Path) -> None:
    reward = ModelReward(folder, PAD, "cpu")
    found = EnsembleReward([reward, lambda prompts, responses: torch.tensor([1.0, 2.0, 3.0])])(PROMPTS, RESPONSES)
    torch.testing.assert_close(found, (reward(PROMPTS, RESPONSES) + torch.tensor([1.0, 2.0, 3.0])) / 2)


def test_a_model_reward_that_is_not_finite_is_refused(folder: Path) -> None:
    reward = ModelReward(folder, PAD, "cpu")
    reward.model.score.weight.data.fill_(math.nan)
    with pytest.raises(RunError, match="3 of 3 rewards are not finite"):
        reward(PROMPTS, RESPONSES)


def test_the_centre_is_kept_beside_the_model(tmp_path: Path) -> None:
    save_centre(tmp_path, -1.25)
    assert load_centre(tmp_path) == -1.25


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_require_finite(bad: float) -> None:
    good = torch.tensor([1.0, -1e30])
    assert require_finite(good) is good
    with pytest.raises(RunError, match=r"1 of 3 rewards are not finite.*train the reward model again"):
        require_finite(torch.tensor([0.0, bad, 1.0]))


# -- critic ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_critic_reads_the_head_one_token_early(folder: Path) -> None:
    model = load_reward_model(folder).eval()
    found = Critic(model)(BATCH)
    assert found.shape == BATCH.response_ids.shape
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        alone = token_values(model, collate([prompt], [response], PAD))[0]
        expected = alone[len(prompt) - 1 : -1]
        torch.testing.assert_close(found[row, : len(response)], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_value_before_a_token_does_not_see_it(folder: Path) -> None:
    critic = Critic(load_reward_model(folder).eval())
    before = critic(BATCH)[1]
    for position in range(6):
        changed = list(RESPONSES[1])
        changed[position] = 4
        after = critic(collate(PROMPTS, [RESPONSES[0], changed, RESPONSES[2]], PAD))[1]
        torch.testing.assert_close(after[: position + 1], before[: position + 1], atol=1e-5, rtol=0)
        if position < 5:
            assert (after[position + 1] - before[position + 1]).abs() > 1e-4


def test_the_critic_learns(folder: Path) -> None:
    critic = Critic(load_reward_model(folder))
    critic(BATCH).masked_fill(~BATCH.response_mask, 0.0).sum().backward()
    assert all(parameter.grad is not None for parameter in critic.parameters())


# -- gold --------------------------------------------------------------------------------------------------------------


def test_gold_rewards_are_looked_up_and_centred() -> None:
    table = {(BOS, 4): {(5, EOS): -1.0, (6, 7, EOS): -3.0}, (BOS, 5): {(5, EOS): -2.0}}
    reward = GoldReward(table, centre=-0.5, offset_reward=-5.0, device="cpu")
    prompts = [[BOS, 4], [BOS, 4], [BOS, 5], [BOS, 4], [BOS, 4], [BOS, 5], [BOS, 6]]
    responses = [[5, EOS], [6, 7, EOS], [5, EOS], [5], [6, EOS], [6, 7, EOS], [5, EOS]]
    # -1, -3, -2; off the set: without end-of-sequence, unknown, another prompt's answer, an unknown prompt
    assert reward(prompts, responses).tolist() == [-0.5, -2.5, -1.5, -4.5, -4.5, -4.5, -4.5]
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        reward(prompts, responses[:-1])
