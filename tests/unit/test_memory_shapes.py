"""Sizes of models from their configs, and tensors counted while code runs, against counts by hand and real tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, OPTConfig

from rlhf_cli.models import dry_run, meter
from rlhf_cli.models.dry_run import Holding, Tokens, Work
from rlhf_cli.models.meter import Meter
from rlhf_cli.models.shapes import CLASSIFIER, POLICY, Adapters, ModelShape, Sizes, skeleton
from rlhf_cli.models.tokens import TokenBatch

D, F, V, P = 8, 16, 40, 12  # width, feed-forward, words, positions
LAYERS = 7
OPT = OPTConfig(
    vocab_size=V, hidden_size=D, word_embed_proj_dim=D, ffn_dim=F, num_hidden_layers=LAYERS, num_attention_heads=2,
    max_position_embeddings=P,
)  # fmt: skip
LLAMA = LlamaConfig(
    vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
PLAIN = Holding(torch.float32)
LORA = Holding(torch.float32, adapters=Adapters(3, ("all-linear",)))
BATCH = Tokens(rows=3, prompt=5, response=4)


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    for function in (dry_run.trained_policy, dry_run.trained_values, dry_run.generated, dry_run.compared):
        function.cache_clear()


def test_sizes_of_opt() -> None:
    # A layer: four attention maps and two of the feed-forward with biases, two layer norms. OPT has 2 positions more.
    maps = 4 * D * D + 2 * D * F
    layer = maps + (4 * D + F + D) + 2 * 2 * D
    total = V * D + (P + 2) * D + LAYERS * layer + 2 * D  # the head is the embedding
    assert ModelShape.of(OPT).sizes(POLICY) == Sizes(total, LAYERS * maps, 0)
    assert ModelShape.of(OPT).sizes(CLASSIFIER) == Sizes(total + D, LAYERS * maps, 0)  # one output


def test_sizes_of_llama_with_an_untied_head_and_adapters() -> None:
    # Two heads, one of keys and values: queries and output D x D, keys and values D x D/2 each.
    maps = 2 * D * D + 2 * D * D // 2 + 3 * D * F
    total = 2 * V * D + LAYERS * (maps + 2 * D) + D
    # rank x (in + out) of each map
    adapter = 3 * LAYERS * (2 * (D + D) + 2 * (D + D // 2) + 3 * (D + F))
    shape = ModelShape.of(LLAMA)
    assert shape.sizes(POLICY, Adapters(3, ("all-linear",))) == Sizes(total, LAYERS * maps, adapter)
    # the classifier has its head in place of that over the words, and trains it whole
    assert shape.sizes(CLASSIFIER, Adapters(3, ("all-linear",))) == Sizes(total - V * D + D, LAYERS * maps, adapter + D)
    one = shape.sizes(POLICY, Adapters(1, ("q_proj",)))
    assert one.adapter == LAYERS * (D + D)


def test_skeletons_take_no_memory() -> None:
    shape = ModelShape.of(LlamaConfig(num_hidden_layers=2))  # 4096 wide
    assert {weight.device.type for weight in skeleton(shape, POLICY).parameters()} == {"meta"}


def test_the_meter_counts_tensors_as_long_as_they_live() -> None:
    model = nn.Linear(10, 5, bias=False)
    with Meter(vocab_size=5, model=model) as found:
        first = torch.zeros(3, 10)  # 120 bytes
        logits = model(first)  # 60
        assert (found.live, found.logits) == (180.0, 60.0)
        view = logits[:1]  # the same memory
        del logits
        assert found.live == 180.0
        del view
        assert (found.live, found.logits) == (120.0, 0.0)
    assert (found.peak, found.peak_logits) == (180.0, 60.0)
    found.restart()
    assert found.peak == 120.0


AGAIN = Holding(torch.float32, checkpointing=True)
Reading = Callable[..., Work]


@pytest.mark.parametrize(
    ("reading", "config", "how"),
    [
        (dry_run.trained_policy, OPT, PLAIN),
        (dry_run.trained_policy, LLAMA, LORA),
        (dry_run.trained_values, LLAMA, AGAIN),
        (dry_run.generated, LLAMA, PLAIN),
    ],
)
def test_one_layer_stands_for_all_that_are_not_run(
    reading: Reading, config: Any, how: Holding, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = reading(ModelShape.of(config), how, BATCH)
    reading.cache_clear()  # type: ignore[attr-defined]
    monkeypatch.setattr(dry_run, "RUN", LAYERS)
    assert reading(ModelShape.of(config), how, BATCH) == fewer
    assert fewer.peak > 0


@pytest.mark.parametrize(
    ("reading", "config", "how"),
    [
        (dry_run.trained_policy, LLAMA, LORA),
        (dry_run.trained_values, OPT, PLAIN),
        (dry_run.generated, LLAMA, PLAIN),
        (dry_run.compared, OPT, PLAIN),
    ],
)
def test_tensors_without_data_take_what_real_ones_take(
    reading: Reading, config: Any, how: Holding, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended = reading(ModelShape.of(config), how, BATCH)
    reading.cache_clear()  # type: ignore[attr-defined]
    monkeypatch.setattr(dry_run, "FakeTensorMode", nullcontext)
    monkeypatch.setattr(meter, "_empty_like", _zeros_like)
    monkeypatch.setattr(Tokens, "batch", _padded)
    real = reading(ModelShape.of(config), how, BATCH)
    assert real.saved == pytest.approx(pretended.saved, rel=0.02)
    assert real.peak == pytest.approx(pretended.peak, rel=0.02)
    assert real.logits == pytest.approx(pretended.logits, rel=0.02)


def _padded(tokens: Tokens) -> TokenBatch:
    """Return a batch with padding: a mask that has data and hides nothing is left out by transformers."""
    ids = torch.zeros(tokens.rows, tokens.prompt + tokens.response, dtype=torch.long)
    mask = torch.ones(ids.shape, dtype=torch.bool)
    mask[0, 0] = False
    return TokenBatch(ids, mask, ids[:, tokens.prompt :], mask[:, tokens.prompt :])


def _zeros_like(tensor: torch.Tensor) -> torch.Tensor:
    found = torch.zeros(tensor.shape, dtype=tensor.dtype)
    if not isinstance(tensor, nn.Parameter):
        return found
    weight = nn.Parameter(found, requires_grad=tensor.requires_grad)
    weight.grad = torch.zeros_like(found) if tensor.requires_grad else None
    return weight


def test_what_takes_more_is_seen_to_take_more() -> None:
    shape = ModelShape.of(OPT)
    base = dry_run.trained_values(shape, PLAIN, BATCH)
    twice = dry_run.trained_values(shape, PLAIN, Tokens(6, 5, 4))
    assert twice.saved == pytest.approx(2 * base.saved, rel=0.05)
    again = dry_run.trained_values(shape, AGAIN, BATCH)
    assert again.saved < 0.4 * base.saved
    eager = dry_run.trained_values(shape, Holding(torch.float32, attention="eager"), BATCH)
    assert eager.saved > base.saved  # the weights of attention
    # keys and values of 3 rows x 9 tokens, D wide each, float32, all layers
    assert dry_run.generated(shape, PLAIN, BATCH).saved == 3 * 9 * 2 * D * 4 * LAYERS
