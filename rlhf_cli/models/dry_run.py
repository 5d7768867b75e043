"""Forward and backward passes on tensors without data: what they hold at their peak, found in tenths of a second.

The code that trains is run itself, so nothing here knows an architecture, a way of attention, or how often log-probs
copy the logits. Lengths are the longest that are allowed, so real batches take less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhf_cli.models import logps
from rlhf_cli.models.adapters import plain, recompute_activations
from rlhf_cli.models.cache import roomy_cache
from rlhf_cli.models.meter import RUN, Meter, without_data
from rlhf_cli.models.reward import token_values
from rlhf_cli.models.shapes import CLASSIFIER, POLICY, Adapters, ModelShape, adapt, decoder_layers, skeleton
from rlhf_cli.models.tokens import TokenBatch

# TRL's head of SFT (trl.kernels.chunked_logprob) reads the logits in tiles of this many tokens and words.
TILE_TOKENS, TILE_WORDS = 4096, 32768
TILE_COPIES = 7.25  # float32, beside the tile itself, where there is no Triton: on the CPU


@dataclass(frozen=True)
class Work:
    """Bytes that a pass holds beside weights, gradients and optimizer.

    Args:
        saved: between forward and backward; of sampling, the whole key-value cache.
        peak: at most.
        logits: of the peak, numbers over the vocabulary.
    """

    saved: float
    peak: float
    logits: float


@dataclass(frozen=True)
class Holding:
    """How models are held and computed.

    Args:
        dtype: of frozen weights and of computation; weights that are trained are float32.
        attention: auto | eager | sdpa | flash_attention_2.
        checkpointing: activations are computed again in the backward pass.
        adapters: None where all weights are trained.
        on_gpu: fused kernels are there.
    """

    dtype: torch.dtype
    attention: str = "auto"
    checkpointing: bool = False
    adapters: Adapters | None = None
    on_gpu: bool = False


@dataclass(frozen=True)
class Tokens:
    """Size of a batch: sequences, and the tokens of a prompt and a response at most."""

    rows: int
    prompt: int
    response: int

    def batch(self) -> TokenBatch:
        """Return a batch without padding."""
        ids = torch.zeros(self.rows, self.prompt + self.response, dtype=torch.long)
        mask = torch.ones(ids.shape, dtype=torch.bool)
        return TokenBatch(ids, mask, ids[:, self.prompt :], mask[:, self.prompt :])


@lru_cache(maxsize=256)
def trained_policy(shape: ModelShape, how: Holding, tokens: Tokens) -> Work:
    """Return what log-probs of responses take with their backward pass: online and pairwise training."""
    return _trained(
        shape,
        POLICY,
        how,
        lambda model: logps.token_logps(_AsTrained(model, how.dtype), tokens.batch(), temperature=1.0, tree=None),
    )


@lru_cache(maxsize=256)
def trained_values(shape: ModelShape, how: Holding, tokens: Tokens) -> Work:
    """Return what the scores of a reward model or critic take with their backward pass."""
    return _trained(shape, CLASSIFIER, how, lambda model: token_values(plain(model), tokens.batch()))


@lru_cache(maxsize=256)
def trained_on_text(shape: ModelShape, how: Holding, tokens: Tokens) -> Work:
    """Return what supervised fine-tuning takes with its backward pass."""

    def loss(model: Any) -> Tensor:
        whole, batch = plain(model), tokens.batch()
        hidden = getattr(whole, whole.base_model_prefix)(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False
        ).last_hidden_state
        read = hidden[:, -tokens.response - 1 : -1] if how.on_gpu else hidden[:, :-1]  # elsewhere under prompts too
        weight = whole.get_output_embeddings().weight
        return cast(Tensor, _TiledHead.apply(read.flatten(0, 1), weight, how))

    return _trained(shape, POLICY, how, loss)


@lru_cache(maxsize=256)
def generated(shape: ModelShape, how: Holding, tokens: Tokens) -> Work:
    """Return what sampling takes, at its first or its last token."""
    with _rehearsal(shape, POLICY, how) as (model, meter), meter, torch.no_grad():
        wrapped, room = _AsTrained(model, how.dtype), tokens.prompt + tokens.response
        with _autocast(how.dtype):  # weights are cast once for all tokens (trainers/engines.py)
            _read_on(wrapped, tokens.rows, tokens.prompt, roomy_cache(model.config, room))
        first = Work(0, meter.peak, meter.peak_logits)
        cache = roomy_cache(model.config, room)
        with _autocast(how.dtype):
            _read_on(wrapped, tokens.rows, tokens.prompt + tokens.response - 1, cache)
            meter.restart()  # nobody reads so many at once: it only fills the cache
            _read_on(wrapped, tokens.rows, 1, cache)
        last = Work(0, meter.peak, meter.peak_logits)
        full = meter.live  # casts are gone by now
    found = max(first, last, key=lambda work: work.peak)
    return Work(full, found.peak, found.logits)


@lru_cache(maxsize=256)
def compared(shape: ModelShape, how: Holding, tokens: Tokens) -> Work:
    """Return what reading rollouts with policy and reference takes: both over the whole vocabulary."""
    with _rehearsal(shape, POLICY, how) as (model, meter), meter, torch.no_grad():
        batch, wrapped = tokens.batch(), _AsTrained(model, how.dtype)
        with _autocast(how.dtype):  # weights are cast once for all batches (trainers/engines.py)
            ours, theirs = (logps.vocabulary_logps(wrapped, batch, temperature=1.0, tree=None) for _ in range(2))
            logps.kl(ours, theirs)
            logps.entropy(ours)
        return Work(0, meter.peak, meter.peak_logits)


@lru_cache(maxsize=256)
def read(shape: ModelShape, how: Holding, tokens: Tokens) -> Work:
    """Return what reading log-probs with a frozen reference takes."""
    with _rehearsal(shape, POLICY, how, trained=False) as (model, meter), meter, torch.no_grad():
        logps.token_logps(_AsTrained(model, how.dtype), tokens.batch(), temperature=1.0, tree=None)
        return Work(0, meter.peak, meter.peak_logits)


# -- how ---------------------------------------------------------------------------------------------------------------


def _trained(shape: ModelShape, kind: str, how: Holding, loss: Callable[[Any], Tensor]) -> Work:
    """Return what one forward and backward pass takes where the gradients are there already."""
    with _rehearsal(shape, kind, how, training=True) as (model, meter), meter:
        with _autocast(how.dtype):
            value = loss(model).sum()
        saved = meter.live
        torch.autograd.backward(value)
        return Work(saved, meter.peak, meter.peak_logits)


@contextmanager
def _rehearsal(
    shape: ModelShape, kind: str, how: Holding, *, trained: bool = True, training: bool = False
) -> Iterator[tuple[Any, Meter]]:
    """Provide a model without data, and a meter of what is computed with it.

    Args:
        trained: whether its weights are held as those of a model that is trained.
        training: whether it is in training mode.
    """
    dtype = torch.float32 if trained and how.adapters is None else how.dtype
    model = skeleton(shape, kind, dtype=dtype, attention=how.attention)
    depth, layers = model.config.get_text_config().num_hidden_layers, decoder_layers(model)
    if layers is not None and depth > RUN:
        del layers[RUN:]
    if how.adapters is not None:
        model = adapt(model, how.adapters)
    if training and how.checkpointing:
        recompute_activations(model)
    model.train(training)
    with FakeTensorMode():
        without_data(model)
        meter = Meter(model.config.get_text_config().vocab_size, model)
        if layers is not None and depth > len(layers):
            meter.stand_in(list(layers), depth)
        yield model, meter


def _read_on(model: _AsTrained, rows: int, length: int, cache: Any) -> None:
    """Read `length` tokens more, and make a distribution over the next one, as models/sampling.py does."""
    ids = torch.zeros(rows, length, dtype=torch.long)
    seen = torch.ones(rows, cache.get_seq_length() + length, dtype=torch.long)
    logits = model(
        input_ids=ids, attention_mask=seen, position_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
    ).logits[:, -1].float() / 1.0  # fmt: skip
    logits.softmax(-1)


class _AsTrained:
    """A model as accelerate wraps it: computed in `dtype`, and the logits come out in float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype

    def __call__(self, **inputs: Any) -> Any:
        with _autocast(self.dtype):
            output = self.model(**inputs)
        output.logits = output.logits.float()
        return output


def _autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


class _TiledHead(torch.autograd.Function):
    """Allocates what TRL's head allocates."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, how: Holding) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.how = how
        _tile(hidden, weight, how)
        return hidden.new_zeros(len(hidden))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        grad_hidden = torch.zeros(hidden.shape)
        grad_weight = torch.zeros(weight.shape) if weight.requires_grad else None
        _tile(hidden, weight, ctx.how)
        return grad_hidden.to(hidden.dtype), grad_weight, None


def _tile(hidden: Tensor, weight: Tensor, how: Holding) -> list[Tensor]:
    rows, words = min(len(hidden), TILE_TOKENS), min(len(weight), TILE_WORDS)
    copies = 0 if how.on_gpu else TILE_COPIES
    return [torch.empty(rows, TILE_WORDS, dtype=how.dtype), torch.empty(int(copies * rows * words))]
