"""The rows every source delivers and every stage reads: plain text, checked, split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the response a writer gave: SFT data."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Pair:
    """A prompt with a preferred and a less preferred response.

    Args:
        label: probability that `chosen` is the better one, in [0.5, 1]; at 0.5 neither is preferred.
        margin: by how much the better one is better, nats, >= 0; 0 where the data do not say.
    """

    prompt: str
    chosen: str
    rejected: str
    label: float = 1.0
    margin: float = 0.0


@dataclass(frozen=True)
class Ranking:
    """A prompt with K >= 2 different responses, best first."""

    prompt: str
    responses: tuple[str, ...]

    def pairs(self) -> list[Pair]:
        """Return the K (K - 1) / 2 pairs the ranking implies: each response is preferred to all after it."""
        return [Pair(self.prompt, better, worse) for better, worse in combinations(self.responses, 2)]


@dataclass(frozen=True)
class Question:
    """A prompt whose valid responses can be enumerated, so that policies are measured exactly.

    Args:
        prompt: the text the policy sees (one wording of the question).
        answers: every valid response.
        people: population share of each answer, sums to 1; None where it is not known.
        writer: share of each answer in the demonstrations, sums to 1; None where it is not known.
        index: number of the question; wordings of one question share it.
        heldout: True for a wording that no stage trains on.
    """

    prompt: str
    answers: tuple[str, ...]
    people: tuple[float, ...] | None = None
    writer: tuple[float, ...] | None = None
    index: int = 0
    heldout: bool = False


@dataclass
class PreferenceData:
    """All a dataset offers, already split. Where it has rankings, the pairs of a split are all that its rankings imply.

    The rows are lists, or lie on disk (lazy.py): measure, index, slice and iterate them, and hold no copy of them all.

    Args:
        demonstrations: for SFT.
        reward_pairs: for the reward model.
        policy_pairs: for pairwise algorithms (dpo, rpo, dpm).
        prompts: for on-policy algorithms.
        heldout_pairs: never trained on; metrics only.
        questions: enumerable prompts; empty on free text.
        gold: the world's own reward of (prompt, response), nats; None where it is not known.
        word_level: True: one token a word; False: byte-level BPE trained on this text.
        dropped: how many rows were left out, by reason.
        reward_rankings: K-way judgements for the reward model; empty where the dataset has only pairs.
        parts: of a mixture, how many rows each part gave.
    """

    demonstrations: Sequence[Demonstration]
    reward_pairs: Sequence[Pair]
    policy_pairs: Sequence[Pair]
    prompts: Sequence[str]
    heldout_pairs: Sequence[Pair]
    questions: list[Question] = field(default_factory=list)
    gold: Callable[[str, str], float] | None = None
    word_level: bool = False
    dropped: dict[str, int] = field(default_factory=dict)
    reward_rankings: Sequence[Ranking] = field(default_factory=list)
    parts: dict[str, int] = field(default_factory=dict)
