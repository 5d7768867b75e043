"""Miniatures of the model families: what is read of a sequence depends neither on padding nor on its batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from miniatures import save_miniature

from rlhf_cli.models.logps import frozen_token_logps, vocabulary_logps
from rlhf_cli.models.policy import freeze, load_policy
from rlhf_cli.models.reward import new_reward_model, sequence_scores
from rlhf_cli.models.sampling import sample
from rlhf_cli.models.tokens import collate

FAMILIES = ["opt", "opt-350m", "pythia", "llama-2", "llama-3.2", "qwen2.5", "mistral-sft", "gemma"]
PROMPTS = [[9, 20, 33], [12, 50, 7, 41, 18, 90, 61, 8, 77, 30, 25, 14], [101]]
RESPONSES = [[30, 31, 9, 60, 11, 35, 44, 21, 17, 80], [15, 2], [70, 71, 72, 5]]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_miniature(request.param, tmp_path_factory.mktemp("family") / request.param)


def wide(rows: list[list[int]], pad_id: int) -> Any:
    """Return the rows among longer ones: padded by 20 tokens more on each side."""
    batch = collate([*PROMPTS, [40] * 32], [*RESPONSES, [40] * 30], pad_id)
    assert batch.input_ids.shape == (len(rows) + 1, 62)
    return batch


def test_log_probs_do_not_depend_on_padding(folder: Path) -> None:
    policy = freeze(load_policy(folder))
    how = {"temperature": 1.0, "tree": None}
    found = {pad: frozen_token_logps(policy, wide(PROMPTS, pad), **how) for pad in (0, 3)}
    for index, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        alone = frozen_token_logps(policy, collate([prompt], [response], 0), **how)[0]
        assert index or alone.std() > 0.05, "a model that says the same of all tokens would hide a wrong position"
        for logps in found.values():
            torch.testing.assert_close(logps[index, : len(response)], alone, rtol=1e-4, atol=1e-5)


def test_rewards_do_not_depend_on_padding(folder: Path) -> None:
    torch.manual_seed(0)
    model = freeze(new_reward_model(folder, init_std=1.0))
    found = [sequence_scores(model, wide(PROMPTS, pad)) for pad in (0, 3)]
    alone = torch.cat([sequence_scores(model, collate([p], [r], 0)) for p, r in zip(PROMPTS, RESPONSES, strict=True)])
    assert alone.std() > 0.1
    for scores in found:
        torch.testing.assert_close(scores[:3], alone, rtol=1e-4, atol=1e-5)


def test_cold_samples_of_a_padded_batch_are_the_likeliest_tokens_of_each_prompt_alone(folder: Path) -> None:
    policy = freeze(load_policy(folder))
    cold: dict[str, Any] = {
        "streams": [0, 1, 2, 3],
        "max_new_tokens": 12,
        "temperature": 1e-4,
        "top_p": 1.0,
        "eos_ids": [2],
        "pad_id": 0,
    }
    sampled = sample(policy, [*PROMPTS, [40] * 32], **cold)[:3]
    assert len({tuple(ids) for ids in sampled}) == 3
    for prompt, ids in zip(PROMPTS, sampled, strict=True):
        logps = vocabulary_logps(policy, collate([prompt], [ids], 0), temperature=1.0, tree=None)[0]
        best = logps.max(-1).values - logps.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        assert best.max() < 2e-3, "nats; two tokens may be about equally likely"
