"""Are the estimators honest? Sampled metrics, candidate pools and hand-made policies against exact numbers.

    python benchmarks/estimators.py        # some minutes; fixed seed

In a small world whose responses can all be listed (benchmarks/enumerable.py):
1. sampled expectations, through the code that measures every run: does their 95 % interval cover the exact value?
2. candidate pools that hold part of the answers: how far are their metrics from those on the whole set?
3. policies made by hand (optimum, uniform, collapsed, gibberish): are they ranked rightly, and flagged?

Writes benchmarks/results/estimators.md. Exit code 1 where an interval covers in less than 88 % of the repetitions,
where a pool that is the whole set differs from it, or where a hand-made policy is ranked or flagged wrongly.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import enumerable
import numpy as np
import torch
from enumerable import EOS, LENGTH, PAD, WRITER, World, expected_per_token, off_answers, on_answers, token_table
from scipy.stats import spearmanr

from rlhf_cli import algos
from rlhf_cli.measure.memo import Memo
from rlhf_cli.measure.pool import PoolMeasure, build_pool
from rlhf_cli.measure.sampled import read_samples, score
from rlhf_cli.measure.samples import Sampling, sample_metrics
from rlhf_cli.metrics.bootstrap import share_interval
from rlhf_cli.metrics.guard import crossed
from rlhf_cli.metrics.preference import preference_metrics

RESULT = Path(__file__).parent / "results" / "estimators.md"
SEED = 0
CLIP = 5.0
BETA, ALPHA = 0.5, 0.05  # of PM, whose three divergences then differ
MEASURED: dict[str, Any] = {"algorithm": algos.get("pm"), "algo": SimpleNamespace(beta=BETA, alpha=ALPHA)}
COVERED = 0.88  # of the repetitions
DISTANCES = ("pm/tv", "pm/kl_rm_policy", "pm/kl_policy_rm", "pm/rank_correlation")
RIGHT_ORDER = ("optimum", "uniform", "collapsed", "gibberish")


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    population: int = 1000  # prompts whose mean is the exact value
    prompts: int = 200  # drawn from them, with replacement, in each repetition
    samples: int = 4  # a prompt, as dataset.eval_samples
    repetitions: int = 400  # with 100, one of so many metrics falls below 88 by chance
    steps: int = 600  # of training the peaked policy; its reference has half
    pools: int = 20  # draws of the candidate pools


FULL = Size()


@dataclass(frozen=True)
class Case:
    """A policy beside its reference, with log-probs of every string, (P, N)."""

    name: str
    policy: Any
    reference: Any
    tree: Any
    logps: np.ndarray
    reference_logps: np.ndarray


@dataclass(frozen=True)
class Coverage:
    """How the estimates of one metric lie around its exact value.

    Args:
        covered: share of the repetitions; lowest: the same of that hundred of them in which it is lowest.
    """

    case: str
    metric: str
    exact: float
    mean: float
    width: float
    covered: float
    lowest: float

    @property
    def kept(self) -> bool:
        return self.covered >= COVERED


def make_cases(world: World, size: Size) -> list[Case]:
    """Return a policy with random weights and a trained, peaked one, each in the open and in the closed vocabulary."""
    sharp = WRITER**2 / (WRITER**2).sum()
    policies = {
        "random": (enumerable.new_policy(SEED + 1), enumerable.new_policy(SEED + 2)),
        "peaked": (
            enumerable.trained_policy(world, sharp, size.steps, SEED + 3),
            enumerable.trained_policy(world, WRITER, size.steps // 2, SEED + 4),
        ),
    }
    trees = {"open": None, "closed": world.tree()}
    return [
        Case(f"{name}, {where}", *pair, tree, *(enumerable.string_logps(model, world, tree) for model in pair))
        for (name, pair), (where, tree) in itertools.product(policies.items(), trees.items())
    ]


# -- 1. sampled expectations -------------------------------------------------------------------------------------------


def exact_values(case: Case, world: World) -> dict[str, float]:
    """Return the population's value of every sampled metric, from the probabilities of all strings."""
    share, rewards = np.exp(case.logps), world.rewards
    lengths = np.array([len(ids) for ids in world.strings])
    ended = np.array([ids[-1] == EOS for ids in world.strings])
    ours, theirs = (token_table(logps, world.strings) for logps in (case.logps, case.reference_logps))
    effective = np.where(theirs > np.log(ALPHA), 0.0, theirs).sum(-1)
    logps = ours.sum(-1)
    moments = [(share * rewards**power).sum(-1).mean() for power in (1, 2)]
    found = {
        "reward/mean": moments[0],
        "reward/std": np.sqrt(moments[1] - moments[0] ** 2),
        "kl/sequence": (share * (ours - theirs).sum(-1)).sum(-1),
        "kl/per_token": expected_per_token(case.logps, ours - theirs, world.strings),
        "entropy/per_token": expected_per_token(case.logps, -ours, world.strings),
        "length/mean": (share * lengths).sum(-1),
        "eos_rate": (share * ended).sum(-1),
        "pm/divergence": twice_variance(share, rewards - logps),
        "pm_beta/divergence": twice_variance(share, rewards / BETA - logps),
        "optimum/divergence": twice_variance(share, rewards / BETA - (logps - effective)),
        "pm/offset_mass": off_answers(case.logps, world),
        **best_of(share, rewards),
    }
    return {key: float(np.mean(value)) for key, value in found.items()}


def twice_variance(share: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """Return E (gap_1 - gap_2)^2 of two independent responses, (P,)."""
    mean = (share * gap).sum(-1, keepdims=True)
    return 2 * (share * (gap - mean) ** 2).sum(-1)


def best_of(share: np.ndarray, rewards: np.ndarray) -> dict[str, np.ndarray]:
    """Return the expected largest reward of k responses: each reward by the chance that it is the largest, (P,)."""
    order = np.argsort(rewards, axis=1, kind="stable")
    ordered, below = (np.take_along_axis(values, order, axis=1) for values in (rewards, share))
    below = np.clip(below.cumsum(-1), 0, 1)
    chances = {k: np.diff(below**k, axis=1, prepend=0.0) for k in (2, 4)}
    return {f"reward/best_of_{k}": (chance * ordered).sum(-1) for k, chance in chances.items()}


def estimate(case: Case, world: World, size: Size, repetition: int) -> dict[str, float]:
    """Return the metrics of fresh samples for fresh prompts, as a run would report them."""
    rows = np.random.default_rng([SEED, repetition]).integers(len(world.prompts), size=size.prompts)
    prompts, how = [world.prompts[row] for row in rows], Sampling(LENGTH, 1.0, case.tree, [EOS], PAD, "cpu")
    samples = read_samples(case.policy, case.reference, prompts, size.samples, how, Memo(None), {}, repetition)
    repeated = [prompt for prompt in prompts for _ in range(size.samples)]
    rewards = score(world.reward(), repeated, samples.responses, Memo(None), {}, "rewards").clamp(-CLIP, CLIP)
    found = sample_metrics(samples, rewards, **MEASURED, how=how)
    if case.tree is None:  # the sampled twin of pm/offset_mass: the share of samples that are no answer
        of_prompt = np.repeat(rows, size.samples)
        valid = [ids in world.answers[row] for row, ids in zip(of_prompt, samples.responses, strict=True)]
        found |= share_interval("pm/offset_mass", 1 - np.reshape(valid, (-1, size.samples)).mean(-1))
    return found


def coverage(case: Case, world: World, size: Size) -> list[Coverage]:
    """Return how every metric with an interval covers its exact value; one that never varies is left out."""
    exact = exact_values(case, world)
    found = [estimate(case, world, size, repetition) for repetition in range(size.repetitions)]
    rows = []
    for key in (key for key in exact if f"{key}/lo" in found[0]):
        middle, low, high = (np.array([row[key + end] for row in found]) for end in ("", "/lo", "/hi"))
        if np.ptp(middle) > 0:
            inside = (low <= exact[key]) & (exact[key] <= high)
            lowest = min(inside[start : start + 100].mean() for start in range(0, len(inside), 100))
            numbers = (exact[key], middle.mean(), (high - low).mean(), inside.mean(), lowest)
            rows.append(Coverage(case.name, key, *numbers))
    return rows


# -- 2. candidate pools ------------------------------------------------------------------------------------------------


def exact_distances(logps: np.ndarray, world: World) -> dict[str, float]:
    """Return the metrics of preference matching on the whole answer set, means over prompts."""
    rewards, ours = (torch.as_tensor(values) for values in (world.answer_rewards, on_answers(logps, world)))
    found = preference_metrics(rewards.log_softmax(-1), rewards, ours, torch.ones_like(ours, dtype=torch.bool))
    return {f"pm/{key}": float(values.nanmean()) for key, values in found.items()}


def draw_candidates(reference: np.ndarray, size: int, rng: np.random.Generator) -> list[list[int]]:
    """Return `size` different answers a prompt: two of a dataset pair, drawn evenly, then samples of the reference.

    Args:
        reference: shares of the answers, (P, A).
    """
    pools = []
    for shares in reference:
        pair = rng.permutation(len(shares))[:2]
        left = np.where(np.isin(np.arange(len(shares)), pair), 0.0, shares)
        drawn = rng.choice(len(shares), size=size - 2, replace=False, p=left / left.sum()) if size > 2 else []
        pools.append([*pair.tolist(), *map(int, drawn)])
    return pools


def pool_distances(
    tables: dict[str, np.ndarray], world: World, candidates: list[list[int]]
) -> dict[str, dict[str, float]]:
    """Return every policy's metrics on pools of these answers, through the code that measures free text.

    Args:
        tables: log pi of each token of every string under each policy, the reference among them, (P, N, LENGTH).
        candidates: columns of the answers that are in the pool, the dataset's two first, P lists.
    """
    listed = [[rows[i] for i in chosen] for rows, chosen in zip(world.answers, candidates, strict=True)]
    pool = build_pool(world.prompts, [rows[:2] for rows in listed], [rows[2:] for rows in listed])
    prompts, responses = pool.rows()
    rewards = world.reward()(prompts, responses).float().clamp(-CLIP, CLIP)
    row_of = {tuple(prompt): row for row, prompt in enumerate(world.prompts)}
    column_of = {tuple(ids): column for column, ids in enumerate(world.strings)}
    places = [(row_of[tuple(p)], column_of[tuple(r)], len(r)) for p, r in zip(prompts, responses, strict=True)]
    read = {name: [tokens[row, column, :end] for row, column, end in places] for name, tokens in tables.items()}
    measure = PoolMeasure(pool, rewards, read["reference"], **MEASURED)
    return {name: measure.metrics(token_logps) for name, token_logps in read.items()}


@dataclass(frozen=True)
class PoolRow:
    """Pool metrics of one policy at one pool size, mean over draws of the pools, beside the exact ones."""

    size: int
    policy: str
    exact: dict[str, float]
    pool: dict[str, float]


def pool_table(world: World, reference: np.ndarray, size: Size) -> list[PoolRow]:
    """Return the metrics of every policy on pools of 2, 3, 4, 6 and all answers."""
    policies = enumerable.made_by_hand(world, reference)
    tables = {name: token_table(logps, world.strings) for name, logps in policies.items()}
    shares, rng = np.exp(on_answers(reference, world)), np.random.default_rng([SEED, 5])
    exact = {name: exact_distances(logps, world) for name, logps in policies.items()}
    rows = []
    for count in (2, 3, 4, 6, shares.shape[1]):
        repeats = 1 if count == shares.shape[1] else size.pools
        drawn = [pool_distances(tables, world, draw_candidates(shares, count, rng)) for _ in range(repeats)]
        for name in policies:
            means = {key: float(np.mean([found[name].get(key, np.nan) for found in drawn])) for key in DISTANCES}
            rows.append(PoolRow(count, name, exact[name], means))
    return rows


def whole_set_differs(rows: Sequence[PoolRow]) -> list[str]:
    """Return what differs on the pool that is the whole set, for policies without mass off it."""
    whole = max(row.size for row in rows)
    return [
        f"{row.policy}: {key} is {row.pool[key]:.6f} on the whole pool and {row.exact[key]:.6f} exactly"
        for row, key in itertools.product(rows, DISTANCES)
        if row.size == whole and row.exact["pm/offset_mass"] < 1e-6
        and not np.isclose(row.pool[key], row.exact[key], atol=1e-5, equal_nan=True)
    ]  # fmt: skip


# -- 3. policies made by hand ------------------------------------------------------------------------------------------


def hand_made_table(world: World, reference: np.ndarray) -> dict[str, dict[str, float]]:
    """Return exact metrics of the hand-made policies; the divergence is over all strings, as samples see it."""
    table = {}
    for name, logps in enumerable.made_by_hand(world, reference).items():
        tokens, share = token_table(logps, world.strings), np.exp(logps)
        found = exact_distances(logps, world)
        found["pm/divergence"] = float(twice_variance(share, world.rewards - tokens.sum(-1)).mean())
        found["entropy/per_token"] = float(expected_per_token(logps, -tokens, world.strings).mean())
        table[name] = found
    usual = table["reference"]["entropy/per_token"]
    return {name: {**found, "reference/entropy/per_token": usual} for name, found in table.items()}


def order(table: dict[str, dict[str, float]], key: str, *, best: str = "lower") -> list[str]:
    """Return the four policies of RIGHT_ORDER, best first by a metric."""
    return sorted(RIGHT_ORDER, key=lambda name: table[name][key] * (1 if best == "lower" else -1))


def ranked_wrongly(table: dict[str, dict[str, float]]) -> list[str]:
    """Return what the shipped ranking metrics and the guard get wrong."""
    orders = {key: order(table, key) for key in ("pm/tv", "pm/kl_rm_policy")}
    wrong = [f"{key} ranks {', '.join(found)}" for key, found in orders.items() if tuple(found) != RIGHT_ORDER]
    coverage_order = order(table, "pm/minority_coverage", best="higher")
    if coverage_order[:2] != list(RIGHT_ORDER[:2]):
        wrong.append(f"pm/minority_coverage ranks {', '.join(coverage_order)}")
    flagged = {name for name in RIGHT_ORDER if crossed(table[name])}
    if flagged != {"collapsed", "gibberish"}:
        wrong.append(f"the guard flags {', '.join(sorted(flagged)) or 'none'}")
    return wrong


# -- the page ----------------------------------------------------------------------------------------------------------


def paragraph(text: str) -> list[str]:
    """Return text as lines, and an empty one."""
    return [*textwrap.wrap(" ".join(text.split()), 118, break_long_words=False, break_on_hyphens=False), ""]


def coverage_section(rows: Sequence[Coverage], size: Size) -> list[str]:
    """Return the table of part 1."""
    lines = ["## Sampled expectations", ""]
    lines += paragraph(
        f"""{size.repetitions} repetitions, each with {size.prompts} prompts drawn with replacement from a population of
        {size.population} and {size.samples} samples a prompt, through the code that measures a finished run. Exact: the
        population's mean, by enumeration. Policies: random weights, and one trained to be peaked, each beside another
        as its reference; vocabulary: open ({len(enumerable.all_strings())} responses a prompt), or closed to the eight
        valid answers (prefix tree). Covered: how often the 95 % interval holds the exact value (Wilson's for shares, a
        bootstrap over prompts for the rest); {COVERED:.0%} is asked for, and kept by {sum(row.kept for row in rows)}
        of {len(rows)}; the last column is the hundred repetitions in which a metric does worst, which is partly chance.
        `pm/offset_mass` is here the share of samples that are no answer; a run on the survey world reports the exact
        number."""
    )
    lines += ["| policy, vocabulary | metric | exact | mean estimate | bias | mean width | covered | worst hundred |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        share = f"{row.covered:.1%}" if row.kept else f"**{row.covered:.1%}**"
        numbers = f"{row.exact:.4f} | {row.mean:.4f} | {row.mean - row.exact:+.4f} | {row.width:.4f}"
        lines.append(f"| {row.case} | `{row.metric}` | {numbers} | {share} | {row.lowest:.0%} |")
    return [*lines, ""]


def pool_section(rows: Sequence[PoolRow], size: Size) -> list[str]:
    """Return the tables of part 2: exact value, then the pool's minus it at each size; and how to read them."""
    sizes = sorted({row.size for row in rows})
    lines = ["## Candidate pools", ""]
    lines += paragraph(
        f"""The exact metric on the whole answer set, and by how much the pool's differs from it; mean over
        {size.population} prompts and {size.pools} draws of the pools. A pool has the two responses of a dataset pair
        and samples of the reference, and both sides are normalised over it. The answer set has {sizes[-1]}: with all of
        them in the pool nothing differs but for mass off the set."""
    )
    for key in DISTANCES:
        lines += [f"| `{key}` | exact | " + " | ".join(f"pool of {count}" for count in sizes) + " |"]
        lines += ["|---" + "|---:" * (len(sizes) + 1) + "|"]
        for name in dict.fromkeys(row.policy for row in rows):
            of_name = {row.size: row for row in rows if row.policy == name}
            gaps = [of_name[count].pool[key] - of_name[count].exact[key] for count in sizes]
            cells = [shown(of_name[sizes[0]].exact[key]), *(shown(gap, "+") for gap in gaps)]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return [*lines, *pool_reading(rows)]


def shown(value: float, sign: str = "") -> str:
    """Return a number with three decimals; no minus before a zero, a dash where it is not defined."""
    return "–" if np.isnan(value) else f"{round(value, 3) + 0.0:{sign}.3f}"


def pool_reading(rows: Sequence[PoolRow]) -> list[str]:
    """Return how to read the pool tables, with the numbers that say it."""
    smallest = min(row.size for row in rows)
    agreement = []
    for count in sorted({row.size for row in rows}):
        of_size = [row for row in rows if row.size == count and row.policy != "gibberish"]
        pairs = [(row.exact["pm/tv"], row.pool["pm/tv"]) for row in of_size]
        agreement.append(f"{spearmanr(*zip(*pairs, strict=True)).statistic:.2f} at {count}")
    gibberish = next(row for row in rows if row.size == smallest and row.policy == "gibberish")
    return paragraph(
        f"""How to read it: a pool metric is a distance on the candidates, not on all text. It is comparable between
        runs that share pool and reward, and its size says nothing about another pool. Small pools flatter a collapsed
        policy: where its one answer is not among the candidates, all of them look alike to it. Rank correlation of the
        policies' `pm/tv` on the pool with the exact one, gibberish left out: {", ".join(agreement)}. What lies off the
        pool is not seen: gibberish has an exact `pm/tv` of {gibberish.exact["pm/tv"]:.2f}, and
        {gibberish.pool["pm/tv"]:.2f} on pools of {smallest}. The guard's bounds on entropy are there for that."""
    )


def hand_made_section(table: dict[str, dict[str, float]]) -> list[str]:
    """Return the table of part 3, and in which order the official metric puts the four policies."""
    keys = ["pm/tv", "pm/kl_rm_policy", "pm/minority_coverage", "pm/offset_mass", "entropy/per_token", "pm/divergence"]
    lines = ["## Policies made by hand", "", "| policy | " + " | ".join(f"`{key}`" for key in keys) + " | guard |"]
    lines += ["|---" + "|---:" * len(keys) + "|---|"]
    for name, found in table.items():
        flags = "; ".join(crossed(found)) or "–"
        lines.append(f"| {name} | " + " | ".join(shown(found[key]) for key in keys) + f" | {flags} |")
    right, official = order(table, "pm/tv"), order(table, "pm/divergence")
    lines += ["", *paragraph(
        f"""Best first by `pm/tv`: {", ".join(right)}. By the official `pm/divergence` (arXiv 2405.16455), over all
        responses: {", ".join(official)}. It is zero for a policy that always says the same, and small where nearly all
        samples are equally bad. So it is never ranked alone, and not at all for a flagged run."""
    )]  # fmt: skip
    return lines


def page(rows: Sequence[Coverage], pools: Sequence[PoolRow], table: dict[str, dict[str, float]], size: Size) -> str:
    """Return the whole markdown page."""
    versions = f"Python {platform.python_version()}, torch {importlib.metadata.version('torch')}"
    lines = ["# Are the estimators honest?", ""]
    lines += paragraph(
        f"""`python benchmarks/estimators.py`, seed {SEED}, {os.cpu_count()} cores ({platform.machine()}), {versions}.
        The world is small enough to list every response (`benchmarks/enumerable.py`)."""
    )
    lines += [*coverage_section(rows, size), *pool_section(pools, size), *hand_made_section(table)]
    return "\n".join(lines).rstrip() + "\n"


def main(size: Size = FULL, result: Path = RESULT, say: Callable[[str], None] = print) -> int:
    """Measure, judge, write."""
    start = time.time()
    world = enumerable.make_world(size.population, SEED)
    cases = make_cases(world, size)
    say(f"every response listed: {time.time() - start:.0f} s")
    rows: list[Coverage] = []
    for case in cases:
        rows += coverage(case, world, size)
        say(f"{case.name}: {time.time() - start:.0f} s")
    closed = next(case for case in cases if case.name == "peaked, closed").reference_logps
    pools = pool_table(world, closed, size)
    opened = next(case for case in cases if case.name == "peaked, open").reference_logps
    table = hand_made_table(world, opened)
    text = page(rows, pools, table, size)
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(text, encoding="utf-8")
    say(f"{text}\nwritten: {result}, {time.time() - start:.0f} s")
    uncovered = [f"{row.case}: {row.metric} covers {row.covered:.1%}" for row in rows if not row.kept]
    problems = [*uncovered, *whole_set_differs(pools), *ranked_wrongly(table)]
    for problem in problems:
        print(f"NOT KEPT: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
