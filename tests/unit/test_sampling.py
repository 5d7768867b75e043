from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from tiny_models import BOS, EOS, PAD, VOCAB, tiny_policy

from rlhf_cli.errors import RunError
from rlhf_cli.models.logps import frozen_token_logps, vocabulary_logps
from rlhf_cli.models.prefix_tree import PrefixTree
from rlhf_cli.models.sampling import draw, nucleus, row_streams, sample, trim, uniforms
from rlhf_cli.models.tokens import collate, pad_left

POLICY = tiny_policy()
PROMPTS = [[BOS, 4, 5, 6, 7], [BOS, 8], [BOS, 9, 4, 4]]
ANSWERS = [[5, EOS], [5, 6, EOS], [7, 7, 7, EOS], [8, EOS]]
TREE = PrefixTree([(prompt, answer) for prompt in PROMPTS for answer in ANSWERS], VOCAB, PAD)
DRAWS = 4000


def sampled(prompts: list[list[int]], *, seed: int = 0, **changes: Any) -> list[list[int]]:
    settings: dict[str, Any] = {
        "max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0, "eos_ids": [EOS], "pad_id": PAD
    }  # fmt: skip
    return sample(POLICY, prompts, streams=row_streams(seed, rows=range(len(prompts))), **{**settings, **changes})


def total_variation(found: list[list[int]], expected: dict[tuple[int, ...], float]) -> float:
    counts = Counter(map(tuple, found))
    keys = counts.keys() | expected.keys()
    return 0.5 * sum(abs(counts[key] / len(found) - expected.get(key, 0.0)) for key in keys)


def two_token_distribution(prompt: list[int], temperature: float) -> dict[tuple[int, ...], float]:
    """Exact probabilities of every response of at most two tokens, cut there."""
    responses = [[EOS]] + [[a, b] for a, b in product(range(VOCAB), repeat=2) if a != EOS]
    batch = collate([prompt] * len(responses), responses, PAD)
    logps = frozen_token_logps(POLICY, batch, temperature=temperature, tree=None).sum(-1)
    return {tuple(ids): p for ids, p in zip(responses, logps.exp().tolist(), strict=True)}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_follow_the_log_probs_at_the_same_temperature(temperature: float) -> None:
    # Prompts of unequal length in one batch. A TV of .5 sum sqrt(p (1-p) 2 / (pi n)) is expected from chance alone.
    found = sampled([prompt for prompt in PROMPTS for _ in range(DRAWS)], max_new_tokens=2, temperature=temperature)
    for number, prompt in enumerate(PROMPTS):
        exact = two_token_distribution(prompt, temperature)
        assert sum(exact.values()) == pytest.approx(1.0, abs=1e-4)
        chance = 0.5 * sum((p * (1 - p) * 2 / (torch.pi * DRAWS)) ** 0.5 for p in exact.values())
        rows = found[number * DRAWS : (number + 1) * DRAWS]
        assert total_variation(rows, exact) < 1.3 * chance
        other = two_token_distribution(prompt, 0.6 if temperature == 1.0 else 1.0)
        assert total_variation(rows, other) > 2 * chance  # the test could tell another temperature apart


def test_at_a_low_temperature_it_is_greedy_generate() -> None:
    ids, mask = pad_left(PROMPTS, PAD)
    generated = POLICY.generate(
        input_ids=ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=8, eos_token_id=EOS, pad_token_id=PAD
    )
    found = sampled(PROMPTS, temperature=1e-4, max_new_tokens=8)
    assert found == trim(generated[:, ids.shape[1] :], [EOS])
    assert found == [sampled([prompt], temperature=1e-4, max_new_tokens=8)[0] for prompt in PROMPTS]


def test_greedy_tokens_are_the_most_likely_ones() -> None:
    found = sampled(PROMPTS, temperature=1e-4)
    batch = collate(PROMPTS, found, PAD)
    with torch.no_grad():
        best = vocabulary_logps(POLICY, batch, temperature=1.0, tree=None).argmax(-1)
    assert torch.equal(best[batch.response_mask], batch.response_ids[batch.response_mask])


def test_responses_end_with_end_of_sequence_or_are_cut() -> None:
    found = sampled(PROMPTS * 100)
    assert all(EOS not in ids[:-1] and 1 <= len(ids) <= 6 for ids in found)
    assert all(ids[-1] == EOS or len(ids) == 6 for ids in found)
    assert any(ids[-1] == EOS for ids in found)
    assert any(ids[-1] != EOS for ids in found)


def test_any_of_several_end_tokens_ends_a_response() -> None:
    found = sampled(PROMPTS * 100, eos_ids=[EOS, 7])
    assert all(not {EOS, 7} & set(ids[:-1]) for ids in found)
    assert {ids[-1] for ids in found if len(ids) < 6} == {EOS, 7}


def test_the_seed_alone_decides() -> None:
    assert sampled(PROMPTS * 10) == sampled(PROMPTS * 10)
    assert sampled(PROMPTS * 10) != sampled(PROMPTS * 10, seed=1)


def test_a_row_draws_the_same_whatever_is_beside_it() -> None:
    streams = row_streams(3, 7, rows=range(30))
    how: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0, "eos_ids": [EOS], "pad_id": PAD}
    whole = sample(POLICY, PROMPTS * 10, streams=streams, **how)
    assert len({tuple(ids) for ids in whole}) > 20
    halves = [sample(POLICY, (PROMPTS * 10)[rows], streams=streams[rows], **how) for rows in (slice(15), slice(15, 30))]
    assert halves[0] + halves[1] == whole
    assert [sample(POLICY, [PROMPTS[i % 3]], streams=[streams[i]], **how)[0] for i in range(30)] == whole
    torch.manual_seed(1)
    assert sample(POLICY, PROMPTS * 10, streams=streams, **how) == whole


def test_streams_are_told_apart_by_every_part_of_their_key() -> None:
    found = [row_streams(*key, rows=range(50)) for key in [(0,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]]
    assert len({stream for streams in found for stream in streams}) == 250
    assert row_streams(0, 1, rows=[9, 3]) == [found[2][9], found[2][3]]
    assert row_streams(5, rows=[]) == []


def test_uniforms_are_uniform_and_independent_between_neighbouring_rows() -> None:
    numbers = uniforms(row_streams(0, rows=range(2000)), 5).numpy()
    assert kstest(numbers.ravel(), "uniform").pvalue > 0.01
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 3 / 100  # 3 sigma of 10,000 pairs
    assert uniforms([], 5).shape == (0, 5)


def test_a_closed_vocabulary_gives_valid_answers_with_their_probabilities() -> None:
    found = sampled([prompt for prompt in PROMPTS for _ in range(DRAWS)], tree=TREE)
    assert {tuple(ids) for ids in found} == {tuple(ids) for ids in ANSWERS}
    for number, prompt in enumerate(PROMPTS):
        batch = collate([prompt] * len(ANSWERS), ANSWERS, PAD)
        exact = frozen_token_logps(POLICY, batch, temperature=1.0, tree=TREE).sum(-1).exp().tolist()
        expected = {tuple(ids): p for ids, p in zip(ANSWERS, exact, strict=True)}
        assert total_variation(found[number * DRAWS : (number + 1) * DRAWS], expected) < 0.03


# -- one token ---------------------------------------------------------------------------------------------------------

PROBABILITIES = torch.tensor([0.05, 0.4, 0.25, 0.3])


def shares(top_p: float) -> list[float]:
    luck = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = draw(PROBABILITIES.log().expand(20_000, 4), top_p, luck)
    return (torch.bincount(tokens, minlength=4) / len(tokens)).tolist()


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1.0, [0.05, 0.4, 0.25, 0.3]),
        (0.9, [0.0, 0.4 / 0.95, 0.25 / 0.95, 0.3 / 0.95]),  # .4 + .3 < .9: the .25 that crosses it stays
        (0.6, [0.0, 4 / 7, 0.0, 3 / 7]),
        (0.39, [0.0, 1.0, 0.0, 0.0]),
        (1e-6, [0.0, 1.0, 0.0, 0.0]),  # never empty
    ],
)
def test_top_p_keeps_the_nucleus(top_p: float, expected: list[float]) -> None:
    found = shares(top_p)
    assert found == pytest.approx(expected, abs=0.015)
    assert [share == 0 for share in found] == [share == 0 for share in expected]


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_tokens_have_their_probabilities(top_p: float) -> None:
    logits = 3 * torch.randn(300, generator=torch.Generator().manual_seed(4))
    exact = logits.double().softmax(-1)
    exact = exact * nucleus(exact, top_p)
    exact = exact / exact.sum()
    luck = torch.rand(50_000, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    counts = torch.bincount(draw(logits.expand(50_000, 300), top_p, luck), minlength=300).double()
    assert counts[exact == 0].sum() == 0
    often = 50_000 * exact >= 5
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = 50_000 * torch.cat([exact[often], exact[~often].sum()[None]])
    keep = expected > 0
    assert chisquare(observed[keep], expected[keep]).pvalue > 0.01


def test_the_ends_of_the_unit_interval_draw_tokens_that_can_be_drawn() -> None:
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    for logits, (first, last) in {(-1e9, 0.0, 1.0, -1e9): (1, 2), (0.0, -1e9, -1e9, -1e9): (0, 0)}.items():
        assert draw(torch.tensor(logits).expand(2, 4), 1.0, ends).tolist() == [first, last]
    wide = torch.cat([torch.randn(100_000), torch.full((5,), -1e9)]).expand(2, -1)
    assert draw(wide, 1.0, ends).max() < 100_000


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_policy_that_diverged_is_named(bad: float, top_p: float) -> None:
    logits = torch.zeros(2, 4)
    logits[1, 2] = bad
    with pytest.raises(RunError, match="probabilities that are not finite. its training diverged. lower the learning"):
        draw(logits, top_p, torch.tensor([0.5, 0.5], dtype=torch.float64))


def test_top_p_restricts_whole_responses() -> None:
    narrow, wide = (sampled([PROMPTS[0]] * 500, top_p=top_p) for top_p in (0.3, 1.0))
    assert {ids[0] for ids in narrow} < {ids[0] for ids in wide}


def test_rows_are_trimmed_after_their_first_end_token() -> None:
    rows = torch.tensor([[4, EOS, PAD, PAD], [EOS, 4, EOS, PAD], [4, 5, 6, 7], [4, 5, 6, EOS]])
    assert trim(rows, [EOS]) == [[4, EOS], [EOS], [4, 5, 6, 7], [4, 5, 6, EOS]]
    assert trim(rows, [EOS, 5]) == [[4, EOS], [EOS], [4, 5], [4, 5]]
