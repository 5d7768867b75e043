"""A model of opt-125m's real shape on real dialogues, on the CPU: seconds and peak memory, beside the estimate.

    python benchmarks/real_shape.py --data FILE  # FILE: HH-RLHF form, two dialogues a line, .jsonl or .jsonl.gz

Writes benchmarks/results/real_shape.md. The weights are random: this shows that the sizes are handled, not that such a
model can hold a conversation. The tokenizer is byte-level BPE as OPT's is, trained on FILE.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "real_shape.md"
JOB = Path(__file__).parent / "resident.py"
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "GOMP_SPINCOUNT": "2000"}
GB = 1e9

# facebook/opt-125m, config.json
OPT_125M = {"vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072}
OPT_125M |= {"num_attention_heads": 12, "max_position_embeddings": 2048, "word_embed_proj_dim": 768}


def steps(number: int, batch: int, micro: int) -> list[str]:
    """Return the overrides that make every stage this short."""
    found = []
    for stage in ("sft", "rm", "online", "pairwise"):
        found += [f"trainer.{stage}.epochs=null", f"trainer.{stage}.max_steps={number}"]
        found += [f"trainer.{stage}.batch_size={batch}", f"trainer.{stage}.micro_batch_size={micro}"]
    return found


FEW_STEPS = [*steps(2, 8, 4), "dataset.eval_prompts=4", "dataset.eval_samples=2", "dataset.pool_samples=2"]
FEW_STEPS += ["dataset.heldout_fraction=0.02"]  # pairs are measured before training and after it
# Rows that fill the limits, as the estimate assumes. Two steps: the second has AdamW's moments beside it.
LENGTHS = (128, 128)
FULL = [*steps(2, 8, 4), "dataset.eval_prompts=2", "dataset.eval_samples=2", "dataset.pool_samples=0"]
FULL += [f"model.prompt_tokens={LENGTHS[0]}", f"model.completion_tokens={LENGTHS[1]}"]
FULL_ROWS = 60

LORA, SHARED = ["peft=lora"], ["peft=lora", "model.share_base=true"]
# Command, what is asked of it, the stage that it trains when those before it are in the store.
COMPARED: list[tuple[str, list[str], str]] = [
    ("train-sft", [], "sft"),
    ("train-rm", [], "rm"),
    ("align", ["algo=pm"], "online"),
    ("align", ["algo=dpo"], "pairwise"),
    ("train-sft", LORA, "sft"),
    ("train-rm", LORA, "rm"),
    ("align", ["algo=pm", *LORA], "online"),
    ("align", ["algo=pm", *SHARED], "online"),
]


@dataclass(frozen=True)
class Measured:
    """What a command took.

    Args:
        seconds, processor: from start to end, by the clock and of all threads.
        before: resident memory before the first weights were read, bytes.
        parts: seconds and peak resident memory, bytes, of the training of each stage and of measuring.
        estimated: peak of each stage beside `before`, as printed, bytes.
    """

    seconds: float
    processor: float
    before: float
    parts: dict[str, dict[str, float]]
    estimated: dict[str, float]


def build(folder: Path, texts: Sequence[str], **sizes: Any) -> Path:
    """Return `folder` with an OPT of random weights and a byte-level BPE tokenizer in Hugging Face layout.

    Args:
        folder: to be written.
        texts: what the tokenizer is trained on.
        sizes: of the config, in place of those of opt-125m.
    """
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2TokenizerFast, OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(**{**OPT_125M, **sizes}, bos_token_id=2, eos_token_id=2, pad_token_id=1)
    OPTForCausalLM(config).save_pretrained(folder)
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=config.vocab_size, special_tokens=SPECIAL, show_progress=False)
    trained.save_model(str(folder))
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    GPT2TokenizerFast(**files, **special, add_bos_token=True).save_pretrained(folder)
    return folder


def dialogues(file: Path) -> list[str]:
    """Return all texts of a file in HH-RLHF form."""
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as lines:
        return [text for line in lines for text in json.loads(line).values() if isinstance(text, str)]


def filled(file: Path, texts: Sequence[str], model: Path, *, rows: int, prompt: int, response: int) -> Path:
    """Return `file`, written in HH-RLHF form with rows that fill these limits in tokens, from the words of `texts`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    words = iter([word for text in texts for word in text.replace("Human:", "").replace("Assistant:", "").split()])
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(rows):
            asked = f"\n\nHuman: {_text(words, tokenizer, prompt - 12)}\n\nAssistant:"
            answers = {name: f"{asked} {_text(words, tokenizer, response + 4)}" for name in ("chosen", "rejected")}
            lines.write(json.dumps(answers) + "\n")
    return file


def _text(words: Iterator[str], tokenizer: Any, tokens: int) -> str:
    """Return the next words that come to about `tokens` tokens."""
    found: list[str] = []
    count = 0
    while count < tokens:
        found.append(next(words))
        count += len(tokenizer(f" {found[-1]}", add_special_tokens=False).input_ids)
    return " ".join(found)


def measured(command: str, overrides: Sequence[str], folder: Path) -> Measured:
    """Return what `rlhf COMMAND` took, run in `folder`; what it says goes to this terminal."""
    report = folder / "report.json"
    job = [sys.executable, str(JOB), str(report), command, *overrides, "tracker=none", "device=cpu"]
    start = time.perf_counter()
    if subprocess.run(job, cwd=folder, env={**os.environ, **OFFLINE}, check=False).returncode:
        raise SystemExit(f"failed: rlhf {' '.join(job[3:])}")
    seconds = time.perf_counter() - start
    found = json.loads(report.read_text(encoding="utf-8"))
    return Measured(seconds, found["processor"], found["before"][0], found["parts"], found["estimated"])


def run_rows(found: Measured) -> list[str]:
    """Return the table of one command that trains everything."""
    named = {"sft": "SFT", "rm": "reward model", "align": "preference matching", "measures": "measuring"}
    parts = found.parts.items()
    rows = [f"{named[name]} | {took['seconds']:.0f} | {took['processor']:.0f}" for name, took in parts]
    trained = [f"| {row} | {took['peak'] / GB:.2f} |" for row, (_, took) in zip(rows, parts, strict=True)]
    peak = max(took["peak"] for _, took in parts)
    return [
        "| part | seconds | of the processor | peak resident memory, GB |",
        "|---|---:|---:|---:|",
        f"| before weights are read | | | {found.before / GB:.2f} |",
        *trained,
        f"| **whole command** | **{found.seconds:.0f}** | **{found.processor:.0f}** | **{peak / GB:.2f}** |",
    ]


def compared_row(command: str, asked: Sequence[str], stage: str, found: Measured) -> str:
    """Return a stage's estimate beside what its training took more than the process before it."""
    part = found.parts["align" if command == "align" else stage]
    took, told = part["peak"] - found.before, found.estimated[stage]
    words = " ".join(["rlhf", command, *asked])
    return f"| `{words}` | {told / GB:.2f} | {took / GB:.2f} | {told / took - 1:+.0%} |"


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="dialogues in HH-RLHF form")
    file = parser.parse_args().data.resolve()
    texts = dialogues(file)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = build(folder / "opt-125m", texts)
        where = ["model=opt-125m", f"model.path={model}", "dataset=hh_rlhf"]
        whole = measured("align", ["algo=pm", *where, f"dataset.path={file}", *FEW_STEPS, "run_dir=run"], folder)
        table = run_rows(whole)
        print("\n".join(table), flush=True)
        rows = filled(folder / "full.jsonl", texts, model, rows=FULL_ROWS, prompt=LENGTHS[0], response=LENGTHS[1])
        compared = []
        for number, (command, asked, stage) in enumerate(COMPARED):
            more = [f"dataset.path={rows}", *FULL, f"run_dir=compared-{number}", "store_dir=compared"]
            found = measured(command, [*asked, *where, *more], folder)
            compared.append(compared_row(command, asked, stage, found))
            print(compared[-1], flush=True)
    RESULT.write_text(page(table, compared, pairs=len(texts) // 2), encoding="utf-8")


def page(table: Sequence[str], compared: Sequence[str], *, pairs: int) -> str:
    """Return what is written."""
    threads = os.environ.get("OMP_NUM_THREADS") or os.cpu_count()
    overrides = " \\\n    ".join(" ".join(FEW_STEPS[at : at + 2]) for at in range(0, len(FEW_STEPS), 2))
    return TEXT.format(
        table="\n".join(table), compared="\n".join(compared), pairs=pairs, threads=threads, overrides=overrides
    )


TEXT = """# A real model's shape on a CPU

An OPT of opt-125m's shape (125 million parameters, 50,272 words, 12 layers of 768) with random weights and a byte-level
BPE tokenizer, and {pairs} pairs of real dialogues, in float32 on {threads} threads. One command trains everything from
an empty store, with the lengths that `model=opt-125m` sets (256 + 256 tokens) and few steps:

```sh
rlhf align algo=pm model=opt-125m model.path=FOLDER dataset=hh_rlhf dataset.path=FILE tracker=none device=cpu \\
    {overrides}
```

{table}

## What the estimate said

Each command prints, before any weights are read, the memory that its stages take at their peak. Here it is beside what
the stage's training took more than the process held when it was printed. Rows fill their limits (128 + 128 tokens), as
the estimate assumes; real ones are shorter and take less. Micro-batches of 4, two optimizer steps, each command with
what the ones before left in the store:

| command | estimated, GB | measured, GB | difference |
|---|---:|---:|---:|
{compared}

For a pretrained model the C library is told to return tensors of 1 MB and more when they are freed
(`rlhf_cli/stages/session.py`). With the 32 MB that suit the tiny one, freed memory stayed with the process in pieces:
LoRA's SFT took 3.64 GB in all instead of 2.64, and three steps of a reward model 4.82 instead of 3.32, in a seventh
less processor time.

`make real-shape DATA=FILE` makes this page anew.
"""


if __name__ == "__main__":
    main()
