"""What a dataset is, in a few lines: where its rows were found, how many there are of each kind, and one of them."""

from __future__ import annotations

from rlhf_cli.config.schema import MixtureConfig, SplitConfig, TextConfig
from rlhf_cli.data import mixture, sources
from rlhf_cli.data.rows import Pair, PreferenceData
from rlhf_cli.metrics.glossary import DROPPED

SPLITS = {
    "demonstrations": "SFT",
    "reward_rankings": "reward model; they imply its pairs",
    "reward_pairs": "reward model",
    "policy_pairs": "alignment from pairs",
    "prompts": "alignment by sampling",
    "heldout_pairs": "metrics, never trained on",
}
TRUNCATED = "response_truncated"
LINES, LETTERS = 8, 600  # of a text that is shown


def describe(cfg: SplitConfig, data: PreferenceData, tokens: list[str]) -> str:
    """Return the dataset's name and places, the rows of each split, those left out by reason, lengths, and one pair.

    Args:
        cfg: of the dataset.
        data: its rows.
        tokens: the table of lengths in tokens.

    Raises:
        UserError: the data cannot be reached.
    """
    rows = [(len(getattr(data, name)), name, use) for name, use in SPLITS.items()]
    rows = [row for row in rows if row[0] or row[1] != "reward_rankings"]
    rows += [(count, "rows of", name) for name, count in data.parts.items()]
    rows += [
        (count, "cut", "responses longer than dataset.max_completion_tokens")
        if reason == TRUNCATED
        else (count, "left out", DROPPED.get(reason, reason))
        for reason, count in data.dropped.items()
    ]
    lines = [f"{cfg.name}", *(f"from {place}" for place in _places(cfg)), ""]
    lines += [f"{count:>9,}  {name:<16}{use}" for count, name, use in rows]
    return "\n".join([*lines, "", *tokens, "", *_shown(data.reward_pairs[0])])


def _places(cfg: SplitConfig) -> list[str]:
    parts = mixture.part_configs(cfg) if isinstance(cfg, MixtureConfig) else [cfg]
    return [_place(part) for part in parts if isinstance(part, TextConfig)]


def _place(cfg: TextConfig) -> str:
    place = sources.find(cfg)
    if place.path.is_file():
        return place.name
    which = f" {cfg.subset}," if cfg.subset is not None else ""
    found = f" in {place.path}" if place.commit is not None else ""
    return f"{place.name},{which} split {cfg.split}{found}"


def _shown(pair: Pair) -> list[str]:
    """Return the lines of a pair, its texts cut and indented."""
    judged = {"label": (pair.label, 1.0), "margin": (pair.margin, 0.0)}
    lines = []
    for name in ("prompt", "chosen", "rejected"):
        lines += [f"{name}:", *(f"  {line}" for line in cut(getattr(pair, name)))]
    return lines + [f"{name}: {value:g}" for name, (value, usual) in judged.items() if value != usual]


def cut(text: str) -> list[str]:
    """Return the lines of a text, `LINES` and `LETTERS` at most, then how much is left out."""
    shown = "\n".join(text[:LETTERS].strip("\n").split("\n")[:LINES])
    rest = len(text.strip("\n")) - len(shown)
    return [*shown.split("\n"), *([f"[{rest:,} letters more]"] if rest > 0 else [])]
