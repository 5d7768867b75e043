"""Reward model and critic: a sequence classifier with one output, read at the last token or at every token."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from rlhf_cli import ranks
from rlhf_cli.errors import RunError
from rlhf_cli.models.adapters import plain
from rlhf_cli.models.batches import rows_that_fit
from rlhf_cli.models.calibration import CALIBRATION_FILE, LengthCalibration
from rlhf_cli.models.classifier import load_reward_model
from rlhf_cli.models.classifier import new_reward_model as new_reward_model
from rlhf_cli.models.loading import Loading
from rlhf_cli.models.sharding import is_sharded, shard_if_asked
from rlhf_cli.models.tokens import TokenBatch, collate

CENTRE_FILE = "reward.json"
MOST_ROWS = 256  # sequences per forward; more are not faster


def save_centre(path: Path, centre: float) -> None:
    """Store the mean score of the chosen training responses, on which rewards are centred (docs/paper_index.md)."""
    (path / CENTRE_FILE).write_text(json.dumps({"chosen_mean_score": centre}), encoding="utf-8")


def load_centre(path: Path) -> float:
    """Return what `save_centre` stored.

    Raises:
        RunError: the file holds something else.
    """
    try:
        return float(json.loads((path / CENTRE_FILE).read_text(encoding="utf-8"))["chosen_mean_score"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path / CENTRE_FILE} is damaged", 'it should hold {"chosen_mean_score": NUMBER}', "delete it"
        ) from error


def token_values(model: Any, batch: TokenBatch) -> Tensor:
    """Return the head's output at every position of the sequences, in the head's float32, (B, P + T)."""
    if getattr(model, "reads_by_token", False):
        return cast(Tensor, model(**{name: getattr(batch, name) for name in batch.__dataclass_fields__}))
    return _values(model, batch)


def _values(model: Any, batch: TokenBatch) -> Tensor:
    body = getattr(model, model.base_model_prefix)
    hidden = body(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state
    exact = model.score.weight.dtype  # of the one in use, where an adapter brings its own
    with torch.autocast(hidden.device.type, enabled=False):  # bfloat16 has three digits: margins would be lost
        return model.score(hidden.to(exact)).squeeze(-1)


def by_token(model: Any) -> None:
    """Make the call of a sequence classifier, with an adapter or without, return `token_values`.

    What trains a model on several ranks wraps its call, and sees no other use of its parts.
    """

    def forward(**fields: Tensor) -> Tensor:
        return _values(plain(model), TokenBatch(**fields))

    model.forward, model.reads_by_token = forward, True


def sequence_scores(model: Any, batch: TokenBatch) -> Tensor:
    """Return the raw score of each response, read at its last token, (B,)."""
    return last_values(token_values(model, batch), batch)


def rows_at_once(model: Any, width: int) -> int:
    """Return how many sequences of `width` tokens one forward without gradient can score, at most 256."""
    config = model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * config.hidden_size
    return min(MOST_ROWS, rows_that_fit(width, 2 * config.hidden_size + inner, model.device))


def last_values(values: Tensor, batch: TokenBatch) -> Tensor:
    """Return the value at the last token of each sequence, (B,), of values (B, P + T)."""
    positions = torch.arange(values.shape[1], device=values.device)
    last = (positions * batch.attention_mask).amax(-1, keepdim=True)
    return values.gather(-1, last).squeeze(-1)


class Critic(nn.Module):
    """State values before each response token, from a copy of the reward model (official PM code).

    The head is read one position early: the value before token t sees the prompt and y_<t.
    """

    def __init__(self, reward_model: Any) -> None:
        super().__init__()
        self.model = reward_model

    def forward(self, batch: TokenBatch) -> Tensor:
        """Return V(x, y_<t) for each response token, (B, T)."""
        length = batch.response_ids.shape[1]
        return token_values(self.model, batch)[:, -length - 1 : -1]


class Reward(Protocol):
    """What scores responses: (prompt ids, response ids with end-of-sequence) -> centred rewards, nats, (B,)."""

    def __call__(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor: ...


class ModelReward:
    """The centred score of a reward model that shares the policy's tokenizer.

    Token ids are scored as sampled, end-of-sequence included: text would lose it, and with it the score.

    Args:
        path: model folder, with reward.json if it was trained here.
        pad_id: padding token.
        device: cpu or cuda.
        calibration: "length" takes out what length explains (calibration.py); "none" reads the score as it is.
        micro_batch: sequences per forward; None: as many as fit the memory.
        how: device, number format and attention; None: in float32 on `device`.
        model: what is in `path`, where it is in memory already; None: it is loaded.

    Raises:
        RunError: the folder holds no such model, or calibration is "length" and it holds none.
    """

    def __init__(
        self,
        path: Path,
        pad_id: int,
        device: str,
        calibration: str = "none",
        micro_batch: int | None = None,
        how: Loading | None = None,
        model: Any = None,
    ) -> None:
        from rlhf_cli.models.policy import freeze

        model = shard_if_asked(load_reward_model(path, device, how), device) if model is None else model
        self.model = freeze(model)
        self.centre = load_centre(path) if (path / CENTRE_FILE).is_file() else 0.0  # a foreign model: see centred()
        self.positions = getattr(self.model.config, "max_position_embeddings", None)
        self.path, self.pad_id, self.device, self.micro_batch = path, pad_id, device, micro_batch
        self.calibration = LengthCalibration.load(path / CALIBRATION_FILE) if calibration == "length" else None

    def calibrated(self, path: Path) -> ModelReward:
        """Return the same model read with the length calibration in `path`; the weights are shared."""
        other = copy(self)
        other.calibration = LengthCalibration.load(path / CALIBRATION_FILE)
        return other

    def centred(self, centre: float) -> ModelReward:
        """Return the same model centred on another mean score of chosen responses; the weights are shared."""
        other = copy(self)
        other.centre = centre
        return other

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
        """Return the centred rewards, (B,).

        Raises:
            RunError: a reward is not finite, or a prompt with its response is longer than the model can read.
        """
        self._require_positions(prompts, responses)
        batch = collate(prompts, responses, self.pad_id, self.device)
        size = self.micro_batch or rows_at_once(self.model, batch.input_ids.shape[1])
        if is_sharded(self.model):  # each forward is that of all ranks, and their sequences differ in length
            size = min(ranks.gather(size))
        scores = batch.read(partial(sequence_scores, self.model), size)
        rewards = require_finite(scores - self.centre)
        if self.calibration is None:
            return rewards
        return rewards - self.calibration.offset(batch.response_mask.sum(-1).to(rewards.dtype))

    def _require_positions(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> None:
        longest = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
        if self.positions is not None and longest > self.positions:
            raise RunError(
                f"the reward model in {self.path} reads {self.positions} tokens at most",
                f"a prompt with its response has {longest} of its tokens",
                "lower dataset.max_prompt_tokens or dataset.max_completion_tokens",
            )


class RetokenizedReward:
    """A reward model with a tokenizer of its own: responses are decoded and encoded again, end-of-sequence put back.

    Args:
        reward: reads its own token ids.
        decode: policy ids of (prompt, response) -> their texts, and whether the response had ended.
        encode: texts of (prompt, response) and whether it had ended -> the reward model's ids.
    """

    def __init__(
        self,
        reward: Reward,
        decode: Callable[[Sequence[int], Sequence[int]], tuple[str, str, bool]],
        encode: Callable[[str, str, bool], tuple[list[int], list[int]]],
    ) -> None:
        self.reward, self.decode, self.encode = reward, decode, encode

    def __call__(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
        """Return the centred rewards, (B,)."""
        encoded = [self.encode(*self.decode(*pair)) for pair in zip(prompts, responses, strict=True)]
        return self.reward([prompt for prompt, _ in encoded], [response for _, response in encoded])


class EnsembleReward:
    """The mean of several rewards (the prediction ensemble of arXiv 2401.12187)."""

    def __init__(self, members: Sequence[Reward]) -> None:
        self.members = members

    def __call__(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
        """Return the mean centred rewards, (B,)."""
        return torch.stack([member(prompts, responses) for member in self.members]).mean(0)


class GoldReward:
    """The world's own centred reward, looked up by token ids; anything that is not a valid answer is off the set.

    Args:
        table: {prompt ids: {response ids with end-of-sequence: gold reward}}.
        centre: mean gold reward of the chosen training responses.
        offset_reward: gold reward of everything else.
        device: cpu or cuda.
    """

    def __init__(
        self,
        table: dict[tuple[int, ...], dict[tuple[int, ...], float]],
        *,
        centre: float,
        offset_reward: float,
        device: str,
    ) -> None:
        self.table, self.centre, self.offset_reward, self.device = table, centre, offset_reward, device

    def __call__(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
        """Return the centred rewards, (B,)."""
        found = [
            self.table.get(tuple(prompt), {}).get(tuple(response), self.offset_reward)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return torch.tensor(found, device=self.device) - self.centre


def require_finite(rewards: Tensor) -> Tensor:
    """Return `rewards` unchanged.

    Raises:
        RunError: one of them is not finite.
    """
    if not bool(torch.isfinite(rewards).all()):
        count = int((~torch.isfinite(rewards)).sum())
        raise RunError(
            f"{count} of {len(rewards)} rewards are not finite",
            "a policy cannot be trained or measured against them",
            "train the reward model again with a lower trainer.rm.learning_rate",
        )
    return rewards
