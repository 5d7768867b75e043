"""WARM's own stage: average the members' weights, and say how far the members agree (arXiv 2401.12187)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_cli.config.schema import TrainRmConfig
from rlhf_cli.metrics.calibration import expected_calibration_error, logistic_loss, right_side
from rlhf_cli.models.reward import EnsembleReward, ModelReward, load_reward_model
from rlhf_cli.rewards.warm import average_weights
from rlhf_cli.stages.judgements import Judgements
from rlhf_cli.stages.log import StageLog
from rlhf_cli.stages.train_rm import finish


def build(cfg: TrainRmConfig, sft: Path, members: list[Path], folder: Path, log: StageLog) -> None:
    """Write the averaged model into `folder`, with its calibration and the members' disagreement."""
    data = Judgements(cfg, sft)
    models = [load_reward_model(member / "model") for member in members]
    models[0].load_state_dict(average_weights([model.state_dict() for model in models]))
    _mean_curves(members, log)
    finish(data, models[0], folder, log, more=agreement(data, members))


def agreement(data: Judgements, members: list[Path]) -> dict[str, float]:
    """Return how the members do on held-out pairs, how their prediction ensemble does, and how far they disagree."""
    pad_id = data.tokenizer.pad_token_id
    rewards = [ModelReward(member / "model", pad_id, "cpu") for member in members]
    label = np.array([pair.label for pair in data.measuring])
    margins = np.stack([_margins(reward, data) for reward in rewards])  # (M, N)
    ensemble = _judged(_margins(EnsembleReward(rewards), data), label)
    each = [_judged(margin, label) for margin in margins]
    found = {f"rm/ensemble_{key}": value for key, value in ensemble.items()}
    found |= {f"rm/member_{key}/mean": float(np.mean([one[key] for one in each])) for key in ensemble}
    found["rm/member_accuracy/min"] = min(one["accuracy"] for one in each)
    found["rm/member_accuracy/max"] = max(one["accuracy"] for one in each)
    found["rm/disagreement"] = float(margins.std(0, ddof=1).mean())
    found["rm/member_flip"] = float((np.abs(np.sign(margins).sum(0)) < len(members)).mean())
    return found


def _margins(reward: Any, data: Judgements) -> np.ndarray:
    rows = data.encode(data.measuring)
    prompts = [row["prompt_ids"] for row in rows]
    sides = [reward(prompts, [row[side] for row in rows]) for side in ("chosen_ids", "rejected_ids")]
    return (sides[0] - sides[1]).double().cpu().numpy()


def _judged(margin: np.ndarray, label: np.ndarray) -> dict[str, float]:
    probability = torch.sigmoid(torch.from_numpy(margin)).numpy()
    return {
        "accuracy": float(right_side(margin, label).mean()),
        "log_loss": float(logistic_loss(margin, label).mean()),
        "ece": expected_calibration_error(probability, label),
    }


def _mean_curves(members: list[Path], log: StageLog) -> None:
    """Log the members' curves as their mean: they are trained one after another, over the same steps."""
    texts = [(member / "training_log.jsonl").read_text(encoding="utf-8").splitlines() for member in members]
    log.rewind(-1)
    for lines in zip(*([json.loads(line) for line in text] for text in texts), strict=False):
        keys = set.intersection(*(set(line) for line in lines)) - {"step"}
        values = {key: [line[key] for line in lines] for key in sorted(keys)}
        log({key: float(np.mean(each)) for key, each in values.items() if None not in each}, lines[0]["step"])
