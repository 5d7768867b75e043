"""The trust report of a reward model: made by every `rlhf train-rm`, and by `rlhf evaluate stage=rm`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_cli import ranks
from rlhf_cli.config.schema import CosinePrior, TrainedRewardConfig, TrainRmConfig
from rlhf_cli.data.encode import PairTokens, encode_prompt, encode_response
from rlhf_cli.measure.sampled import Sampling, draw
from rlhf_cli.measure.trust import Gold, HeldOut, Spread, trust_report
from rlhf_cli.models.calibration import CALIBRATION_FILE
from rlhf_cli.models.policy import freeze, load_policy, load_tokenizer
from rlhf_cli.models.reward import ModelReward, Reward
from rlhf_cli.report.trust import trust_figure
from rlhf_cli.stages import priors, provide
from rlhf_cli.stages.judgements import Judgements
from rlhf_cli.stages.opening import frozen
from rlhf_cli.stages.reward_reading import mean_reward, read_with
from rlhf_cli.stages.session import Session, say
from rlhf_cli.stages.workspace import answer_tree, measured_prompts
from rlhf_cli.store import write_json
from rlhf_cli.trainers.common import resolve_device

SHOWN = ["rm/accuracy", "rm/log_loss", "rm/brier", "rm/ece", "rm/negative_accuracy", "rm/margin/q50", "rm/bound/half"]
SHOWN += ["rm/length_correlation", "rm/length_correlation_labels", "rm/gold_tv", "rm/gold_spearman"]
SHOWN += ["rm/score_policy_beyond", "rm/disagreement", "rm/ensemble_accuracy"]
SIDES = ("chosen_ids", "rejected_ids")
BATCH = 256  # responses scored at a time
FILE, FIGURE = "trust.json", "trust.png"


def report(cfg: TrainRmConfig, session: Session, *, policy: tuple[str, Any] | None = None) -> None:
    """Judge the reward model of `cfg`, read as `cfg` says, and write metrics, trust.json and trust.png.

    Args:
        cfg: of the command.
        session: its open run; metrics it holds already are kept.
        policy: name and model of the policy whose samples are scored beside the dataset's responses; None: SFT's.

    Raises:
        RunError: a score is not finite.
    """
    sft = provide.sft_policy(cfg)
    device = resolve_device(cfg.device)
    data = Judgements(cfg, sft)
    readings, read = reward_readings(cfg, data.tokenizer.pad_token_id, device)
    pairs = data.encode(data.measuring)
    heldout = _held_out(cfg, data, pairs, readings, read, sft)
    dataset = np.concatenate([heldout.chosen, heldout.rejected])
    name, model = policy or ("the SFT policy", load_policy(sft / "model", how=frozen(cfg)))
    tokenizer = load_tokenizer(sft / "model")
    scored = read_with(readings[read], tokenizer, data.tokenizer, data.data)
    spread = Spread(dataset, _policy_rewards(cfg, data, scored, (model, tokenizer), device), name)
    metrics, panels = trust_report(heldout, _gold(data, readings[read]), spread)
    metrics["rm/negative_accuracy"] = _negative_accuracy(data, pairs, readings[read])
    write_json(session.directory / FILE, {"metrics": metrics, "panels": panels})
    figure = session.directory / FIGURE
    trust_figure(panels, figure, title=f"{cfg.reward.name} on {cfg.dataset.name}, seed {cfg.seed}")
    session.run.add_figure(figure)
    before = {key: value for key, value in session.run.metrics().items() if value is not None}
    session.run.write_metrics({**before, **metrics})
    say(f"trust report: {figure}")


def reward_readings(cfg: TrainRmConfig, pad_id: int, device: str) -> tuple[dict[str, Reward], str]:
    """Return the reward as it is (`raw`) and, where it can be, calibrated for length, and which of them `cfg` reads.

    Raises:
        RunError: `cfg` reads it calibrated, and it has no calibration.
    """
    reward = cfg.reward
    assert isinstance(reward, TrainedRewardConfig)
    folders = [folder / "model" for folder in provide.combined_members(cfg) or [provide.reward_model(cfg)]]
    members = [ModelReward(folder, pad_id, device, how=frozen(cfg)) for folder in folders]
    readings: dict[str, Reward] = {"raw": mean_reward(members)}
    read = "calibrated" if reward.calibration == "length" else "raw"
    if read == "calibrated" or all((folder / CALIBRATION_FILE).is_file() for folder in folders):
        pairs = zip(members, folders, strict=True)
        readings["calibrated"] = mean_reward([member.calibrated(folder) for member, folder in pairs])
    return readings, read


def _held_out(
    cfg: TrainRmConfig,
    data: Judgements,
    pairs: Sequence[PairTokens],
    readings: dict[str, Reward],
    read: str,
    sft: Path,
) -> HeldOut:
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(pair.prompt for pair in data.measuring))}
    scores = {name: [_rewards(reward, pairs, side) for side in SIDES] for name, reward in readings.items()}
    calibrated = scores.get("calibrated", [None, None])
    cosine = None
    if isinstance(cfg.reward, CosinePrior):
        cosine = priors.similarities(cfg.reward, data.measuring, cfg=cfg, sft=sft)
    return HeldOut(
        prompts=np.array([prompts[pair.prompt] for pair in data.measuring]),
        chosen=scores[read][0],
        rejected=scores[read][1],
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


def _negative_accuracy(data: Judgements, pairs: Sequence[PairTokens], reward: Reward) -> float:
    """Return the share of damaged responses below the intact one, as many as there are pairs."""
    damaged = data.damaged(pairs, 0.5, np.random.default_rng([data.cfg.seed, 1]))
    margin = _rewards(reward, damaged, "chosen_ids") - _rewards(reward, damaged, "rejected_ids")
    return float((margin > 0).mean())


def _rewards(reward: Reward, pairs: Sequence[Any], side: str) -> np.ndarray:
    return _scored(reward, [pair["prompt_ids"] for pair in pairs], [pair[side] for pair in pairs])


def _scored(reward: Reward, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
    batches = [slice(start, start + BATCH) for start in range(0, len(prompts), BATCH)]
    pieces: Iterator[Tensor] = ranks.dealt(batches, lambda batch: reward(prompts[batch], responses[batch]).cpu())
    return torch.cat(list(pieces)).double().numpy()


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


def _policy_rewards(
    cfg: TrainRmConfig, data: Judgements, reward: Reward, speaker: tuple[Any, Any], device: str
) -> np.ndarray:
    """Return the rewards of a policy's samples, drawn as its alignment draws them, (prompts, samples)."""
    policy, tokenizer = speaker
    generation = getattr(cfg, "generation", None)  # train-rm has none: the SFT policy as it is
    how = Sampling(
        max_new_tokens=cfg.dataset.max_completion_tokens,
        temperature=1.0 if generation is None else generation.temperature,
        tree=answer_tree(cfg.dataset, data.data, tokenizer, policy.config.vocab_size, device),
        eos_ids=[tokenizer.eos_token_id],
        pad_id=tokenizer.pad_token_id,
        device=device,
    )
    texts, samples = measured_prompts(cfg, data.data)
    prompts = [encode_prompt(tokenizer, text) for text in texts for _ in range(samples)]
    return _scored(reward, prompts, draw(freeze(policy), prompts, how, cfg.seed)).reshape(len(texts), samples)
