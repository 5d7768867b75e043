"""The preference data of a reward model: what it learns from, what fits its calibration, what measures it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from rlhf_cli.config.schema import CommandConfig, TrainedRewardConfig, TrainRmConfig
from rlhf_cli.data import load
from rlhf_cli.data.encode import (
    PairTokens,
    encode_pairs,
    encode_prompt,
    encode_rankings,
    encode_response,
    fit_to_context,
)
from rlhf_cli.data.lazy import IDS, JUDGED, LazyRows, RowWriter
from rlhf_cli.data.negatives import negative_pairs
from rlhf_cli.data.rows import Pair, PreferenceData
from rlhf_cli.errors import DataError
from rlhf_cli.models.calibration import MIN_POINTS
from rlhf_cli.models.policy import load_tokenizer
from rlhf_cli.rewards.base import RewardLoss
from rlhf_cli.stages import priors
from rlhf_cli.stages.opening import reward_start

FREE = float("inf")  # the bound of a pair that has none
CERTAIN = {"label": 1.0, "margin": 0.0, "bound": FREE}  # of a ranking
MEASURED_PAIRS = 10_000  # held-out pairs that a reward model is measured on where they lie on disk
# On disk, in the order of a judgement's columns.
JUDGEMENT = pa.schema({"prompt_ids": IDS, "response_ids": pa.list_(IDS), **JUDGED, "bound": pa.float64()})


class Judgements:
    """The preference data of a reward model as token ids: for training, for fitting its calibration, for measuring.

    The held-out pairs are halved: one half fits the length calibration, the other measures.

    Raises:
        DataError: length calibration is asked for and too few held-out responses are there to fit it.
    """

    def __init__(self, cfg: TrainRmConfig, sft: Path) -> None:
        start = reward_start(cfg, sft)
        own = "auto" if start == sft / "model" else cfg.model.chat_template  # what SFT was saved with is its own
        self.cfg, self.tokenizer = cfg, load_tokenizer(start, chat_template=own)
        self.data = fit_to_context(load(cfg.dataset), self.tokenizer, cfg.dataset)
        self.pairs = self.encode(self.data.reward_pairs)
        self.fitting, self.measuring = halves(self.data)
        check_calibration(cfg, self.data)

    def encode(self, pairs: Sequence[Pair]) -> Sequence[PairTokens]:
        """Return pairs as token ids."""
        return encode_pairs(pairs, self.tokenizer, self.cfg.dataset)

    def training_set(self, loss: RewardLoss, sft: Path, rng: np.random.Generator, folder: Path) -> Any:
        """Return what the trainer reads: the judgements and, beside them, damaged responses drawn with `rng`.

        A list; of rows on disk, a dataset that is written into `folder`.
        """
        assert isinstance(self.cfg.reward, TrainedRewardConfig)
        share, rows = self.cfg.reward.negative_share, self.training_rows(loss, sft)
        if not isinstance(self.pairs, LazyRows):
            listed = list(rows)
            # without a bound: a prior is about what people judge
            return listed + [judgement(pair) for pair in self.damaged(self.pairs, share, rng, beside=len(listed))]
        folder.mkdir(parents=True, exist_ok=True)
        with RowWriter(folder / "judgements.arrow", JUDGEMENT) as file:
            for row in rows:
                file.write(*row.values())
            share = _share_of_pairs(share, file.count, len(self.pairs))
            for batch in _shares(self.pairs, share, rng):
                for pair in self.damaged(batch.rows, batch.share, rng):
                    file.write(*judgement(pair).values())
        return Dataset.from_file(str(folder / "judgements.arrow"))

    def training_rows(self, loss: RewardLoss, sft: Path) -> Iterator[dict[str, Any]]:
        """Yield what is learned from: rankings whole where the loss takes them, else the pairs with their bounds.

        Reading every token and smoothing labels are defined on pairs, so they too learn the pairs rankings imply.
        """
        rankings, reward = self.data.reward_rankings, self.cfg.reward
        assert isinstance(reward, TrainedRewardConfig)
        if rankings and loss.ranking_loss is not None and not (reward.token_wise or reward.label_smoothing):
            for row in encode_rankings(rankings, self.tokenizer, self.cfg.dataset):
                yield {"prompt_ids": row["prompt_ids"], "response_ids": row["response_ids"], **CERTAIN}
            return
        bounds = priors.bounds(self.cfg.reward, self.data.reward_pairs, self.pairs, cfg=self.cfg, sft=sft)
        listed = repeat(FREE, len(self.pairs)) if bounds is None else map(float, bounds)
        for pair, bound in zip(self.pairs, listed, strict=True):
            yield judgement(pair, bound)

    def damaged(
        self, pairs: Sequence[PairTokens], share: float, rng: np.random.Generator, *, beside: int | None = None
    ) -> list[PairTokens]:
        """Return pairs whose loser is a damaged response, as many as make up `share` of all judgements.

        `beside` is the number of judgements that are not damaged; None: the pairs themselves.
        """
        if beside is not None and beside != len(pairs):  # rankings imply more pairs than they are
            share = _share_of_pairs(share, beside, len(pairs))
        specials = set(self.tokenizer.all_special_ids)
        vocabulary = [i for i in range(len(self.tokenizer)) if i not in specials]
        return negative_pairs(
            pairs, share, rng=rng, vocab_ids=vocabulary, valid_by_prompt=valid_responses(self.data, self.tokenizer),
            eos_id=self.tokenizer.eos_token_id, max_tokens=self.cfg.dataset.max_completion_tokens,
        )  # fmt: skip


@dataclass(frozen=True)
class _Batch:
    rows: list[PairTokens]
    share: float  # of damaged responses in all judgements, once they are added


def _share_of_pairs(share: float, judgements: int, pairs: int) -> float:
    """Return the share in `pairs` and what is added to them of as many as are `share` of all beside `judgements`."""
    count = share / (1 - share) * judgements
    return count / (count + pairs)


def _shares(pairs: LazyRows[PairTokens], share: float, rng: np.random.Generator) -> Iterator[_Batch]:
    """Yield the pairs in batches, in random order, each with the share that makes the sum over all what it would be."""
    total, done = round(share / (1 - share) * len(pairs)), 0
    for rows in pairs.take(rng.permutation(len(pairs))).batches():
        count = round(total * (done + len(rows)) / len(pairs)) - round(total * done / len(pairs))
        done += len(rows)
        yield _Batch(rows, count / (count + len(rows)))


def judgement(pair: PairTokens, bound: float = FREE) -> dict[str, Any]:
    """Return a pair as the trainer reads it."""
    responses = [pair["chosen_ids"], pair["rejected_ids"]]
    about = {"label": pair["label"], "margin": pair["margin"], "bound": bound}
    return {"prompt_ids": pair["prompt_ids"], "response_ids": responses, **about}


def check_calibration(cfg: CommandConfig, data: PreferenceData) -> None:
    """Refuse length calibration where there are too few held-out responses to fit it.

    Raises:
        DataError: there are fewer than MIN_POINTS.
    """
    responses = 2 * len(halves(data)[0])
    if getattr(getattr(cfg, "reward", None), "calibration", "none") == "length" and responses < MIN_POINTS:
        raise DataError(
            f"{responses} held-out responses are too few to fit reward.calibration=length",
            f"it takes {MIN_POINTS}, from half of the held-out pairs",
            "add held-out pairs, or use reward.calibration=none",
        )


def halves(data: PreferenceData) -> tuple[list[Pair], list[Pair]]:
    """Return the held-out pairs as two halves: to fit the length calibration, and to measure.

    On free text no prompt is in both. On the survey world every wording is: its first judgements are in the one, its
    later ones in the other, since a curve fitted on some questions says little about the length of others' answers.
    Where they lie on disk, the first MEASURED_PAIRS are halved.
    """
    lazy = isinstance(data.heldout_pairs, LazyRows)
    by_prompt: dict[str, list[Pair]] = {}
    for pair in data.heldout_pairs[:MEASURED_PAIRS] if lazy else data.heldout_pairs:
        by_prompt.setdefault(pair.prompt, []).append(pair)
    groups = list(by_prompt.values())
    if not data.questions:
        return [pair for group in groups[1::2] for pair in group], [pair for group in groups[::2] for pair in group]
    fitting = [pair for group in groups for pair in group[: len(group) // 2]]
    return fitting, [pair for group in groups for pair in group[len(group) // 2 :]]


def valid_responses(data: PreferenceData, tokenizer: Any) -> dict[tuple[int, ...], set[tuple[int, ...]]]:
    """Return the token ids of every enumerated answer by prompt ids, so that no negative is one of them."""
    return {
        tuple(encode_prompt(tokenizer, question.prompt)): {
            tuple(encode_response(tokenizer, answer)) for answer in question.answers
        }
        for question in data.questions
    }
