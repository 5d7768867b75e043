"""What sharding makes of tiny models on several ranks; rank_jobs.py runs it, test_ranks.py judges what it finds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import OPTConfig, OPTForCausalLM, OPTForSequenceClassification

from rlhf_cli import ranks
from rlhf_cli.models import loading, sharding
from rlhf_cli.models.classifier import load_reward_model
from rlhf_cli.models.loading import Loading
from rlhf_cli.models.logps import token_logps
from rlhf_cli.models.policy import load_policy
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
        **_opened(policy, classifier, batch),
        **_critic_step(critic, batch),
        "resumed": _resumed(shard(Critic(deepcopy(classifier))), shard(Critic(deepcopy(classifier))), batch),
    }


def share(model: Any) -> float:
    """Return which part of the weights this rank holds."""
    weights = list(model.parameters())
    assert is_sharded(model)
    assert all(isinstance(weight, DTensor) for weight in weights)
    return sum(weight.to_local().numel() for weight in weights) / sum(weight.numel() for weight in weights)


def _opened(policy: Any, classifier: Any, batch: Any) -> dict[str, float]:
    """Return what is seen of models that are split as they are opened.

    How far they are from whole ones, the weights that this rank has before it gets its part, and the most that it has
    at any time, both as shares of all: of a policy whose layers are most of it.
    """
    folder = Path(ranks.broadcast(tempfile.mkdtemp()))
    deep = OPTForCausalLM(OPTConfig(**{**SHAPE, "num_hidden_layers": 8, "torch_dtype": torch.float32}))
    adapted = get_peft_model(deepcopy(policy), LoraConfig(r=1, target_modules=["q_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "policy")
    kept = {"policy": policy, "reward": classifier, "deep": deep, "adapter": adapted}
    for name, model in kept.items() if ranks.is_main() else ():
        model.save_pretrained(folder / name)
    if ranks.is_main():  # as OPT-350m is published: that its head is its embedding, only the weights show
        (folder / "deep" / "model.safetensors").unlink()
        torch.save(deep.state_dict(), folder / "deep" / "pytorch_model.bin")
    ranks.barrier()
    how, read = Loading(split=True), {"temperature": 1.0, "tree": None}
    before, most, _ = _watched(lambda: load_policy(folder / "deep", how=how))
    found = load_policy(folder / "policy", how=how), load_policy(folder / "adapter", how=how)
    reward = load_reward_model(folder / "reward", how=how)
    expected = load_policy(folder / "policy"), load_policy(folder / "adapter")
    with torch.no_grad():
        gaps = [
            token_logps(a, batch, **read) - token_logps(b, batch, **read) for a, b in zip(found, expected, strict=True)
        ]
        far = (token_logps(expected[0], batch, **read) - token_logps(expected[1], batch, **read))[batch.response_mask]
        scores = (sequence_scores(reward, batch) - sequence_scores(classifier, batch)).abs().max()
    assert all(share(model) < 0.51 for model in (*found, reward))
    return {
        "opened": max(float(gap[batch.response_mask].abs().max()) for gap in gaps),
        "opened_scores": float(scores),
        "adapter": float(far.abs().max()),
        "before": before,
        "most": most,
    }


def _watched(function: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return the share of a model's weights that is here before it is sharded, the most after, and the model."""
    shard, fully_shard, seen = loading.shard, sharding.fully_shard, []
    models: list[Any] = []

    def held() -> float:
        weights = list(models[0].parameters())
        here = [w.to_local() if isinstance(w, DTensor) else w for w in weights if not w.is_meta]
        return sum(weight.numel() for weight in here) / sum(weight.numel() for weight in weights)

    def watching(model: Any, *how: Any) -> Any:
        models.append(model)
        seen.append(held())
        return shard(model, *how)

    def counting(part: Any, **how: Any) -> Any:
        seen.append(held())
        return fully_shard(part, **how)

    loading.shard, sharding.fully_shard = watching, counting  # type: ignore[assignment]
    try:
        model = function()
    finally:
        loading.shard, sharding.fully_shard = shard, fully_shard
    return seen[0], max(seen[1:]), model


def _critic_step(critic: Critic, batch: Any) -> dict[str, float]:
    """Return how a critic that is sharded, and one whose gradients are averaged, differ from one in one process.

    Each rank learns from half of the batch; the one in one process from all of it.
    """
    before = {name: weight.detach().clone() for name, weight in critic.named_parameters()}
    alone, averaged, sharded = critic, deepcopy(critic), shard(deepcopy(critic))
    _, mine = batch.pieces(2)[ranks.rank()]
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
