"""Preference matching on a candidate pool; with a pool of every answer it is the exact measure."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tiny_models import BOS, EOS, tiny_policy
from tiny_world import ANSWERS, PROMPTS, QUESTIONS, REWARDS, TREE, lookup, measure, sampling

from rlhf_cli import algos
from rlhf_cli.errors import DataError
from rlhf_cli.measure.memo import Memo
from rlhf_cli.measure.pool import Pool, PoolMeasure, build_pool
from rlhf_cli.measure.sampled import read_logps, score

WHOLE = build_pool(PROMPTS, ANSWERS, [[]] * 3)
TRAINED = [replace(question, heldout=False) for question in QUESTIONS]
PLAIN = SimpleNamespace(beta=1.0)


def token_logps(policy: Any, pool: Pool = WHOLE) -> list[np.ndarray]:
    return read_logps(policy, *pool.rows(), sampling(TREE), Memo(None), {}, "candidates")


def pool_measure(reference: Any, name: str, algo: Any, pool: Pool = WHOLE) -> PoolMeasure:
    rewards = score(lookup, *pool.rows(), Memo(None), {}, "candidates").clamp(-5, 5)
    tokens = reference if isinstance(reference, list) else token_logps(reference, pool)
    return PoolMeasure(pool, rewards, tokens, algorithm=algos.get(name), algo=algo)


def stub(shares: list[list[float]]) -> list[np.ndarray]:
    """Token log-probs of a policy that gives candidates these shares, all on the first of two tokens."""
    return [np.array([math.log(share), 0.0]) for row in shares for share in row]


# -- the pool ----------------------------------------------------------------------------------------------------------


def test_a_pool_holds_responses_once_those_of_the_dataset_first() -> None:
    a, b, c = [7, EOS], [8, EOS], [7]
    pool = build_pool(
        [[BOS, 4], [BOS, 5], [BOS, 6], [BOS]],
        [[b, a, b], [a], [], [a, a]],
        [[c, a, c], [b, [9]], [b, b], [a]],
    )
    assert pool.prompts == [[BOS, 4], [BOS, 5]]  # the others have one candidate
    assert pool.candidates == [[b, a, c], [a, b, [9]]]
    assert pool.sources == [["dataset", "dataset", "reference"], ["dataset", "reference", "reference"]]
    assert pool.rows() == ([[BOS, 4]] * 3 + [[BOS, 5]] * 3, [b, a, c, a, b, [9]])


def test_a_pool_without_candidates_is_refused() -> None:
    with pytest.raises(DataError, match=r"none of 2 prompts has two different .* raise dataset.pool_samples"):
        build_pool([[4], [5]], [[[7]], [[8]]], [[[7]], []])


# -- the pool is the whole response set --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "algo"),
    [
        ("kl_ppo", PLAIN),
        ("kl_ppo", SimpleNamespace(beta=0.3)),
        ("pm", SimpleNamespace(beta=2.0, alpha=0.3)),
        ("pm", SimpleNamespace(beta=1.0, alpha=None)),
    ],
)
def test_a_pool_of_every_answer_is_the_exact_measure(name: str, algo: Any) -> None:
    reference, policy = tiny_policy(1), tiny_policy(2)
    exact = measure(reference, name, algo, TRAINED, tree=TREE)
    pool = pool_measure(reference, name, algo)
    for found, expected in (
        (pool.metrics(token_logps(policy)), exact.metrics(policy)),
        (pool.reference_metrics(), exact.reference_metrics()),
    ):
        shared = {key for key in found if not key.endswith(("/lo", "/hi", "/n")) and not key.startswith("pool/")}
        assert {key: found[key] for key in shared} == pytest.approx({key: expected[key] for key in shared}, abs=1e-5)
        where = "reference/" if "reference/pm/tv" in found else ""
        names = ["tv", "kl_rm_policy", "kl_policy_rm", "tv_max", "kl_rm_policy_max", "kl_policy_rm_max"]
        names += ["minority_mass", "minority_mass_target", "minority_coverage", "rank_correlation"]
        wanted = {f"{where}pm/{name}" for name in names}
        wanted |= {f"{where}optimum/{key}" for key in ("tv", "kl", "tv_max", "kl_max")}
        wanted |= {f"{where}pm_beta/{name}" for name in names[:-1] if algo.beta != 1}
        assert shared == wanted
    assert found["reference/pm/tv"] > 0.05


@pytest.mark.parametrize("alpha", [1.0, 0.3, None])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_the_optimum_on_the_pool_is_at_distance_0(alpha: float | None, beta: float) -> None:
    reference = token_logps(tiny_policy(1))
    e = [np.where(np.exp(t) > (alpha or 0), 0.0, t).sum() for t in reference]
    weights = np.exp(REWARDS.clamp(-5, 5).numpy() / beta + np.array(e))
    best = [np.array([math.log(weight)]) for weight in weights]  # unnormalised: the pool normalises
    found = pool_measure(reference, "pm", SimpleNamespace(beta=beta, alpha=alpha)).metrics(best)
    for key in ("optimum/tv", "optimum/kl", "optimum/tv_max", "optimum/kl_max"):
        assert found[key] == pytest.approx(0.0, abs=1e-6), key
    if alpha is None:
        assert found["pm/tv" if beta == 1 else "pm_beta/tv"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", ["dpo", "dpm", "rpo"])
def test_pairwise_algorithms_have_no_optimum_on_text(name: str) -> None:
    found = pool_measure(tiny_policy(1), name, SimpleNamespace(beta=1.0, alpha=0.3)).metrics(
        token_logps(tiny_policy(2))
    )
    assert not [key for key in found if key.startswith("optimum")]
    assert "pm/tv" in found


# -- values ------------------------------------------------------------------------------------------------------------


def two_prompts(rewards: list[float], **changes: Any) -> PoolMeasure:
    pool = build_pool([[BOS, 4], [BOS, 5]], [[[7, EOS], [8, EOS]], [[7, EOS], [8, EOS], [9, EOS]]], [[], []])
    settings: dict[str, Any] = {"algorithm": algos.get("kl_ppo"), "algo": PLAIN, **changes}
    return PoolMeasure(pool, torch.tensor(rewards), stub([[0.5, 0.5], [0.2, 0.3, 0.5]]), **settings)


def test_metrics_by_hand() -> None:
    third = math.log(0.6), math.log(0.3), math.log(0.1)
    work = two_prompts([0.0, math.log(3), *third])  # q: 1/4, 3/4; .6 .3 .1
    # pi on the pool: .05 and .05 are 1/2 and 1/2, although most mass is elsewhere; .5 .4 .1
    found = work.metrics(stub([[0.05, 0.05], [0.25, 0.2, 0.05]]))
    assert found["pm/tv"] == pytest.approx((0.25 + 0.1) / 2)
    assert found["pm/tv_max"] == pytest.approx(0.25)
    kl = [0.25 * math.log(0.5) + 0.75 * math.log(1.5), 0.6 * math.log(1.2) + 0.3 * math.log(0.75)]
    assert found["pm/kl_rm_policy"] == pytest.approx(sum(kl) / 2)
    reverse = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.5 * math.log(5 / 6) + 0.4 * math.log(4 / 3)]
    assert found["pm/kl_policy_rm"] == pytest.approx(sum(reverse) / 2)
    assert found["pm/kl_policy_rm_max"] == pytest.approx(max(reverse))
    assert found["pm/minority_mass"] == pytest.approx((0.5 + 0.5) / 2)
    assert found["pm/minority_mass_target"] == pytest.approx((0.25 + 0.4) / 2)
    assert found["pm/minority_coverage"] == pytest.approx((1 + 1) / 2)
    assert found["pm/rank_correlation"] == pytest.approx(1.0)  # of the second prompt: the first has equal log-probs
    assert found["pm/rank_correlation/n"] == 1
    assert (found["pm/tv/lo"], found["pm/tv/hi"], found["pm/tv/n"]) == pytest.approx((0.1, 0.25, 2))
    assert found["pool/size"] == 2.5
    assert found["pool/prompts"] == 2
    assert not [key for key in found if "offset" in key or "divergence" in key or "minority_mass_max" in key]


def test_rank_correlation_is_spearman_s() -> None:
    rewards = [0.0, 1.0, 0.3, 0.3, -1.0]
    found = two_prompts(rewards).metrics(stub([[0.3, 0.2], [0.1, 0.6, 0.2]]))
    second = spearmanr(rewards[2:], [0.1, 0.6, 0.2]).statistic
    assert found["pm/rank_correlation"] == pytest.approx((-1 + second) / 2)


def test_equal_rewards_have_no_rank_correlation() -> None:
    found = two_prompts([1.0] * 5).metrics(stub([[0.3, 0.2], [0.1, 0.6, 0.2]]))
    assert not [key for key in found if "rank_correlation" in key]
    assert found["pm/tv"] > 0.05


def test_beta_gives_the_tempered_preferences() -> None:
    found = two_prompts([0.0, 0.5 * math.log(3), 0.0, 0.0, 0.0], algo=SimpleNamespace(beta=0.5)).metrics(
        stub([[0.25, 0.75], [0.1, 0.1, 0.1]])
    )
    assert found["pm_beta/tv"] == pytest.approx(0.0, abs=1e-7)
    assert found["pm/tv"] > 0.05
    assert "pm_beta/tv" not in two_prompts([0.0] * 5).metrics(stub([[0.3, 0.2], [0.1, 0.6, 0.2]]))


def test_a_policy_that_has_lost_a_candidate_is_measured() -> None:
    """A log-prob of -1e9 is a token that a closed vocabulary does not allow."""
    lost = [np.array([0.0]), np.array([-1e9]), *stub([[0.2, 0.3, 0.5]])]
    found = two_prompts([0.0] * 5).metrics(lost)
    assert found["pm/tv_max"] == pytest.approx(0.5)
    assert all(math.isfinite(value) for value in found.values())


def test_metrics_do_not_depend_on_the_order_of_prompts() -> None:
    def found(order: list[int]) -> dict[str, float]:
        pool = build_pool([PROMPTS[i] for i in order], [ANSWERS[i] for i in order], [[]] * 3)
        work = pool_measure(tiny_policy(1), "kl_ppo", PLAIN, pool)
        return work.metrics(token_logps(tiny_policy(2), pool))

    first, second = found([0, 1, 2]), found([2, 0, 1])
    points = [key for key in first if not key.endswith(("/lo", "/hi"))]
    assert {key: first[key] for key in points} == pytest.approx({key: second[key] for key in points}, abs=1e-5)
