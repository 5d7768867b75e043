"""From text rows to token ids: beginning- and end-of-sequence tokens, the context limits, and what they leave out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, TypedDict

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from rlhf_cli.config.schema import DatasetConfig
from rlhf_cli.data.lazy import LazyRows
from rlhf_cli.data.limits import check_answers, check_splits
from rlhf_cli.data.rows import Demonstration, Pair, PreferenceData, Ranking
from rlhf_cli.data.stream_tokens import encoding_key, fit_lazy
from rlhf_cli.data.turns import prompt_ids, response_ids, response_text

CHUNK = 2_000  # texts tokenised at a time
PROGRESS_FROM = 20_000  # texts; below, tokenisation takes about a second


class PromptTokens(TypedDict):
    """A prompt as text and as token ids."""

    prompt: str
    prompt_ids: list[int]


class PairTokens(TypedDict):
    """A preference pair as token ids; responses without the prompt, EOS included unless truncated.

    `label` and `margin` as in `Pair`.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    label: float
    margin: float


class RankingTokens(TypedDict):
    """A ranking as token ids, best response first; responses without the prompt, EOS included unless truncated."""

    prompt_ids: list[int]
    response_ids: list[list[int]]


class DemonstrationTokens(TypedDict):
    """A demonstration as token ids; the completion without the prompt, EOS included unless truncated."""

    prompt_ids: list[int]
    completion_ids: list[int]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the ids of a prompt, after BOS or in the chat template, as the tokenizer has it (turns.py)."""
    return _encode_prompts(tokenizer, [prompt])[prompt]


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str, max_tokens: int | None = None) -> list[int]:
    """Return the ids of a response as it follows a prompt (turns.py), EOS at its end; cut to max_tokens it has no EOS.

    Args:
        max_tokens: the longest result in tokens, EOS included; None: no limit.
    """
    return _encode_responses(tokenizer, [response], max_tokens)[response]


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of a response up to its EOS: what `encode_response` would encode.

    Other special tokens stay visible (turns.py).
    """
    return response_text(tokenizer, ids)


def encode_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, cfg: DatasetConfig
) -> Sequence[PromptTokens]:
    """Return the prompts with their token ids; those of lazy rows stay on disk."""
    if (lazy := _on_disk(prompts, tokenizer, cfg)) is not None:
        return lazy
    ids = _encode_prompts(tokenizer, prompts)
    return [PromptTokens(prompt=prompt, prompt_ids=ids[prompt]) for prompt in prompts]


def encode_pairs(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, cfg: DatasetConfig) -> Sequence[PairTokens]:
    """Return the pairs as token ids, those of lazy rows on disk. Equal texts share a list: copy it first."""
    if (lazy := _on_disk(pairs, tokenizer, cfg)) is not None:
        return lazy
    prompts = _encode_prompts(tokenizer, (pair.prompt for pair in pairs))
    texts = (text for pair in pairs for text in (pair.chosen, pair.rejected))
    responses = _encode_responses(tokenizer, texts, cfg.max_completion_tokens)
    return [
        PairTokens(
            prompt_ids=prompts[pair.prompt],
            chosen_ids=responses[pair.chosen],
            rejected_ids=responses[pair.rejected],
            label=pair.label,
            margin=pair.margin,
        )
        for pair in pairs
    ]


def encode_rankings(
    rankings: Sequence[Ranking], tokenizer: PreTrainedTokenizerBase, cfg: DatasetConfig
) -> Sequence[RankingTokens]:
    """Return the rankings as token ids, those of lazy rows on disk. Equal texts share a list: copy it first."""
    if (lazy := _on_disk(rankings, tokenizer, cfg)) is not None:
        return lazy
    prompts = _encode_prompts(tokenizer, (ranking.prompt for ranking in rankings))
    texts = (text for ranking in rankings for text in ranking.responses)
    responses = _encode_responses(tokenizer, texts, cfg.max_completion_tokens)
    return [
        RankingTokens(prompt_ids=prompts[ranking.prompt], response_ids=[responses[text] for text in ranking.responses])
        for ranking in rankings
    ]


def trainer_rows(rows: Sequence[Any], bound: np.ndarray | None = None) -> Any:
    """Return token rows as trainers take them: a `datasets.Dataset` where they lie on disk, else a list.

    Args:
        rows: token rows.
        bound: delta* of each pair, nats, (N,), a column more; None: there is none.
    """
    if isinstance(rows, LazyRows):
        return rows.dataset if bound is None else rows.dataset.add_column("bound", bound)
    return rows if bound is None else [{**row, "bound": b} for row, b in zip(rows, bound.tolist(), strict=True)]


def _on_disk(rows: Sequence[Any], tokenizer: PreTrainedTokenizerBase, cfg: DatasetConfig) -> LazyRows[Any] | None:
    """Return the ids that `fit_to_context` wrote for lazy rows, None for lists and rows fitted to other settings."""
    if not isinstance(rows, LazyRows) or rows.encoded is None or rows.encoded.key != encoding_key(tokenizer, cfg):
        return None
    return LazyRows(rows.encoded.rows, lambda row: row, source=f"{rows.source}, {rows.encoded.key}")


def shared_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many leading tokens two responses share; equal responses share their full length."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def encode_demonstrations(
    demonstrations: Sequence[Demonstration], tokenizer: PreTrainedTokenizerBase, cfg: DatasetConfig
) -> Sequence[DemonstrationTokens]:
    """Return the demonstrations as token ids, those of lazy rows on disk. Equal texts share a list: copy it first."""
    if (lazy := _on_disk(demonstrations, tokenizer, cfg)) is not None:
        return lazy
    prompts = _encode_prompts(tokenizer, (row.prompt for row in demonstrations))
    responses = _encode_responses(tokenizer, (row.response for row in demonstrations), cfg.max_completion_tokens)
    return [
        DemonstrationTokens(prompt_ids=prompts[row.prompt], completion_ids=responses[row.response])
        for row in demonstrations
    ]


def fit_to_context(data: PreferenceData, tokenizer: PreTrainedTokenizerBase, cfg: DatasetConfig) -> PreferenceData:
    """Return the rows that fit the context; `dropped` gains, counted in rows, or responses for the second:

    - prompt_too_long: prompt over max_prompt_tokens (BOS included); left out, never cut.
    - response_truncated: response over max_completion_tokens (EOS included); kept, cut when it is encoded.
    - equal_after_truncation: pairs whose cut responses no longer differ; left out.

    Of a ranking's responses that are equal once cut, the best-ranked stays; with one left, the ranking is left out.
    A ranking counts as the pairs it implies, so these are not counted twice.

    Raises:
        DataError: no row of some split fits, or an enumerable answer does not.
    """
    result = fit_lazy(data, tokenizer, cfg) if isinstance(data.demonstrations, LazyRows) else _fit(data, tokenizer, cfg)
    check_splits(data, result, tokenizer, cfg)
    check_answers(result, tokenizer, cfg)
    return result


def _fit(data: PreferenceData, tokenizer: PreTrainedTokenizerBase, cfg: DatasetConfig) -> PreferenceData:
    encoded = _encode_prompts(tokenizer, _prompts(data))
    fitting = {prompt for prompt, ids in encoded.items() if len(ids) <= cfg.max_prompt_tokens}
    short = replace(
        data,
        demonstrations=[row for row in data.demonstrations if row.prompt in fitting],
        reward_rankings=[row for row in data.reward_rankings if row.prompt in fitting],
        prompts=[prompt for prompt in data.prompts if prompt in fitting],
        questions=[question for question in data.questions if question.prompt in fitting],
        **_each_list(data, lambda rows: [pair for pair in rows if pair.prompt in fitting]),
    )
    texts = [row.response for row in short.demonstrations]
    texts += [text for rows in _lists(short) for pair in rows for text in (pair.chosen, pair.rejected)]
    ids = _encode_responses(tokenizer, texts, cfg.max_completion_tokens)
    result = _distinct(short, ids)
    counts = {
        "prompt_too_long": _count(data) - _count(short),
        "response_truncated": sum(ids[text][-1] != tokenizer.eos_token_id for text in texts),
        "equal_after_truncation": _count(short) - _count(result),
    }
    result.dropped = data.dropped | {reason: count for reason, count in counts.items() if count}
    return result


def _distinct(data: PreferenceData, ids: dict[str, list[int]]) -> PreferenceData:
    """Return the data without pairs of equal ids, and its rankings without repeated ids."""
    rankings = []
    for ranking in data.reward_rankings:
        first: dict[tuple[int, ...], str] = {}
        for text in ranking.responses:
            first.setdefault(tuple(ids[text]), text)
        if len(first) > 1:
            rankings.append(Ranking(ranking.prompt, tuple(first.values())))

    def keep(rows: Sequence[Pair]) -> list[Pair]:
        if data.reward_rankings and rows is data.reward_pairs:
            return [pair for ranking in rankings for pair in ranking.pairs()]
        return [pair for pair in rows if ids[pair.chosen] != ids[pair.rejected]]

    return replace(data, reward_rankings=rankings, **_each_list(data, keep))


def _lists(data: PreferenceData) -> list[Sequence[Pair]]:
    """Return the lists of pairs, each once: one list may serve two uses, the survey's does."""
    return list({id(rows): rows for rows in (data.reward_pairs, data.policy_pairs, data.heldout_pairs)}.values())


def _each_list(data: PreferenceData, change: Callable[[Sequence[Pair]], Sequence[Pair]]) -> dict[str, Any]:
    """Return the changed lists of pairs by field name; what was one list stays one."""
    changed = {id(rows): change(rows) for rows in _lists(data)}
    return {name: changed[id(getattr(data, name))] for name in ("reward_pairs", "policy_pairs", "heldout_pairs")}


def _count(data: PreferenceData) -> int:
    return len(data.demonstrations) + sum(map(len, _lists(data)))


def _prompts(data: PreferenceData) -> Iterable[str]:
    yield from (row.prompt for row in data.demonstrations)
    for pairs in (data.reward_pairs, data.policy_pairs, data.heldout_pairs):
        yield from (pair.prompt for pair in pairs)
    yield from data.prompts
    yield from (question.prompt for question in data.questions)


def _encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str]) -> dict[str, list[int]]:
    return _encoded(prompts, lambda texts: prompt_ids(tokenizer, texts), None)


def _encode_responses(
    tokenizer: PreTrainedTokenizerBase, responses: Iterable[str], max_tokens: int | None
) -> dict[str, list[int]]:
    return _encoded(responses, lambda texts: response_ids(tokenizer, texts), max_tokens)


def _encoded(
    texts: Iterable[str], encode: Callable[[list[str]], list[list[int]]], max_tokens: int | None
) -> dict[str, list[int]]:
    """Return the ids of each text, cut to max_tokens. Equal ids are one object: a token takes 8 bytes instead of 36."""
    unique, known, found = list(dict.fromkeys(texts)), dict[int, int](), dict[str, list[int]]()
    with tqdm(total=len(unique), desc="tokenising", unit="text", disable=len(unique) <= PROGRESS_FROM) as bar:
        for start in range(0, len(unique), CHUNK):
            chunk = unique[start : start + CHUNK]
            for text, ids in zip(chunk, encode(chunk), strict=True):
                found[text] = [known.setdefault(token, token) for token in ids[:max_tokens]]
            bar.update(len(chunk))
    return found
