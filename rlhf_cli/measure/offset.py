"""How much mass the open-vocabulary optimum itself puts off the enumerated set, estimated by importance sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_cli.algos.base import masked_sum
from rlhf_cli.measure.exact import ExactMeasure
from rlhf_cli.measure.sampled import SampledMeasure
from rlhf_cli.metrics.bootstrap import interval
from rlhf_cli.models.logps import frozen_token_logps
from rlhf_cli.models.tokens import collate

SAMPLES = 128  # reference samples a prompt


def offset_bound(exact: ExactMeasure, sampled: SampledMeasure) -> dict[str, float]:
    """Return `optimum/offset_bound` with its interval: Z_off / (Z_on + Z_off), mean over trained prompts.

    The optimum's weight of a response is exp(r / beta) prod_t exp(e_t) (math: closed_form). Z_on is its exact sum over
    the set; Z_off = E_{y ~ pi_ref} [ 1(y off the set) exp(r / beta + sum_t e_t - log pi_ref(y)) ] is estimated from
    samples of the reference. Responses the reference never samples are not seen: read it as a lower bound.
    """
    enumeration = exact.enumeration
    on_set = {(tuple(p), tuple(r)) for p, r in zip(enumeration.prompt_ids, enumeration.response_ids, strict=True)}
    prompts = list(dict.fromkeys(tuple(prompt) for prompt in enumeration.prompt_ids))
    weight_on = exact.weight_on_set().logsumexp(-1).exp()[exact.trained].cpu()
    trained = [list(prompt) for prompt, keep in zip(prompts, exact.trained.tolist(), strict=True) if keep]
    repeated = [prompt for prompt in trained for _ in range(SAMPLES)]
    responses = sampled.draw(sampled.reference, repeated)
    off = [row for row in range(len(repeated)) if (tuple(repeated[row]), tuple(responses[row])) not in on_set]
    weights = torch.zeros(len(repeated))
    if off:
        weights[off] = _weights([repeated[i] for i in off], [responses[i] for i in off], sampled).cpu()
    weight_off = weights.view(-1, SAMPLES).mean(-1)
    found = interval("optimum/offset_bound", (weight_off / (weight_on + weight_off)).numpy())
    return {**found, "optimum/offset_bound/n": len(repeated)}


def _weights(prompts: list[list[int]], responses: list[list[int]], sampled: SampledMeasure) -> Tensor:
    how, beta = sampled.sampling, sampled.algo.beta
    batch = collate(prompts, responses, how.pad_id, how.device)
    reference = frozen_token_logps(sampled.reference, batch, temperature=how.temperature, tree=how.tree)
    effective = masked_sum(sampled.algorithm.effective_reference(reference, sampled.algo), batch.response_mask)
    rewards = sampled.clipped_rewards(prompts, responses)
    return (rewards / beta + effective.cpu() - reference.sum(-1).cpu()).exp()
