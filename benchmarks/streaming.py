"""Data larger than memory: rows a second and peak memory with dataset.streaming=true and false.

    python benchmarks/streaming.py               # 200,000 rows; python benchmarks/streaming.py 20000

Writes benchmarks/results/streaming.md. Rows are made up: 1 to 2 KB each, words as frequent as words are. Each line of
the table is a process of its own that loads, splits, tokenises and fits all rows, then reads every token row of the
reward model's split once, as an epoch would.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RESULT = Path(__file__).parent / "results" / "streaming.md"
ROWS, FEW = 200_000, 2_000
WORDS, VOCABULARY = 60_000, 50_000  # different words in the text; tokens
SEED = 0
STAGES = ("load", "tokenise", "read")


def main() -> None:
    """Run, print, write."""
    if sys.argv[1:2] == ["--measure"]:
        file, tokenizer, streaming = sys.argv[2:]
        sys.stdout.write(json.dumps(measure(Path(file), Path(tokenizer), streaming == "true")))
        return
    rows = int(sys.argv[1]) if sys.argv[1:] else ROWS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, count in (("many.jsonl", rows), ("few.jsonl", FEW)):
            write(folder / file, count)
        make_tokenizer(folder / "few.jsonl", folder / "tokenizer")
        sizes = {file: (folder / file).stat().st_size for file in ("many.jsonl", "few.jsonl")}
        jobs = [("many.jsonl", rows, True), ("many.jsonl", rows, False), ("few.jsonl", FEW, True)]
        jobs.append(("few.jsonl", FEW, False))
        lines = [row(folder, file, count, streaming) for file, count, streaming in jobs]
    text = page(lines, rows, sizes["many.jsonl"])
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def write(file: Path, count: int) -> None:
    """Write `count` preference rows of one to two kilobytes: a prompt of 30 to 120 words, responses of 20 to 120."""
    rng = np.random.default_rng(SEED)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = ["".join(rng.choice(letters, size)) for size in rng.integers(2, 10, WORDS)]
    ends = (1 / np.arange(1, WORDS + 1)).cumsum()  # Zipf's law
    with file.open("w", encoding="utf-8") as lines:
        for number in range(count):
            sizes = rng.integers([30, 20, 20], [120, 120, 120])
            words = [vocabulary[word] for word in ends.searchsorted(rng.random(sizes.sum()) * ends[-1])]
            prompt, chosen, rejected = np.split(np.array(words, dtype=object), sizes.cumsum()[:-1])
            row = {
                "prompt": f"{number} {' '.join(prompt)}?",
                "chosen": " ".join(chosen),
                "rejected": " ".join(rejected),
            }
            lines.write(json.dumps(row) + "\n")


def make_tokenizer(file: Path, folder: Path) -> None:
    """Train a byte-level BPE on the rows of a file and save it."""
    from rlhf_cli.data.tokenizer import bpe_tokenizer

    with file.open(encoding="utf-8") as lines:
        texts = (text for line in lines for text in json.loads(line).values())
        bpe_tokenizer(texts, VOCABULARY).save_pretrained(folder)


def measure(file: Path, tokenizer: Path, streaming: bool) -> dict[str, float]:
    """Return the seconds of each stage, the rows that were kept, the vocabulary, and the peak memory in MB."""
    from transformers import AutoTokenizer

    from rlhf_cli.config.compose import load as load_config
    from rlhf_cli.data import load
    from rlhf_cli.data.encode import encode_pairs, fit_to_context, trainer_rows

    overrides = ["dataset=preferences", f"dataset.path={file}", f"dataset.streaming={str(streaming).lower()}"]
    cfg = load_config("train-rm", [*overrides, "dataset.max_prompt_tokens=512", "dataset.max_completion_tokens=256"])
    words = AutoTokenizer.from_pretrained(tokenizer)
    start, begun = time.perf_counter(), time.process_time()
    found: dict[str, float] = {}
    data = load(cfg.dataset)
    found["load"], start = time.perf_counter() - start, time.perf_counter()
    data = fit_to_context(data, words, cfg.dataset)
    pairs = trainer_rows(encode_pairs(data.reward_pairs, words, cfg.dataset))
    found["tokenise"], start = time.perf_counter() - start, time.perf_counter()
    tokens = sum(len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs)
    found["read"], found["cpu"] = time.perf_counter() - start, time.process_time() - begun
    splits = (data.demonstrations, data.reward_pairs, data.policy_pairs, data.heldout_pairs)
    found |= {"rows": sum(map(len, splits)), "tokens": tokens / len(pairs), "vocabulary": len(words)}
    # In kilobytes on Linux, in bytes on macOS.
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return found | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}


def row(folder: Path, file: str, count: int, streaming: bool) -> dict[str, float]:
    """Return what a process of its own measures, on one core and with a cache of its own."""
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / f"cache-{file}"), "OMP_NUM_THREADS": "1"}
    environment |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    arguments = [str(folder / file), str(folder / "tokenizer"), str(streaming).lower()]
    job = [sys.executable, __file__, "--measure", *arguments]
    done = subprocess.run(job, check=True, cwd=folder, env=environment, stdout=subprocess.PIPE)
    return {**json.loads(done.stdout), "given": count, "streaming": streaming}


def page(lines: list[dict[str, float]], rows: int, size: int) -> str:
    """Return the page of results."""
    first = lines[0]
    heads = ["rows", "`dataset.streaming`", "load and split, s", "tokenise, s", "read a split, s", "CPU, s", "rows/s"]
    table = [f"| {' | '.join([*heads, 'peak memory, MB'])} |", "|---:|---|---:|---:|---:|---:|---:|---:|"]
    for line in lines:
        seconds = " | ".join(f"{line[stage]:.1f}" for stage in (*STAGES, "cpu"))
        speed = line["given"] / (line["load"] + line["tokenise"])
        mode = str(line["streaming"]).lower()
        table.append(f"| {line['given']:,} | {mode} | {seconds} | {speed:,.0f} | {line['peak']:,.0f} |")
    return f"""# Data larger than memory

{rows:,} made-up preference rows, {size / rows / 1000:.1f} KB each ({size / 1e6:,.0f} MB of JSON lines); byte-level BPE,
{first["vocabulary"]:,.0f} tokens; {first["tokens"]:.0f} tokens a pair. One thread. Rows/s: loading, splitting,
tokenising and fitting. CPU: seconds of computing in all three; where the three take much longer, the machine had other
work. Peak memory is the whole process's (maximum resident set), Python and its libraries included; with streaming it
counts pages of files that the system keeps for as long as it has room. Made by `make streaming`.

{chr(10).join(table)}

Rows are written once for a dataset and its split, token ids once for a tokenizer: later stages and runs find both.
"""


if __name__ == "__main__":
    main()
