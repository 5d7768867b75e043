"""What a command's help lists: the choices of its options and config groups, and examples."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from textwrap import fill
from typing import Any

from typer.core import TyperCommand

from rlhf_cli.config.catalog import Catalog

EXAMPLES = {
    "train-sft": [
        "rlhf train-sft",
        "rlhf train-sft dataset=hh_rlhf dataset.path=FILE.jsonl.gz trainer.sft.max_steps=500",
    ],
    "train-rm": ["rlhf train-rm reward=pcrm_length", "rlhf train-rm reward=warm reward.members=4 seed=1"],
    "align": ["rlhf align algo=pm", "rlhf align -m algo=kl_ppo,pm,dpo,rpo seed=0,1,2"],
    "evaluate": [
        "rlhf evaluate policy=RUN_DIR checkpoint=best",
        "rlhf evaluate policy=RUN_DIR reference=MODEL reward_model=[MODEL,MODEL] sampler.top_p=0.9",
        "rlhf evaluate policy=RUN_DIR judge=openai judge.model=NAME",
        "rlhf evaluate stage=rm policy=RUN_DIR",
    ],
    "generate": ["rlhf generate RUN", "rlhf generate RUN --file FILE.jsonl --out answers.jsonl --samples 4"],
    "export": ["rlhf export RUN", "rlhf export RUN OUT --checkpoint best --push USER/NAME --private"],
    "data": ["rlhf data dataset=preferences dataset.path=FILE.jsonl", "rlhf data --out pairs.jsonl"],
}


class Checkpoint(StrEnum):
    """Which policy of a run."""

    last = "last"
    best = "best"


class Dtype(StrEnum):
    """Number format of exported weights."""

    as_is = "as_is"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Device(StrEnum):
    """Where a model runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class CommandWithExamples(TyperCommand):
    """A command whose help ends with examples."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write two examples or more."""
        with formatter.section("Examples"):
            for example in EXAMPLES[str(self.name)]:
                formatter.write(f"{'':>{formatter.current_indent}}{example}\n")


class CommandWithGroups(CommandWithExamples):
    """A command whose help lists the choices of every config group, a user's own included."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Remember the arguments: --help is answered before --config-dir is read."""
        ctx.meta["rlhf.args"] = list(args)
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the config groups and two examples."""
        name = str(self.name)
        catalog = Catalog("train-sft" if name == "data" else name, _config_dir(ctx.meta.get("rlhf.args", [])))
        with formatter.section("Config groups (GROUP=CHOICE; * is the default)"):
            sweeps = [("sweep", f"{', '.join(catalog.choices('sweep'))} (with -m)")] if name == "align" else []
            _write_rows(formatter, [*((group, _shown(catalog, group)) for group in catalog.groups), *sweeps])
        super().format_epilog(ctx, formatter)


def _write_rows(formatter: Any, rows: list[tuple[str, str]]) -> None:
    """Write names and texts in two columns, as click does, but break no choice at its hyphen: they are copied."""
    column = formatter.current_indent + max(len(name) for name, _ in rows) + 2
    for name, text in rows:
        first = f"{'':>{formatter.current_indent}}{name}".ljust(column)
        rest = " " * column
        filled = fill(
            text, formatter.width, initial_indent=first, subsequent_indent=rest,
            break_on_hyphens=False, break_long_words=False,
        )  # fmt: skip
        formatter.write(filled + "\n")


def _shown(catalog: Catalog, group: str) -> str:
    if group == "trainer":
        return f"{', '.join(catalog.choices(group))} (the dataset brings its own)"
    return ", ".join(f"{choice}*" if choice == catalog.groups[group] else choice for choice in catalog.choices(group))


def _config_dir(args: list[str]) -> Path | None:
    """Return the directory that --config-dir names among raw arguments, else RLHF_CONFIG_DIR."""
    for position, arg in enumerate(args):
        if arg == "--config-dir" and position + 1 < len(args):
            return Path(args[position + 1])
        if arg.startswith("--config-dir="):
            return Path(arg.partition("=")[2])
    named = os.environ.get("RLHF_CONFIG_DIR")
    return Path(named) if named else None
