"""How rewards are read for a policy: by one model or several, the gold reward, or a model with its own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.config.schema import AlignConfig
from rlhf_cli.data.encode import decode_response, encode_pairs, encode_prompt, encode_response
from rlhf_cli.data.rows import PreferenceData
from rlhf_cli.errors import RunError
from rlhf_cli.models.folders import has_tokenizer
from rlhf_cli.models.policy import load_tokenizer
from rlhf_cli.models.reward import CENTRE_FILE, EnsembleReward, GoldReward, ModelReward, RetokenizedReward, Reward

CENTRE_PAIRS = 256  # training pairs whose chosen responses centre a reward model that brings no centre


def read_reward(cfg: AlignConfig, data: PreferenceData, tokenizer: Any, folders: Sequence[Path], device: str) -> Reward:
    """Return the reward of token ids of `tokenizer`: the mean of the models in `folders`; the gold reward if none."""
    if not folders:
        return gold_reward(data, tokenizer, device)
    return mean_reward([model_reward(cfg, data, tokenizer, folder, device) for folder in folders])


def mean_reward(members: Sequence[Reward]) -> Reward:
    """Return the reward of one model, or the mean of several."""
    return members[0] if len(members) == 1 else EnsembleReward(members)


def model_reward(cfg: AlignConfig, data: PreferenceData, tokenizer: Any, folder: Path, device: str) -> Reward:
    """Return the reward of the model in `folder`, read with its own tokenizer where that is another one.

    A model that brings no centre is centred on chosen training responses, cut as they are for training.

    Raises:
        RunError: the folder holds no reward model that can be read so.
    """
    own = load_tokenizer(folder, training=False) if has_tokenizer(folder) else tokenizer
    model = ModelReward(folder, own.pad_token_id, device, getattr(cfg.reward, "calibration", "none"))
    if model.model.config.vocab_size < len(own):
        raise RunError(
            f"the reward model in {folder} knows {model.model.config.vocab_size} tokens",
            f"its tokenizer has {len(own)}" if own is not tokenizer else f"the policy's tokenizer has {len(own)}",
            "put the tokenizer that it was trained with into its folder",
        )

    def reading(reward: Reward) -> Reward:
        return reward if own.get_vocab() == tokenizer.get_vocab() else _retokenized(reward, tokenizer, own)

    if (folder / CENTRE_FILE).is_file():
        return reading(model)
    pairs = encode_pairs((data.reward_pairs or data.heldout_pairs)[:CENTRE_PAIRS], tokenizer, cfg.dataset)
    scores = reading(model)([pair["prompt_ids"] for pair in pairs], [pair["chosen_ids"] for pair in pairs])
    return reading(model.centred(float(scores.mean())))


def gold_reward(data: PreferenceData, tokenizer: Any, device: str) -> GoldReward:
    """Return the world's own reward, centred on the chosen responses of its pairs."""
    gold = data.gold
    assert gold is not None
    table = {
        tuple(encode_prompt(tokenizer, question.prompt)): {
            tuple(encode_response(tokenizer, answer)): gold(question.prompt, answer) for answer in question.answers
        }
        for question in data.questions
    }
    chosen = [gold(pair.prompt, pair.chosen) for pair in data.reward_pairs]
    return GoldReward(table, centre=sum(chosen) / len(chosen), offset_reward=gold("", ""), device=device)


def _retokenized(reward: Reward, policy: Any, own: Any) -> RetokenizedReward:
    def decode(prompt: Sequence[int], response: Sequence[int]) -> tuple[str, str, bool]:
        text = policy.decode(prompt, skip_special_tokens=True)
        return text, decode_response(policy, response), policy.eos_token_id in response

    def encode(prompt: str, response: str, ended: bool) -> tuple[list[int], list[int]]:
        ids = encode_response(own, response)
        return encode_prompt(own, prompt), ids if ended else ids[:-1] or ids

    return RetokenizedReward(reward, decode, encode)
