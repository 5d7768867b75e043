"""The commands on real human dialogues: seconds and metrics.

    python benchmarks/hh.py FILE.jsonl.gz        # HH-RLHF form: two dialogues a line

Writes benchmarks/results/hh.md. The policy is a small OPT made from scratch: this shows that the
pipeline runs on real text, not that half a million parameters can hold a conversation.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "hh.md"
SHOWN = ["reward/mean", "kl/sequence", "entropy/per_token", "length/mean", "eos_rate", "pm/pair_tv", "pm/divergence"]
SHOWN += ["rm/accuracy", "data/dropped/prompt_too_long", "data/dropped/response_truncated"]


def main() -> None:
    """Run, print, write."""
    file = Path(sys.argv[1]).resolve()
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as lines:
        count = sum(1 for _ in lines)
    data = ["dataset=hh_rlhf", f"dataset.path={file}"]
    commands = {"train-sft": data, "train-rm": data, "align": [*data, "algo=pm", "run_dir=run"]}
    commands["evaluate"] = ["policy=run", "run_dir=evaluation"]
    commands["train-rm reward=pcrm_cosine"] = data
    commands["align reward=pcrm_length"] = [*data, "algo=pm", "trainer.online.max_steps=20"]
    rows = ["| command | seconds |", "|---|---:|"]
    with tempfile.TemporaryDirectory() as folder:
        for command, overrides in commands.items():
            start = time.perf_counter()
            job = [sys.executable, "-m", "rlhf_cli.cli", *command.split(), *overrides, "tracker=none"]
            subprocess.run(job, check=True, cwd=folder, stderr=subprocess.DEVNULL)
            rows.append(f"| `rlhf {command}` | {time.perf_counter() - start:.0f} |")
        metrics = json.loads((Path(folder) / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
    rows += ["", "| metric | value | 95 % interval |", "|---|---:|---|"]
    for key in SHOWN:
        low, high = metrics.get(f"{key}/lo"), metrics.get(f"{key}/hi")
        rows.append(f"| `{key}` | {metrics[key]:.4g} | {'' if low is None else f'{low:.4g} to {high:.4g}'} |")
    text = (
        f"# Real dialogues\n\n{count} pairs, {os.cpu_count()} cores, `algo=pm model=tiny`.\n\n" + "\n".join(rows) + "\n"
    )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
