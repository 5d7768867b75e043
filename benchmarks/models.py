"""Every model family through every stage, with all weights trained, with adapters, and with one shared base.

    python benchmarks/models.py [--families opt,llama-2] [--folder DIR]

A miniature stands for a family: its architecture, its kind of tokenizer, its special tokens (miniatures.py). Each goes
through SFT, reward model, preference matching (GAE and leave-one-out), DPO, RPO and evaluate; model_checks.py says what
is checked. Writes benchmarks/results/models.md, with --families into DIR. Exit code 1 if a check failed.
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # before torch is imported; the workers inherit it
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}

import argparse
import importlib.metadata
import multiprocessing
import platform
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from miniatures import FAMILIES
from model_checks import MODES, PADDING, REOPENED, STAGES, START_KL, Family
from transformers import AutoTokenizer

from rlhf_cli.errors import UserError
from rlhf_cli.models.policy import load_tokenizer

RESULTS = Path(__file__).parent / "results"
AT_A_TIME = 2
TITLES = {
    "full": "All weights",
    "lora": "LoRA (`peft=lora`)",
    "shared": "LoRA on one base in memory (`peft=lora model.share_base=true`)",
}


@dataclass
class Cell:
    """One stage of a family: what was measured, and what failed."""

    seconds: float = 0.0
    measured: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return it as a table has it."""
        if self.failures:
            return "**failed**"
        shown = [
            f"{self.measured[key]:.0e}" if key in self.measured else "–" for key in ("moved", "padding", "re-opened")
        ]
        return " / ".join([*shown, f"{self.seconds:.1f} s"])


@dataclass
class Row:
    """One family: what it is, and its cells by mode and stage."""

    name: str
    facts: dict[str, str] = field(default_factory=dict)
    cells: dict[str, dict[str, Cell]] = field(default_factory=dict)

    def failures(self) -> list[str]:
        """Return everything that failed, one line each."""
        found = [(mode, stage, cell) for mode, stages in self.cells.items() for stage, cell in stages.items()]
        return [f"{self.name}, {mode}, {stage}: {text}" for mode, stage, cell in found for text in cell.failures]


def stages_of(mode: str) -> list[str]:
    """Return the stages of a mode; roles share a base in alignment with a reward model only."""
    return [stage for stage in STAGES if mode != "shared" or stage in ("PM gae", "PM rloo", "evaluate")]


def measure(name: str, folder: Path) -> Row:
    """Return the row of one family; what its jobs print goes to a file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    row = Row(name)
    with (folder / "output.txt").open("w") as out, redirect_stdout(out), redirect_stderr(out):
        family = Family(name, folder)
        for mode in MODES:
            row.cells[mode] = {stage: _cell(family, mode, stage) for stage in stages_of(mode)}
        row.facts = facts(family)
    return row


def _cell(family: Family, mode: str, stage: str) -> Cell:
    started = time.perf_counter()
    try:
        found = family.run(mode, stage)
    except (Exception, SystemExit) as error:  # a failed stage is a finding, and the others are still wanted
        traceback.print_exc()
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return Cell(time.perf_counter() - started, failures=[reason.splitlines()[0]])
    return Cell(found.seconds, found.measured, found.failures)


def facts(family: Family) -> dict[str, str]:
    """Return what a family is, and the special tokens found for it."""
    kind, published = family.start, AutoTokenizer.from_pretrained(family.base)
    about = {
        "laid out as": f"`{kind.like}`",
        "architecture": f"`{kind.architecture}`",
        "tokenizer": f"`{type(published).__name__}`",
        "tokens / rows": f"{len(published)} / {len(published) + kind.spare}",
        "published BOS, EOS, pad": _tokens(published),
    }
    trained = family.place("full", "SFT") / "model"
    if trained.is_dir():
        found = load_tokenizer(trained)
        about["BOS, EOS, pad in use"] = _tokens(found)
        about["template"] = "yes" if found.chat_template else "no"
    return about


def _tokens(tokenizer: object) -> str:
    names = [getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad")]
    return ", ".join("–" if name is None else f"`{name}`" for name in names).replace("|", "\\|")


def page(rows: Sequence[Row], seconds: float) -> str:
    """Return the results as Markdown."""
    versions = f"Python {platform.python_version()}, torch {importlib.metadata.version('torch')}, transformers "
    versions += f"{transformers.__version__}, peft {importlib.metadata.version('peft')}"
    failures = [failure for row in rows for failure in row.failures()]
    cells = [cell for row in rows for stages in row.cells.values() for cell in stages.values()]
    verdict = "All passed." if not failures else f"{len(failures)} checks failed, listed at the end."
    lines = [
        "# Model families",
        f"`make models-test`, {os.cpu_count()} cores ({platform.machine()}), {versions}: {len(cells)} jobs of"
        f" {len(rows)} families in {seconds / 60:.1f} minutes. {verdict}",
        textwrap.dedent(
            f"""\
            Each family is a miniature with random weights: the published architecture and number format, a
            tokenizer of the published kind, hidden size 32, two layers. So the tables say that the code path is
            right for the family, not how well its models learn. A cell reads: largest change of a weight / largest
            difference of a log-prob or score read alone and beside longer sequences, under other padding (at most
            {PADDING:g}) / largest difference between the model in memory and the saved one opened again (at most
            {REOPENED:g}; evaluate: of any metric) / seconds. Checked beside that, for every cell: all metrics are
            finite; with all weights every tensor changed; with LoRA every adapter and head did and the base, bit by
            bit, did not; responses end with EOS, come back as text, and hold no padding token; before the first
            step KL to the reference is 0 (at most {START_KL:g}); greedy sampling, ours and that of transformers,
            picks what reading finds most likely."""
        ).replace("\n", " "),
        "\n".join(_table([{"family": row.name, **row.facts} for row in rows])),
    ]
    for mode, title in TITLES.items():
        lines.append(f"## {title}")
        table = [{"family": row.name, **{s: cell.text() for s, cell in row.cells[mode].items()}} for row in rows]
        lines.append("\n".join(_table(table)))
    if failures:
        lines += ["## Failed", "\n".join(f"- {failure}" for failure in failures)]
    return "\n\n".join(lines) + "\n"


def _table(rows: Sequence[dict[str, str]]) -> list[str]:
    columns = list(max(rows, key=len))
    lines = [columns, ["---"] * len(columns), *([row.get(column, "–") for column in columns] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def main() -> int:
    """Measure the families, print and write the page, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default=",".join(FAMILIES), help="names, with commas between them")
    parser.add_argument("--folder", type=Path, help="keep the runs there; default: a temporary folder")
    args = parser.parse_args()
    names = args.families.split(",")
    if unknown := sorted(set(names) - set(FAMILIES)):
        parser.error(f"no such families: {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="rlhf-models-") as scratch:
        place = args.folder or Path(scratch)
        with ProcessPoolExecutor(AT_A_TIME, multiprocessing.get_context("spawn")) as pool:
            waiting = [pool.submit(measure, name, place / name) for name in names]
            rows = [future.result() for future in waiting]
        text = page(rows, time.perf_counter() - started)
        whole = names == list(FAMILIES)
        file = (RESULTS if whole else place) / "models.md"
        file.write_text(text, encoding="utf-8")
    print(text)
    return 1 if any(row.failures() for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
