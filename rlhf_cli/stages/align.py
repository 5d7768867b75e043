"""`rlhf align`: from preferences to a measured, aligned policy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf_cli import ranks
from rlhf_cli.config.schema import AlignConfig, OnlineAlgoConfig
from rlhf_cli.data.encode import encode_pairs, encode_prompts, trainer_rows
from rlhf_cli.models.adapters import save_model
from rlhf_cli.run import seed_everything
from rlhf_cli.stages import footprint, priors, roles
from rlhf_cli.stages.batch_sizes import require_batches
from rlhf_cli.stages.opening import check_bases, computing
from rlhf_cli.stages.results import SHOWN, announce, measure
from rlhf_cli.stages.role_models import critic_model
from rlhf_cli.stages.session import Session, open_run, replace_folder, summary
from rlhf_cli.stages.workspace import Workspace, prepare
from rlhf_cli.store import read_json, write_json
from rlhf_cli.trainers import engines
from rlhf_cli.trainers.common import Reporter, fit, reading, resolve_device

logger = logging.getLogger(__name__)


def run(cfg: AlignConfig, overrides: Sequence[str] = (), config_dir: str | None = None) -> Path:
    """Provide SFT policy and reward model, align a policy, measure it, and leave everything in the run folder."""
    if isinstance(cfg.algo, OnlineAlgoConfig):
        engines.require(cfg.generation, resolve_device(cfg.device))
    with open_run(cfg, "align", cfg.algo.name, overrides, config_dir) as session:
        if not session.finished:
            footprint.announce(cfg)
            check_bases(cfg)
            _align(cfg, session)
        summary(session, SHOWN)
    return session.directory


def _align(cfg: AlignConfig, session: Session) -> None:
    work = prepare(cfg, roles.of_config(cfg), training=True)
    announce(work, session)
    seed_everything(cfg.seed)
    policy = work.models.policy
    trainer = _trainer(work, policy, ranks.shared(session.directory / "checkpoints"))
    best = Best(session.directory, work)
    every = (cfg.trainer.online if work.algorithm.family == "online" else cfg.trainer.pairwise).eval_every_steps
    follow = _follow(work, policy, best)
    reporter = Reporter(cfg.algo.name, session.log, rename=_names, evaluate=follow, eval_every_steps=every)
    fit(trainer, reporter, rewind=session.run.rewind)
    save_model(policy, session.directory / "model")
    work.tokenizer.save_pretrained(session.directory / "model")
    ranks.barrier()
    measure(work, policy, ranks.shared(session.directory / "model"), session, best.metrics())


class Best:
    """Keeps the policy with the lowest distance to the preferences so far beside the last one.

    The distance is pm/tv where it is exact, else pm/pair_tv. It survives an interruption.
    """

    def __init__(self, directory: Path, work: Workspace) -> None:
        self.directory, self.work = directory, work
        self.key = "pm/tv" if work.exact is not None else "pm/pair_tv"
        self.path = directory / "best.json"

    def offer(self, policy: Any, metrics: dict[str, float], step: int) -> None:
        """Save `policy` if it is better than every earlier one; step 0 is the reference and does not count."""
        before = ranks.on_main(lambda: read_json(self.path))
        again = before is not None and before["best/step"] >= step
        if step == 0 or (before is not None and not again and metrics[self.key] >= before[f"best/{self.key}"]):
            return
        partial = self.directory / ".best.partial"
        save_model(policy, partial)
        self.work.tokenizer.save_pretrained(partial)
        replace_folder(partial, self.directory / "best")
        kept = {key: value for key, value in metrics.items() if key.startswith(("pm/", "optimum/", "gold/"))}
        write_json(self.path, {"best/step": step, **{f"best/{key}": value for key, value in kept.items()}})

    def metrics(self) -> dict[str, float]:
        """Return step and metrics of the best policy."""
        found = ranks.on_main(lambda: read_json(self.path)) or {}
        return {key: float(value) for key, value in found.items()}


def _follow(work: Workspace, policy: Any, best: Best) -> Callable[[int], dict[str, float]]:
    def evaluate(step: int) -> dict[str, float]:
        with reading(policy):
            metrics = ranks.broadcast(work.metrics_while_training(policy))  # alike on all, but for rounding
        best.offer(policy, metrics, step)
        return metrics

    return evaluate


def _trainer(work: Workspace, policy: Any, folder: Path) -> Any:
    cfg, stages = work.cfg, work.roles.stages
    require_batches(cfg, work.data)
    places: dict[str, Any] = {"folder": folder, "seed": cfg.seed, "computing": computing(cfg)}
    if work.algorithm.family == "pairwise":
        from rlhf_cli.trainers.pairwise import pairwise_trainer

        block = cfg.trainer.pairwise
        pairs = encode_pairs(work.data.policy_pairs, work.tokenizer, cfg.dataset)
        bounds = priors.bounds(cfg.algo.constraint, work.data.policy_pairs, pairs, cfg=cfg, sft=stages[roles.REFERENCE])
        return pairwise_trainer(
            work.algorithm, cfg.algo, policy, work.reference, work.tokenizer, trainer_rows(pairs, bounds), block,
            temperature=cfg.generation.temperature, tree=work.tree, **places,
        )  # fmt: skip
    from rlhf_cli.trainers.online import online_trainer
    from rlhf_cli.trainers.parts import OnlineParts

    assert isinstance(cfg.algo, OnlineAlgoConfig)
    parts = OnlineParts(
        algorithm=work.algorithm,
        algo=cfg.algo,
        reward=work.reward,
        reward_clip=cfg.reward.clip,
        reference=work.reference,
        critic=critic_model(cfg, work.roles, work.models, work.tokenizer) if cfg.algo.advantage == "gae" else None,
        generation=cfg.generation,
        tree=work.tree,
    )
    if cfg.generation.top_p < 1:
        logger.warning("generation.top_p=%s: gradients are biased; metrics use top_p=1", cfg.generation.top_p)
    prompts: Any = encode_prompts(work.data.prompts, work.tokenizer, cfg.dataset)
    return online_trainer(
        parts, policy, work.tokenizer, prompts, cfg.trainer.online,
        max_completion_tokens=cfg.dataset.max_completion_tokens, **places,
    )  # fmt: skip


def _names(metrics: dict[str, float]) -> dict[str, float]:
    """Keep our own metrics and the trainer's basic ones; TRL's duplicates under other names are left out.

    What is also measured on held-out data gets the prefix train/, so that one key means one thing.
    """
    skipped = ("completions/", "rewards/", "num_tokens", "step_time", "frac_", "train_", "num_input")
    measured = ("reward/", "kl/", "entropy/", "length/", "eos_rate", "chosen_logps")
    kept = {key: value for key, value in metrics.items() if not key.startswith(skipped)}
    return {f"train/{k}" if k.startswith(measured) else k: v for k, v in kept.items()}
