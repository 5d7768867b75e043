"""How different the samples of one prompt are from each other, and a response from itself (docs/paper_index.md).

Texts are split by sacrebleu's tokenizer of mteval-v13a, case kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a


def diversity(groups: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """Return distinct_1, distinct_2, self_bleu and repetition of each prompt's samples, in [0, 1], {name: (P,)}.

    distinct_n: different n-grams over all n-grams of the samples; NaN where there are none.
    self_bleu: mean over samples of BLEU against the prompt's others (effective order, smoothed as in mteval); NaN for
    one sample. Two empty samples are alike: 1; BLEU itself says 0.
    repetition: mean over samples of the share of 3-grams that stood before in the same one; NaN where no sample has
    three tokens.

    Args:
        groups: the texts of each prompt's samples; a text may be empty.
    """
    tokenize = Tokenizer13a()
    rows = []
    for texts in groups:
        samples = [tokenize(text.strip()).split() for text in texts]
        rows.append((_distinct(samples, 1), _distinct(samples, 2), _self_bleu(samples), _repetition(samples)))
    columns = np.array(rows, dtype=float).reshape(len(groups), 4).T
    return dict(zip(("distinct_1", "distinct_2", "self_bleu", "repetition"), columns, strict=True))


def _ngrams(tokens: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def _distinct(samples: list[list[str]], n: int) -> float:
    found = [ngram for tokens in samples for ngram in _ngrams(tokens, n)]
    return len(set(found)) / len(found) if found else float("nan")


def _self_bleu(samples: list[list[str]]) -> float:
    if len(samples) < 2:
        return float("nan")
    bleu = BLEU(tokenize="none", effective_order=True)
    scores = []
    for number, tokens in enumerate(samples):
        others = samples[:number] + samples[number + 1 :]
        if tokens:
            scores.append(bleu.sentence_score(" ".join(tokens), [" ".join(other) for other in others]).score / 100)
        else:
            scores.append(float([] in others))
    return float(np.mean(scores))


def _repetition(samples: list[list[str]]) -> float:
    of_sample = [_ngrams(tokens, 3) for tokens in samples if len(tokens) >= 3]
    return float(np.mean([1 - len(set(found)) / len(found) for found in of_sample])) if of_sample else float("nan")
