"""Damaged responses for reward training: without them a reward model gives nonsense an average score."""

from __future__ import annotations

from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from rlhf_cli.data.encode import PairTokens

Ids = tuple[int, ...]
MAX_TRIES = 200


@dataclass(frozen=True)
class _Source:
    """What a damaged response is made from; `body` and `other` are responses without their EOS."""

    rng: np.random.Generator
    prompt: Sequence[int]
    body: list[int]
    other: list[int]
    vocab: Sequence[int]  # without EOS
    eos: int
    ended: bool  # False for a truncated response, which has no EOS to lose

    def between(self, low: int, high: int) -> int:
        """Return an integer in [low, high], uniform; low if the range is empty."""
        return int(self.rng.integers(low, high + 1)) if high > low else low

    def tokens(self, count: int) -> list[int]:
        return [self.vocab[i] for i in self.rng.integers(len(self.vocab), size=count).tolist()]

    def close(self, tokens: list[int]) -> list[int]:
        return [*tokens, self.eos] if self.ended else tokens

    def segment(self, tokens: Sequence[int]) -> list[int]:
        """Return a random stretch of the tokens, at least one unless there is none."""
        start = self.between(0, len(tokens) - 1)
        return list(tokens[start : self.between(start + 1, len(tokens))])


def damaged(
    rng: np.random.Generator,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    other_response_ids: Sequence[int],
    vocab_ids: Sequence[int],
    *,
    valid: Collection[Ids] = (),
    eos_id: int | None = None,
    max_tokens: int | None = None,
) -> list[int]:
    """Return a damaged form of a response: token ids that are neither the response nor in `valid`.

    Most differ in one token (at any position, EOS included), or answer another prompt, wholly or from some word on:
    that is what a sampled policy gets wrong. The others are cut, stretched, shuffled, unended or random.

    Args:
        prompt_ids: the prompt; a response that echoes it is one kind of damage.
        response_ids: a real response, EOS at its end unless it was truncated.
        other_response_ids: a real response to another prompt; may be empty.
        vocab_ids: tokens that random damage draws from (EOS is skipped); leave padding out.
        valid: good responses to the prompt, EOS included.
        eos_id: the end-of-sequence token; None: the last token of response_ids.
        max_tokens: longest result in tokens, >= 1; what is cut there has no EOS. None: no limit.

    Raises:
        ValueError: response_ids is empty, vocab_ids holds nothing but EOS, or every damaged form tried is valid.
    """
    if len(response_ids) == 0:
        raise ValueError("response_ids is empty")
    eos = response_ids[-1] if eos_id is None else eos_id
    source = _source(rng, prompt_ids, response_ids, other_response_ids, _without(vocab_ids, eos), eos)
    return _damage(source, {tuple(response_ids), *valid}, max_tokens)


def negative_pairs(
    pairs: Sequence[PairTokens],
    share: float,
    *,
    rng: np.random.Generator,
    vocab_ids: Sequence[int],
    valid_by_prompt: Mapping[Ids, Collection[Ids]] | None = None,
    eos_id: int | None = None,
    max_tokens: int | None = None,
) -> list[PairTokens]:
    """Return the new pairs alone, round(share / (1 - share) * len(pairs)) of them, to be added to `pairs`.

    Each prefers a real response (chosen or rejected, evenly) to a damaged form that is no real response to the prompt.

    Args:
        share: share of the new pairs in all pairs once they are added, in [0, 1).
        vocab_ids, eos_id: as in `damaged`; eos_id None: the responses' most frequent last token.
        valid_by_prompt: good responses (EOS included) by prompt ids, besides those in `pairs`.
        max_tokens: longest damaged response in tokens, >= 1; None: the longest response in `pairs`.

    Raises:
        ValueError: share outside [0, 1), vocab_ids holds nothing but EOS, or every damaged form tried is valid.
    """
    count = _count(share, len(pairs))
    if count == 0:
        return []
    responses = [ids for pair in pairs for ids in (pair["chosen_ids"], pair["rejected_ids"])]
    eos = Counter(ids[-1] for ids in responses).most_common(1)[0][0] if eos_id is None else eos_id
    limit = max(map(len, responses)) if max_tokens is None else max_tokens
    vocab = _without(vocab_ids, eos)
    valid = _real_responses(pairs, valid_by_prompt or {})
    owners, others = rng.integers(len(responses), size=(2, count)).tolist()
    negatives = []
    for owner, other in zip(owners, others, strict=True):
        prompt, response = pairs[owner // 2]["prompt_ids"], responses[owner]
        elsewhere = responses[other] if pairs[other // 2]["prompt_ids"] != prompt else []  # the same prompt's are real
        rejected = _damage(_source(rng, prompt, response, elsewhere, vocab, eos), valid[tuple(prompt)], limit)
        row = PairTokens(prompt_ids=prompt, chosen_ids=response, rejected_ids=rejected, label=1.0, margin=0.0)
        negatives.append(row)
    return negatives


def _count(share: float, pairs: int) -> int:
    if not 0 <= share < 1:
        raise ValueError(f"share must be in [0, 1), got {share}")
    return round(share / (1 - share) * pairs)


def _source(
    rng: np.random.Generator,
    prompt: Sequence[int],
    response: Sequence[int],
    other: Sequence[int],
    vocab: Sequence[int],
    eos: int,
) -> _Source:
    body, other_body = ([token for token in ids if token != eos] for ids in (response, other))
    return _Source(rng, prompt, body, other_body, vocab, eos, ended=response[-1] == eos)


def _without(vocab_ids: Sequence[int], eos: int) -> list[int]:
    vocab = [int(token) for token in vocab_ids if token != eos]
    if not vocab:
        raise ValueError("vocab_ids holds no token besides EOS")
    return vocab


def _real_responses(pairs: Sequence[PairTokens], more: Mapping[Ids, Collection[Ids]]) -> dict[Ids, set[Ids]]:
    real: defaultdict[Ids, set[Ids]] = defaultdict(set)
    for pair in pairs:
        real[tuple(pair["prompt_ids"])].update((tuple(pair["chosen_ids"]), tuple(pair["rejected_ids"])))
    for prompt in real:
        real[prompt].update(more.get(prompt, ()))
    return real


def _damage(source: _Source, valid: Collection[Ids], max_tokens: int | None) -> list[int]:
    for _ in range(MAX_TRIES):
        kind = KINDS[min(bisect(CUMULATIVE, source.rng.random()), len(KINDS) - 1)]
        result = kind(source)[:max_tokens]
        if result and tuple(result) not in valid:
            return result
    raise ValueError(f"no damaged form of the response {source.body} found in {MAX_TRIES} tries")


# Each kind returns token ids; an empty list where it does not apply, and then another kind is drawn.


def _replace_one(s: _Source) -> list[int]:
    place = s.between(0, len(s.body) - (not s.ended))
    (token,) = s.tokens(1)
    if place == len(s.body):  # in place of EOS; half of these end one token late
        return [*s.body, token, s.eos] if s.rng.random() < 0.5 else [*s.body, token]
    return s.close([*s.body[:place], token, *s.body[place + 1 :]])


def _replace_two(s: _Source) -> list[int]:
    if len(s.body) < 2:
        return []
    first, second = s.rng.choice(len(s.body), size=2, replace=False).tolist()
    body = list(s.body)
    body[first], body[second] = s.tokens(2)
    return s.close(body)


def _insert(s: _Source) -> list[int]:
    place = s.between(0, len(s.body))
    return s.close([*s.body[:place], *s.tokens(1), *s.body[place:]])


def _delete(s: _Source) -> list[int]:
    place = s.between(0, len(s.body) - 1)
    return s.close([*s.body[:place], *s.body[place + 1 :]])


def _shuffle(s: _Source) -> list[int]:
    return s.close([s.body[i] for i in s.rng.permutation(len(s.body)).tolist()])


def _stop_early(s: _Source) -> list[int]:
    return [*s.body[: s.between(0, len(s.body) - 1)], s.eos]


def _never_end(s: _Source) -> list[int]:
    return s.body[: s.between(1, len(s.body))] if s.ended else []


def _run_on(s: _Source) -> list[int]:
    more = s.segment(s.other) if s.rng.random() < 0.5 else s.tokens(s.between(1, 4))
    return [*s.body, *more, s.eos]


def _repeat(s: _Source) -> list[int]:
    start = s.between(0, len(s.body) - 1)
    end = s.between(start + 1, len(s.body))
    return s.close([*s.body[:end], *s.body[start:end] * s.between(1, 2), *s.body[end:]])


def _splice(s: _Source) -> list[int]:
    return [*s.body[: s.between(1, len(s.body))], *s.other[s.between(0, len(s.other) - 1) :], s.eos]


def _off_topic(s: _Source) -> list[int]:
    return [*s.other, s.eos] if s.other else []


def _echo(s: _Source) -> list[int]:
    return [*s.segment(s.prompt), s.eos]


def _random(s: _Source) -> list[int]:
    return [*s.tokens(s.between(1, len(s.body) + 2)), s.eos]


# Shares of the kinds. Most are what a sampled policy gets wrong: one token, or another prompt's answer, whole or from
# some word on; a reward model that has not seen those scores them as average, and alignment finds them.
SHARES: dict[Callable[[_Source], list[int]], float] = {
    _replace_one: 0.30,
    _off_topic: 0.20,
    _splice: 0.15,
    _replace_two: 0.04,
    _insert: 0.04,
    _delete: 0.04,
    _shuffle: 0.03,
    _stop_early: 0.04,
    _never_end: 0.03,
    _run_on: 0.04,
    _repeat: 0.03,
    _echo: 0.02,
    _random: 0.04,
}
KINDS = tuple(SHARES)
CUMULATIVE = tuple(accumulate(SHARES.values()))
