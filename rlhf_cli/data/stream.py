"""Checked rows, one at a time, to a split on disk: for data that need not fit in memory.

The split of a row is decided by a hash of its prompt alone, so no pass over all prompts is needed. Fractions hold in
expectation; otherwise the splits are those of text.py: no prompt is in two, and file order is kept in each.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from rlhf_cli.config.schema import SplitConfig
from rlhf_cli.data.lazy import KINDS, RowWriter, cached, lazy_rows
from rlhf_cli.data.rows import Pair, PreferenceData, Ranking
from rlhf_cli.errors import DataError
from rlhf_cli.store import read_json, write_json

FORMAT = 1  # raised when rows are written differently, so that old files are not re-used
SPLIT_KEYS = ("split_seed", "sft_fraction", "rm_fraction", "heldout_fraction", "max_rows")
# Field of PreferenceData, which is the name of its file, and the kind of its rows.
FIELDS = {
    "demonstrations": "demonstration",
    "reward_pairs": "pair",
    "reward_rankings": "ranking",
    "policy_pairs": "pair",
    "prompts": "prompt",
    "heldout_pairs": "pair",
}
COUNTS, UNIQUE = "counts.json", "prompts.npy"
# Yields the usable rows one by one; its arguments gain what it leaves out, and how many rows a part of a mixture gives.
Reader = Callable[[Counter[str], dict[str, int]], Iterable[Pair | Ranking]]


def load_streamed(rows: Reader, cfg: SplitConfig, identity: dict[str, Any]) -> PreferenceData:
    """Return rows split by prompt, on disk in the cache of the datasets library: written there unless they are.

    Args:
        rows: yields the checked rows, all pairs or all rankings; called unless they are on disk.
        cfg: of the dataset.
        identity: what determines the rows besides the settings of the split.

    Raises:
        DataError: a split is empty, or what `rows` raises.
        RunError: the cache cannot be written.
    """
    what = {"format": FORMAT, "rows": identity, **{key: getattr(cfg, key) for key in SPLIT_KEYS}}
    with cached("rows", what) as building:
        if not building.ready:
            _write(rows, cfg, building.path)
            building.publish()
        folder = building.path
    kept = {"prompts": np.load(folder / UNIQUE)}
    listed: dict[str, Any] = {
        name: lazy_rows(folder / f"{name}.arrow", kind, source=f"{folder.name}/{name}", kept=kept.get(name))
        for name, kind in FIELDS.items()
    }
    return PreferenceData(**listed, **(read_json(folder / COUNTS) or {}))


def split_of(prompt: str, cfg: SplitConfig) -> str:
    """Return heldout, sft, rm or align: the same for a prompt wherever it stands."""
    digest = blake2b(f"{cfg.split_seed}\0{prompt}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest) / 2**64
    if place < cfg.heldout_fraction:
        return "heldout"
    place = (place - cfg.heldout_fraction) / (1 - cfg.heldout_fraction)
    if place < cfg.sft_fraction:
        return "sft"
    return "rm" if place < cfg.sft_fraction + cfg.rm_fraction else "align"


def _write(rows: Reader, cfg: SplitConfig, folder: Path) -> None:
    dropped: Counter[str] = Counter()
    parts: dict[str, int] = {}
    counts: Counter[str] = Counter()
    hashes = array("Q")  # of the prompts for alignment, 8 bytes each: what is held in memory
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(RowWriter(folder / f"{name}.arrow", KINDS[kind][0]))
            for name, kind in FIELDS.items()
        }
        for row in tqdm(rows(dropped, parts), desc="rows to disk", unit="row", mininterval=1, delay=2):
            split = split_of(row.prompt, cfg)
            counts[split] += 1
            if split == "align":
                hashes.append(int.from_bytes(blake2b(row.prompt.encode(), digest_size=8).digest()))
                files["prompts"].write(row.prompt)
            if split != "rm" and isinstance(row, Pair) and row.label <= 0.5:
                dropped["no_direction"] += 1
            else:
                _put(files, split, row)
    _check(counts, dropped, {name: file.count for name, file in files.items()})
    np.save(folder / UNIQUE, np.sort(np.unique(np.frombuffer(hashes, np.uint64), return_index=True)[1]))
    write_json(folder / COUNTS, {"dropped": dict(dropped), "parts": parts})


def _put(files: dict[str, RowWriter], split: str, row: Pair | Ranking) -> None:
    best, pairs = (row.responses[0], row.pairs()) if isinstance(row, Ranking) else (row.chosen, [row])
    if split == "sft":
        files["demonstrations"].write(row.prompt, best)
        return
    if split == "rm" and isinstance(row, Ranking):
        files["reward_rankings"].write(row.prompt, list(row.responses))
    file = files[{"rm": "reward_pairs", "align": "policy_pairs", "heldout": "heldout_pairs"}[split]]
    for pair in pairs:
        file.write(pair.prompt, pair.chosen, pair.rejected, pair.label, pair.margin)


def _check(counts: Counter[str], dropped: Counter[str], written: dict[str, int]) -> None:
    """Refuse data of which some split has no row, or none with a direction."""
    left_out = ", ".join(f"{reason} {count}" for reason, count in dropped.items() if count)
    for name in ("sft", "rm", "align", "heldout"):
        if not counts[name]:
            raise DataError(
                f"the {name} split has no row: {counts.total()} rows are usable",
                "with dataset.streaming=true the fractions hold on average only"
                + (f"; left out: {left_out}" if left_out else ""),
                "give more rows, or set dataset.streaming=false",
            )
    for name in ("demonstrations", "policy_pairs", "heldout_pairs"):
        if not written[name]:
            raise DataError(
                f"every row for {name.replace('_', ' ')} has label 0.5",
                "it must be known which response is better",
                "give rows with other labels, or change dataset.split_seed",
            )
