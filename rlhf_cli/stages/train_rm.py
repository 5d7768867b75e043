"""`rlhf train-rm`: a reward model from preferences, initialised from the SFT policy, and the report on its trust."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_cli import ranks, rewards
from rlhf_cli.config.schema import QLoraConfig, TrainedRewardConfig, TrainRmConfig
from rlhf_cli.metrics.calibration import logistic_loss, right_side
from rlhf_cli.models.adapters import plain, save_model
from rlhf_cli.models.calibration import CALIBRATION_FILE, MIN_POINTS, fit_length_calibration
from rlhf_cli.models.policy import freeze
from rlhf_cli.models.reward import load_reward_model, new_reward_model, require_finite, save_centre, sequence_scores
from rlhf_cli.models.tokens import collate
from rlhf_cli.run import seed_everything
from rlhf_cli.stages.batch_sizes import require_batches
from rlhf_cli.stages.judgements import Judgements
from rlhf_cli.stages.log import StageLog
from rlhf_cli.stages.opening import adapted, check_bases, computing, frozen, reward_start, trained
from rlhf_cli.stages.session import open_run, summary
from rlhf_cli.stages.train_sft import dropped
from rlhf_cli.trainers.common import Reporter, fit

CENTRE_PAIRS = 2000  # pairs whose chosen responses give the centre


def run(cfg: TrainRmConfig, overrides: Sequence[str] = (), config_dir: str | None = None) -> Path:
    """Train (or find) the reward model, judge it, and leave both with curves and figures in the run folder."""
    from rlhf_cli.stages import footprint, provide, trust

    with open_run(cfg, "train-rm", "rm", overrides, config_dir) as session:
        if not session.finished:
            footprint.announce(cfg)
            check_bases(cfg)
            stage = provide.reward_model(cfg, session.log)
            session.adopt(stage, "rm")
            trust.report(cfg, session)
        summary(session, trust.SHOWN, files="metrics.json, trust.json, trust.png, model/")
    return session.directory


def build(cfg: TrainRmConfig, sft: Path, folder: Path, log: StageLog, member: int = 0) -> None:
    """Train the reward model into `folder`: model/ in Hugging Face layout with reward.json, metrics.json.

    `member` numbers models of one initialisation (WARM): each has its own data order and damaged responses.
    """
    from rlhf_cli.trainers.reward import reward_trainer

    assert isinstance(cfg.reward, TrainedRewardConfig)
    data = Judgements(cfg, sft)
    require_batches(cfg, data.data)
    seed_everything(cfg.seed)
    start = reward_start(cfg, sft)
    model = adapted(cfg, new_reward_model(start, init_std=cfg.model.init_std, how=trained(cfg)), start)
    seed = member_seed(cfg.seed, member)
    loss = rewards.get(cfg.reward.name)
    rows = data.training_set(loss, sft, np.random.default_rng(seed), folder / "checkpoints")
    trainer = reward_trainer(
        model, data.tokenizer, rows, loss, cfg.reward, cfg.trainer.rm, folder=ranks.shared(folder / "checkpoints"),
        seed=seed, computing=computing(cfg),
    )  # fmt: skip
    title = "reward model" if member == 0 else f"reward model, member {member}"
    fit(trainer, Reporter(title, log, rename=_names), rewind=log.rewind)
    save_model(model, folder / "model")
    if isinstance(cfg.peft, QLoraConfig):  # read as it will be: on the base as it is
        del trainer
        model = plain(load_reward_model(ranks.shared(folder / "model"), how=frozen(cfg)))
    finish(data, model, folder, log)


def member_seed(seed: int, member: int) -> int:
    """Return the seed of one of several models of one initialisation; the first has the run's own."""
    return seed if member == 0 else int(np.random.SeedSequence([seed, member]).generate_state(1)[0])


def finish(data: Judgements, model: Any, folder: Path, log: StageLog, more: dict[str, float] | None = None) -> None:
    """Write what belongs to a trained model in `folder`: tokenizer, centre, length calibration, first numbers."""
    freeze(model)
    data.tokenizer.save_pretrained(folder / "model")
    centre = float(_scores(model, data.pairs[:CENTRE_PAIRS], "chosen_ids", data.tokenizer.pad_token_id).mean())
    save_centre(folder / "model", centre)
    _save_calibration(data, model, folder / "model")
    heldout = data.encode(data.measuring)
    damaged = data.damaged(heldout, 0.5, np.random.default_rng([data.cfg.seed, 1]))
    log.write_metrics(
        {
            **_held_out(model, heldout, data.tokenizer.pad_token_id),
            "rm/negative_accuracy": _held_out(model, damaged, data.tokenizer.pad_token_id)["rm/accuracy"],
            "data/reward_pairs": len(data.pairs),
            **dropped(data.data),
            **(more or {}),
        }
    )


def _save_calibration(data: Judgements, model: Any, folder: Path) -> None:
    """Fit LOWESS of the reward on length, unless there is too little to fit it on."""
    rows = data.encode(data.fitting)
    lengths = np.array([len(row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows], dtype=float)
    if len(lengths) < MIN_POINTS or len(set(lengths.tolist())) == 1:
        return
    pad_id = data.tokenizer.pad_token_id
    scores = torch.cat([_scores(model, rows, side, pad_id) for side in ("chosen_ids", "rejected_ids")])
    chosen = np.arange(len(lengths)) < len(rows)
    fit_length_calibration(lengths, scores.cpu().double().numpy(), centre=chosen).save(folder / CALIBRATION_FILE)


@torch.no_grad()
def _scores(model: Any, rows: Sequence[Any], side: str, pad_id: int) -> torch.Tensor:
    batch = collate([row["prompt_ids"] for row in rows], [row[side] for row in rows], pad_id, model.device)
    return require_finite(batch.read(partial(sequence_scores, model), 256))


def _held_out(model: Any, rows: Sequence[Any], pad_id: int) -> dict[str, float]:
    sides = [_scores(model, rows, side, pad_id).double().cpu().numpy() for side in ("chosen_ids", "rejected_ids")]
    margin, label = sides[0] - sides[1], np.array([row["label"] for row in rows])
    found = {"rm/accuracy": right_side(margin, label), "rm/log_loss": logistic_loss(margin, label)}
    return {key: float(values.mean()) for key, values in found.items()}


def _names(metrics: dict[str, float]) -> dict[str, float]:
    kept = {"loss": "rm/loss", "accuracy": "train/rm/accuracy", "margin": "margin"}
    kept |= {"bound": "rm/bound", "bound_half": "rm/bound_half", "beyond_bound": "rm/beyond_bound"}
    kept |= {"bounded_margin": "rm/bounded_margin"}
    kept |= {key: key for key in ("score/mean", "score/std", "grad_norm", "learning_rate")}
    return {name: metrics[key] for key, name in kept.items() if key in metrics}
