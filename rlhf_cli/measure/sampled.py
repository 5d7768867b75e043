"""Drawing from a policy, and reading policies and rewards on responses, in batches that fit and are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rlhf_cli import ranks
from rlhf_cli.algos.base import Algorithm, masked_sum
from rlhf_cli.config.schema import AlgoConfig
from rlhf_cli.measure.memo import Memo, Row, token_hash
from rlhf_cli.measure.samples import Samples, Sampling, sample_metrics
from rlhf_cli.metrics.bootstrap import interval
from rlhf_cli.models import logps
from rlhf_cli.models.batches import by_length, in_batches, rows_that_fit
from rlhf_cli.models.reward import Reward
from rlhf_cli.models.sampling import row_streams, sample
from rlhf_cli.models.tokens import TokenBatch, collate

T = TypeVar("T")
Ids = Sequence[list[int]]

DRAWN = 128  # sequences drawn at a time
SCORED = 256  # responses scored at a time


def draw(policy: Any, prompts: Ids, how: Sampling, seed: int, rows: Sequence[int] | None = None) -> list[list[int]]:
    """Return one response of `policy` for each prompt; the global random state is left as it was.

    Args:
        policy: causal language model.
        prompts: token ids, one list a prompt.
        how: how it is sampled.
        seed: with a row's number it decides what is drawn for it.
        rows: number of each prompt among all; None counts them.
    """
    streams = row_streams(seed, rows=range(len(prompts)) if rows is None else rows)

    def drawn(batch: slice) -> list[list[int]]:
        return sample(
            policy,
            prompts[batch],
            streams=streams[batch],
            max_new_tokens=how.max_new_tokens,
            temperature=how.temperature * how.sample_temperature,
            top_p=how.top_p,
            eos_ids=how.eos_ids,
            pad_id=how.pad_id,
            tree=how.tree,
        )

    batches = [slice(start, start + how.micro_batch) for start in range(0, len(prompts), how.micro_batch)]
    with evaluating(policy):
        return list(chain.from_iterable(ranks.dealt(batches, drawn)))


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def read_samples(
    policy: Any,
    reference: Any,
    prompts: list[list[int]],
    samples: int,
    how: Sampling,
    memo: Memo,
    identity: dict[str, Any],
    seed: int,
) -> Samples:
    """Return `samples` responses of `policy` to each prompt, as policy and reference read them.

    They are drawn in pieces of whole prompts, each sample from a stream of its own, so that they depend neither on
    what the memory holds at a time nor on an interruption.

    Args:
        policy, reference: causal language models.
        prompts: token ids, P lists.
        samples: S, responses per prompt.
        how: how they are drawn and read.
        memo: keeps them.
        identity: what policy and reference are; prompts, `how` and seed are added.
        seed: of the draws.
    """
    order = [prompt * samples + n for prompt in by_length([len(ids) for ids in prompts]) for n in range(samples)]
    piece = max(1, DRAWN // samples) * samples

    def compute(indices: list[int]) -> list[Row]:
        asked = [prompts[index // samples] for index in indices]

        def drawn(part: list[int]) -> list[list[int]]:
            places = [indices[i] for i in part]
            return draw(policy, [asked[i] for i in part], replace(how, micro_batch=len(part)), seed, places)

        responses = in_batches(range(len(indices)), drawn, DRAWN)
        rows = _read_both(policy, reference, asked, responses, how)
        return [{"response": np.array(ids), **row} for ids, row in zip(responses, rows, strict=True)]

    drawing = {"max_new_tokens": how.max_new_tokens, "eos_ids": how.eos_ids, "top_p": how.top_p}
    drawing |= {"sample_temperature": how.sample_temperature, "samples": samples, "seed": seed}
    what = {**identity, **_reading_identity(how), **drawing, "tokens": token_hash(prompts)}
    rows = memo.rows("samples", what, len(order), compute, order=order, piece=piece, label="samples")
    return _samples(prompts, samples, [row["response"].tolist() for row in rows], rows)


def score(reward: Reward, prompts: Ids, responses: Ids, memo: Memo, identity: dict[str, Any], label: str) -> Tensor:
    """Return the rewards of the responses, before clipping, nats, on the CPU, (N,).

    Args:
        reward: what scores them.
        prompts, responses: token ids, N lists each.
        memo: keeps them.
        identity: what the reward is; prompts and responses are added.
        label: what the progress bar counts.
    """

    def scored(part: list[int]) -> list[np.ndarray]:
        return list(reward([prompts[i] for i in part], [responses[i] for i in part]).float().cpu().numpy())

    def compute(indices: list[int]) -> list[Row]:
        return [{"reward": value} for value in in_batches(indices, scored, SCORED)]

    order = _longest_first(prompts, responses)
    what = {**identity, "tokens": token_hash(prompts, responses)}
    rows = memo.rows("scores", what, len(prompts), compute, order=order, piece=SCORED, label=label)
    return torch.tensor([float(row["reward"]) for row in rows])


def read_logps(
    model: Any, prompts: Ids, responses: Ids, how: Sampling, memo: Memo, identity: dict[str, Any], label: str
) -> list[np.ndarray]:
    """Return log pi of each token of each response, nats, N arrays.

    Args:
        model: causal language model.
        prompts, responses: token ids, N lists each.
        how: how log-probs are read.
        memo: keeps them.
        identity: what the model is; prompts, responses and the reading are added.
        label: what the progress bar counts.
    """

    def read(batch: TokenBatch) -> list[np.ndarray]:
        return _unpadded(logps.frozen_token_logps(model, batch, **how.reading, micro_batch=None), batch)

    def compute(indices: list[int]) -> list[Row]:
        asked, given = [prompts[i] for i in indices], [responses[i] for i in indices]
        return [{"token_logps": row} for row in _in_batches(asked, given, how, model.config.vocab_size, read)]

    order = _longest_first(prompts, responses)
    what = {**identity, **_reading_identity(how), "tokens": token_hash(prompts, responses)}
    rows = memo.rows("logps", what, len(prompts), compute, order=order, label=label)
    return [row["token_logps"] for row in rows]


class SampledMeasure:
    """Samples `samples` responses to each prompt and measures them: the curves of a run that is training.

    Args:
        prompts: token ids, one list a prompt.
        samples: responses per prompt, >= 2.
        reference, reward, reward_clip: as in training.
        algorithm, algo: give beta and the effective reference of the conditional divergence.
        sampling: how.
        seed: of sampling, the same at every call, so that checkpoints are compared on equal luck.
    """

    def __init__(
        self,
        prompts: list[list[int]],
        samples: int,
        reference: Any,
        reward: Reward,
        *,
        reward_clip: float | None,
        algorithm: Algorithm,
        algo: AlgoConfig,
        sampling: Sampling,
        seed: int,
    ) -> None:
        self.prompts = [prompt for prompt in prompts for _ in range(samples)]
        self.samples, self.reference, self.reward, self.reward_clip = samples, reference, reward, reward_clip
        self.algorithm, self.algo, self.sampling, self.seed = algorithm, algo, sampling, seed

    def draw(self, policy: Any, prompts: list[list[int]]) -> list[list[int]]:
        """Return one response for each prompt; the global random state is left as it was."""
        return draw(policy, prompts, self.sampling, self.seed)

    def clipped_rewards(self, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        """Return the rewards as training used them, on the CPU, (N,)."""
        raw = score(self.reward, prompts, responses, Memo(None), {}, "rewards")
        return raw if self.reward_clip is None else raw.clamp(-self.reward_clip, self.reward_clip)

    def measure(self, policy: Any) -> tuple[dict[str, float], list[list[int]], Tensor]:
        """Return metrics with their intervals, the sampled responses, and their rewards (N,)."""
        responses = self.draw(policy, self.prompts)
        rewards = self.clipped_rewards(self.prompts, responses)
        rows = _read_both(policy, self.reference, self.prompts, responses, self.sampling)
        samples = _samples(self.prompts[:: self.samples], self.samples, responses, rows)
        return self.metrics(samples, rewards), responses, rewards

    def mean_reward(self, policy: Any, samples: int) -> dict[str, float]:
        """Return reward/mean with its interval from the first `samples` samples of each prompt, and nothing else."""
        prompts = [prompt for prompt in self.prompts[:: self.samples] for _ in range(samples)]
        rewards = self.clipped_rewards(prompts, self.draw(policy, prompts))
        return interval("reward/mean", rewards.view(-1, samples).mean(-1).numpy())

    def metrics(self, samples: Samples, rewards: Tensor) -> dict[str, float]:
        """Return the metrics of samples that were drawn as this measure draws, with rewards as training used them."""
        return sample_metrics(samples, rewards, algorithm=self.algorithm, algo=self.algo, how=self.sampling)


def _samples(prompts: list[list[int]], per_prompt: int, responses: list[list[int]], rows: list[Row]) -> Samples:
    columns = {name: torch.tensor([float(row[name]) for row in rows]) for name in ("logps", "kl", "entropy")}
    return Samples(prompts, per_prompt, responses, columns, [row["ref_token_logps"] for row in rows])


def _read_both(policy: Any, reference: Any, prompts: Ids, responses: Ids, how: Sampling) -> list[Row]:
    """Return per response: log pi, exact KL and entropy summed over its tokens, log pi_ref of each token."""

    def read(batch: TokenBatch) -> list[Row]:
        ours = logps.vocabulary_logps(policy, batch, **how.reading)
        theirs = ours if reference is policy else logps.vocabulary_logps(reference, batch, **how.reading)
        tokens = {
            "logps": logps.gather_logps(ours, batch.response_ids),
            "kl": logps.kl(ours, theirs),
            "entropy": logps.entropy(ours),
        }
        sums = {name: masked_sum(values, batch.response_mask).cpu().numpy() for name, values in tokens.items()}
        reference_logps = _unpadded(logps.gather_logps(theirs, batch.response_ids), batch)
        return [
            {**{name: values[i] for name, values in sums.items()}, "ref_token_logps": row}
            for i, row in enumerate(reference_logps)
        ]

    with torch.no_grad(), evaluating(policy), evaluating(reference):
        return _in_batches(prompts, responses, how, policy.config.vocab_size, read)


def _in_batches(
    prompts: Ids, responses: Ids, how: Sampling, vocab_size: int, read: Callable[[TokenBatch], list[T]]
) -> list[T]:
    """Return what `read` returns for each sequence; those of about one length are read together."""

    def batch(part: list[int]) -> list[T]:
        asked, given = [prompts[i] for i in part], [responses[i] for i in part]
        return read(collate(asked, given, how.pad_id, how.device))

    order = _longest_first(prompts, responses)
    width = max(map(len, prompts)) + max(map(len, responses))
    fitting = min(ranks.gather(rows_that_fit(width, vocab_size, how.device)))  # all ranks make the same batches
    size = min(how.micro_batch, fitting)
    shares: list[list[int]] = [[] for _ in range(ranks.world())]
    for number, start in enumerate(range(0, len(order), size)):
        shares[number % len(shares)] += order[start : start + size]
    found = ranks.dealt(shares, lambda share: in_batches(share, batch, size))
    rows = dict(zip(chain.from_iterable(shares), chain.from_iterable(found), strict=True))
    return [rows[i] for i in range(len(order))]


def _longest_first(prompts: Ids, responses: Ids) -> list[int]:
    return by_length([len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)])


def _unpadded(values: Tensor, batch: TokenBatch) -> list[np.ndarray]:
    """Return values of the response tokens (B, T) without the padding, an array a response."""
    lengths = batch.response_mask.sum(-1).tolist()
    return [row[:length].copy() for row, length in zip(values.cpu().numpy(), lengths, strict=True)]


def _reading_identity(how: Sampling) -> dict[str, Any]:
    if how.tree is None:
        return {"temperature": how.temperature, "tree": None}
    tables = [table.cpu().numpy().tobytes() for table in (how.tree.next, how.tree.allowed)]
    return {"temperature": how.temperature, "tree": sha256(b"".join(tables)).hexdigest()}
