"""The collapse guard: bounds outside which a policy's distance to the preferences is not to be trusted alone.

`pm/divergence` is zero for a policy that always says the same, and text without meaning can have a high reward. A run
that crosses a bound is flagged wherever it is shown, and its `pm/divergence` is never ranked.
"""

from __future__ import annotations

from collections.abc import Mapping

# Matching preferences narrows a policy, but what people are divided on stays open: a quarter of the reference's
# entropy is e.g. two equal choices where it had sixteen.
LOW_ENTROPY = 1 / 4
# Samples of one prompt share words by their topic in any policy; half of the reference's variety is one text retold.
LOW_DISTINCT = 1 / 2
# A fifth of the text is no valid answer. Policies that reach their optimum stay below 0.05 (benchmarks/results).
HIGH_OFFSET = 0.2
# The uniform policy over a large vocabulary has many times the reference's entropy. The margin in nats spares
# references that are nearly certain, for which twice next to nothing is still next to nothing.
HIGH_ENTROPY = 2.0
HIGH_ENTROPY_MARGIN = 1.0
# Where the reference is unsure itself, twice its entropy is more than there is: what counts is how near to uniform.
NEAR_UNIFORM = 1 / 2
# A policy that gives what minorities prefer most of their share has not collapsed, however few its choices are.
COVERED = 1 / 2

BOUNDS = (
    "entropy per token below a quarter of the reference's",
    "distinct 2-grams below half of the reference's",
    f"more than {HIGH_OFFSET:g} of the mass off the answer set",
    f"entropy per token above {HIGH_ENTROPY:g} times the reference's and over {HIGH_ENTROPY_MARGIN:g} nat above it",
    "entropy per token nearer to uniform than half of the reference's distance from it",
)


def crossed(metrics: Mapping[str, float | None]) -> list[str]:
    """Return one sentence for each bound that a run's metrics cross; a bound without its numbers is not crossed.

    entropy per token < 1/4 of the reference's;  distinct 2-grams < 1/2 of the reference's;  mass off the set > 0.2;
    entropy per token > 2 times the reference's and > 1 nat above it, or log V - entropy < 1/2 of the reference's. The
    first two do not count where answers can be listed and the policy covers at least half of what minorities prefer.

    Args:
        metrics: flat, keys as in the glossary; the reference's under `reference/`.
    """
    entropy, usual = (metrics.get(f"{of}entropy/per_token") for of in ("", "reference/"))
    distinct, usual_distinct = (metrics.get(f"{of}distinct_2") for of in ("", "reference/"))
    offset = metrics.get("pm/offset_mass")
    found = []
    matched = "pool/size" not in metrics and (metrics.get("pm/minority_coverage") or 0.0) >= COVERED
    if entropy is not None and usual is not None:
        if entropy < LOW_ENTROPY * usual and not matched:
            found.append(f"entropy per token {entropy:.3g} is below a quarter of the reference's {usual:.3g}")
        found += _meaningless(entropy, usual, metrics.get("entropy/uniform"))
    if distinct is not None and usual_distinct is not None and distinct < LOW_DISTINCT * usual_distinct and not matched:
        found.append(f"share of distinct 2-grams {distinct:.3g} is below half of the reference's {usual_distinct:.3g}")
    if offset is not None and offset > HIGH_OFFSET:
        found.append(f"mass off the answer set {offset:.3g} is above {HIGH_OFFSET:g}")
    return found


def _meaningless(entropy: float, usual: float, uniform: float | None) -> list[str]:
    """Return the sentence on text that means nothing, if the entropy is that of such text."""
    if entropy > HIGH_ENTROPY * usual and entropy > usual + HIGH_ENTROPY_MARGIN:
        times = f"{HIGH_ENTROPY:g} times the reference's {usual:.3g}"
        return [f"entropy per token {entropy:.3g} is above {times}: such text means nothing"]
    if uniform is not None and uniform - entropy < NEAR_UNIFORM * (uniform - usual):
        return [
            f"entropy per token {entropy:.3g} is nearer to {uniform:.3g}, that of random tokens, than half of the "
            f"reference's distance ({usual:.3g}): such text means nothing"
        ]
    return []
