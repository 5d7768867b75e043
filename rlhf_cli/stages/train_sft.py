"""`rlhf train-sft`: the reference policy, supervised on demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.config.schema import CommandConfig, MadeModelConfig, TrainSftConfig
from rlhf_cli.data import load
from rlhf_cli.data.encode import encode_demonstrations, fit_to_context
from rlhf_cli.data.rows import PreferenceData
from rlhf_cli.data.tokenizer import bpe_tokenizer, word_tokenizer
from rlhf_cli.models.policy import load_policy, load_tokenizer, make_policy
from rlhf_cli.run import seed_everything
from rlhf_cli.stages.log import StageLog
from rlhf_cli.stages.session import open_run, require_batch, summary
from rlhf_cli.trainers.common import Reporter, fit, resolve_device


def run(cfg: TrainSftConfig, overrides: Sequence[str] = (), config_dir: str | None = None) -> Path:
    """Train (or find) the SFT policy, and leave it with its curves and metrics in the run folder."""
    from rlhf_cli.stages import provide

    with open_run(cfg, "train-sft", "sft", overrides, config_dir) as session:
        if not session.finished:
            session.adopt(provide.sft_policy(cfg, session.log), "sft")
        summary(session, ["sft/loss"])
    return session.directory


def build(cfg: CommandConfig, folder: Path, log: StageLog) -> None:
    """Train the SFT policy into `folder`: model/ in Hugging Face layout, metrics.json, training_log.jsonl."""
    from rlhf_cli.trainers.sft import sft_trainer

    device = resolve_device(cfg.device)
    data = load(cfg.dataset)
    seed_everything(cfg.seed)
    tokenizer = load_tokenizer(cfg.model.path) if cfg.model.path else make_tokenizer(cfg, data)
    data = fit_to_context(data, tokenizer, cfg.dataset)
    require_batch(data.demonstrations, cfg.trainer.sft.batch_size, "demonstrations", "trainer.sft.batch_size")
    longest = cfg.dataset.max_prompt_tokens + cfg.dataset.max_completion_tokens
    policy = load_policy(cfg.model.path) if cfg.model.path else make_policy(made(cfg), tokenizer, max_positions=longest)
    rows: list[Any] = encode_demonstrations(data.demonstrations, tokenizer, cfg.dataset)
    trainer = sft_trainer(
        policy, tokenizer, rows, cfg.trainer.sft, folder=folder / "checkpoints", seed=cfg.seed, device=device
    )
    fit(trainer, Reporter("SFT", log, rename=_names), rewind=log.rewind)
    policy.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    log.write_metrics({"sft/loss": _last_loss(trainer), "data/demonstrations": len(rows), **dropped(data)})


def made(cfg: CommandConfig) -> MadeModelConfig:
    """Return the sizes of a model that is made here; rules.py has refused a config with neither sizes nor a path."""
    assert isinstance(cfg.model, MadeModelConfig)
    return cfg.model


def make_tokenizer(cfg: CommandConfig, data: PreferenceData) -> Any:
    """Return a tokenizer made from the training text: one token a word for the survey world, else byte-level BPE."""
    texts = [text for row in data.demonstrations for text in (row.prompt, row.response)]
    texts += [text for pair in data.reward_pairs for text in (pair.prompt, pair.chosen, pair.rejected)]
    if not data.word_level:
        return bpe_tokenizer(texts, made(cfg).vocab_size)
    texts += [text for question in data.questions for text in (question.prompt, *question.answers)]
    return word_tokenizer(texts)


def dropped(data: PreferenceData) -> dict[str, float]:
    """Return how many rows were left out, by reason."""
    return {f"data/dropped/{reason}": count for reason, count in data.dropped.items()}


def _names(metrics: dict[str, float]) -> dict[str, float]:
    kept = {"loss": "sft/loss", "grad_norm": "grad_norm", "learning_rate": "learning_rate"}
    return {name: metrics[key] for key, name in kept.items() if key in metrics}


def _last_loss(trainer: Any) -> float:
    """Return the last loss on the curve; of a run too short for one, the mean over the run."""
    logged = [line.get("loss", line.get("train_loss")) for line in trainer.state.log_history]
    return float(next(loss for loss in reversed(logged[:-1] or logged) if loss is not None))
