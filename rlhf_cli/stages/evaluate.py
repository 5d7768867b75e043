"""`rlhf evaluate`: the metrics and figures of one policy, by the reward model and reference of its config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.config.schema import EvaluateConfig
from rlhf_cli.errors import RunError
from rlhf_cli.models.policy import freeze, load_policy, load_tokenizer
from rlhf_cli.stages import provide
from rlhf_cli.stages.results import SHOWN, announce, measure
from rlhf_cli.stages.session import open_run, say, summary
from rlhf_cli.stages.workspace import prepare


def run(cfg: EvaluateConfig, overrides: Sequence[str] = (), config_dir: str | None = None) -> Path:
    """Measure the policy that `cfg.policy` names; nothing is trained but a missing SFT policy or reward model."""
    folder = policy_folder(cfg)
    with open_run(cfg, "evaluate", "evaluate", overrides, config_dir, {"weights": weights(folder)}) as session:
        if not session.finished:
            sft = provide.sft_policy(cfg)
            rm = provide.reward_model(cfg) if cfg.reward.name != "gold" else None
            work = prepare(cfg, sft, rm)
            path = folder or sft / "model"
            say(f"policy: {path}")
            stages = {"reference policy": sft} | ({"reward model": rm} if rm else {})
            announce(work, stages, session)
            policy = load_policy(path, work.device)
            require_same_tokens(path, work.tokenizer, policy)
            measure(work, freeze(policy), session, stages, {})
        summary(session, SHOWN)
    return session.directory


def weights(folder: Path | None) -> list[str]:
    """Return name, size and time of the weight files: a policy trained again in the same place is another one."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]) if folder else []
    return [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]


def policy_folder(cfg: EvaluateConfig) -> Path | None:
    """Return the model folder to measure, or None for the SFT policy.

    Raises:
        RunError: there is no such folder, or it holds no model.
    """
    if cfg.policy is None:
        return None
    given = Path(cfg.policy)
    if not given.is_dir():
        raise RunError(f"policy={given} is not a folder", "", "give a run folder or a Hugging Face model folder")
    name = "model" if cfg.checkpoint == "last" else "best"
    for folder in (given / name, given):
        if (folder / "config.json").is_file():
            return folder
    raise RunError(
        f"policy={given} holds no model", f"neither {name}/config.json nor config.json is there",
        "give a finished run folder or a Hugging Face model folder",
    )  # fmt: skip


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
