"""How much mass the open-vocabulary optimum itself puts off the enumerated set, estimated by importance sampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.measure.exact import ExactMeasure
from rlhf_cli.measure.memo import Memo, Row, token_hash
from rlhf_cli.measure.sampled import SampledMeasure, read_logps
from rlhf_cli.measure.samples import effective_logps
from rlhf_cli.metrics.bootstrap import interval

SAMPLES = 128  # reference samples a prompt


def offset_bound(
    exact: ExactMeasure, sampled: SampledMeasure, memo: Memo | None = None, identity: dict[str, Any] | None = None
) -> dict[str, float]:
    """Return `optimum/offset_bound` with its interval: Z_off / (Z_on + Z_off), mean over trained prompts.

    The optimum's weight of a response is exp(r / beta) prod_t exp(e_t) (math: closed_form). Z_on is its exact sum over
    the set; Z_off = E_{y ~ pi_ref} [ 1(y off the set) exp(r / beta + sum_t e_t - log pi_ref(y)) ] is estimated from
    samples of the reference. Responses the reference never samples are not seen: read it as a lower bound.

    Args:
        exact: measures the reference's answers.
        sampled: samples and reads it.
        memo: keeps the estimate of Z_off of each prompt; None keeps nothing.
        identity: what reward, reference and algorithm are, for the memo.
    """
    enumeration = exact.enumeration
    on_set = {(tuple(p), tuple(r)) for p, r in zip(enumeration.prompt_ids, enumeration.response_ids, strict=True)}
    prompts = list(dict.fromkeys(tuple(prompt) for prompt in enumeration.prompt_ids))
    weight_on = exact.weight_on_set().logsumexp(-1).exp()[exact.trained].cpu()
    trained = [list(prompt) for prompt, keep in zip(prompts, exact.trained.tolist(), strict=True) if keep]

    def compute(indices: list[int]) -> list[Row]:
        repeated = [trained[index] for index in indices for _ in range(SAMPLES)]
        responses = sampled.draw(sampled.reference, repeated)
        off = [row for row in range(len(repeated)) if (tuple(repeated[row]), tuple(responses[row])) not in on_set]
        weights = torch.zeros(len(repeated))
        if off:
            weights[off] = _weights([repeated[i] for i in off], [responses[i] for i in off], sampled).float()
        return [{"weight": value} for value in weights.view(-1, SAMPLES).mean(-1).numpy()]

    set_hash = token_hash(enumeration.prompt_ids, enumeration.response_ids)
    what = {**(identity or {}), **_how(sampled), "set": set_hash, "prompts": token_hash(trained)}
    rows = (memo or Memo(None)).rows("offset", what, len(trained), compute, piece=len(trained), label="prompts")
    weight_off = torch.tensor([float(row["weight"]) for row in rows])
    groups = np.array([question.index for question in enumeration.questions])[exact.trained.cpu().numpy()]
    return interval("optimum/offset_bound", (weight_off / (weight_on + weight_off)).numpy(), groups=groups)


def _how(sampled: SampledMeasure) -> dict[str, Any]:
    """Return what decides the estimate beside reward, reference, algorithm and prompts."""
    how = sampled.sampling
    return {
        "clip": sampled.reward_clip,
        "temperature": how.temperature,
        "max_new_tokens": how.max_new_tokens,
        "samples": SAMPLES,
        "seed": sampled.seed,
    }


def _weights(prompts: list[list[int]], responses: list[list[int]], sampled: SampledMeasure) -> Tensor:
    how, beta = sampled.sampling, sampled.algo.beta
    reference = read_logps(sampled.reference, prompts, responses, how, Memo(None), {}, "responses")
    effective = effective_logps(reference, sampled.algorithm, sampled.algo)
    rewards = sampled.clipped_rewards(prompts, responses)
    return (rewards / beta + effective - torch.tensor([row.sum(dtype=float) for row in reference])).exp()
