"""`rlhf train-rm`: a reward model from preference pairs, initialised from the SFT policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_cli.config.schema import TrainRmConfig
from rlhf_cli.data import load
from rlhf_cli.data.encode import encode_pairs, encode_prompt, encode_response, fit_to_context
from rlhf_cli.data.negatives import negative_pairs
from rlhf_cli.data.rows import PreferenceData
from rlhf_cli.models.policy import load_tokenizer
from rlhf_cli.models.reward import new_reward_model, save_centre, sequence_scores
from rlhf_cli.models.tokens import collate
from rlhf_cli.rewards.bt import bt_loss
from rlhf_cli.run import seed_everything
from rlhf_cli.stages.log import StageLog
from rlhf_cli.stages.session import open_run, require_batch, summary
from rlhf_cli.stages.train_sft import dropped
from rlhf_cli.trainers.common import Reporter, fit, resolve_device

CENTRE_PAIRS = 2000  # pairs whose chosen responses give the centre


def run(cfg: TrainRmConfig, overrides: Sequence[str] = (), config_dir: str | None = None) -> Path:
    """Train (or find) the reward model, and leave it with its curves and metrics in the run folder."""
    from rlhf_cli.stages import provide

    with open_run(cfg, "train-rm", "rm", overrides, config_dir) as session:
        if not session.finished:
            session.adopt(provide.reward_model(cfg, session.log), "rm")
        summary(session, ["rm/accuracy", "rm/loss", "rm/negative_accuracy"])
    return session.directory


def build(cfg: TrainRmConfig, sft: Path, folder: Path, log: StageLog) -> None:
    """Train the reward model into `folder`: model/ in Hugging Face layout with reward.json, metrics.json."""
    from rlhf_cli.trainers.reward import reward_trainer

    device = resolve_device(cfg.device)
    tokenizer = load_tokenizer(sft / "model")
    data = fit_to_context(load(cfg.dataset), tokenizer, cfg.dataset)
    require_batch(data.reward_pairs, cfg.trainer.rm.batch_size, "reward pairs", "trainer.rm.batch_size")
    seed_everything(cfg.seed)
    rng = np.random.default_rng(cfg.seed)
    pairs: list[Any] = encode_pairs(data.reward_pairs, tokenizer, cfg.dataset)
    heldout: list[Any] = encode_pairs(data.heldout_pairs, tokenizer, cfg.dataset)
    how: dict[str, Any] = {
        "rng": rng,
        "vocab_ids": [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids],
        "valid_by_prompt": valid_responses(data, tokenizer),
        "eos_id": tokenizer.eos_token_id,
        "max_tokens": cfg.dataset.max_completion_tokens,
    }
    rows = pairs + negative_pairs(pairs, cfg.reward.negative_share, **how)
    model = new_reward_model(sft / "model", init_std=cfg.model.init_std)
    trainer = reward_trainer(
        model, tokenizer, rows, bt_loss, cfg.trainer.rm, folder=folder / "checkpoints", seed=cfg.seed, device=device
    )
    fit(trainer, Reporter("reward model", log, rename=_names), rewind=log.rewind)
    model.eval()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    centre_rows = pairs[:CENTRE_PAIRS]
    save_centre(folder / "model", float(_scores(model, centre_rows, "chosen_ids", tokenizer.pad_token_id).mean()))
    damaged = negative_pairs(heldout, 0.5, **how)
    log.write_metrics(
        {
            **_held_out(model, heldout, tokenizer.pad_token_id),
            "rm/negative_accuracy": _held_out(model, damaged, tokenizer.pad_token_id)["rm/accuracy"],
            "data/reward_pairs": len(pairs),
            **dropped(data),
        }
    )


def valid_responses(data: PreferenceData, tokenizer: Any) -> dict[tuple[int, ...], set[tuple[int, ...]]]:
    """Return the token ids of every enumerated answer by prompt ids, so that no negative is one of them."""
    return {
        tuple(encode_prompt(tokenizer, question.prompt)): {
            tuple(encode_response(tokenizer, answer)) for answer in question.answers
        }
        for question in data.questions
    }


@torch.no_grad()
def _scores(model: Any, rows: list, side: str, pad_id: int) -> torch.Tensor:
    batch = collate([row["prompt_ids"] for row in rows], [row[side] for row in rows], pad_id, model.device)
    return torch.cat([sequence_scores(model, piece) for piece in batch.slices(256)])


def _held_out(model: Any, rows: list, pad_id: int) -> dict[str, float]:
    margin = _scores(model, rows, "chosen_ids", pad_id) - _scores(model, rows, "rejected_ids", pad_id)
    loss = bt_loss(margin, torch.zeros_like(margin)).mean()
    return {"rm/accuracy": float((margin > 0).float().mean()), "rm/loss": float(loss)}


def _names(metrics: dict[str, float]) -> dict[str, float]:
    kept = {"loss": "rm/loss", "accuracy": "rm/accuracy", "margin": "margin", "score/mean": "score/mean"}
    kept |= {"grad_norm": "grad_norm", "learning_rate": "learning_rate"}
    return {name: metrics[key] for key, name in kept.items() if key in metrics}
