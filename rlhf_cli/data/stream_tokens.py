"""Rows on disk to token ids on disk: which rows fit the context, what is cut, and the ids, chunk by chunk.

The counterpart of encode.py for lazy rows, with the same rows, ids and counts. Done once for a dataset, a tokenizer and
the limits; later stages and runs read it from the cache.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from rlhf_cli.config.schema import DatasetConfig
from rlhf_cli.data.lazy import (
    IDS,
    JUDGED,
    RANKING,
    TEXT,
    Encoded,
    LazyRows,
    RowWriter,
    cached,
    lazy_rows,
)
from rlhf_cli.data.rows import Demonstration, Pair, PreferenceData, Ranking
from rlhf_cli.data.turns import prompt_ids, response_ids
from rlhf_cli.store import read_json, write_json

FORMAT = 1  # raised when ids are made or written differently, so that old files are not re-used
PAIR_IDS = pa.schema({"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS, **JUDGED})
DEMONSTRATION_IDS = pa.schema({"prompt_ids": IDS, "completion_ids": IDS})
RANKING_IDS = pa.schema({"prompt_ids": IDS, "response_ids": pa.list_(IDS)})
PROMPT_IDS = pa.schema({"prompt": TEXT, "prompt_ids": IDS})
FIELDS = {
    "demonstrations": DEMONSTRATION_IDS,
    "reward_pairs": PAIR_IDS,
    "policy_pairs": PAIR_IDS,
    "prompts": PROMPT_IDS,
    "heldout_pairs": PAIR_IDS,
}
RANKED = "reward_rankings"


def encoding_key(tokenizer: PreTrainedTokenizerBase, cfg: DatasetConfig) -> str:
    """Return what determines token ids: all that the tokenizer is, and the limits, as a hash."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: Any = [type(tokenizer).__name__, tokenizer.get_vocab()]
    else:
        state = json.loads(backend.to_str()) | {"truncation": None, "padding": None}  # of the last call
    specials = [str(tokenizer.bos_token), str(tokenizer.eos_token), getattr(tokenizer, "split_special_tokens", None)]
    limits = [cfg.max_prompt_tokens, cfg.max_completion_tokens]
    what = [FORMAT, state, str(tokenizer.chat_template), specials, limits]
    return sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def fit_lazy(data: PreferenceData, tokenizer: PreTrainedTokenizerBase, cfg: DatasetConfig) -> PreferenceData:
    """Return the lazy rows that fit the context with their token ids, and `dropped` with the counts of fit_to_context.

    Raises:
        RunError: the cache cannot be written.
    """
    key = encoding_key(tokenizer, cfg)
    dropped: Counter[str] = Counter()
    fields: dict[str, Any] = {}
    ranked = len(data.reward_rankings) > 0
    names = [name for name in FIELDS if not (ranked and name == "reward_pairs")]
    for name in [*names, *([RANKED] if ranked else [])]:
        rows: Any = getattr(data, name)
        with cached("tokens", {"rows": rows.source, "key": key}) as building:
            if not building.ready:
                fit = _Fit(tokenizer, cfg, building.path)
                (fit.rankings if name == RANKED else fit.rows)(rows, name)
                building.publish()
            folder = building.path
        dropped.update(read_json(folder / "counts.json") or {})
        fields |= _ranked_fields(data, folder, key) if name == RANKED else {name: _fitting(rows, folder, name, key)}
    return replace(data, **fields, dropped=data.dropped | {reason: n for reason, n in dropped.items() if n})


def _fitting(rows: LazyRows[Any], folder: Path, name: str, key: str) -> LazyRows[Any]:
    fitting = rows.take(np.load(folder / f"{name}.npy"))
    fitting.encoded = Encoded(Dataset.from_file(str(folder / f"{name}.arrow")), key)
    return fitting


def _ranked_fields(data: PreferenceData, folder: Path, key: str) -> dict[str, Any]:
    pairs: Any = data.reward_pairs
    texts = lazy_rows(folder / "texts.arrow", "ranking", source=f"{folder.name}/{RANKED}")
    texts.encoded = Encoded(Dataset.from_file(str(folder / f"{RANKED}.arrow")), key)
    return {RANKED: texts, "reward_pairs": _fitting(pairs, folder, "reward_pairs", key)}


class _Fit:
    """Writes the ids of the rows that fit into a folder, with their places among all rows, and counts the others."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, cfg: DatasetConfig, folder: Path) -> None:
        self.tokenizer, self.cfg, self.folder = tokenizer, cfg, folder
        self.counts: Counter[str] = Counter()

    def rows(self, rows: LazyRows[Any], name: str) -> None:
        """Fit rows of the field `name`: demonstrations, pairs or prompts."""
        kept: list[np.ndarray] = []
        with RowWriter(self.folder / f"{name}.arrow", FIELDS[name]) as file:
            start = 0
            for batch in _progress(rows, name):
                kept.append(start + np.flatnonzero(self._batch(batch, file)))
                start += len(batch)
        self._finish(name, kept)

    def rankings(self, rows: LazyRows[Ranking], _: str) -> None:
        """Fit rankings and the pairs they imply; where responses are equal once cut, the best-ranked of them stays."""
        kept: list[np.ndarray] = []
        implied = 0  # pairs that the rankings so far imply
        with (
            RowWriter(self.folder / "texts.arrow", RANKING) as texts,
            RowWriter(self.folder / f"{RANKED}.arrow", RANKING_IDS) as file,
            RowWriter(self.folder / "reward_pairs.arrow", PAIR_IDS) as pairs,
        ):
            for batch in _progress(rows, RANKED):
                prompts = self._prompts(row.prompt for row in batch)
                responses = self._responses(text for row in batch for text in row.responses)
                for row in batch:
                    places, count = _pair_places(len(row.responses))
                    stays = self._ranking(row, prompts[row.prompt], responses)
                    if len(stays) > 1:
                        ids = [responses[row.responses[i]] for i in stays]
                        texts.write(row.prompt, [row.responses[i] for i in stays])
                        file.write(prompts[row.prompt], ids)
                        for better, worse in _pair_places(len(stays))[0]:
                            pairs.write(prompts[row.prompt], ids[better], ids[worse], 1.0, 0.0)
                    held = set(stays)
                    both = [i in held and j in held for i, j in places]
                    kept.append(implied + np.flatnonzero(both))
                    implied += count
        self._finish("reward_pairs", kept)

    def _ranking(self, row: Ranking, prompt: list[int], responses: dict[str, list[int]]) -> list[int]:
        """Return the places of the responses that stay, none where the prompt is too long, and count."""
        count = _pair_places(len(row.responses))[1]
        if len(prompt) > self.cfg.max_prompt_tokens:
            self.counts["prompt_too_long"] += count
            return []
        each = len(row.responses) - 1  # each response is in as many pairs
        self.counts["response_truncated"] += each * sum(self._cut(responses[text]) for text in row.responses)
        first: dict[tuple[int, ...], int] = {}
        for place, text in enumerate(row.responses):
            first.setdefault(tuple(responses[text]), place)
        self.counts["equal_after_truncation"] += count - _pair_places(len(first))[1]
        return list(first.values())

    def _batch(self, batch: Sequence[Any], file: RowWriter) -> list[bool]:
        """Write the ids of the rows that fit; return which do."""
        prompts = self._prompts(row if isinstance(row, str) else row.prompt for row in batch)
        short = [len(ids) <= self.cfg.max_prompt_tokens for ids in prompts.values()]
        fitting = {prompt for prompt, fits in zip(prompts, short, strict=True) if fits}
        left = [row for row in batch if (row if isinstance(row, str) else row.prompt) in fitting]
        responses = self._responses(text for row in left for text in _responses_of(row))
        kept = []
        for row in batch:
            prompt = row if isinstance(row, str) else row.prompt
            kept.append(prompt in fitting and self._row(row, prompts[prompt], responses, file))
            self.counts["prompt_too_long"] += prompt not in fitting and not isinstance(row, str)
        return kept

    def _row(self, row: Any, prompt: list[int], responses: dict[str, list[int]], file: RowWriter) -> bool:
        self.counts["response_truncated"] += sum(self._cut(responses[text]) for text in _responses_of(row))
        if isinstance(row, str):
            file.write(row, prompt)
        elif isinstance(row, Demonstration):
            file.write(prompt, responses[row.response])
        elif responses[row.chosen] == responses[row.rejected]:
            self.counts["equal_after_truncation"] += 1
            return False
        else:
            file.write(prompt, responses[row.chosen], responses[row.rejected], row.label, row.margin)
        return True

    def _cut(self, ids: list[int]) -> bool:
        return ids[-1] != self.tokenizer.eos_token_id

    def _prompts(self, texts: Iterable[str]) -> dict[str, list[int]]:
        unique = list(dict.fromkeys(texts))
        return dict(zip(unique, prompt_ids(self.tokenizer, unique), strict=True))

    def _responses(self, texts: Iterable[str]) -> dict[str, list[int]]:
        unique, limit = list(dict.fromkeys(texts)), self.cfg.max_completion_tokens
        return {text: ids[:limit] for text, ids in zip(unique, response_ids(self.tokenizer, unique), strict=True)}

    def _finish(self, name: str, kept: list[np.ndarray]) -> None:
        np.save(self.folder / f"{name}.npy", np.concatenate([np.zeros(0, np.int64), *kept]))
        write_json(self.folder / "counts.json", dict(self.counts))


def _responses_of(row: Any) -> tuple[str, ...]:
    if isinstance(row, Pair):
        return row.chosen, row.rejected
    return (row.response,) if isinstance(row, Demonstration) else ()


def _pair_places(count: int) -> tuple[list[tuple[int, int]], int]:
    """Return the places of the responses of each pair that a ranking implies, in their order, and their number."""
    places = [(i, j) for i in range(count) for j in range(i + 1, count)]
    return places, len(places)


def _progress(rows: LazyRows[Any], name: str) -> Iterable[list[Any]]:
    with tqdm(total=len(rows), desc=f"tokenising {name}", unit="row", mininterval=1, delay=2) as bar:
        for batch in rows.batches():
            yield batch
            bar.update(len(batch))
