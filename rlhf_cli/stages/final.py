"""Every number of a finished policy: from samples, on the answer set or the candidate pool, on pairs, by judges."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_cli import ranks
from rlhf_cli.config.compose import identity, own_modules
from rlhf_cli.config.schema import EvaluateConfig, SplitConfig
from rlhf_cli.data import content
from rlhf_cli.data.encode import decode_response, encode_response
from rlhf_cli.measure.diversity import diversity
from rlhf_cli.measure.judge import Comparison, Judge
from rlhf_cli.measure.offset import offset_bound
from rlhf_cli.measure.pool import Pool, PoolMeasure, build_pool
from rlhf_cli.measure.sampled import read_logps, read_samples, score
from rlhf_cli.measure.samples import Samples, sample_metrics
from rlhf_cli.metrics.bootstrap import interval, share_interval
from rlhf_cli.metrics.guard import crossed
from rlhf_cli.metrics.samples import win_rate
from rlhf_cli.models.folders import fingerprint
from rlhf_cli.models.reward import Reward
from rlhf_cli.stages.reward_reading import model_reward
from rlhf_cli.stages.workspace import Workspace, digest, reward_id

OF_PAIRS = ("pm/pair_length_difference", "chosen_logps_change")  # of the data, and of a policy beside the reference
POOL_SEED = 0  # the pool belongs to its reference, whatever the seed of a run
# distances to a judge's preferences
JUDGED = ("pm/tv", "pm/kl_rm_policy", "pm/kl_policy_rm", "pm/rank_correlation", "pm/pair_tv")
NOT_BESIDE = ("optimum/divergence", "sampler/")  # what is not said of the reference again


@dataclass
class Measured:
    """What is written of a policy.

    Args:
        metrics: flat; every key is in the glossary.
        completions: rows of completions.jsonl.
        pairs: pairs.json.
        about: measured.json, what the numbers rest on; runs are comparable where it is equal.
    """

    metrics: dict[str, float]
    completions: list[dict[str, Any]]
    pairs: dict[str, Any]
    about: dict[str, Any]


@dataclass
class Drawn:
    """Samples of one policy with their rewards (N,), as training reads them, and their texts."""

    samples: Samples
    rewards: Tensor
    texts: list[str]


def measure_policy(work: Workspace, policy: Any, folder: Path) -> Measured:
    """Return every metric of `policy`, whose weights are in `folder`; what was computed before is re-used."""
    reference = work.roles.reference
    ours = _draw(work, policy, folder, work.cfg.seed)
    theirs = _draw(work, work.reference, reference, reference_seed(work.cfg.seed))
    found = {**_of_samples(work, ours), **_win_rates(work, ours, theirs)}
    beside = _of_samples(work, theirs)
    pool = _pool(work) if work.exact is None else None
    if pool is not None:
        measure = _pool_measure(work, pool, work.clipped(_pool_rewards(work, pool, work.reward, work.reward_id)))
        token_logps = _pool_logps(work, pool, policy, folder)
        found |= measure.metrics(token_logps)
        found |= measure.reference_metrics()
    else:
        found, beside = _exact(work, policy, found, beside)
    pairs = work.pairs.read(policy, work.memo, {"policy": fingerprint(folder)})
    found |= work.pairs.metrics(pairs)
    beside |= {k: v for k, v in work.pairs.metrics(work.pairs.reference).items() if not k.startswith(OF_PAIRS)}
    for label, judge in work.roles.judges.items():
        found |= {f"by/{label}/{key}": v for key, v in _judged(work, judge, policy, folder, pool, ours, theirs).items()}
    found |= {f"reference/{key}": value for key, value in beside.items() if not key.startswith(NOT_BESIDE)}
    if work.tree is None:
        found["entropy/uniform"] = math.log(work.reference.config.vocab_size)
    if work.how.of_policy:  # else there is no entropy, and nothing could be said
        found["guard/crossed"] = float(len(crossed(found)))
    return Measured(found, _completions(work, ours, theirs), work.pairs.histograms(pairs), _about(work, pool))


def reference_seed(seed: int) -> int:
    """Return the seed of the reference's samples: with the policy's own, alike policies would tie, not win and lose."""
    return int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])


def _draw(work: Workspace, policy: Any, folder: Path, seed: int) -> Drawn:
    """Return samples of `policy` to every measured prompt."""
    what = {"policy": fingerprint(folder), "reference": fingerprint(work.roles.reference)}
    samples = read_samples(policy, work.reference, work.prompt_ids, work.samples, work.how, work.memo, what, seed)
    rewards = work.clipped(_scored(work, samples, work.reward, work.reward_id))
    return Drawn(samples, rewards, [decode_response(work.tokenizer, ids) for ids in samples.responses])


def _scored(work: Workspace, samples: Samples, reward: Reward, name: str) -> Tensor:
    """Return the rewards of samples before clipping, (N,)."""
    prompts = [prompt for prompt in work.prompt_ids for _ in range(work.samples)]
    return score(reward, prompts, samples.responses, work.memo, {"reward": name}, "rewards")


def _of_samples(work: Workspace, drawn: Drawn) -> dict[str, float]:
    found = _sample_metrics(work, drawn.samples, drawn.rewards)
    size = work.samples
    groups = [drawn.texts[start : start + size] for start in range(0, len(drawn.texts), size)]
    for key, values in diversity(groups).items():
        if not np.isnan(values).all():
            found |= interval(key, values, groups=work.questions)
    return found


def _sample_metrics(work: Workspace, samples: Samples, rewards: Tensor) -> dict[str, float]:
    return sample_metrics(
        samples, rewards, algorithm=work.algorithm, algo=work.cfg.algo, how=work.how, groups=work.questions
    )


def _win_rates(work: Workspace, ours: Drawn, theirs: Drawn) -> dict[str, float]:
    """Return the share of samples that are better than the reference's, by reward model, gold and language model."""
    table = ours.samples.table
    found = share_interval("win_rate/rm", win_rate(table(ours.rewards), table(theirs.rewards)), groups=work.questions)
    gold = work.data.gold
    prompts = [prompt for prompt in work.prompts for _ in range(work.samples)]
    if gold is not None:
        ours_gold, theirs_gold = (
            torch.tensor([gold(prompt, text) for prompt, text in zip(prompts, drawn.texts, strict=True)])
            for drawn in (ours, theirs)
        )
        found |= share_interval("win_rate/gold", win_rate(table(ours_gold), table(theirs_gold)), groups=work.questions)
    cfg = work.cfg
    if isinstance(cfg, EvaluateConfig) and cfg.judge.name != "none":
        first = range(0, min(len(prompts), cfg.judge.prompts * work.samples), work.samples)
        items = [Comparison(prompts[row], ours.texts[row], theirs.texts[row]) for row in first]
        found |= ranks.on_main(lambda: Judge(cfg.judge, Path(cfg.store_dir)).win_rate(items))
    return found


def _exact(
    work: Workspace, policy: Any, found: dict[str, float], beside: dict[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return both sets of metrics with the exact distances, which win over sampled ones of the same name."""
    assert work.exact is not None
    kept = [{key: v for key, v in some.items() if key.split("/")[1:2] != ["divergence"]} for some in (found, beside)]
    exact = work.exact.metrics(policy)
    if work.algorithm.family == "online" and work.algorithm.has_optimum and work.tree is None:
        what: dict[str, Any] = {"reward": work.reward_id, "reference": fingerprint(work.roles.reference)}
        what |= {"algo": identity(work.cfg.algo), "own": own_modules(work.cfg)}
        exact |= offset_bound(work.exact, work.sampled, work.memo, what)
    reference = {key.removeprefix("reference/"): value for key, value in work.exact.reference_metrics().items()}
    return {**kept[0], **exact}, {**kept[1], **reference}


def _pool(work: Workspace) -> Pool:
    """Return the candidates of every measured prompt: the dataset's responses and samples of the reference."""
    assert isinstance(work.cfg.dataset, SplitConfig)
    size, limit = work.cfg.dataset.pool_samples, work.cfg.dataset.max_completion_tokens
    listed: dict[str, list[list[int]]] = {prompt: [] for prompt in work.prompts}
    for pair in work.data.heldout_pairs:
        if pair.prompt in listed:
            listed[pair.prompt] += [
                encode_response(work.tokenizer, text, limit) for text in (pair.chosen, pair.rejected)
            ]
    drawn: list[list[list[int]]] = [[] for _ in work.prompts]
    if size:
        own = fingerprint(work.roles.reference)
        how = replace(work.how, sample_temperature=1.0, top_p=1.0)
        found = read_samples(
            work.reference, work.reference, work.prompt_ids, size, how, work.memo, {"policy": own, "reference": own},
            POOL_SEED,
        )  # fmt: skip
        drawn = [found.responses[start : start + size] for start in range(0, len(found.responses), size)]
    return build_pool(work.prompt_ids, list(listed.values()), drawn)


def _pool_measure(work: Workspace, pool: Pool, rewards: Tensor) -> PoolMeasure:
    """Return the measure on the pool by rewards (N,) of its candidates."""
    token_logps = _pool_logps(work, pool, work.reference, work.roles.reference)
    return PoolMeasure(pool, rewards, token_logps, algorithm=work.algorithm, algo=work.cfg.algo)


def _pool_rewards(work: Workspace, pool: Pool, reward: Reward, name: str) -> Tensor:
    """Return the rewards of the candidates before clipping, (N,)."""
    return score(reward, *pool.rows(), work.memo, {"reward": name}, "pool rewards")


def _pool_logps(work: Workspace, pool: Pool, policy: Any, folder: Path) -> list[np.ndarray]:
    return read_logps(policy, *pool.rows(), work.how, work.memo, {"policy": fingerprint(folder)}, "pool log-probs")


def pool_id(pool: Pool) -> str:
    """Return the hash of a pool's prompts and candidates."""
    return digest([pool.prompts, pool.candidates])


def _judged(
    work: Workspace, judge: Path, policy: Any, own: Path, pool: Pool | None, ours: Drawn, theirs: Drawn
) -> dict[str, float]:
    """Return what another reward model says of the same samples and candidates."""
    reward = model_reward(work.cfg, work.data, work.tokenizer, judge, work.device)
    name = reward_id(work.cfg, [judge], work.tokenizer)
    rewards = [
        _scored(work, drawn.samples, reward, name) for drawn in (ours, theirs)
    ]  # as they are: it trained nothing
    sampled = _sample_metrics(work, ours.samples, rewards[0])
    found = {key: value for key, value in sampled.items() if key.startswith("reward/")}
    found |= share_interval("win_rate/rm", win_rate(*map(ours.samples.table, rewards)), groups=work.questions)
    if pool is not None:
        measure = _pool_measure(work, pool, _pool_rewards(work, pool, reward, name))
        distances = measure.metrics(_pool_logps(work, pool, policy, own))
    else:
        distances = work.exact_with(reward).metrics(policy)
    pairs = work.pairs
    read = score(reward, pairs.prompts, pairs.responses, work.memo, {"reward": name}, "rewards")
    logps = pairs.read(policy, work.memo, {"policy": fingerprint(own)})
    distances |= pairs.against(read).metrics(logps)
    return {**found, **{key: value for key, value in distances.items() if key.startswith(JUDGED)}}


def _completions(work: Workspace, ours: Drawn, theirs: Drawn) -> list[dict[str, Any]]:
    eos = set(work.how.eos_ids)
    prompts = [prompt for prompt in work.prompts for _ in range(work.samples)]
    rows = zip(
        prompts, ours.texts, ours.rewards.tolist(), ours.samples.responses, theirs.texts, theirs.rewards.tolist(),
        theirs.samples.responses, strict=True,
    )  # fmt: skip
    return [
        {
            "prompt": prompt,
            "completion": text,
            "reward": reward,
            "tokens": len(response),
            "ended": response[-1] in eos,
            "reference": reference,
            "reference_reward": reference_reward,
            "reference_ended": beside[-1] in eos,
        }
        for prompt, text, reward, response, reference, reference_reward, beside in rows
    ]


def _about(work: Workspace, pool: Pool | None) -> dict[str, Any]:
    cfg = work.cfg
    return {
        "dataset": content(cfg.dataset) or digest(identity(cfg.dataset)),
        "prompts": digest([work.prompt_ids, work.samples]),
        "pool": None if pool is None else pool_id(pool),
        "reward": work.reward_id,
        "reference": fingerprint(work.roles.reference),
        "sampler": {"temperature": work.how.sample_temperature, "top_p": work.how.top_p},
        "judges": {label: str(path) for label, path in work.roles.judges.items()},
    }
