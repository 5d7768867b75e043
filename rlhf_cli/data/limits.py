"""What is refused because of the context limits: a split of which nothing fits, an answer that cannot be given."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_cli.config.schema import DatasetConfig
from rlhf_cli.data.rows import PreferenceData
from rlhf_cli.data.turns import prompt_ids, response_ids
from rlhf_cli.errors import DataError

SPLITS = ("demonstrations", "reward_pairs", "policy_pairs", "prompts", "heldout_pairs", "questions")
LOOKED_AT = 2_000  # rows that a message rests on


def check_splits(
    before: PreferenceData, after: PreferenceData, tokenizer: PreTrainedTokenizerBase, cfg: DatasetConfig
) -> None:
    """Refuse data of which some split has no row left.

    Args:
        before, after: the rows as loaded, and those of them that fit the context.

    Raises:
        DataError: a split has no row left; with the number to set.
    """
    for name in SPLITS:
        rows = getattr(before, name)
        if not rows or getattr(after, name):
            continue
        what = f"none of the {len(rows)} {name.replace('_', ' ')} fits the context"
        shortest = _shortest(rows, tokenizer)
        if shortest <= cfg.max_prompt_tokens:
            same = "cut to that, chosen and rejected are the same"
            raise DataError(
                what, f"dataset.max_completion_tokens={cfg.max_completion_tokens}, and {same}", "raise the number"
            )
        raise DataError(
            what,
            f"dataset.max_prompt_tokens={cfg.max_prompt_tokens}, and the shortest prompt has {shortest} tokens",
            f"set dataset.max_prompt_tokens={shortest} or more, or give shorter prompts",
        )


def check_answers(data: PreferenceData, tokenizer: PreTrainedTokenizerBase, cfg: DatasetConfig) -> None:
    """Refuse an enumerable answer that is too long: a policy that cannot reach it can never match its share.

    Raises:
        DataError: an answer is longer than a response may be; with the number to set.
    """
    answers = list(dict.fromkeys(text for question in data.questions for text in question.answers))
    if not answers:
        return
    need, longest = max((len(ids), text) for text, ids in zip(answers, response_ids(tokenizer, answers), strict=True))
    if need > cfg.max_completion_tokens:
        raise DataError(
            f"dataset.max_completion_tokens={cfg.max_completion_tokens} is too small",
            f"the answer {longest!r} has {need} tokens, end-of-sequence included",
            f"set dataset.max_completion_tokens={need} or more",
        )


def _shortest(rows: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the length of the shortest prompt of rows, or of prompts themselves, in tokens."""
    prompts = [row if isinstance(row, str) else row.prompt for row in islice(rows, LOOKED_AT)]
    return min(len(ids) for ids in prompt_ids(tokenizer, list(dict.fromkeys(prompts))))
