"""What an on-policy update has to compute and to move at least, phase by phase: FLOPs, bytes, and a device's limits.

A multiplication and an addition are two FLOPs. Counted is what the model asks for on real tokens, without padding and
without what is computed twice to save memory, so that a share of the peak is the usual "model FLOPs utilisation":

    forward of a token       2 x weights of the linear layers, and 2 x weights of the head where logits are read
    attention                4 x layers x width for each token that is looked at, itself included; n (n + 1) / 2 of them
                             in a sequence of n
    backward                 twice the forward; of frozen weights once: only the gradient of their input is needed
    left out                 embeddings, norms, softmax, value heads, optimizers: together below 1 % from 1e8 weights on

Bytes are a lower bound: weights are read once a forward, what linear layers read and write goes through memory once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rlhf_cli.models.adapters import HEAD
from rlhf_cli.models.shapes import POLICY, Adapters, ModelShape, skeleton

GENERATE, SCORE, LOGPS, UPDATE, REST = "generate", "score", "log-probs", "update", "rest"
PHASES = (GENERATE, SCORE, LOGPS, UPDATE)
MASTER = 4  # bytes of a weight that is trained, and of its gradient
ADAM_TRAFFIC = 28  # bytes a weight and step: weight, gradient and two moments read, all but the gradient written
# Dense bfloat16 FLOP/s and bytes/s of memory by the name that PyTorch gives, from the makers' data sheets.
DATA_SHEETS = {
    "A100-SXM4-40GB": (312e12, 1.555e12),
    "A100-SXM4-80GB": (312e12, 2.039e12),
    "H100 80GB HBM3": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
    "B200": (2250e12, 8e12),
    "L40S": (362e12, 0.864e12),
}


@dataclass(frozen=True)
class Body:
    """What arithmetic needs to know of a model.

    Args:
        linear: weights of the linear layers, without the head.
        head: weights of the head over the vocabulary.
        layers: decoder layers.
        width: of attention, all heads together.
        cache_width: of the keys, as of the values, that a token leaves in a layer.
        passing: numbers that the linear layers read and write for a token.
        vocab_size: logits of a token.
        adapter: weights of the adapters; 0 where all weights are trained.
    """

    linear: int
    head: int
    layers: int
    width: int
    cache_width: int
    passing: int
    vocab_size: int
    adapter: int = 0

    @classmethod
    def of(cls, shape: ModelShape, adapters: Adapters | None = None) -> Body:
        """Return that of a causal language model."""
        model, config = skeleton(shape, POLICY), shape.config.get_text_config()
        heads = (model.get_output_embeddings(), getattr(model, HEAD, None))
        linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in heads]
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return cls(
            linear=sum(module.weight.numel() for module in linears),
            head=model.get_output_embeddings().weight.numel(),
            layers=config.num_hidden_layers,
            width=size * config.num_attention_heads,
            cache_width=size * groups,
            passing=sum(module.in_features + module.out_features for module in linears),
            vocab_size=config.vocab_size,
            adapter=0 if adapters is None else shape.sizes(POLICY, adapters).adapter,
        )

    def attention(self, tokens: int) -> float:
        """Return the FLOPs of attention in a sequence of `tokens`."""
        return 4 * self.layers * self.width * tokens * (tokens + 1) / 2

    def forward(self, tokens: int, *, read: int = 0) -> float:
        """Return the FLOPs of a forward pass over a sequence of `tokens`, with logits at `read` of them."""
        return 2 * (self.linear + self.adapter) * tokens + 2 * self.head * read + self.attention(tokens)

    def trained(self, tokens: int, *, read: int = 0) -> float:
        """Return the FLOPs of a forward and a backward pass."""
        frozen = 2 * self.linear * tokens + 2 * self.head * read if self.adapter else 0.0
        return 3 * self.forward(tokens, read=read) - frozen


@dataclass(frozen=True)
class Update:
    """One update of preference matching with a critic.

    Args:
        rows: tokens of (prompt, response) of each rollout.
        micro_batch: sequences per forward pass.
        epochs: passes over the rollouts.
        steps: optimizer steps.
        number_bytes: of the number format of computation.
        casts: whether the trained weights are held in float32 and computed with in another format.
        engine: that samples.
    """

    rows: Sequence[tuple[int, int]]
    micro_batch: int
    epochs: int
    steps: int
    number_bytes: int
    casts: bool
    engine: str = "default"

    @property
    def prompt_tokens(self) -> int:
        """Return how many tokens all prompts have."""
        return sum(prompt for prompt, _ in self.rows)

    @property
    def response_tokens(self) -> int:
        """Return how many tokens all responses have."""
        return sum(response for _, response in self.rows)

    @property
    def tokens(self) -> int:
        """Return how many tokens all sequences have."""
        return self.prompt_tokens + self.response_tokens


def tokens(update: Update) -> dict[str, int]:
    """Return the tokens of each phase: of generation those sampled, of the others those read or learned from."""
    return {
        GENERATE: update.response_tokens,
        SCORE: update.tokens,
        LOGPS: update.tokens,
        UPDATE: update.tokens * update.epochs,
    }


def flops(policy: Body, values: Body, update: Update) -> dict[str, float]:
    """Return the FLOPs of each phase.

    Args:
        policy: policy and reference.
        values: reward model and critic.
        update: what is computed.
    """
    rows = update.rows
    reference = Body(**{**policy.__dict__, "adapter": 0})
    return {
        GENERATE: sum(policy.forward(p + t - 1, read=t) for p, t in rows),  # the last token is not read again
        SCORE: sum(values.forward(p + t) for p, t in rows),
        LOGPS: sum(
            policy.forward(p + t, read=t + 1) + reference.forward(p + t, read=t + 1) + values.forward(p + t)
            for p, t in rows
        ),
        UPDATE: update.epochs * sum(policy.trained(p + t, read=t + 1) + values.trained(p + t) for p, t in rows),
    }


def traffic(policy: Body, values: Body, update: Update) -> dict[str, float]:
    """Return the bytes that each phase moves to and from memory at least."""
    size, forwards = update.number_bytes, -(-len(update.rows) // update.micro_batch)
    cast = MASTER + size if update.casts else 0  # bytes of a weight: read, and written in the other format
    steps = max(response for _, response in update.rows)
    passing = update.tokens * size
    logits = sum(response + 1 for _, response in update.rows) * policy.vocab_size * (size + 8)  # and float32, twice
    of_policy, of_values = policy.linear + policy.head, values.linear
    sampled = MASTER if update.casts and update.engine == "continuous" else size  # in the format of the weights
    once = 0 if update.engine in ("continuous", "vllm") else cast
    # A micro-batch casts, reads forward and backward, and adds to gradients in float32, those of adapters aside.
    learned = cast + 2 * size
    summed = [0 if body.adapter else 2 * MASTER for body in (policy, values)]
    trained = (policy.adapter or of_policy) + (values.adapter or of_values)
    return {
        GENERATE: of_policy * (steps * sampled + once) + passing * policy.passing + cache_traffic(policy, update),
        SCORE: forwards * of_values * size + passing * values.passing,
        LOGPS: (of_policy + of_values) * cast + forwards * (2 * of_policy + of_values) * size
        + passing * (2 * policy.passing + values.passing) + 2 * logits,
        UPDATE: update.epochs * forwards * (of_policy * (learned + summed[0]) + of_values * (learned + summed[1]))
        + 3 * update.epochs * (passing * (policy.passing + values.passing) + logits)
        + ADAM_TRAFFIC * update.steps * trained,
    }  # fmt: skip


def cache_traffic(policy: Body, update: Update) -> float:
    """Return the bytes of keys and values that attention reads while responses are sampled."""
    size = MASTER if update.casts and update.engine == "continuous" else update.number_bytes
    token = 2 * policy.layers * policy.cache_width * size
    return token * sum((t - 1) * p + t * (t - 1) / 2 for p, t in update.rows)  # p + 1, …, p + t - 1 of them


@dataclass(frozen=True)
class Limits:
    """What a device can do.

    Args:
        name: of the device.
        peak: FLOP/s.
        bandwidth: bytes/s of its memory.
        source: where the two are from.
        matmul, copy: the same, measured.
    """

    name: str
    peak: float
    bandwidth: float
    source: str
    matmul: float
    copy: float

    @property
    def on_gpu(self) -> bool:
        """Return whether it is a GPU."""
        return not self.name.startswith("CPU")

    @property
    def ridge(self) -> float:
        """Return the FLOPs a byte from which on arithmetic bounds, not memory."""
        return self.peak / self.bandwidth


def limits(device: str, name: str, dtype: torch.dtype) -> Limits:
    """Return the limits of `device`: by data sheet where there is one, else measured."""
    side = 8192 if device == "cuda" else 1024
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    matmul = 2 * side**3 / _seconds(lambda: one @ other, device)
    source = torch.empty(2**30 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / _seconds(lambda: target.copy_(source), device)  # read and written
    known = next((found for key, found in DATA_SHEETS.items() if key in name), None)
    peak, bandwidth = known or (matmul, copy)
    return Limits(name, peak, bandwidth, "data sheet" if known else "measured", matmul, copy)


def _seconds(work: Any, device: str, times: int = 5) -> float:
    """Return the least time that `work` takes."""
    found = []
    for _ in range(times + 1):
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def synchronise(device: str) -> None:
    """Wait for what the device has still to do."""
    if device == "cuda":
        torch.cuda.synchronize()
