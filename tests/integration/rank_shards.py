"""What sharding makes of tiny models on several ranks; rank_jobs.py runs it, test_ranks.py judges what it finds."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import OPTConfig, OPTForCausalLM, OPTForSequenceClassification

from rlhf_cli import ranks
from rlhf_cli.models.logps import token_logps
from rlhf_cli.models.reward import Critic, sequence_scores
from rlhf_cli.models.sharding import is_sharded, shard, whole_state
from rlhf_cli.models.tokens import collate
from rlhf_cli.trainers.critic import CriticTraining, average_gradients

SHAPE: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "word_embed_proj_dim": 16, "max_position_embeddings": 32, "dropout": 0.0, "pad_token_id": 1,
}  # fmt: skip
PROMPTS = [[2, 5, 6], [2, 7], [2, 8, 9, 10], [2, 11]]
RESPONSES = [[12, 3], [13, 14, 3], [15, 3], [16, 17, 18, 3]]


def found() -> dict[str, float]:
    """Return how sharded models differ from whole ones, and the largest share of their weights that this rank has."""
    torch.manual_seed(0)
    batch = collate(PROMPTS, RESPONSES, 1)
    policy, classifier = (
        OPTForCausalLM(OPTConfig(**SHAPE)),
        OPTForSequenceClassification(OPTConfig(**SHAPE, num_labels=1)),
    )
    how: dict[str, Any] = {"temperature": 1.0, "tree": None}
    reward, critic = shard(deepcopy(classifier)), Critic(deepcopy(classifier))
    sharded = shard(deepcopy(policy))
    with torch.no_grad():
        logps = (
            (token_logps(sharded, batch, **how) - token_logps(policy, batch, **how))[batch.response_mask].abs().max()
        )
        scores = (sequence_scores(reward, batch) - sequence_scores(classifier, batch)).abs().max()
    whole = whole_state(sharded) or {}
    state = [float((whole[name] - weight).abs().max()) for name, weight in policy.state_dict().items() if name in whole]
    return {
        "share": max(share(sharded), share(reward)),
        "logps": float(logps),
        "scores": float(scores),
        "state": max(state, default=0.0),
        "gathered": float(len(state)),
        **_critic_step(critic, batch),
        "resumed": _resumed(shard(Critic(deepcopy(classifier))), shard(Critic(deepcopy(classifier))), batch),
    }


def share(model: Any) -> float:
    """Return which part of the weights this rank holds."""
    weights = list(model.parameters())
    assert is_sharded(model)
    assert all(isinstance(weight, DTensor) for weight in weights)
    return sum(weight.to_local().numel() for weight in weights) / sum(weight.numel() for weight in weights)


def _critic_step(critic: Critic, batch: Any) -> dict[str, float]:
    """Return how a critic that is sharded, and one whose gradients are averaged, differ from one in one process.

    Each rank learns from half of the batch; the one in one process from all of it.
    """
    before = {name: weight.detach().clone() for name, weight in critic.named_parameters()}
    alone, averaged, sharded = critic, deepcopy(critic), shard(deepcopy(critic))
    _, mine = batch.by_length(2)[ranks.rank()]
    for model, part in ((alone, batch), (averaged, mine), (sharded, mine)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        (model(part) * part.response_mask).sum().div(len(part.input_ids)).backward()
        if model is averaged:
            average_gradients(list(model.parameters()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    gathered = {name: weight.full_tensor() for name, weight in sharded.named_parameters()}
    expected = dict(alone.named_parameters())
    return {
        "averaged": max(
            float((weight - expected[name]).detach().abs().max()) for name, weight in averaged.named_parameters()
        ),
        "sharded": max(float((weight - expected[name]).detach().abs().max()) for name, weight in gathered.items()),
        "moved": max(float((weight - before[name]).detach().abs().max()) for name, weight in expected.items()),
    }


def _resumed(one: Critic, other: Critic, batch: Any) -> float:
    """Return how a sharded critic that goes on from a checkpoint differs from one that was never interrupted."""
    args: Any = SimpleNamespace(adam_beta1=0.9, adam_beta2=0.99, learning_rate=1.0, max_grad_norm=1.0)
    block: Any = SimpleNamespace(critic_learning_rate=0.1, weight_decay=0.0)
    policy: Any = SimpleNamespace(param_groups=[{"lr": 1.0}])
    first, second = (CriticTraining(critic, block, args) for critic in (one, other))

    def step(training: CriticTraining) -> None:
        (training.critic(batch) * batch.response_mask).sum().backward()
        training.step(policy)

    step(first)
    second.load(deepcopy(ranks.broadcast(first.state())))  # rank 0 writes it, and all read it
    step(first)
    step(second)
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a.full_tensor() - b.full_tensor()).detach().abs().max()) for a, b in pairs)
