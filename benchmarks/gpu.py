"""What a GPU really does in preference matching: speed, arithmetic and memory of each phase, for every engine.

    python benchmarks/gpu.py                       # OPT-1.3B with random weights, 256 + 256 tokens, bfloat16
    python benchmarks/gpu.py --model FOLDER        # a model of your own, in Hugging Face layout
    python benchmarks/gpu.py --dry-run             # a small OPT on the CPU: shows that the script works

Conditional PM with PPO and a critic, as `rlhf align experiment=pm_opt-1.3b_hh`, on made-up dialogues that fill their
limits. Each row is a process of its own (benchmarks/gpu_job.py). Writes benchmarks/results/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from gpu_arithmetic import GENERATE, LOGPS, PHASES, UPDATE, Body, Limits, Update, flops, tokens, traffic
from gpu_job import MEMORY
from gpu_page import Measured, Row, Size, page
from real_shape import build, steps

HERE = Path(__file__).parent
RESULT = HERE / "results" / "gpu.md"
# facebook/opt-1.3b, config.json
OPT_1_3B = {"vocab_size": 50272, "hidden_size": 2048, "num_hidden_layers": 24, "ffn_dim": 8192}
OPT_1_3B |= {"num_attention_heads": 32, "max_position_embeddings": 2048, "word_embed_proj_dim": 2048}
SMALL = {"vocab_size": 8192, "hidden_size": 384, "num_hidden_layers": 6, "ffn_dim": 1536}
SMALL |= {"num_attention_heads": 8, "max_position_embeddings": 256, "word_embed_proj_dim": 384}
ASKED, ANSWERED = "\n\nHuman:", "\n\nAssistant:"  # of HH-RLHF
VARIANTS = {
    "full": [],
    "LoRA": ["peft=lora"],
    "shared base": ["peft=lora", "model.share_base=true"],
}
# glibc else keeps freed tensors, and resident memory on a CPU would be what was once held.
FREED = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
MEASURED = "default"  # engine whose memory is measured on a CPU: that takes longer than all else
ENGINES = ("default", "generate", "continuous", "vllm")
# What the estimate calls the phases (models/memory.py); rewards adapt their batches to what is left and have none.
ESTIMATED = {GENERATE: "generation", LOGPS: "reading", UPDATE: "training"}


REAL = Size(OPT_1_3B, prompt=256, response=256, rollouts=64, micro_batch=8, updates=3)
DRY = Size(SMALL, prompt=64, response=64, rollouts=16, micro_batch=8, updates=3)


def made_up(count: int, seed: int = 0) -> Iterator[str]:
    """Return `count` words, as frequent as words are (Zipf's law)."""
    chance = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(5000)]
    return iter(chance.choices(words, [1 / place for place in range(1, len(words) + 1)], k=count))


def write_dialogues(file: Path, model: Path, words: Iterator[str], *, rows: int, size: Size) -> None:
    """Write preference rows in HH-RLHF form that fill their limits in the tokens of `model`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def longest(before: str, after: str, limit: int) -> str:
        inner = ""
        while True:
            more = f"{inner} {next(words)}"
            if len(tokenizer(f"{before}{more}{after}").input_ids) > limit:
                return f"{before}{inner}{after}"
            inner = more

    with file.open("w", encoding="utf-8") as lines:
        for _ in range(rows):
            asked = longest(ASKED, ANSWERED, size.prompt)
            chosen, rejected = (asked + longest("", "", size.response - 1) for _ in range(2))  # and end-of-sequence
            lines.write(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")


def prepared(size: Size, folder: Path) -> list[str]:
    """Return the overrides of `rlhf align` that all variants share; model and dialogues are in `folder` then."""
    seen = (
        f"{ASKED} {' '.join(words)}{ANSWERED} {' '.join(words)}" for words in zip(*[made_up(20_000)] * 50, strict=False)
    )
    model = size.model if isinstance(size.model, Path) else build(folder / "model", list(seen), **size.model)
    rows, count = folder / "dialogues.jsonl", 2 * size.rollouts + 20
    words = made_up(count * (size.prompt + 2 * size.response), seed=1)  # a word is a token or more
    write_dialogues(rows, model, words, rows=count, size=size)
    return [
        "algo=pm", "algo.num_generations=1", "reward=bt", "reward.clip=5.0", "model=opt-1.3b", f"model.path={model}",
        "dataset=hh_rlhf", f"dataset.path={rows}", f"dataset.max_prompt_tokens={size.prompt}",
        f"dataset.max_completion_tokens={size.response}", "dataset.eval_prompts=2", "dataset.pool_samples=0",
        "dataset.sft_fraction=0.05", "dataset.rm_fraction=0.2", "reward.negative_share=0",
        *steps(1, 2, 2), "trainer.sft.max_steps=0", f"trainer.online.batch_size={size.rollouts}",
        f"trainer.online.micro_batch_size={size.micro_batch}", f"store_dir={folder / 'store'}", "tracker=none",
    ]  # fmt: skip


def measured(variant: str, engine: str, overrides: Sequence[str], size: Size, folder: Path) -> Measured | str:
    """Return what a variant took with an engine, in a process of its own; or why the engine cannot work here."""
    asked = [*VARIANTS[variant], f"generation={engine}", *overrides]
    found = read(variant, engine, job(asked, size.updates + 1, folder / "report.json"))
    if isinstance(found, str) or found.limits.on_gpu or engine != MEASURED:
        return found
    (held,) = job([MEMORY, *asked], 2, folder / "report.json", FREED)["updates"]
    memory = [{"peak": held[row.phase]["peak"], "tensors": held[row.phase]["tensors"]} for row in found.rows]
    return replace(found, rows=[replace(row, **sizes) for row, sizes in zip(found.rows, memory, strict=True)])


def job(
    overrides: Sequence[str], updates: int, report: Path, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the report of gpu_job.py, run with more in its environment."""
    command = [sys.executable, str(HERE / "gpu_job.py"), str(report), str(updates), *overrides]
    around = {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", **os.environ, **(environment or {})}
    if subprocess.run(command, env=around, check=False).returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def read(variant: str, engine: str, report: dict[str, Any]) -> Measured | str:
    """Return what a report of gpu_job.py says."""
    if "refused" in report:
        return str(report["refused"])
    device = Limits(**report["device"])
    updates = report["updates"]
    work = [arithmetic({**report, "engine": engine}, rows) for rows in report["rows"]]
    found = []
    for phase in PHASES:
        took = [update[phase] for update in updates]
        found.append(
            Row(
                phase,
                statistics.median(one["seconds"] for one in took),
                *(int(statistics.mean(one[part][phase] for one in work)) for part in ("tokens", "flops", "bytes")),
                max(one["peak"] for one in took),
                estimated(phase, report),
            )
        )
    whole = statistics.median(sum(part["seconds"] for part in update.values()) for update in updates)
    prompts = len(report["rows"][0]) // report["samples"]
    return Measured(variant, engine, device, report["dtype"], prompts, whole, found)


def arithmetic(report: dict[str, Any], rows: Sequence[Sequence[int]]) -> dict[str, dict[str, float]]:
    """Return tokens, FLOPs and bytes of each phase of an update with these rollouts, (prompt, response) tokens."""
    from rlhf_cli.models.shapes import Adapters, ModelShape

    policy_shape, reward_shape = (None if content is None else ModelShape(content) for content in report["shapes"])
    assert policy_shape is not None
    adapters = report["adapters"] and Adapters(report["adapters"]["rank"], tuple(report["adapters"]["targets"]))
    policy, values = Body.of(policy_shape, adapters), Body.of(reward_shape or policy_shape, adapters)
    whole = [(prompt, response) for prompt, response in rows]
    size = 2 if report["dtype"] == "bfloat16" else 4
    counted = {name: report[name] for name in ("micro_batch", "epochs", "steps")}
    casts = size == 2 and adapters is None
    update = Update(whole, **counted, number_bytes=size, casts=casts, engine=report["engine"])
    return {
        "tokens": dict(tokens(update)),
        "flops": flops(policy, values, update),
        "bytes": traffic(policy, values, update),
    }


def estimated(phase: str, report: dict[str, Any]) -> float | None:
    """Return the estimate of a phase's peak, bytes: what is held throughout and what is at work."""
    name = ESTIMATED.get(phase)
    if name is None:
        return None
    found = [size for words, size in report["estimated"].items() if words.startswith(name)]
    later = [size for words, size in report["estimated"].items() if phase == UPDATE and words == "gradients"]
    return float(report["held"] + max(found + later))


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder in Hugging Face layout, in place of random weights")
    parser.add_argument("--dry-run", action="store_true", help="a small OPT, on the CPU in float32")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    for field in fields(Size)[1:]:
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, help=f"default {getattr(REAL, field.name)}")
    asked = parser.parse_args()
    chosen = DRY if asked.dry_run else REAL
    given = {field.name: getattr(asked, field.name) or getattr(chosen, field.name) for field in fields(Size)}
    size = Size(**given)
    device = ["device=cpu", "model.dtype=float32"] if asked.dry_run else ["device=cuda", "model.dtype=bfloat16"]
    with tempfile.TemporaryDirectory() as scratch:
        found = run(size, Path(scratch), asked.variants, asked.engines, device)
    text = page(found, size, dry=asked.dry_run)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")
    print(text)


def run(
    size: Size, folder: Path, variants: Sequence[str], engines: Sequence[str], more: Sequence[str]
) -> list[Measured | tuple[str, str]]:
    """Return what each variant took with each engine; where an engine cannot work, its name and the reason once."""
    overrides = [*prepared(size, folder), *more]
    for variant in variants:  # the reward models
        job([*VARIANTS[variant], *overrides], 0, folder / "report.json")
    found: list[Measured | tuple[str, str]] = []
    for engine in engines:
        for variant in variants:
            one = measured(variant, engine, overrides, size, folder)
            if isinstance(one, str):
                found.append((engine, one))
                break
            print(f"{variant}, generation={engine}: {one.prompts / one.seconds:.2f} prompts/s", flush=True)
            found.append(one)
    return found


if __name__ == "__main__":
    main()
