"""`rlhf evaluate`: the metrics and figures of one policy, beside a reference, by one reward model or several."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.config.compose import RECORD_FILE
from rlhf_cli.config.schema import EvaluateConfig
from rlhf_cli.errors import RunError
from rlhf_cli.measure.judge import check_judge
from rlhf_cli.models.folders import fingerprint, has_tokenizer
from rlhf_cli.models.policy import freeze, load_policy, load_tokenizer
from rlhf_cli.stages import provide, roles, trust
from rlhf_cli.stages.opening import frozen
from rlhf_cli.stages.results import SHOWN, announce, measure, stage_metrics
from rlhf_cli.stages.session import Session, open_run, say, summary
from rlhf_cli.stages.workspace import prepare, require_context
from rlhf_cli.store import read_json

JUDGED = re.compile(r"by/[^/]+/(pm/tv|win_rate/rm|reward/mean)")  # of further reward models, what is printed


def run(cfg: EvaluateConfig, overrides: Sequence[str] = (), config_dir: str | None = None) -> Path:
    """Measure the policy that `cfg.policy` names, or the reward model; only missing earlier stages are trained."""
    check_judge(cfg.judge)
    folder = policy_folder(cfg)
    more = {"weights": weights(cfg, folder)}
    if cfg.stage == "rm":
        return _reward_model(cfg, folder, open_run(cfg, "evaluate", "evaluate-rm", overrides, config_dir, more))
    with open_run(cfg, "evaluate", "evaluate", overrides, config_dir, more) as session:
        if not session.finished:
            found = roles.of_evaluation(cfg)
            path = folder or found.reference
            policy = load_policy(path, how=frozen(cfg))
            require_same_tokens(path, load_tokenizer(found.reference, training=False), policy)
            require_context(policy, cfg.dataset, str(path))
            work = prepare(cfg, found)
            require_same_logits(path, policy, work.reference)
            say(f"policy: {path}")
            announce(work, session)
            measure(work, freeze(policy), path, session, {})
        summary(session, SHOWN, files="metrics.json, completions.jsonl, pairs.json")
    return session.directory


def _reward_model(cfg: EvaluateConfig, folder: Path | None, opened: Session) -> Path:
    """Write the trust report of the reward model, with the samples of the policy in `folder` (None: SFT)."""
    with opened as session:
        if not session.finished:
            rm = provide.reward_model(cfg)
            say(f"reward model: {rm}")
            session.run.write_metrics(stage_metrics({"reward model": rm}))
            trust.report(cfg, session, policy=_named_policy(cfg, folder))
        summary(session, trust.SHOWN, files="metrics.json, trust.json, trust.png")
    return session.directory


def _named_policy(cfg: EvaluateConfig, folder: Path | None) -> tuple[str, Any] | None:
    """Return name and model of the policy in `folder`, which must have the reward model's tokens."""
    if folder is None:
        return None
    policy = load_policy(folder, how=frozen(cfg))
    require_same_tokens(folder, load_tokenizer(provide.sft_policy(cfg) / "model"), policy)
    return str(folder), policy


def weights(cfg: EvaluateConfig, folder: Path | None) -> list[str]:
    """Return what identifies the named models: one trained again in the same place is another one."""
    named = [folder] if folder else []
    named += [roles.policy_in("reference", cfg.reference)] if cfg.reference else []
    return [fingerprint(path) for path in [*named, *map(roles.reward_folder, cfg.reward_model)]]


def policy_folder(cfg: EvaluateConfig) -> Path | None:
    """Return the model folder to measure, or None for the SFT policy.

    Raises:
        RunError: there is no such folder, or it holds no model, or a reward model.
    """
    if cfg.policy is None:
        return None
    if cfg.stage == "rm" and (read_json(Path(cfg.policy) / RECORD_FILE) or {}).get("command") == "train-rm":
        return None  # a reward model's run: it names the reward model, through its overrides, and no policy
    return roles.policy_in("policy", cfg.policy, cfg.checkpoint)


def require_same_tokens(path: Path, tokenizer: Any, policy: Any) -> None:
    """Refuse a policy whose token ids mean something else than the reference's: every number would be wrong.

    Raises:
        RunError: vocabularies differ.
    """
    own = load_tokenizer(path, training=False) if has_tokenizer(path) else tokenizer
    if own.get_vocab() != tokenizer.get_vocab() or policy.config.vocab_size < len(tokenizer):
        raise RunError(
            f"the policy in {path} has another vocabulary than its reference",
            f"{len(own)} tokens against {len(tokenizer)}, or other ids",
            "name the dataset, model and seed that the policy was trained with, or its reference=",
        )


def require_same_logits(path: Path, policy: Any, reference: Any) -> None:
    """Refuse a policy with more or fewer logits than its reference: their KL is not defined.

    Raises:
        RunError: they differ, though the tokenizers do not.
    """
    sizes = policy.config.vocab_size, reference.config.vocab_size
    if sizes[0] != sizes[1]:
        raise RunError(
            f"the policy in {path} has {sizes[0]} logits a token and its reference {sizes[1]}",
            "the KL between them is not defined",
            "give a reference= with as many",
        )
