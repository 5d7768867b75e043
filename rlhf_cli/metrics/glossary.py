"""Every metric key, defined once: its unit, what it says in one sentence, and which direction is better.

The keys themselves are in metrics/glossary_entries.py. A key may carry prefixes that say for whom or where it was
measured (`heldout/`, `reference/`, `best/`, `by/LABEL/`) and suffixes (`_max`, `/lo`, `/hi`, `/n`).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import replace

from rlhf_cli.metrics.glossary_entries import DROPPED, GLOSSARY, TRUST, Direction, Metric

__all__ = ["DROPPED", "GLOSSARY", "PREFIXES", "SUFFIXES", "TRUST", "Direction", "Metric"]
__all__ += ["describe", "known", "rankable"]

PREFIXES = {
    "heldout/": "on wordings that no stage trained on",
    "reference/": "of the reference (SFT) policy",
    "best/": "of the best checkpoint",
    "train/": "on the batch that is trained on",
}
BY = re.compile(r"by/([\w.-]+)/")  # another reward model as judge
BEST_OF = re.compile(r"reward/best_of_([1-9]\d*)")

SUFFIXES = {
    "/lo": "lower end of the 95 % interval over prompts",
    "/hi": "upper end of the 95 % interval over prompts",
    "/n": "how many prompts (in the survey world: questions) it rests on",
    "_max": "worst prompt",
}


def known(key: str) -> bool:
    """Return whether a metric key, with any of its prefixes and suffixes, is defined."""
    return _metric(_split(key)[1]) is not None


def describe(key: str) -> Metric:
    """Return what a metric key means; prefixes and suffixes are put into words.

    Raises:
        ValueError: the key is not defined.
    """
    prefixes, base, suffixes = _split(key)
    metric = _metric(base)
    if metric is None:
        near = _nearest(key)
        raise ValueError(f"Unknown metric key {key!r}." + (f" Did you mean {near!r}?" if near else ""))
    notes = [SUFFIXES[suffix] for suffix in reversed(suffixes)] + [_in_words(prefix) for prefix in prefixes]
    if notes:
        metric = replace(metric, meaning=f"{metric.meaning} ({', '.join(notes)})")
    # A count has no better direction, and is not in the metric's unit.
    return replace(metric, unit="prompts", better="none") if "/n" in suffixes else metric


def rankable(key: str) -> Metric:
    """Return what a metric key means, if policies can be ranked by it: one direction of it is the better one.

    Raises:
        ValueError: the key is not defined (the nearest one is named), or neither direction is better.
    """
    metric = describe(key)
    if metric.better == "none":
        why = f"neither a high nor a low value is better in itself ({metric.meaning})"
        raise ValueError(f"Nothing can be ranked by {key}: {why}. Choose a metric with a direction, such as pm/tv.")
    return metric


def _metric(base: str) -> Metric | None:
    """Return the entry of a key without prefixes and suffixes, or None where there is none."""
    draws = BEST_OF.fullmatch(base)
    if draws is None:
        return GLOSSARY.get(base)
    count = int(draws[1])
    meaning = f"Expected best reward of {count} samples of a prompt, estimated without bias"
    return Metric("nats", meaning, "higher") if count.bit_count() == 1 else None


def _split(key: str) -> tuple[list[str], str, list[str]]:
    """Return (prefixes, what is left, suffixes): together the key."""
    prefixes: list[str] = []
    suffixes: list[str] = []
    for group in (("/lo", "/hi", "/n"), ("_max",)):
        suffix = next((suffix for suffix in group if key.endswith(suffix)), None)
        if suffix is not None:
            key = key.removesuffix(suffix)
            suffixes.insert(0, suffix)
    while _metric(key) is None:
        judge = BY.match(key)
        prefix = judge[0] if judge else next((prefix for prefix in PREFIXES if key.startswith(prefix)), None)
        if prefix is None:
            break
        key = key.removeprefix(prefix)
        prefixes.append(prefix)
    return prefixes, key, suffixes


def _in_words(prefix: str) -> str:
    judge = BY.match(prefix)
    return f"by the reward model {judge[1]}" if judge else PREFIXES[prefix]


def _nearest(key: str) -> str | None:
    """Return the defined key that is spelt most like this one, with or without its own prefixes and suffixes."""
    prefixes, _, suffixes = _split(key)
    bases = [*GLOSSARY, "reward/best_of_2", "reward/best_of_4", "reward/best_of_8"]
    ends = {("", ""), ("".join(prefixes), ""), ("", "".join(suffixes)), ("".join(prefixes), "".join(suffixes))}
    near = difflib.get_close_matches(key, [start + base + end for start, end in sorted(ends) for base in bases], n=1)
    return near[0] if near else None
