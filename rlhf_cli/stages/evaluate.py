"""`rlhf evaluate`: the metrics and figures of one policy, by the reward model and reference of its config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.config.compose import RECORD_FILE
from rlhf_cli.config.schema import EvaluateConfig
from rlhf_cli.errors import RunError
from rlhf_cli.models.policy import freeze, load_policy, load_tokenizer
from rlhf_cli.stages import provide, trust
from rlhf_cli.stages.results import SHOWN, announce, measure, stage_metrics
from rlhf_cli.stages.session import Session, open_run, say, summary
from rlhf_cli.stages.workspace import prepare
from rlhf_cli.store import read_json
from rlhf_cli.trainers.common import resolve_device


def run(cfg: EvaluateConfig, overrides: Sequence[str] = (), config_dir: str | None = None) -> Path:
    """Measure the policy that `cfg.policy` names, or the reward model; only missing earlier stages are trained."""
    folder = policy_folder(cfg)
    more = {"weights": weights(folder)}
    if cfg.stage == "rm":
        return _reward_model(cfg, folder, open_run(cfg, "evaluate", "evaluate-rm", overrides, config_dir, more))
    with open_run(cfg, "evaluate", "evaluate", overrides, config_dir, more) as session:
        if not session.finished:
            sft = provide.sft_policy(cfg)
            rm = provide.reward_model(cfg) if cfg.reward.name != "gold" else None
            work = prepare(cfg, sft, rm, provide.combined_members(cfg))
            path = folder or sft / "model"
            say(f"policy: {path}")
            stages = {"reference policy": sft} | ({"reward model": rm} if rm else {})
            announce(work, stages, session)
            policy = load_policy(path, work.device)
            require_same_tokens(path, work.tokenizer, policy)
            measure(work, freeze(policy), session, stages, {})
        summary(session, SHOWN)
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
    policy = load_policy(folder, resolve_device(cfg.device))
    require_same_tokens(folder, load_tokenizer(provide.sft_policy(cfg) / "model"), policy)
    return str(folder), policy


def weights(folder: Path | None) -> list[str]:
    """Return name, size and time of the weight files: a policy trained again in the same place is another one."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]) if folder else []
    return [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]


def policy_folder(cfg: EvaluateConfig) -> Path | None:
    """Return the model folder to measure, or None for the SFT policy.

    Raises:
        RunError: there is no such folder, or it holds no model, or a reward model.
    """
    if cfg.policy is None:
        return None
    given = Path(cfg.policy)
    if cfg.stage == "rm" and (read_json(given / RECORD_FILE) or {}).get("command") == "train-rm":
        return None  # a reward model's run: it names the reward model, through its overrides, and no policy
    if not given.is_dir():
        raise RunError(f"policy={given} is not a folder", "", "give a run folder or a Hugging Face model folder")
    name = "model" if cfg.checkpoint == "last" else "best"
    for folder in (given / name, given):
        if (folder / "config.json").is_file():
            require_policy(folder)
            return folder
    raise RunError(
        f"policy={given} holds no model", f"neither {name}/config.json nor config.json is there",
        "give a finished run folder or a Hugging Face model folder",
    )  # fmt: skip


def require_policy(folder: Path) -> None:
    """Refuse a reward model: its body would open as a policy, and every number would be wrong.

    Raises:
        RunError: it is one.
    """
    architectures = (read_json(folder / "config.json") or {}).get("architectures") or []
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        raise RunError(
            f"{folder} holds a reward model, not a policy",
            "",
            "give a policy, or judge a reward model with stage=rm policy=RUN_DIR, its run folder",
        )


def require_same_tokens(path: Path, tokenizer: Any, policy: Any) -> None:
    """Refuse a policy whose token ids mean something else than the reference's: every number would be wrong.

    Raises:
        RunError: vocabularies differ.
    """
    own = load_tokenizer(path) if (path / "tokenizer_config.json").is_file() else tokenizer
    if own.get_vocab() != tokenizer.get_vocab() or policy.config.vocab_size < len(tokenizer):
        raise RunError(
            f"the policy in {path} has another vocabulary than its reference",
            f"{len(own)} tokens against {len(tokenizer)}, or other ids",
            "name the dataset, model and seed that the policy was trained with",
        )
