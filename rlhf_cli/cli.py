"""The `rlhf` command: Typer reads the command, Hydra the rest; nothing heavy is imported before a config is valid."""

from __future__ import annotations

import os
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from rlhf_cli import __version__
from rlhf_cli.config.catalog import Catalog
from rlhf_cli.errors import RunError, UserError

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
    "data": ["rlhf data", "rlhf data dataset=preferences dataset.path=FILE.jsonl"],
}


class CfgView(StrEnum):
    """What --cfg prints."""

    job = "job"


class CommandWithGroups(TyperCommand):
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
            formatter.write_dl([*((group, _shown(catalog, group)) for group in catalog.groups), *sweeps])
        with formatter.section("Examples"):
            for example in EXAMPLES[name]:
                formatter.write(f"{'':>{formatter.current_indent}}{example}\n")


def _shown(catalog: Catalog, group: str) -> str:
    if group == "trainer":
        return f"{', '.join(catalog.choices(group))} (the dataset brings its own)"
    return ", ".join(f"{choice}*" if choice == catalog.groups[group] else choice for choice in catalog.choices(group))


class Rlhf(TyperGroup):
    """All commands: a user's mistake becomes one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("interrupted: run the same command again to go on", err=True)
            raise typer.Exit(130) from None


def _config_dir(args: list[str]) -> Path | None:
    """Return the directory that --config-dir names among raw arguments, else RLHF_CONFIG_DIR."""
    for position, arg in enumerate(args):
        if arg == "--config-dir" and position + 1 < len(args):
            return Path(args[position + 1])
        if arg.startswith("--config-dir="):
            return Path(arg.partition("=")[2])
    named = os.environ.get("RLHF_CONFIG_DIR")
    return Path(named) if named else None


app = typer.Typer(
    cls=Rlhf,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Align language models with preferences, and measure whether minorities survive it.",
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="GROUP=CHOICE|KEY=VALUE", help="What to change; every key: add --cfg job.", show_default=False
    ),
]
Multirun = Annotated[bool, typer.Option("-m", "--multirun", help="One job for each combination of KEY=a,b,c.")]
Cfg = Annotated[
    CfgView | None, typer.Option("--cfg", help="Print the composed config, every value resolved, and run nothing.")
]
ConfigDir = Annotated[
    Path | None,
    typer.Option(
        "--config-dir",
        envvar="RLHF_CONFIG_DIR",
        help="Your own groups: DIR/algo/x.yaml with DIR/algos/x.py, DIR/reward/x.yaml with DIR/rewards/x.py.",
    ),
]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"rlhf {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Threads that spin long while they wait stall every run as soon as another process wants a core (a second run,
    # say); not spinning at all is slow alone. Read when torch is imported, so it is set here.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")


@app.command("train-sft", cls=CommandWithGroups)
def train_sft(
    overrides: Overrides = None, multirun: Multirun = False, cfg: Cfg = None, config_dir: ConfigDir = None
) -> None:
    """Train the reference policy on demonstrations."""
    _command("train-sft", overrides, multirun, cfg, config_dir)


@app.command("train-rm", cls=CommandWithGroups)
def train_rm(
    overrides: Overrides = None, multirun: Multirun = False, cfg: Cfg = None, config_dir: ConfigDir = None
) -> None:
    """Train a reward model on preference pairs."""
    _command("train-rm", overrides, multirun, cfg, config_dir)


@app.command(cls=CommandWithGroups)
def align(
    overrides: Overrides = None, multirun: Multirun = False, cfg: Cfg = None, config_dir: ConfigDir = None
) -> None:
    """Align a policy with preferences and measure it; SFT and reward model are trained if they are not there yet."""
    _command("align", overrides, multirun, cfg, config_dir)


@app.command(cls=CommandWithGroups)
def evaluate(
    overrides: Overrides = None, multirun: Multirun = False, cfg: Cfg = None, config_dir: ConfigDir = None
) -> None:
    """Measure a policy: policy=RUN_DIR brings the run's own config, policy=MODEL_DIR any Hugging Face model."""
    _command("evaluate", overrides, multirun, cfg, config_dir)


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Run folders, folders that hold some, or a glob: 'runs/**'.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Where all files go.", show_default=False)] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            help="The row that others are compared with, by its name in the table; kl_ppo, else sft, by default.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option("--rank", metavar="METRIC", help="Order the rows by a metric, best first.", show_default=False),
    ] = None,
    wandb: Annotated[bool, typer.Option("--wandb", help="Log the comparison to W&B, as a run of its own.")] = False,
) -> None:
    """Put runs side by side, policies or reward models: tables with intervals, figures, one HTML page."""
    from rlhf_cli.stages import compare as stage

    stage.run(runs, out, baseline=baseline, rank=rank, wandb=wandb)


@app.command(cls=CommandWithGroups)
def data(overrides: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Print the survey world, or a summary of another dataset."""
    from rlhf_cli.config import compose
    from rlhf_cli.config.schema import SurveyConfig

    dataset = compose.load("train-sft", overrides or [], config_dir).dataset
    if isinstance(dataset, SurveyConfig):
        from rlhf_cli.data.survey import describe_world, make_world

        typer.echo(describe_world(make_world(dataset)))
        return
    from rlhf_cli.data import load

    rows = load(dataset)
    ranked = ["reward_rankings"] if rows.reward_rankings else []
    splits = ["demonstrations", *ranked, "reward_pairs", "policy_pairs", "prompts", "heldout_pairs"]
    for name, count in [*((split, len(getattr(rows, split))) for split in splits), *rows.dropped.items()]:
        typer.echo(f"{count:>8}  {name if name in splits else f'dropped: {name}'}")


def _command(
    command: str, overrides: list[str] | None, multirun: bool, cfg: CfgView | None, config_dir: Path | None
) -> None:
    from rlhf_cli import jobs
    from rlhf_cli.config import compose

    asked = overrides or []
    if cfg is not None:
        for job in jobs.expand(command, asked, config_dir) if multirun else [asked]:
            typer.echo(("---\n" if multirun else "") + compose.dump(compose.load(command, job, config_dir)), nl=False)
    elif multirun:
        _multirun(command, asked, config_dir)
    else:
        jobs.run_one(command, asked, config_dir)


def _multirun(command: str, overrides: list[str], config_dir: Path | None) -> None:
    """Run a sweep, compare what finished, and end with an error if a job failed."""
    from rlhf_cli import jobs
    from rlhf_cli.config import compose

    sweep = jobs.plan(command, overrides, config_dir)
    outcomes = jobs.multirun(command, sweep, config_dir)
    folders = [Path(outcome["run_dir"]) for outcome in outcomes if outcome["run_dir"] is not None]
    finished = [Path(outcome["run_dir"]) for outcome in outcomes if outcome["failure"] is None]
    failed = [outcome for outcome in outcomes if outcome["failure"] is not None]
    if command in ("align", "train-rm") and finished and len(outcomes) >= 2:
        from rlhf_cli.stages import compare as stage

        given = [item for item in compose.parse(overrides) if item.key_or_group == "run_dir"]
        one_place = given and not given[-1].is_sweep_override() and given[-1].value() is not None
        digest = sha256("\n".join(sorted(path.name for path in finished)).encode()).hexdigest()[:8]
        out = Path(str(given[-1].value())) if one_place else finished[0].parent / f"compare-{digest}"
        lost = [(outcome["job"], outcome["reason"]) for outcome in failed if outcome["run_dir"] is None]
        stage.run(folders, out, failed=lost, rank=sweep.rank or sweep.objective)
    if found := jobs.best(outcomes, sweep):
        typer.echo(found)
    if failed:
        error = RunError(
            f"{len(failed)} of {len(outcomes)} jobs failed: {'; '.join(outcome['job'] for outcome in failed)}",
            "The reason of each is printed above",
            "Mend it and run the same command again: finished jobs are not repeated",
        )
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1 if any(outcome["failure"] == "bug" for outcome in outcomes) else 2)


def main() -> None:
    """Run the command line."""
    app(prog_name="rlhf")


if __name__ == "__main__":
    main()
