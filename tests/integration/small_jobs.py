"""The very small jobs of the integration tests, and how their results are read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from typer.testing import Result

# The smallest jobs that still go through every line: a second a run.
SMALL = ["tracker=none", "device=cpu"]
SMALL += ["model.hidden_size=32", "model.ffn_size=64", "model.layers=1", "model.vocab_size=400"]
SMALL += [f"trainer.{stage}.batch_size=16" for stage in ("sft", "rm", "online", "pairwise")]
SMALL += [f"trainer.{stage}.log_every_steps=2" for stage in ("sft", "rm", "online", "pairwise")]
SMALL += [f"trainer.{stage}.max_steps=6" for stage in ("sft", "rm")]
SMALL += [f"trainer.{stage}.{key}" for stage in ("online", "pairwise") for key in ("max_steps=4", "save_every_steps=4")]
SMALL += [f"trainer.{stage}.eval_every_steps=2" for stage in ("online", "pairwise")]
SURVEY = ["dataset.questions=2", "dataset.demonstrations=256", "dataset.pairs=512", "dataset.heldout_pairs=64"]

ALGORITHMS = {
    "pm": ["algo=pm"],
    "pm_rloo": ["algo=pm", "algo.advantage=rloo"],
    "pm_closed": ["algo=pm", "algo.alpha=null", "dataset.closed_vocabulary=true", "reward=gold"],
    "kl_ppo": ["algo=kl_ppo"],
    "dpo": ["algo=dpo"],
    "rpo": ["algo=rpo"],
    "dpm": ["algo=dpm"],
}


def job(command: str, *overrides: str, run_dir: Path, store: Path, config_dir: Path | None = None) -> Path:
    """Run one small job of the survey world in this process and return its run folder."""
    from rlhf_cli import jobs

    places = [f"run_dir='{run_dir}'", f"store_dir='{store}'"]
    return jobs.run_one(command, [*SMALL, *SURVEY, *places, *overrides], config_dir)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def files(folder: Path) -> set[str]:
    """Return the names in a folder, hidden ones too."""
    return {path.name for path in folder.iterdir()}


def weights(folder: Path) -> dict[str, Any]:
    """Return the tensors of a model folder."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def gap(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest difference of two sets of tensors; they must have the same names."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).detach().abs().max()) for name in one)


def sft_folder(store: Path, run_dir: Path) -> Path:
    """Return the SFT policy in the store that a run started from."""
    asked = read_json(run_dir / "manifest.json")["identity"]
    for folder in (store / "sft").iterdir():
        kept = read_json(folder / "identity.json")
        same = [kept["seed"] == asked["seed"], kept["sft"] == asked["trainer"]["sft"]]
        same.append(kept["model"].items() <= asked["model"].items())
        if all(same) and kept["dataset"].items() <= asked["dataset"].items():
            return folder
    raise AssertionError(f"no SFT policy of {run_dir} in {store}")


def refused(result: Result) -> str:
    """Return the one line of the error; there is no traceback."""
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "Traceback" not in result.output
    assert re.search(r"[^.?!][.?!]$", line), "one full stop ends it"
    return line


def nothing_half_trained(store: Path) -> None:
    """Locks may stay; work that was begun, or a stage that was not finished, may not."""
    begun = [path for path in store.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert begun == []
    assert not list(store.glob(".work/*"))


def spoil_scores(store: Path) -> None:
    """Make the scores of every reward model in a store overflow; its weights are finite, for others are not opened."""
    from safetensors.torch import load_file, save_file

    for path in (store / "rm").glob("*/model/model.safetensors"):
        tensors = load_file(path)
        tensors["score.weight"].fill_(3e38)
        save_file(tensors, path, metadata={"format": "pt"})
