"""The commands with a model of opt-125m's real shape on real dialogues: peak memory and seconds of each stage.

    python benchmarks/real_shape.py FILE         # FILE: HH-RLHF form, two dialogues a line, .jsonl or .jsonl.gz

Writes benchmarks/results/real_shape.md. The weights are random: this shows that the sizes are handled, not that such a
model can hold a conversation. The tokenizer is byte-level BPE as OPT's is, trained on FILE; its vocabulary is padded to
OPT's size by the embedding.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "real_shape.md"
VOCABULARY, SPECIAL = 50272, ["<s>", "<pad>", "</s>", "<unk>"]
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
SMALL = ["model.prompt_tokens=128", "model.completion_tokens=32"]
SMALL += ["trainer.sft.epochs=null", "trainer.sft.max_steps=4", "trainer.sft.batch_size=8"]
SMALL += ["trainer.sft.micro_batch_size=4", "trainer.rm.epochs=null", "trainer.rm.max_steps=4"]
SMALL += ["trainer.rm.batch_size=8", "trainer.rm.micro_batch_size=4", "trainer.online.epochs=null"]
SMALL += ["trainer.online.max_steps=3", "trainer.online.batch_size=8", "trainer.online.micro_batch_size=4"]
SMALL += ["dataset.eval_prompts=8", "dataset.eval_samples=2", "dataset.pool_samples=2"]


@dataclass(frozen=True)
class Measured:
    """What a command took.

    Args:
        seconds: of wall-clock time.
        before: resident memory when the command's weights were about to be read, bytes.
        peak: largest resident memory, bytes.
        lines: what it printed.
    """

    seconds: float
    before: float
    peak: float
    lines: list[str]


def build(folder: Path, texts: list[str], **sizes: Any) -> Path:
    """Return `folder` with an OPT of random weights and a byte-level BPE tokenizer in Hugging Face layout.

    Args:
        folder: to be written.
        texts: what the tokenizer is trained on.
        sizes: of the config, in place of those of facebook/opt-125m.
    """
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2TokenizerFast, OPTConfig, OPTForCausalLM

    # https://huggingface.co/facebook/opt-125m/blob/main/config.json
    shape = {"vocab_size": VOCABULARY, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072}
    shape |= {"num_attention_heads": 12, "max_position_embeddings": 2048, "word_embed_proj_dim": 768}
    torch.manual_seed(0)
    config = OPTConfig(**{**shape, **sizes}, bos_token_id=2, eos_token_id=2, pad_token_id=1)
    OPTForCausalLM(config).save_pretrained(folder)
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=config.vocab_size, special_tokens=SPECIAL, show_progress=False)
    trained.save_model(str(folder))
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    GPT2TokenizerFast(**files, **special, add_bos_token=True).save_pretrained(folder)
    return folder


def measured(command: str, overrides: list[str], folder: Path) -> Measured:
    """Return what `rlhf COMMAND` took, run in `folder`; what it says on errors goes to this terminal."""
    job = [sys.executable, "-m", "rlhf_cli.cli", command, *overrides, "tracker=none", "device=cpu"]
    start, before, lines = time.perf_counter(), 0.0, []
    process = subprocess.Popen(job, cwd=folder, stdout=subprocess.PIPE, text=True, env={**os.environ, **OFFLINE})
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip())
        if line.startswith("memory") and not before:
            pages = Path(f"/proc/{process.pid}/statm").read_text(encoding="utf-8").split()[1]
            before = float(pages) * os.sysconf("SC_PAGE_SIZE")
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"rlhf {command} failed: {' '.join(job)}")
    return Measured(time.perf_counter() - start, before, used.ru_maxrss * 1024.0, lines)


def dialogues(file: Path) -> list[str]:
    """Return all texts of a file in HH-RLHF form."""
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as lines:
        return [text for line in lines for text in json.loads(line).values() if isinstance(text, str)]


def main() -> None:
    """Run, print, write."""
    file = Path(sys.argv[1]).resolve()
    texts = dialogues(file)
    rows = [
        "| stage | seconds | peak memory, GB | estimated, beside Python and the libraries, GB |",
        "|---|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = build(folder / "opt-125m", texts)
        where = ["model=opt-125m", f"model.path={model}", "dataset=hh_rlhf", f"dataset.path={file}", *SMALL]
        for command, more in (("train-sft", []), ("train-rm", []), ("align", ["algo=pm"])):
            found = measured(command, [*where, *more, f"run_dir={command}"], folder)
            told = next(line for line in found.lines if line.startswith("memory"))
            estimate = told.rpartition(" ")[2]
            rows.append(
                f"| `rlhf {' '.join([command, *more])}` | {found.seconds:.0f} | {found.peak / 1e9:.2f} | {estimate} |"
            )
            print(rows[-1], flush=True)
    text = TEXT.format(
        rows="\n".join(rows), pairs=len(texts) // 2, cores=os.cpu_count(), overrides=" \\\n    ".join(SMALL)
    )
    RESULT.write_text(text, encoding="utf-8")
    print(text)


TEXT = """# A real model's shape on a CPU

An OPT of opt-125m's shape (125 million parameters, 50,272 words, 12 layers of 768) with random weights, and {pairs}
pairs of real dialogues, on {cores} cores. One after another, each with what the one before left in the store:

{rows}

```sh
rlhf align algo=pm model=opt-125m model.path=FOLDER dataset=hh_rlhf dataset.path=FILE tracker=none device=cpu \\
    {overrides}
```

Memory is the largest resident size of the process, about 0.7 GB of it Python and the libraries.
"""


if __name__ == "__main__":
    main()
