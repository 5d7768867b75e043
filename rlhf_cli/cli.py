"""The `rlhf` command: Typer reads the command, Hydra the rest; nothing heavy is imported before a config is valid."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rlhf_cli import __version__
from rlhf_cli.cli_help import Checkpoint, CommandWithExamples, CommandWithGroups, Device, Dtype
from rlhf_cli.errors import RankError, RunError, UserError
from rlhf_cli.stages import imported


class CfgView(StrEnum):
    """What --cfg prints."""

    job = "job"


class Rlhf(TyperGroup):
    """All commands: a user's mistake becomes one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except RankError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("interrupted: run the same command again to go on", err=True)
            raise typer.Exit(130) from None


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


CheckpointOption = Annotated[Checkpoint, typer.Option("--checkpoint", help="Which policy of a run: last | best.")]


@app.command(cls=CommandWithExamples)
def generate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, a model folder or a Hub id.")],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="None: type them, or pipe lines in.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help=".txt: a prompt a line; .jsonl: prompt or messages.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.jsonl", help="Write instead of printing.", show_default=False)
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="Answers a prompt.")] = 1,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Default: as the run was trained.", show_default=False)
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="Default: as the run was trained; 0: the likeliest.", show_default=False),
    ] = None,
    top_p: Annotated[float, typer.Option("--top-p", help="Nucleus, in (0, 1].")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="The same command gives the same answers.")] = 0,
    reference: Annotated[bool, typer.Option(help="Show what the reference policy answers too.")] = True,
    reward: Annotated[bool, typer.Option("--reward", help="Score the answers by the run's reward model.")] = False,
    checkpoint: CheckpointOption = Checkpoint.last,
    device: Annotated[Device, typer.Option("--device", help="auto | cpu | cuda.")] = Device.auto,
) -> None:
    """Answer prompts with a policy, side by side with its reference."""
    from rlhf_cli.stages import prompts as given

    asked = given.Asked(
        samples, max_new_tokens, temperature, top_p, seed, reference, reward, checkpoint.value, device.value
    )
    if out is not None:
        given.check_out(out, file)
    found = given.gathered(prompts or [], file, sys.stdin)
    imported("generate").run(run, found, asked, out)


@app.command(cls=CommandWithExamples)
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run of align, train-sft or train-rm.")],
    out: Annotated[
        Path | None,
        typer.Argument(metavar="[OUT]", help="The folder to make; default: RUN/export.", show_default=False),
    ] = None,
    checkpoint: CheckpointOption = Checkpoint.last,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Of weights; as_is: as the run holds them.")] = Dtype.as_is,
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", metavar="BASE", help="The adapter alone, to be put on BASE.", show_default=False),
    ] = None,
    push: Annotated[
        str | None, typer.Option("--push", metavar="REPO", help="Upload it to the Hub, too.", show_default=False)
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="If the repository is new, make it private.")] = False,
) -> None:
    """Make a folder for the Hub: merged weights, tokenizer, model card."""
    from rlhf_cli.stages.finished_run import read_run

    finished = read_run(run)
    stage = imported("export")
    stage.run(finished, out, stage.Wanted(checkpoint.value, dtype.value, adapter), push=push, private=private)


@app.command(cls=CommandWithGroups)
def data(
    overrides: Overrides = None,
    config_dir: ConfigDir = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE.jsonl",
            help="Write all pairs, as dataset=preferences reads them.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print the survey world, or what a run would read of another dataset."""
    from rlhf_cli.config import compose

    cfg = compose.load("train-sft", overrides or [], config_dir)
    from rlhf_cli.stages import data as stage

    typer.echo(stage.run(cfg, out))


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
