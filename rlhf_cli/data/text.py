"""Human preferences: the usable rows of a dataset or a mixture (checked.py, mixture.py), split by prompt."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence

from rlhf_cli.config.schema import MixtureConfig, SplitConfig, TextConfig
from rlhf_cli.data.checked import checked_rows
from rlhf_cli.data.mixture import mixed_rows
from rlhf_cli.data.rows import Demonstration, Pair, PreferenceData, Ranking
from rlhf_cli.errors import ConfigError, DataError


def load_text(cfg: SplitConfig) -> PreferenceData:
    """Return the checked preference rows of a dataset or a mixture, split by prompt: no prompt is in two splits.

    Responses are stripped; rows that carry no preference are left out and counted in `dropped`. A pair with label 0.5
    is there for the reward model; elsewhere it would need a direction, and is counted as `no_direction`.

    Raises:
        DataError: there is nothing to read; a row lacks a column or holds something other than text or messages, or a
            label or margin out of range; pairs and rankings, or texts and messages, are mixed; no row is usable; too
            few prompts for the splits, or a split without a direction.
        ConfigError: sft_fraction + rm_fraction leave nothing for alignment.
        UserError: the Hub, or a dataset on it, cannot be reached.
    """
    dropped: Counter[str] = Counter()
    parts: dict[str, int] = {}
    data = _split(list(usable_rows(cfg, dropped, parts)), cfg)
    data.dropped = dict(dropped) | data.dropped
    data.parts = parts
    return data


def usable_rows(
    cfg: SplitConfig, dropped: Counter[str], parts: dict[str, int] | None = None
) -> Iterator[Pair | Ranking]:
    """Yield the usable rows, all pairs or all rankings, one at a time.

    Args:
        dropped: gains the rows left out, by reason.
        parts: gains how many rows each part of a mixture gives.

    Raises:
        ConfigError, DataError, UserError: as `load_text` says.
    """
    if cfg.sft_fraction + cfg.rm_fraction >= 1:
        total = cfg.sft_fraction + cfg.rm_fraction
        raise ConfigError(
            f"dataset.sft_fraction + dataset.rm_fraction = {total:g}",
            "their sum must stay below 1, because the rest of the prompts is for alignment",
            "lower one of them",
        )
    found = 0
    rows = mixed_rows(cfg, dropped, {} if parts is None else parts) if isinstance(cfg, MixtureConfig) else None
    for row in rows or checked_rows(_single(cfg), dropped):
        found += 1
        yield row
    if found:
        return
    if not dropped:
        raise DataError(f"{_name(cfg)} is empty", "", "give a file with one JSON object a line")
    counts = ", ".join(f"{reason} {count}" for reason, count in dropped.items())
    raise DataError(
        f"no usable row in {_name(cfg)}",
        f"all {dropped.total()} rows were left out: {counts}",
        f"check that the rows are in the form of dataset={cfg.source}",
    )


def _single(cfg: SplitConfig) -> TextConfig:
    assert isinstance(cfg, TextConfig)
    return cfg


def _name(cfg: SplitConfig) -> str:
    return str(cfg.path) if isinstance(cfg, TextConfig) else "the mixture"


def _split(rows: Sequence[Pair | Ranking], cfg: SplitConfig) -> PreferenceData:
    """Return the rows split by prompt: held out, SFT, reward model, alignment. File order is kept in each."""
    parts = _parts(rows, cfg)
    directed = {name: [row for row in part if _has_direction(row)] for name, part in parts.items() if name != "rm"}
    for name, part in directed.items():
        if not part:
            raise DataError(
                f"every row of the {name} split of {_name(cfg)} has label 0.5",
                "demonstrations, pairwise algorithms and held-out measures need to know which response is better",
                "give it rows with other labels, or change dataset.split_seed",
            )
    undirected = sum(len(parts[name]) - len(part) for name, part in directed.items())
    return PreferenceData(
        demonstrations=[Demonstration(row.prompt, _best(row)) for row in directed["sft"]],
        reward_pairs=_pairs(parts["rm"]),
        policy_pairs=_pairs(directed["align"]),
        prompts=list(dict.fromkeys(row.prompt for row in parts["align"])),
        heldout_pairs=_pairs(directed["heldout"]),
        dropped={"no_direction": undirected} if undirected else {},
        reward_rankings=[row for row in parts["rm"] if isinstance(row, Ranking)],
    )


def _parts(rows: Sequence[Pair | Ranking], cfg: SplitConfig) -> dict[str, list[Pair | Ranking]]:
    # Sorted first, so that the split depends on the prompts and the seed, not on the order of the rows.
    prompts = sorted({row.prompt for row in rows})
    random.Random(cfg.split_seed).shuffle(prompts)
    heldout = max(1, round(cfg.heldout_fraction * len(prompts)))
    training = len(prompts) - heldout
    sft, rm = (max(1, round(fraction * training)) for fraction in (cfg.sft_fraction, cfg.rm_fraction))
    if training - sft - rm < 1:
        raise DataError(
            f"{_name(cfg)} has {len(prompts)} usable prompts",
            f"held-out {heldout}, SFT {sft} and reward model {rm} leave none for alignment",
            "give more prompts, or lower dataset.heldout_fraction, sft_fraction or rm_fraction",
        )
    sizes = {"heldout": heldout, "sft": sft, "rm": rm, "align": training - sft - rm}
    names = (name for name, size in sizes.items() for _ in range(size))
    split_of = dict(zip(prompts, names, strict=True))
    parts: dict[str, list[Pair | Ranking]] = {name: [] for name in sizes}
    for row in rows:
        parts[split_of[row.prompt]].append(row)
    return parts


def _pairs(rows: Sequence[Pair | Ranking]) -> list[Pair]:
    return [pair for row in rows for pair in (row.pairs() if isinstance(row, Ranking) else [row])]


def _has_direction(row: Pair | Ranking) -> bool:
    return isinstance(row, Ranking) or row.label > 0.5


def _best(row: Pair | Ranking) -> str:
    return row.responses[0] if isinstance(row, Ranking) else row.chosen
