"""What is measured and drawn of a finished policy, the same after aligning and when evaluating."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_cli.metrics.glossary import DROPPED
from rlhf_cli.report.figures import curves, preference_bars
from rlhf_cli.report.pair_figures import pair_figure
from rlhf_cli.stages.final import measure_policy
from rlhf_cli.stages.roles import STAGES_FILE
from rlhf_cli.stages.session import Session, say
from rlhf_cli.stages.workspace import Workspace
from rlhf_cli.store import read_json, write_json

SHOWN = ["pm/tv", "pm/kl_rm_policy", "pm/minority_mass", "pm/minority_mass_target", "pm/offset_mass"]
SHOWN += [
    "optimum/tv",
    "gold/tv",
    "pm/pair_tv",
    "pm/divergence",
    "pm/rank_correlation",
    "reward/mean",
    "win_rate/rm",
    "win_rate/gold",
    "win_rate/llm",
    "kl/sequence",
    "distinct_2",
    "eos_rate",
    "chosen_logps_change",
]
CURVES = ["pm/tv", "pm/minority_mass", "pm/offset_mass"]


def announce(work: Workspace, session: Session) -> None:
    """Say which models are used and which rows were left out; keep the first in stages.json."""
    stages = work.roles.stages
    for name, folder in stages.items():
        say(f"{name}: {folder}")
    write_json(session.directory / STAGES_FILE, {name: str(folder) for name, folder in stages.items()})
    for reason, count in work.data.dropped.items():
        if reason == "response_truncated":
            say(f"cut: {count} responses longer than dataset.max_completion_tokens")
        else:
            say(f"left out: {count} rows ({DROPPED.get(reason, reason)})")


def stage_metrics(stages: dict[str, Path]) -> dict[str, float]:
    """Return the final metrics of the stages in use."""
    found: dict[str, float] = {}
    for folder in stages.values():
        found |= read_json(folder / "metrics.json") or {}
    return found


def measure(work: Workspace, policy: Any, folder: Path, session: Session, more: dict[str, float]) -> None:
    """Write metrics, completions, distributions and figures of `policy`, whose weights are in `folder`."""
    measured = measure_policy(work, policy, folder)
    counts = {f"data/{split}": len(getattr(work.data, split)) for split in ("policy_pairs", "prompts", "heldout_pairs")}
    counts |= {f"data/dropped/{reason}": count for reason, count in work.data.dropped.items()}
    session.run.write_completions(measured.completions)
    write_json(session.directory / "measured.json", measured.about)
    write_json(session.directory / "pairs.json", measured.pairs)
    name = work.cfg.algo.name
    if work.exact is not None:
        rows = work.exact.distributions(policy)
        write_json(session.directory / "distributions.json", rows)
        figure = session.directory / "preferences.png"
        preference_bars(rows, figure, title=f"{name}: people, reward model, reference, policy")
        session.run.add_figure(figure)
    figure = session.directory / "pairs.png"
    if pair_figure({name: measured.pairs}, figure):
        session.run.add_figure(figure)
    _draw_curves(work, session)
    session.run.write_metrics({**stage_metrics(work.roles.stages), **counts, **measured.metrics, **more})


def _draw_curves(work: Workspace, session: Session) -> None:
    log = session.directory / "training_log.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    wanted = CURVES if work.exact is not None else ["pm/pair_tv", "reward/mean", "kl/sequence"]
    keys = [key for key in wanted if any(line.get(key) is not None for line in lines)]
    if keys:
        figure = session.directory / "curves.png"
        curves({work.cfg.algo.name: lines}, figure, keys)
        session.run.add_figure(figure)
