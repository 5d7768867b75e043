"""WARM's own stage: average the members' weights, and say how far the members agree (arXiv 2401.12187)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_cli.config.schema import TrainRmConfig
from rlhf_cli.metrics.calibration import expected_calibration_error, logistic_loss, right_side
from rlhf_cli.models.adapters import adapter_base, is_adapter, merged, open_adapter, save_model
from rlhf_cli.models.reward import ModelReward, load_reward_model, new_reward_model
from rlhf_cli.rewards.warm import average_weights
from rlhf_cli.stages.judgements import Judgements
from rlhf_cli.stages.log import StageLog
from rlhf_cli.stages.opening import frozen
from rlhf_cli.stages.train_rm import finish
from rlhf_cli.trainers.common import resolve_device


def build(cfg: TrainRmConfig, sft: Path, members: list[Path], folder: Path, log: StageLog) -> None:
    """Write the averaged model into `folder`, with its calibration and the members' disagreement."""
    data, device = Judgements(cfg, sft), resolve_device(cfg.device)
    _mean_curves(members, log)
    found = agreement(data, members, device)
    weights = average_weights([_whole(member).state_dict() for member in members])
    averaged = _whole(members[0])
    averaged.load_state_dict(weights)
    save_model(averaged, folder / "model")
    finish(data, averaged.to(device), folder, log, more=found)


def _whole(member: Path) -> Any:
    """Return a member in float32, its adapter merged if it has one."""
    folder = member / "model"
    if not is_adapter(folder):
        return load_reward_model(folder)
    return merged(open_adapter(new_reward_model(adapter_base(folder), init_std=1.0), folder))


def agreement(data: Judgements, members: list[Path], device: str) -> dict[str, float]:
    """Return how the members do on held-out pairs, how their prediction ensemble does, and how far they disagree."""
    margins = np.stack([_margins(member, data, device) for member in members])  # (M, N)
    ensemble = _judged(margins.mean(0), data)
    each = [_judged(margin, data) for margin in margins]
    found = {f"rm/ensemble_{key}": value for key, value in ensemble.items()}
    found |= {f"rm/member_{key}/mean": float(np.mean([one[key] for one in each])) for key in ensemble}
    found["rm/member_accuracy/min"] = min(one["accuracy"] for one in each)
    found["rm/member_accuracy/max"] = max(one["accuracy"] for one in each)
    found["rm/disagreement"] = float(margins.std(0, ddof=1).mean())
    found["rm/member_flip"] = float((np.abs(np.sign(margins).sum(0)) < len(members)).mean())
    return found


def _margins(member: Path, data: Judgements, device: str) -> np.ndarray:
    reward = ModelReward(member / "model", data.tokenizer.pad_token_id, device, how=frozen(data.cfg))
    rows = data.encode(data.measuring)
    prompts = [row["prompt_ids"] for row in rows]
    sides = [reward(prompts, [row[side] for row in rows]) for side in ("chosen_ids", "rejected_ids")]
    return (sides[0] - sides[1]).double().cpu().numpy()


def _judged(margin: np.ndarray, data: Judgements) -> dict[str, float]:
    """Return accuracy and log-loss, means over prompts of their pairs as in the trust report, and ECE."""
    label = np.array([pair.label for pair in data.measuring])
    prompts = np.unique([pair.prompt for pair in data.measuring], return_inverse=True)[1]
    pairs = np.bincount(prompts)
    probability = torch.sigmoid(torch.from_numpy(margin)).numpy()
    return {
        "accuracy": float((np.bincount(prompts, right_side(margin, label)) / pairs).mean()),
        "log_loss": float((np.bincount(prompts, logistic_loss(margin, label)) / pairs).mean()),
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
