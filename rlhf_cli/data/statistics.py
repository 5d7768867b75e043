"""How long prompts and responses are in tokens, what the limits cost, and how many rows are where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_cli.config.schema import DatasetConfig
from rlhf_cli.data.rows import Demonstration, Pair, PreferenceData
from rlhf_cli.data.turns import prompt_ids, response_ids

SAMPLE = 2_000  # rows that are tokenised, drawn evenly from all splits
SEED = 0
SPLITS = {
    "demonstrations": "SFT",
    "reward_pairs": "reward model",
    "policy_pairs": "alignment",
    "prompts": "alignment prompts",
    "heldout_pairs": "held out",
}
TRUNCATED = "response_truncated"  # counts responses that are cut; every other reason counts rows left out


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens before anything is cut.

    Args:
        mean, median, p95, longest: of the sample.
        limit: the longest that the config allows.
        over: share of the sample beyond it, in [0, 1].
    """

    mean: float
    median: float
    p95: float
    longest: int
    limit: int
    over: float


@dataclass(frozen=True)
class TokenStatistics:
    """What a dataset is in the tokens of a tokenizer.

    Args:
        prompts, responses: their lengths, special tokens included.
        rows: of each split, by field of `PreferenceData`.
        dropped: rows left out, and responses cut, by reason.
        sample: rows that the lengths rest on.
        loaded: rows that it was drawn from.
    """

    prompts: Lengths
    responses: Lengths
    rows: dict[str, int]
    dropped: dict[str, int]
    sample: int
    loaded: int

    def table(self) -> list[str]:
        """Return the lengths as a table for the terminal, three lines."""
        title = f"tokens of {'all' if self.sample == self.loaded else 'a sample of'} {self.sample:,} rows"
        head = f"{title:<32}{'mean':>7}{'median':>8}{'95 %':>7}{'longest':>9}{'limit':>7}"
        parts = (("prompts", self.prompts, "left out"), ("responses", self.responses, "cut"))
        return [head] + [
            f"{name:<32}{part.mean:>7.0f}{part.median:>8.0f}{part.p95:>7.0f}{part.longest:>9}{part.limit:>7}"
            f"  {part.over:.1%} {fate}"
            for name, part, fate in parts
        ]

    def lines(self) -> list[str]:
        """Return the table, the rows of each split and those left out, five lines at most."""
        rows = ", ".join(f"{words} {self.rows[name]:,}" for name, words in SPLITS.items())
        lost = [f"{reason} {count:,}" for reason, count in self.dropped.items() if reason != TRUNCATED]
        cut = self.dropped.get(TRUNCATED, 0)
        lost += [f"responses cut {cut:,}"] if cut else []
        return [*self.table(), f"rows: {rows}", *([f"left out: {', '.join(lost)}"] if lost else [])]


def token_statistics(
    data: PreferenceData,
    tokenizer: PreTrainedTokenizerBase,
    cfg: DatasetConfig,
    fitted: PreferenceData | None = None,
) -> TokenStatistics:
    """Return the lengths of a dataset's rows in tokens, before anything is cut.

    Of more than SAMPLE rows, SAMPLE are drawn with a fixed seed and tokenised; a row counts each response it has.

    Args:
        data: as it was loaded.
        tokenizer: of the policy.
        cfg: the limits.
        fitted: what `fit_to_context` left of it, whose rows and counts are reported instead; None: it has not run.
    """
    parts: list[Sequence[Demonstration | Pair]] = [data.demonstrations, data.reward_pairs]
    parts += [data.policy_pairs, data.heldout_pairs]
    rows = _sample(parts)
    prompts = [row.prompt for row in rows]
    responses = [text for row in rows for text in _responses(row)]
    shown = fitted or data
    return TokenStatistics(
        _lengths(prompts, lambda texts: prompt_ids(tokenizer, texts), cfg.max_prompt_tokens),
        _lengths(responses, lambda texts: response_ids(tokenizer, texts), cfg.max_completion_tokens),
        {name: len(getattr(shown, name)) for name in SPLITS},
        dict(shown.dropped),
        len(rows),
        sum(map(len, parts)),
    )


def _sample(parts: list[Sequence[Demonstration | Pair]]) -> list[Demonstration | Pair]:
    ends = np.cumsum([len(part) for part in parts])
    places = np.arange(ends[-1])
    if len(places) > SAMPLE:
        places = np.sort(np.random.default_rng(SEED).choice(len(places), SAMPLE, replace=False))
    found = np.searchsorted(ends, places, side="right")
    starts = ends - [len(part) for part in parts]
    return [parts[part][int(place - starts[part])] for part, place in zip(found, places, strict=True)]


def _responses(row: Demonstration | Pair) -> tuple[str, ...]:
    return (row.response,) if isinstance(row, Demonstration) else (row.chosen, row.rejected)


def _lengths(texts: list[str], encode: Callable[[list[str]], list[list[int]]], limit: int) -> Lengths:
    unique = list(dict.fromkeys(texts))
    length = {text: len(ids) for text, ids in zip(unique, encode(unique), strict=True)}
    found = np.array([length[text] for text in texts])
    mean, median, p95 = float(found.mean()), float(np.median(found)), float(np.percentile(found, 95))
    return Lengths(mean, median, p95, int(found.max()), limit, float((found > limit).mean()))
