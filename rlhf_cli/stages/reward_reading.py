"""How rewards are read for a policy: by one model or several, the gold reward, or a model with its own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_cli.config.schema import AlignConfig
from rlhf_cli.data.dialogue import HUMAN
from rlhf_cli.data.encode import decode_response, encode_pairs, encode_prompt, encode_response
from rlhf_cli.data.rows import PreferenceData
from rlhf_cli.data.turns import prompt_text, same_turns
from rlhf_cli.errors import RunError
from rlhf_cli.models.folders import has_tokenizer
from rlhf_cli.models.loading import loading
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


def model_reward(
    cfg: AlignConfig, data: PreferenceData, tokenizer: Any, folder: Path, device: str, *, model: Any = None
) -> Reward:
    """Return the reward of the model in `folder`, read with its own tokenizer where that is another one.

    A model that brings no centre is centred on chosen training responses, cut as they are for training. `model` is
    what is in `folder` where it is in memory already.

    Raises:
        RunError: the folder holds no reward model that can be read so.
    """
    own = load_tokenizer(folder, training=False) if has_tokenizer(folder) else tokenizer
    how, calibration = loading(cfg.model, device), getattr(cfg.reward, "calibration", "none")
    found = ModelReward(folder, own.pad_token_id, device, calibration, how=how, model=model)
    if found.model.config.vocab_size < len(own):
        raise RunError(
            f"the reward model in {folder} knows {found.model.config.vocab_size} tokens",
            f"its tokenizer has {len(own)}" if own is not tokenizer else f"the policy's tokenizer has {len(own)}",
            "put the tokenizer that it was trained with into its folder",
        )

    if (folder / CENTRE_FILE).is_file():
        return read_with(found, tokenizer, own, data)
    pairs = encode_pairs((data.reward_pairs or data.heldout_pairs)[:CENTRE_PAIRS], tokenizer, cfg.dataset)
    scores = read_with(found, tokenizer, own, data)(
        [pair["prompt_ids"] for pair in pairs], [pair["chosen_ids"] for pair in pairs]
    )
    return read_with(found.centred(float(scores.mean())), tokenizer, own, data)


def read_with(reward: Reward, policy: Any, own: Any, data: PreferenceData) -> Reward:
    """Return `reward`, which reads ids of the tokenizer `own`, for ids that `policy` gives to prompts of `data`."""
    dialogues = any(prompt.startswith(HUMAN) for prompt in islice(data.prompts, 100))
    return reward if same_turns(own, policy) else _retokenized(reward, policy, own, dialogues)


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


def _retokenized(reward: Reward, policy: Any, own: Any, dialogues: bool) -> RetokenizedReward:
    def decode(prompt: Sequence[int], response: Sequence[int]) -> tuple[str, str, bool]:
        text = prompt_text(policy, prompt, dialogues=dialogues)
        return text, decode_response(policy, response), policy.eos_token_id in response

    def encode(prompt: str, response: str, ended: bool) -> tuple[list[int], list[int]]:
        ids = encode_response(own, response)
        return encode_prompt(own, prompt), ids if ended else ids[:-1] or ids

    return RetokenizedReward(reward, decode, encode)
