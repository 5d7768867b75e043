"""The trust report of a reward model: made by every `rlhf train-rm`, and by `rlhf evaluate stage=rm`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.config.schema import CosinePrior, TrainedRewardConfig, TrainRmConfig
from rlhf_cli.data.encode import PairTokens, encode_prompt, encode_response
from rlhf_cli.measure.sampled import Sampling, draw
from rlhf_cli.measure.trust import Gold, HeldOut, Spread, trust_report
from rlhf_cli.models.calibration import CALIBRATION_FILE
from rlhf_cli.models.policy import freeze, load_policy
from rlhf_cli.models.reward import Reward
from rlhf_cli.report.trust import trust_figure
from rlhf_cli.stages import priors, provide
from rlhf_cli.stages.judgements import Judgements
from rlhf_cli.stages.session import Session, say
from rlhf_cli.stages.workspace import measured_prompts, model_reward
from rlhf_cli.store import write_json
from rlhf_cli.trainers.common import resolve_device

SHOWN = ["rm/accuracy", "rm/log_loss", "rm/brier", "rm/ece", "rm/negative_accuracy", "rm/margin/q50", "rm/bound/half"]
SHOWN += ["rm/length_correlation", "rm/length_correlation_labels", "rm/gold_tv", "rm/gold_spearman"]
SHOWN += ["rm/score_policy_beyond", "rm/disagreement", "rm/ensemble_accuracy"]
SIDES = ("chosen_ids", "rejected_ids")
BATCH = 256  # responses scored at a time
FILE, FIGURE = "trust.json", "trust.png"


def report(cfg: TrainRmConfig, session: Session, *, policy: Path | None) -> None:
    """Judge the reward model of `cfg`, read as `cfg` says, and write metrics, trust.json and trust.png.

    Args:
        cfg: of the command.
        session: its open run; metrics it holds already are kept.
        policy: model folder whose samples are scored beside the dataset's responses; None: the SFT policy.

    Raises:
        RunError: a score is not finite.
    """
    sft = provide.sft_policy(cfg)
    device = resolve_device(cfg.device)
    data = Judgements(cfg, sft)
    rewards = reward_models(cfg, data.tokenizer.pad_token_id, device)
    pairs = data.encode(data.measuring)
    heldout = _held_out(cfg, data, pairs, rewards, sft)
    dataset = np.concatenate([heldout.chosen, heldout.rejected])
    name = "the SFT policy" if policy is None else str(policy)
    spread = Spread(dataset, _policy_rewards(cfg, data, rewards["read"], policy or sft / "model", device), name)
    metrics, panels = trust_report(heldout, _gold(data, rewards["read"]), spread)
    write_json(session.directory / FILE, {"metrics": metrics, "panels": panels})
    figure = session.directory / FIGURE
    trust_figure(panels, figure, title=f"{cfg.reward.name} on {cfg.dataset.source}, seed {cfg.seed}")
    session.run.add_figure(figure)
    before = {key: value for key, value in session.run.metrics().items() if value is not None}
    session.run.write_metrics({**before, **metrics})
    say(f"trust report: {figure}")


def reward_models(cfg: TrainRmConfig, pad_id: int, device: str) -> dict[str, Reward]:
    """Return the reward as `cfg` says it is read, as it is without calibration, and calibrated where it can be."""
    reward = cfg.reward
    assert isinstance(reward, TrainedRewardConfig)
    folders = provide.combined_members(cfg) or [provide.reward_model(cfg)]

    def read(calibration: str) -> Reward:
        return model_reward(replace(reward, calibration=calibration), folders, pad_id, device)

    calibrated = all((folder / "model" / CALIBRATION_FILE).is_file() for folder in folders)
    found = {"raw": read("none"), **({"calibrated": read("length")} if calibrated else {})}
    asked = reward.calibration == "length"
    return {**found, "read": (found.get("calibrated") or read("length")) if asked else found["raw"]}


def _held_out(
    cfg: TrainRmConfig, data: Judgements, pairs: list[PairTokens], rewards: dict[str, Reward], sft: Path
) -> HeldOut:
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(pair.prompt for pair in data.measuring))}
    scores = {name: [_rewards(reward, pairs, side) for side in SIDES] for name, reward in rewards.items()}
    calibrated = scores.get("calibrated", [None, None])
    cosine = None
    if isinstance(cfg.reward, CosinePrior):
        cosine = priors.similarities(cfg.reward, data.measuring, cfg=cfg, sft=sft)
    return HeldOut(
        prompts=np.array([prompts[pair.prompt] for pair in data.measuring]),
        chosen=scores["read"][0],
        rejected=scores["read"][1],
        raw_chosen=scores["raw"][0],
        raw_rejected=scores["raw"][1],
        calibrated_chosen=calibrated[0],
        calibrated_rejected=calibrated[1],
        chosen_lengths=np.array([len(pair["chosen_ids"]) for pair in pairs]),
        rejected_lengths=np.array([len(pair["rejected_ids"]) for pair in pairs]),
        label=np.array([pair["label"] for pair in pairs]),
        length_ratio=priors.length_ratios(pairs),
        cosine=cosine,
        bound=priors.bounds(cfg.reward, data.measuring, pairs, cfg=cfg, sft=sft),
    )


def _rewards(reward: Reward, pairs: Sequence[Any], side: str) -> np.ndarray:
    return _scored(reward, [pair["prompt_ids"] for pair in pairs], [pair[side] for pair in pairs])


def _scored(reward: Reward, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
    pieces: list[Tensor] = [
        reward(prompts[start : start + BATCH], responses[start : start + BATCH])
        for start in range(0, len(prompts), BATCH)
    ]
    return torch.cat(pieces).double().cpu().numpy()


def _gold(data: Judgements, reward: Reward) -> Gold | None:
    """Return the reward model's and the world's reward of every valid answer, where the world is known."""
    gold, questions = data.data.gold, data.data.questions
    if gold is None or not questions:
        return None
    found = []
    for question in questions:
        prompt = encode_prompt(data.tokenizer, question.prompt)
        answers = [encode_response(data.tokenizer, answer) for answer in question.answers]
        found.append(_scored(reward, [prompt] * len(answers), answers))
    known = [np.array([gold(question.prompt, answer) for answer in question.answers]) for question in questions]
    return Gold(found, known, [not question.heldout for question in questions])


def _policy_rewards(cfg: TrainRmConfig, data: Judgements, reward: Reward, path: Path, device: str) -> np.ndarray:
    """Return the rewards of a policy's samples, (prompts, samples)."""
    tokenizer = data.tokenizer
    how = Sampling(
        cfg.dataset.max_completion_tokens, 1.0, None, [tokenizer.eos_token_id], tokenizer.pad_token_id, device
    )
    texts, samples = measured_prompts(cfg, data.data)
    prompts = [encode_prompt(tokenizer, text) for text in texts for _ in range(samples)]
    responses = draw(freeze(load_policy(path, device)), prompts, how, cfg.seed)
    return _scored(reward, prompts, responses).reshape(len(texts), samples)
