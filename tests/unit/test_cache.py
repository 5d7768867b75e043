"""The cache with its room made at once holds what transformers' growing one holds, and loses rows as it does."""

from __future__ import annotations

import torch
from tiny_models import BOS, PAD, tiny_policy
from transformers import DynamicCache, MistralConfig

from rlhf_cli.models.cache import RoomyLayer, roomy_cache
from rlhf_cli.models.sampling import row_streams, sample
from rlhf_cli.models.tokens import pad_left

POLICY = tiny_policy()
IDS, MASK = pad_left([[BOS, 4, 5, 6, 7], [BOS, 8], [BOS, 9, 4, 4]], PAD)
ROOM = IDS.shape[1] + 3


@torch.no_grad()
def test_logits_are_those_of_the_growing_cache_and_its_memory_is_made_once() -> None:
    ours, theirs = roomy_cache(POLICY.config, ROOM), DynamicCache(config=POLICY.config)
    rows, ids, mask, places = torch.arange(3), IDS, torch.nn.functional.pad(MASK.long(), (0, 3), value=1), set()
    for step in range(4):
        seen = {"attention_mask": mask[rows, : IDS.shape[1] + step], "use_cache": True}
        found = [POLICY(input_ids=ids, past_key_values=cache, **seen).logits[:, -1] for cache in (ours, theirs)]
        torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)
        assert ours.get_seq_length() == theirs.get_seq_length() == IDS.shape[1] + step
        places.add(ours.layers[0].whole_keys.data_ptr())
        if step == 1:
            assert len(places) == 1
            rows = torch.tensor([0, 2])
            for cache in (ours, theirs):
                cache.batch_select_indices(rows)
        ids = torch.tensor([[5], [6], [7]])[rows]
    assert len(places) == 2
    assert all(torch.equal(one.keys, other.keys) for one, other in zip(ours.layers, theirs.layers, strict=True))


def test_layers_that_see_a_window_are_left_as_they_are() -> None:
    config = MistralConfig(num_hidden_layers=2, sliding_window=4)
    assert [type(layer) for layer in roomy_cache(config, 9).layers] == [
        type(layer) for layer in DynamicCache(config=config).layers
    ]
    assert not any(isinstance(layer, RoomyLayer) for layer in roomy_cache(config, 9).layers)


def test_rows_that_have_ended_are_not_computed_again() -> None:
    sizes: list[int] = []
    hook = POLICY.register_forward_pre_hook(
        lambda _, __, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    prompts, streams = [[BOS, 4, 5], [BOS, 8]] * 20, row_streams(3, rows=range(40))
    how = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "eos_ids": [2, 5, 6, 7, 8], "pad_id": PAD}
    try:
        whole = sample(POLICY, prompts, streams=streams, **how)
        assert sizes[0] == 40
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] <= 20
        for step, size in enumerate(sizes):  # never more than twice the rows that have not ended
            assert size <= max(2 * sum(len(ids) > step for ids in whole), 1) or step == 0
    finally:
        hook.remove()
    assert [sample(POLICY, [one], streams=[at], **how)[0] for one, at in zip(prompts, streams, strict=True)] == whole
