"""Three questions that can be enumerated, their rewards, and measures of policies on them."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from tiny_models import BOS, EOS, PAD, VOCAB, tiny_policy
from torch import Tensor

from rlhf_cli import algos
from rlhf_cli.data.rows import Question
from rlhf_cli.measure.exact import ExactMeasure, enumerate_answers
from rlhf_cli.measure.sampled import SampledMeasure, Sampling
from rlhf_cli.models.prefix_tree import PrefixTree

# Two trained wordings and a held-out one; 3, 2 and 3 answers of unequal length.
PROMPTS = [[BOS, 4], [BOS, 5, 6], [BOS, 6, 4]]
ANSWERS = [
    [[7, EOS], [8, 9, EOS], [7, 9, EOS]],
    [[7, 8, 9, EOS], [10, EOS]],
    [[7, EOS], [8, 9, EOS], [7, 9, EOS]],
]
PEOPLE = [(0.5, 0.3, 0.2), (0.9, 0.1), (0.5, 0.3, 0.2)]
QUESTIONS = [
    Question(f"prompt {i}", tuple(f"answer {j}" for j in range(len(people))), people, None, i // 2, heldout=i == 2)
    for i, people in enumerate(PEOPLE)
]
ENUMERATION = enumerate_answers(QUESTIONS, PROMPTS, ANSWERS, PAD, "cpu")
N = 8
REWARDS = torch.tensor([1.0, 0.0, -1.0, 0.5, -7.0, 0.3, 2.0, -0.2])  # -7 is clipped to -5
TREE = PrefixTree(zip(ENUMERATION.prompt_ids, ENUMERATION.response_ids, strict=True), VOCAB, PAD)
TARGET = torch.tensor([[1.0, 0.0, -1.0], [0.5, -5.0, -math.inf], [0.3, 2.0, -0.2]]).softmax(-1)
KL = SimpleNamespace(beta=1.0)


def lookup(prompts: Any, responses: Any) -> Tensor:
    table = {
        (tuple(p), tuple(r)): REWARDS[i].item()
        for i, (p, r) in enumerate(zip(ENUMERATION.prompt_ids, ENUMERATION.response_ids, strict=True))
    }
    return torch.tensor([table.get((tuple(p), tuple(r)), -1.5) for p, r in zip(prompts, responses, strict=True)])


def measure(
    reference: Any, name: str = "kl_ppo", algo: Any = KL, questions: list[Question] = QUESTIONS, **changes: Any
) -> ExactMeasure:
    settings: dict[str, Any] = {"reward_clip": 5.0, "temperature": 1.0, "tree": None}
    rows = replace(ENUMERATION, questions=questions)
    return ExactMeasure(rows, reference, lookup, algorithm=algos.get(name), algo=algo, **{**settings, **changes})


def sampling(tree: PrefixTree | None = TREE, **changes: Any) -> Sampling:
    return Sampling(**{"max_new_tokens": 4, "temperature": 1.0, "tree": tree, "eos_ids": [EOS], "pad_id": PAD,
                       "device": "cpu", **changes})  # fmt: skip


def sampled_measure(samples: int, reward: Any = lookup, algo: Any = KL, seed: int = 0, **how: Any) -> SampledMeasure:
    return SampledMeasure(
        PROMPTS, samples, tiny_policy(1), reward, reward_clip=5.0, algorithm=algos.get("kl_ppo"), algo=algo,
        sampling=sampling(**how), seed=seed,
    )  # fmt: skip
