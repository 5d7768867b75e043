"""Sweeps: their files, the jobs they stand for, the names of these, and what a sweeper is told."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from typer.testing import Result

from rlhf_cli import jobs, objective
from rlhf_cli.config import compose, sweeps
from rlhf_cli.config.catalog import Catalog, conf_dir
from rlhf_cli.config.naming import group_name, job_name, run_name
from rlhf_cli.config.sweeps import Sweep
from rlhf_cli.errors import RUN_FOLDER, ConfigError, RunError

Rlhf = Callable[..., Result]
Write = Callable[..., Path]


@pytest.fixture
def own(tmp_path: Path) -> Write:
    """Return a function that writes sweep/mine.yaml into a user's own directory and returns that."""

    def write(**content: Any) -> Path:
        (tmp_path / "own/sweep").mkdir(parents=True, exist_ok=True)
        (tmp_path / "own/sweep/mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return tmp_path / "own"

    return write


class Align(ModuleType):
    """Stands in for `rlhf align`: the distance is beta, except that beta=9 fails after it has begun."""

    def __init__(self) -> None:
        super().__init__("align")
        self.seen: list[Any] = []

    def run(self, cfg: Any, overrides: list[str], config_dir: str | None) -> Path:
        self.seen.append(cfg)
        folder = Path(cfg.run_dir or f"runs/{len(self.seen)}")
        folder.mkdir(parents=True, exist_ok=True)
        if cfg.algo.beta == 9:
            error = RunError("the reward is not finite", "", "lower the learning rate")
            error.add_note(f"{RUN_FOLDER}{folder}")
            raise error
        metrics = {"heldout/pm/tv": abs(cfg.algo.beta - 0.5), "heldout/gold/tv": cfg.algo.beta}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        return folder


class Compare(ModuleType):
    """Stands in for the comparison: remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__("compare")
        self.asked: list[Any] = []

    def run(self, folders: Any, out: Path, **options: Any) -> None:
        self.asked.append((list(folders), options))


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> tuple[Align, Compare]:
    import rlhf_cli.stages

    fakes = Align(), Compare()
    for fake in fakes:
        monkeypatch.setitem(sys.modules, f"rlhf_cli.stages.{fake.__name__}", fake)
        monkeypatch.setattr(rlhf_cli.stages, fake.__name__, fake, raising=False)
    return fakes


def listed(*overrides: str, config_dir: Path | None = None) -> list[tuple[str, list[str]]]:
    """Return name and overrides of each job of a sweep, unchecked: checking takes a tenth of a second a job."""
    sweep = sweeps.resolve(list(overrides), Catalog("align", config_dir))
    return [(job_name(job, grid, sweep.named), job) for grid in sweep.grids for job in sweeps.split(grid)]


def names(overrides: list[str], config_dir: Path | None = None) -> list[str]:
    return [name for name, _ in listed(*overrides, config_dir=config_dir)]


# --- files -----------------------------------------------------------------------------------------------------


def test_the_papers_grid_is_alpha_times_beta_and_its_baselines() -> None:
    found = {
        (cfg.algo.name, getattr(cfg.algo, "alpha", None), cfg.algo.beta)
        for cfg in (compose.load("align", job) for _, job in listed("sweep=pm_grid"))
    }
    betas = (0.1, 0.5, 1.0)
    assert found == {*(("pm", a, b) for a in (0.1, 0.3, 0.5) for b in betas), *(("kl_ppo", None, b) for b in betas)}


def test_rpo_has_both_reductions_of_its_paper_and_dpo_as_baseline() -> None:
    configs = [compose.load("align", job).algo for _, job in listed("sweep=rpo")]
    assert [cfg.name for cfg in configs].count("dpo") == 1
    rpo = [cfg for cfg in configs if cfg.name == "rpo"]
    assert {(cfg.sft_reduction, cfg.sft_scale_by_beta) for cfg in rpo} == {("sum", True), ("seq_mean", False)}
    assert len({(cfg.sft_reduction, cfg.eta) for cfg in rpo}) == len(rpo) == 6


def test_optuna_minimises_what_no_stage_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "_is_installed", lambda package: package == "hydra-optuna-sweeper")
    sweep = jobs.plan("align", ["sweep=optuna", "algo.beta=1"], None)
    assert (sweep.sweeper, sweep.objective, sweep.direction) == ("optuna", "heldout/pm/tv", "minimize")
    assert "algo.alpha=tag(log, interval(0.001, 0.5))" in sweep.grids[0]
    assert "hydra.sweeper.sampler.seed=0" in sweep.grids[0], "so that the same command finds its finished jobs"


@pytest.mark.parametrize("name", ["pm_grid", "rpo", "optuna"])
def test_a_header_says_how_many_jobs_and_minutes(name: str) -> None:
    header = [line for line in (conf_dir() / f"sweep/{name}.yaml").read_text().splitlines() if line.startswith("#")]
    said = re.search(r"# (\d+) jobs.*minutes on 2 cores", "\n".join(header))
    assert said is not None
    if name != "optuna":
        assert int(said[1]) == len(listed(f"sweep={name}"))
    assert f"sweep={name}" in header[-1], "the command"


JOBS = ["algo=pm algo.beta=0.5,1", "algo=dpo"]
BASIC = ["algo=pm", "algo.beta=interval(0.1, 1.0)", "hydra/sweeper=fake"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"jobs": JOBS, "rnk": "pm/tv"}, r"unknown key rnk \(in .*mine\.yaml\)\. The nearest is rank"),
        ({"jobs": JOBS, "overrides": BASIC}, "a sweep has both jobs and overrides"),
        ({"rank": "pm/tv"}, "a sweep has neither jobs nor overrides"),
        ({"jobs": []}, "jobs is no list of texts"),
        ({"jobs": [["algo=pm"]]}, "jobs is no list of texts"),
        ({"jobs": ["algo=pm algo"]}, r"cannot read 'algo' \(in .*mine\.yaml\)"),
        ({"jobs": ["algo=pm sweep=rpo"]}, r"sweep=rpo is a sweep, and this is one run \(in .*mine\.yaml\)"),
        ({"jobs": ["algo=pmm"]}, r"algo=pmm does not exist \(in .*mine\.yaml\)\. The nearest choice is pm"),
        ({"jobs": ["algo=pm algo.bta=1,2"]}, r"job 1 of 2 \(algo\.bta=1\): unknown key algo\.bta"),
        ({"jobs": JOBS, "rank": 3}, "rank=3 is not a metric"),
        ({"jobs": JOBS, "rank": "pm/tw"}, r"rank=pm/tw cannot rank the jobs of a sweep\. .*Did you mean 'pm/tv'"),
        ({"jobs": JOBS, "rank": "kl/per_token"}, "neither a high nor a low value is better"),
        ({"jobs": JOBS, "objective": "pm/tv"}, "objective is for a sweeper .* Use rank"),
        ({"overrides": BASIC}, "overrides without objective"),
        ({"overrides": ["algo=pm"], "objective": "pm/tv"}, "overrides without hydra/sweeper"),
        ({"overrides": BASIC, "objective": "pm/tw"}, "objective=pm/tw cannot rank .*Did you mean 'pm/tv'"),
        ({"overrides": BASIC, "objective": "dpo_loss"}, "objective=dpo_loss is measured in training"),
        ({"overrides": BASIC, "objective": "sft/loss"}, "objective=sft/loss is measured in training"),
        ({"overrides": BASIC, "objective": "train/reward/mean"}, "train/reward/mean is measured in training"),
        ({"overrides": BASIC, "objective": "pm/divergence"}, "It is zero for a collapsed policy too"),
        ({"overrides": BASIC, "objective": "pm/tv", "direction": "min"}, "direction=min is not .*is minimize"),
        ({"overrides": BASIC, "objective": "reward/mean"}, "minimize makes reward/mean worse. .*direction: maximize"),
        ({"overrides": ["algo=pm", "algo.beta=interval(-1.0, 1.0)", BASIC[2]], "objective": "pm/tv"}, "algo.beta=-1.0"),
    ],
)
def test_refused_files(own: Write, content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        jobs.plan("align", ["sweep=mine"], own(**content))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep=pm_gird"], "sweep=pm_gird does not exist. The nearest choice is pm_grid"),
        (["sweep=pm_grid,rpo"], "sweep= names several sweeps"),
        (["sweep=pm_grid", "algo.bta=1"], "unknown key algo.bta .on the command line|unknown key algo.bta"),
        (["hydra/sweeper=optuna", "algo.beta=interval(0,1)"], "hydra/sweeper=optuna has no objective"),
        (["sweep=pm_grid", "hydra/sweeper=optuna"], "hydra/sweeper=optuna has no objective"),
    ],
)
def test_refused_commands(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        jobs.plan("align", overrides, None)


def test_a_missing_plugin_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "_is_installed", lambda _: False)
    with pytest.raises(ConfigError, match=r"hydra-optuna-sweeper is not installed\. pip install rlhf-cli\[optuna\]"):
        jobs.plan("align", ["sweep=optuna"], None)
    assert not sweeps.__dict__["_is_installed"]("hydra-optuna-sweeper")


# --- jobs and their names --------------------------------------------------------------------------------------


def test_what_is_typed_multiplies_and_replaces(own: Write) -> None:
    config_dir = own(jobs=JOBS)
    assert names(["sweep=mine"], config_dir) == ["algo=pm,algo.beta=0.5", "algo=pm,algo.beta=1", "algo=dpo"]
    assert names(["sweep=mine", "seed=0,1"], config_dir) == [
        *(f"algo=pm,algo.beta={beta},seed={seed}" for beta in (0.5, 1) for seed in (0, 1)),
        *(f"algo=dpo,seed={seed}" for seed in (0, 1)),
    ]
    assert jobs.expand("align", ["sweep=mine", "algo.beta=0.3", "seed=7"], config_dir) == [
        ["algo=pm", "algo.beta=0.3", "seed=7"],
        ["algo=dpo", "algo.beta=0.3", "seed=7"],
    ]


def test_names_do_not_depend_on_which_part_of_a_sweep_runs(own: Write) -> None:
    config_dir = own(jobs=["algo=pm algo.alpha=0.1,0.3 algo.beta=0.5,1", "algo=kl_ppo algo.beta=0.5,1"])
    everything = names(["sweep=mine"], config_dir)
    assert len(set(everything)) == len(everything) == 6
    assert set(names(["sweep=mine", "algo.beta=0.5"], config_dir)) < set(everything)


def test_what_all_grids_share_is_not_in_a_name(own: Write) -> None:
    config_dir = own(jobs=["algo=pm seed=3 generation.temperature=0.9", "algo=dpo seed=3 generation.temperature=0.9"])
    assert names(["sweep=mine"], config_dir) == ["algo=pm", "algo=dpo"]


def test_spaces_within_quotes_belong_to_a_value(own: Write) -> None:
    config_dir = own(jobs=["algo=pm run_dir='my runs' algo.beta=1"])
    assert jobs.expand("align", ["sweep=mine"], config_dir) == [["algo=pm", "run_dir='my runs'", "algo.beta=1"]]


def test_globs_work_in_a_file(own: Write) -> None:
    assert names(["sweep=mine"], own(jobs=["algo=glob(dp*)"])) == ["algo=dpm", "algo=dpo"]


def parsed(*overrides: str) -> list[Any]:
    return compose.parse(list(overrides))


def test_a_group_says_command_and_swept_keys_and_hides_places() -> None:
    group = group_name("align", parsed("algo=pm,dpo", "algo/constraint=none", "seed=0,1", "run_dir=a"))
    assert group is not None
    assert re.fullmatch(r"align-algo-x-seed-[0-9a-f]{8}", group)
    elsewhere = ["seed=0,1", "run_dir=b", "algo/constraint=none", "algo=pm,dpo", "tracker.project=p", "device=cpu"]
    assert group_name("align", parsed("algo=pm,dpo", "algo/constraint=none", "seed=0,1")) == group
    again = group_name("align", parsed(*elsewhere))
    assert again is not None
    assert again[-8:] == group[-8:], "the order as typed changes nothing"
    assert group_name("align", parsed("algo=pm,dpo", "seed=0,1", "algo.beta=2")) != group
    assert group_name("align", parsed("algo=pm", "seed=0")) is None
    assert len(str(group_name("align", parsed(*(f"algo.{chr(120) * 50}{n}=1,2" for n in range(5)))))) == 120


def test_the_group_of_a_named_sweep_is_its_name() -> None:
    assert sweeps.resolve(["sweep=rpo", "seed=0,1"], Catalog("align")).group == "rpo"


def test_run_names_are_short_and_say_what_differs() -> None:
    cfg = compose.load("align", ["seed=3"])
    shown = ["algo=pm", "algo.alpha=0.123456789", "algo/constraint=none", "seed=3", "experiment=quick", "device=cpu"]
    assert (
        run_name("align", cfg, parsed(*shown)) == "pm alpha=0.1235 constraint=none experiment=quick seed=3 survey tiny"
    )
    assert run_name("train-rm", cfg, parsed("reward=bt")) == "train-rm bt seed=3 survey tiny"
    assert run_name("train-sft", cfg, []) == "train-sft seed=3 survey tiny"
    evaluated = run_name("evaluate", cfg, parsed("policy=runs/pm-survey/model", "algo=pm"))
    assert evaluated == "evaluate pm policy=model seed=3 survey tiny"
    twice = run_name("align", cfg, parsed("trainer.sft.max_steps=5", "trainer.rm.max_steps=6"))
    assert twice == "pm trainer.sft.max_steps=5 trainer.rm.max_steps=6 seed=3 survey tiny"
    long = run_name("align", cfg, parsed(*(f"algo.key{n}={'x' * 20}" for n in range(9))))
    assert len(long) <= 120
    assert long.endswith("seed=3 survey tiny")


# --- the command -----------------------------------------------------------------------------------------------


def test_without_m_it_says_to_add_it(rlhf: Rlhf, stages: tuple[Align, Compare]) -> None:
    result = rlhf("align", "sweep=pm_grid")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: sweep=pm_grid is a sweep, and this is one run. Add -m: rlhf align -m sweep=pm_grid.\n"
    )
    assert not stages[0].seen


def test_cfg_job_prints_every_job_unless_a_sweeper_makes_them_up(rlhf: Rlhf, own: Write, sweeper: type) -> None:
    config_dir = str(own(jobs=JOBS))
    printed = rlhf("align", "-m", "--cfg", "job", "sweep=mine", "--config-dir", config_dir).output
    assert printed.count("---\nseed: ") == 3
    config_dir = str(own(overrides=BASIC, objective="heldout/pm/tv"))
    result = rlhf("align", "-m", "--cfg", "job", "sweep=mine", "--config-dir", config_dir)
    assert result.exit_code == 2
    assert "the jobs of this sweep cannot be listed. hydra/sweeper=fake chooses each" in result.stderr


def test_help_lists_sweeps_for_align_alone(rlhf: Rlhf, own: Write) -> None:
    listed = rlhf("align", "--help", "--config-dir", str(own(jobs=JOBS))).output
    assert re.search(r"  sweep +mine, optuna, pm_grid, pm_paper, rpo \(with -m\)\n", listed)
    assert "pm_grid" not in rlhf("train-rm", "--help").output


def test_a_sweep_runs_the_union_and_shows_what_failed(
    rlhf: Rlhf, stages: tuple[Align, Compare], own: Write, tmp_path: Path
) -> None:
    config_dir = own(jobs=["algo=pm algo.beta=0.5,9", "algo=dpo"], rank="gold/tv")
    result = rlhf("align", "-m", "sweep=mine", "run_dir=A", "seed=4", "--config-dir", str(config_dir))
    assert result.exit_code == 2
    align, compare = stages
    assert [(cfg.algo.name, cfg.algo.beta, cfg.seed, cfg.run_dir) for cfg in align.seen] == [
        ("pm", 0.5, 4, "A/algo=pm,algo.beta=0.5"),
        ("pm", 9.0, 4, "A/algo=pm,algo.beta=9"),
        ("dpo", 0.1, 4, "A/algo=dpo"),
    ]
    assert {cfg.tracker.group for cfg in align.seen} == {"mine"}
    assert [cfg.tracker.run_name for cfg in align.seen][::2] == [
        "pm beta=0.5 seed=4 survey tiny",
        "dpo seed=4 survey tiny",
    ]
    [(folders, options)] = compare.asked
    assert [folder.name for folder in folders] == ["algo=pm,algo.beta=0.5", "algo=pm,algo.beta=9", "algo=dpo"]
    assert options == {"failed": [], "rank": "gold/tv"}, "the failed one left its folder"
    assert "error: 1 of 3 jobs failed: algo=pm,algo.beta=9. " in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A", "own"], "nothing of Hydra's is left"


def test_outcomes_carry_reason_and_folder(stages: tuple[Align, Compare], tmp_path: Path) -> None:
    sweep = jobs.plan("align", ["algo.beta=9,1", f"run_dir={tmp_path}/A"], None)
    failed, finished = jobs.multirun("align", sweep, None)
    assert failed == {
        "job": "algo.beta=9",
        "run_dir": f"{tmp_path}/A/algo.beta=9",
        "failure": "user",
        "reason": "the reward is not finite. lower the learning rate.",
        "objective": None,
    }
    assert (finished["failure"], finished["reason"], finished["run_dir"]) == (None, None, f"{tmp_path}/A/algo.beta=1")


def test_a_group_and_name_of_ones_own_are_kept(rlhf: Rlhf, stages: tuple[Align, Compare]) -> None:
    assert rlhf("align", "-m", "seed=0,1", "tracker.group=g", "tracker.run_name=n").exit_code == 0
    assert {(cfg.tracker.group, cfg.tracker.run_name) for cfg in stages[0].seen} == {("g", "n")}


def test_a_job_that_two_grids_share_counts_once(stages: tuple[Align, Compare], own: Write) -> None:
    sweep = jobs.plan(
        "align", ["sweep=mine", "algo.beta=1"], own(jobs=["algo=pm algo.beta=1,2", "algo=pm algo.beta=3"])
    )
    assert [outcome["job"] for outcome in jobs.multirun("align", sweep, None)] == ["algo.beta=1"]


# --- sweepers --------------------------------------------------------------------------------------------------


class FakeSweeper(Sweeper):
    """A Hydra sweeper that tries three betas, and keeps what each job gave back."""

    __module__ = "hydra_plugins.fake"  # Hydra takes plugins from there alone
    told: list[Any] = []

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        fixed = [text for text in arguments if "interval" not in text]
        for number, beta in enumerate((1.0, 0.75, 9.0)):
            [done] = self.launcher.launch([[*fixed, f"++algo.beta={beta}"]], initial_job_idx=number)
            self.told.append(done.return_value)


@pytest.fixture
def sweeper(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeSweeper]]:
    """The fake, installed as a plugin would be: hydra/sweeper=fake."""
    plugins = Plugins.instance()  # looks for real ones first
    package = sys.modules.get("hydra_plugins") or ModuleType("hydra_plugins")
    module = ModuleType("hydra_plugins.fake")
    monkeypatch.setitem(sys.modules, "hydra_plugins", package)
    monkeypatch.setitem(sys.modules, "hydra_plugins.fake", module)
    monkeypatch.setattr(package, "fake", module, raising=False)
    monkeypatch.setattr(module, "FakeSweeper", FakeSweeper, raising=False)
    monkeypatch.setattr(FakeSweeper, "told", [])
    store = ConfigStore.instance()
    plugins.register(FakeSweeper)
    store.store(group="hydra/sweeper", name="fake", node={"_target_": "hydra_plugins.fake.FakeSweeper"})
    yield FakeSweeper
    del store.repo["hydra"]["sweeper"]["fake.yaml"]


def test_a_sweeper_is_told_the_final_metric_and_of_failures(
    rlhf: Rlhf, stages: tuple[Align, Compare], own: Write, sweeper: type[FakeSweeper]
) -> None:
    config_dir = own(overrides=BASIC, objective="heldout/pm/tv")
    result = rlhf("align", "-m", "sweep=mine", "--config-dir", str(config_dir))
    assert sweeper.told == [0.5, 0.25, None], "a failed job has no value"
    assert "best heldout/pm/tv of 2 jobs: 0.2500 (algo.beta=0.75)\n" in result.stdout
    assert stages[1].asked[0][1]["rank"] == "heldout/pm/tv", "the table too"
    assert result.exit_code == 2
    assert "1 of 3 jobs failed: algo.beta=9.0" in result.stderr
    assert {cfg.tracker.group for cfg in stages[0].seen} == {"mine"}


def test_the_best_is_the_largest_where_more_is_better() -> None:
    outcomes = [{"job": f"j{n}", "objective": value} for n, value in enumerate((0.1, None, 0.3))]
    assert jobs.best(outcomes, Sweep(((),), objective="reward/mean", direction="maximize")) == (
        "best reward/mean of 2 jobs: 0.3000 (j2)"
    )
    assert jobs.best(outcomes[1:2], Sweep(((),))) is None


def test_a_run_without_the_objective_is_a_failed_job(
    stages: tuple[Align, Compare], own: Write, sweeper: type[FakeSweeper]
) -> None:
    config_dir = own(overrides=BASIC, objective="eos_rate", direction="maximize")
    outcomes = jobs.multirun("align", jobs.plan("align", ["sweep=mine"], config_dir), config_dir)
    assert sweeper.told == [None] * 3
    assert outcomes[0]["failure"] == "user"
    assert outcomes[0]["reason"].startswith("eos_rate is not among the metrics of runs/1.")


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_optuna_goes_both_ways_and_survives_failed_jobs(
    stages: tuple[Align, Compare], own: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, direction: str
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(objective, "check", lambda sweep: None)  # of one metric both directions are tried
    setting = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=5", "hydra.sweeper.n_jobs=1"]
    setting += ["hydra.sweeper.sampler.seed=1"]

    def tried(beta: str) -> tuple[list[float], str | None, list[Any]]:
        config_dir = own(overrides=[*setting, beta], objective="heldout/gold/tv", direction=direction)
        sweep = jobs.plan("align", ["sweep=mine"], config_dir)
        stages[0].seen.clear()
        outcomes = jobs.multirun("align", sweep, config_dir)
        return [cfg.algo.beta for cfg in stages[0].seen], jobs.best(outcomes, sweep), outcomes

    betas, best, _ = tried("algo.beta=choice(0.25, 1, 9)")
    assert {0.25, 1.0, 9.0} == set(betas)
    winner = "0.2500 (algo.beta=0.25)" if direction == "minimize" else "1.0000 (algo.beta=1)"
    assert best == f"best heldout/gold/tv of 2 jobs: {winner}"
    assert tried("algo.beta=choice(0.25, 1, 9)")[0] == betas, "the same command asks for the same jobs"
    _, best, outcomes = tried("algo.beta=choice(9)")
    assert (best, [outcome["failure"] for outcome in outcomes]) == (None, ["user"]), "where all fail it ends in order"
