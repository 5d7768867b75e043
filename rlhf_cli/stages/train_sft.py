"""`rlhf train-sft`: the reference policy, supervised on demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_cli import ranks
from rlhf_cli.config.schema import CommandConfig, LoraConfig, MadeModelConfig, TrainSftConfig
from rlhf_cli.data import load
from rlhf_cli.data.encode import encode_demonstrations, fit_to_context, trainer_rows
from rlhf_cli.data.rows import PreferenceData
from rlhf_cli.data.tokenizer import made_tokenizer
from rlhf_cli.models.adapters import merged, open_adapter, save_model
from rlhf_cli.models.folders import base_folder
from rlhf_cli.models.policy import load_policy, load_tokenizer, make_policy
from rlhf_cli.models.tokenizers import fit_embedding
from rlhf_cli.run import seed_everything
from rlhf_cli.stages.batch_sizes import require_batches
from rlhf_cli.stages.description import say_statistics
from rlhf_cli.stages.log import StageLog
from rlhf_cli.stages.opening import adapted, computing, frozen, split, trained
from rlhf_cli.stages.session import open_run, summary
from rlhf_cli.trainers.common import Reporter, fit

ADAPTER = "adapter"  # folder of the trained adapter beside the checkpoints, until it is merged


def run(cfg: TrainSftConfig, overrides: Sequence[str] = (), config_dir: str | None = None) -> Path:
    """Train (or find) the SFT policy, and leave it with its curves and metrics in the run folder."""
    from rlhf_cli.stages import footprint, provide

    with open_run(cfg, "train-sft", "sft", overrides, config_dir) as session:
        if not session.finished:
            footprint.announce(cfg)
            session.adopt(provide.sft_policy(cfg, session.log), "sft")
        summary(session, ["sft/loss"])
    return session.directory


def build(cfg: CommandConfig, folder: Path, log: StageLog) -> None:
    """Train the SFT policy into `folder`: model/ in Hugging Face layout, metrics.json, training_log.jsonl.

    With adapters, one is trained around the base and merged into it. A model that is made here has no base worth
    keeping: all its weights are trained. With max_steps 0 the base is an SFT policy already, and stays as it is.
    """
    from rlhf_cli.trainers.sft import sft_trainer

    loaded = load(cfg.dataset)
    seed_everything(cfg.seed)
    base = base_folder(cfg.model) if cfg.model.path else None
    tokenizer = load_tokenizer(base, chat_template=cfg.model.chat_template) if base else make_tokenizer(cfg, loaded)
    data = fit_to_context(loaded, tokenizer, cfg.dataset)
    say_statistics(loaded, tokenizer, cfg.dataset, data)
    require_batches(cfg, data)
    if base is not None and cfg.trainer.sft.max_steps == 0:
        if ranks.is_main():
            _whole(cfg, base, tokenizer).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        log.write_metrics(dropped(data))
        return
    policy = _policy(cfg, base, tokenizer)
    rows = encode_demonstrations(data.demonstrations, tokenizer, cfg.dataset)
    checkpoints = ranks.shared(folder / "checkpoints")
    places: dict[str, Any] = {"folder": checkpoints, "seed": cfg.seed, "computing": computing(cfg)}
    trainer = sft_trainer(policy, tokenizer, trainer_rows(rows), cfg.trainer.sft, **places)
    fit(trainer, Reporter("SFT", log, rename=_names), rewind=log.rewind)
    last_loss = _last_loss(trainer)
    if base is not None and isinstance(cfg.peft, LoraConfig):
        save_model(policy, checkpoints / ADAPTER)
        del trainer, policy  # the base is loaded again, neither quantised nor rounded, for the adapter to go into
        if ranks.is_main():
            whole = merged(open_adapter(_whole(cfg, base, tokenizer), checkpoints / ADAPTER))
            whole.save_pretrained(folder / "model")
    else:
        save_model(policy, folder / "model")
    tokenizer.save_pretrained(folder / "model")
    log.write_metrics({"sft/loss": last_loss, "data/demonstrations": len(rows), **dropped(data)})


def _policy(cfg: CommandConfig, base: Path | None, tokenizer: Any) -> Any:
    """Return what is trained: the model in `base`, with an adapter if one is asked for, or a model made here."""
    if base is None:
        longest = cfg.dataset.max_prompt_tokens + cfg.dataset.max_completion_tokens
        return split(cfg, make_policy(made(cfg), tokenizer, max_positions=longest))
    policy = load_policy(base, how=trained(cfg))
    fit_embedding(policy, tokenizer)
    return adapted(cfg, policy, base)


def _whole(cfg: CommandConfig, base: Path, tokenizer: Any) -> Any:
    """Return the model in `base` in float32 on the CPU, made one for `tokenizer`."""
    policy = load_policy(base, how=replace(frozen(cfg).trained(), device="cpu", split=False))
    fit_embedding(policy, tokenizer)
    return policy


def made(cfg: CommandConfig) -> MadeModelConfig:
    """Return the sizes of a model that is made here; rules.py has refused a config with neither sizes nor a path."""
    assert isinstance(cfg.model, MadeModelConfig)
    return cfg.model


def make_tokenizer(cfg: CommandConfig, data: PreferenceData) -> Any:
    """Return a tokenizer made from the training text: one token a word for the survey world, else byte-level BPE."""
    return made_tokenizer(data, made(cfg).vocab_size)


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
