"""Runs made by hand, in memory and as folders, for the tests of comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from rlhf_cli.report.run_groups import Run

POLICIES = {"kl_ppo": [0.2, 0.7, 0.1], "pm": [0.5, 0.3, 0.2], "dpo": [0.4, 0.1, 0.1]}


def run_of(name: str, seed: int = 0, metrics: dict[str, float] | None = None, **settings: Any) -> Run:
    """Return a finished run of the survey world; `group__key=value` sets a key of a block, `group=value` a block."""
    config: dict[str, Any] = {"seed": seed, "run_dir": f"{name}{seed}", "algo": {"name": name, "beta": 1.0}}
    config |= {"dataset": {"source": "survey", "seed": 0}, "tracker": {"name": "none"}, "reward": {"name": "bt"}}
    for key, value in settings.items():
        group, _, leaf = key.partition("__")
        config[group] = {**config.get(group, {}), leaf: value} if leaf else value
    return Run(Path(f"{name}{seed}"), name, config, {"pm/tv": 0.5} if metrics is None else metrics, [], [])


def write_run(folder: Path, algo: str = "pm", seed: int = 0, **changes: Any) -> Path:
    """Write a finished run of the survey world; `changes` replaces config blocks, state, error, ended or metrics."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {"seed": seed, "algo": {"name": algo, "beta": 1.0}, "reward": {"name": "bt"}}
    config |= {"dataset": {"source": "survey", "seed": 0}, "model": {"name": "tiny"}}
    status = {"state": changes.pop("state", "finished"), "error": changes.pop("error", None)}
    status["ended"] = changes.pop("ended", "2026-01-01T00:00:00+00:00")
    metrics = changes.pop("metrics", {"pm/tv": 0.1 + 0.01 * seed, "pm/offset_mass": 0.02, "reference/pm/tv": 0.6})
    log = [{"step": step, "loss": 1.0, "pm/tv": 0.5 - step / 100} for step in (0, 25)]
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, **changes}))
    (folder / "status.json").write_text(json.dumps(status))
    if status["state"] == "finished":
        (folder / "metrics.json").write_text(json.dumps(metrics))
        if "pm/tv" in metrics and "pool/size" not in metrics:
            (folder / "distributions.json").write_text(json.dumps([distribution(algo)]))
    (folder / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


def distribution(algo: str) -> dict[str, Any]:
    """Return one line of distributions.json."""
    policy = POLICIES.get(algo, [0.5, 0.3, 0.2])
    entry = {"question": 0, "prompt": "Which season?", "heldout": False, "answers": ["spring", "summer", "winter"]}
    entry |= {"people": [0.5, 0.3, 0.2], "reward_model": [0.5, 0.3, 0.2], "reference": [0.1, 0.8, 0.1]}
    return entry | {"policy": policy, "optimum": None, "policy_offset": 1 - sum(policy), "reference_offset": 0.0}


def write_completions(run: Path, texts: list[str]) -> None:
    """Write completions.jsonl into a run folder, one line a text."""
    row = {"prompt": "Which season?", "reward": 0.5, "tokens": 3, "ended": True}
    row |= {"reference": "summer", "reference_reward": 0.1}
    lines = (json.dumps({**row, "completion": text}, ensure_ascii=False) + "\n" for text in texts)
    (run / "completions.jsonl").write_text("".join(lines), encoding="utf-8")


def pairs_json(count: int = 3) -> dict[str, Any]:
    """Return the content of a pairs.json."""
    edges = [bin / 20 for bin in range(21)]
    counts = {name: [count] * 20 for name in ("reward_model", "reference", "policy")}
    middles = [bin / 20 + 0.025 for bin in range(20)]
    reliability = {"edges": edges, "predicted": middles, "observed": middles, "count": [count] * 20}
    return {
        "edges": edges,
        "counts": counts,
        "reliability": reliability,
        "length_difference": [1, 2, 3],
        "pairs": 20 * count,
    }
