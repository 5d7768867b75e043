"""The worked example of docs/models_and_data.md does what it says: from a local file and model to an export."""

from __future__ import annotations

import json
import re
import shlex
import traceback
from collections.abc import Callable
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import Result

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models_and_data.md"
# Same commands, fewer steps: what is learned is not the question here.
FEWER = {
    "train-sft": ["trainer.sft.max_steps=5"],
    "align": ["trainer.rm.max_steps=4", "trainer.online.max_steps=4", "dataset.max_rows=2000"],
}


def example() -> list[list[str]]:
    """Return the commands of the worked example, as lists of arguments."""
    text = PAGE.read_text(encoding="utf-8")
    block = re.search(r"\*\*A worked example.*?```bash\n(.*?)```", text, re.DOTALL)
    assert block is not None
    lines = block[1].replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def test_from_a_local_file_and_a_local_model_to_an_export(rlhf: Callable[..., Result], tmp_path: Path) -> None:
    commands = example()
    assert [command[1] for command in commands] == ["data", "train-sft", "align", "compare", "generate", "export"]
    answers = {}
    for _, command, *args in commands:
        quiet = ["tracker=none"] if command in FEWER else []
        result = rlhf(command, *args, *FEWER.get(command, []), *quiet)
        assert result.exit_code == 0, (command, result.output, traceback.format_exception(result.exception))
        answers[command] = result.output
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(pairs) > 2000
    assert {"prompt", "chosen", "rejected"} <= set(pairs[0])
    metrics = json.loads((tmp_path / "runs/mine/metrics.json").read_text(encoding="utf-8"))
    assert 0 < metrics["pm/tv"] < 1
    assert "policy 5" in answers["generate"]
    assert "none, had its SFT" in (tmp_path / "runs/mine/export/README.md").read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/mine/export")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "runs/mine/export")
    logits = model(**tokenizer("Which season do you like best?", return_tensors="pt")).logits
    assert logits.isfinite().all()
    weights, settings = (tmp_path / "runs/mine/model" / name for name in ("model.safetensors", "config.json"))
    assert weights.stat().st_mode == settings.stat().st_mode  # colleagues may read both
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/base/model")
    moved = [not a.equal(b) for a, b in zip(model.parameters(), base.parameters(), strict=True)]
    assert all(moved)
