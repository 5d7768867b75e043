"""Several datasets as one: rows drawn from each without replacement, as the weights say, and interleaved."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from rlhf_cli.config.inputs import DATASETS
from rlhf_cli.config.schema import MixtureConfig, TextConfig
from rlhf_cli.data import sources
from rlhf_cli.data.checked import checked_rows
from rlhf_cli.data.rows import Pair, Ranking
from rlhf_cli.errors import DataError, UserError

KEYS = re.compile(r"dataset\.[\w.]+=[^\s,]+( dataset\.[\w.]+=[^\s,]+)*")  # in advice, one after the other


def part_configs(cfg: MixtureConfig) -> list[TextConfig]:
    """Return the config of each part; no part reads more rows than the mixture is to have."""
    parts = []
    for values in cfg.sources:
        part = _typed(DATASETS[values["source"]], values)
        limits = [limit for limit in (part.max_rows, cfg.max_rows) if limit is not None]
        part.max_rows = min(limits, default=None)
        parts.append(part)
    return parts


def mixed_rows(cfg: MixtureConfig, dropped: Counter[str], counts: dict[str, int]) -> Iterator[Pair | Ranking]:
    """Yield the rows of a mixture: of each part a random choice in its own order, the parts in turns by weight.

    As many rows as the scarcest part allows, `cfg.max_rows` at most. Every part is read twice, once to count its
    usable rows, so that none is held in memory.

    Args:
        dropped: gains the rows that parts leave out, by reason.
        counts: gains how many rows of each part are in the mixture.

    Raises:
        DataError: a part cannot be read or has no usable row, naming it; or some parts have pairs and others rankings.
        UserError: the Hub, or a dataset on it, cannot be reached.
    """
    parts = part_configs(cfg)
    usable, kinds = [], []
    for name, part in zip(cfg.parts, parts, strict=True):
        with named(name, part):
            kind, count = _counted(part, dropped)
        usable.append(count)
        kinds.append(kind)
    if len(set(kinds)) > 1:
        what = ", ".join(f"{name} has {kind.__name__.lower()}s" for name, kind in zip(cfg.parts, kinds, strict=True))
        raise DataError("the parts of the mixture do not go together", what, "mix pairs with pairs")
    takes = shares(usable, cfg.weights, cfg.max_rows)
    for name, take in zip(cfg.parts, takes, strict=True):
        counts[name] = counts.get(name, 0) + take
    rng = random.Random(cfg.split_seed)
    drawn = [
        _drawn(name, part, take, count, random.Random(rng.random()))
        for name, part, take, count in zip(cfg.parts, parts, takes, usable, strict=True)
    ]
    for turn in _turns(takes):
        yield next(drawn[turn])


def shares(usable: list[int], weights: list[float], most: int | None) -> list[int]:
    """Return how many rows each part gives: in proportion to the weights, and no part more than it has.

    Args:
        usable: rows of each part, >= 1.
        weights: one a part, > 0.
        most: rows in all, at most; None: no limit.
    """
    total = min(count / weight for count, weight in zip(usable, weights, strict=True))
    if most is not None:
        total = min(total, most / sum(weights))
    return [max(1, min(count, int(total * weight + 1e-9))) for count, weight in zip(usable, weights, strict=True)]


@contextmanager
def named(name: str, part: TextConfig) -> Iterator[None]:
    """Name the part of the mixture in what is wrong with it; keys are set in its yaml, and a path needs one first."""
    try:
        yield
    except UserError as error:
        place = f"in the yaml of {name}"
        if part.path == name:
            place = f"in DIR/dataset/NAME.yaml with defaults: [{part.source}, _self_] and path: {name}"
            place += ", and take it by --config-dir DIR with NAME in dataset.parts"
        todo = error.todo
        if part.path == name:  # another path is another part
            todo = re.sub(r"dataset\.path=([^\s,]+)", r"\1 in dataset.parts", todo)
        todo = re.sub(KEYS, lambda found: f"{found[0].replace('dataset.', '')} {place}", todo, count=1)
        raise type(error)(f"part {name} of the mixture: {error.what}", error.why, todo) from error


def _counted(part: TextConfig, dropped: Counter[str]) -> tuple[type, int]:
    own: Counter[str] = Counter()
    kind: type = Pair
    count = 0
    for row in checked_rows(part, own):
        kind, count = type(row), count + 1
    dropped.update(own)
    if not count:
        left_out = ", ".join(f"{reason} {number}" for reason, number in own.items())
        why = f"all {own.total()} rows were left out: {left_out}" if own else ""
        raise DataError("there is no usable row", why, f"check that the rows are in the form of dataset={part.source}")
    return kind, count


def _drawn(name: str, part: TextConfig, take: int, usable: int, rng: random.Random) -> Iterator[Pair | Ranking]:
    """Yield `take` of the `usable` rows of a part, each as likely as any other, in the order they are read."""
    with named(name, part):
        for place, row in enumerate(checked_rows(part, Counter())):
            if rng.random() * (usable - place) < take:
                take -= 1
                yield row
                if not take:
                    return


def _turns(takes: list[int]) -> Iterator[int]:
    """Yield the number of the part whose turn it is, so that at any time each has given its share."""
    given = [0] * len(takes)
    for _ in range(sum(takes)):
        part = min(range(len(takes)), key=lambda i: (given[i] + 0.5) / takes[i])
        given[part] += 1
        yield part


def _typed(schema: type, values: dict[str, Any]) -> Any:
    """Return a config made from nested values."""
    hints = get_type_hints(schema)
    made = {}
    for field in fields(schema):
        if field.name in values:
            value, hint = values[field.name], hints[field.name]
            made[field.name] = _typed(hint, value) if is_dataclass(hint) and isinstance(hint, type) else value
    return schema(**made)


def content(cfg: MixtureConfig) -> list[str]:
    """Return what identifies the rows of each part.

    Raises:
        UserError: a part cannot be reached.
    """
    found = []
    for name, part in zip(cfg.parts, part_configs(cfg), strict=True):
        with named(name, part):
            found.append(sources.content(part))
    return found


def check(cfg: MixtureConfig) -> None:
    """Refuse a part that is not there, naming it.

    Raises:
        UserError: a part is missing or cannot be reached.
    """
    for name, part in zip(cfg.parts, part_configs(cfg), strict=True):
        with named(name, part):
            sources.find(part)
