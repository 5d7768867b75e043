"""The experiments on reward models: their runs, and tables and verdicts from fabricated numbers. Nothing is trained."""

from __future__ import annotations

import importlib.util
import json
import sys
from math import log
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from rlhf_cli.config import compose
from rlhf_cli.errors import ConfigError, RunError
from rlhf_cli.metrics.glossary import known

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "reward_models.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reward_models", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reward_models"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


bench = load()


def write_run(job, metrics: dict[str, float], state: str = "finished") -> None:
    """Write what the benchmark reads of a run."""
    job.run_dir.mkdir(parents=True, exist_ok=True)
    (job.run_dir / "status.json").write_text(json.dumps({"state": state}))
    (job.run_dir / "metrics.json").write_text(json.dumps(metrics))
    (job.run_dir / "distributions.json").write_text(json.dumps([distribution()]))


def distribution(**changes) -> dict:
    row = {"heldout": False, "people": [0.5, 0.5], "policy": [0.75, 0.05], "policy_offset": 0.2}
    return row | {"reference": [1.0, 0.0], "reference_offset": 0.0} | changes


def every_metric(asked, value: float) -> dict[str, float]:
    """Return a number for every column of an experiment that comes from metrics.json."""
    columns = [*bench.EXPERIMENTS[asked.experiment].columns.values(), *bench.POLICY.values(), "reference/gold/tv"]
    columns += [f"rm/{of}_{name}{end}" for of, end in (("member", "/mean"), ("ensemble", "")) for name in MEMBER_KEYS]
    return {key: value for key in columns if key != "gold_reward"}


MEMBER_KEYS = ("accuracy", "log_loss", "ece")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No experiment is named. Give one of pcrm, calibration, warm"),
        (["warn"], "'warn' is no experiment"),
        (["quick=true", "warm"], "'quick=true' is no experiment"),
        (["warm", "quik=true"], "'quik' is no argument"),
        (["warm", "--quick"], "--quick has no value"),
        (["warm", "quick=1"], "quick=1 is neither true nor false"),
        (["warm", "folder="], "folder has no value"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.parse(arguments)
    assert bench.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"folder=.*file cannot be a folder"):
        bench.parse(["pcrm", f"folder={tmp_path / 'file'}"])


def test_quick_is_one_seed_whose_tables_stay_in_the_folder(tmp_path: Path) -> None:
    quick, full = bench.parse(["warm", "quick=true", f"folder={tmp_path}"]), bench.parse(["warm", f"folder={tmp_path}"])
    assert (quick.seeds, quick.results) == ((0,), tmp_path)
    assert (full.seeds, full.results) == ((0, 1, 2), FILE.parent / "results")
    assert bench.parse(["warm"]).folder == Path("runs/reward_models")
    dirs = [{job.run_dir for job in bench.plan(asked)} for asked in (quick, full)]
    assert not dirs[0] & dirs[1]  # another config must not meet the same run folder
    stores = [part for job in bench.plan(quick) for part in job.command() if part.startswith("store_dir=")]
    assert set(stores) == {f"store_dir={tmp_path / 'store'}"}


# pcrm: 5 losses x 3 seeds x (2 settings + 2 algorithms); calibration: 2 x 3 x 4; warm: 3 x 3 x (1 + 2)
@pytest.mark.parametrize(("experiment", "runs"), [("pcrm", 60), ("calibration", 24), ("warm", 27)])
def test_reward_models_come_first_and_neighbours_share_no_open_stage(experiment: str, runs: int) -> None:
    plan = bench.plan(bench.Asked(experiment))
    stages = [job.stage == "rm" for job in plan]
    assert len({job.run_dir for job in plan}) == len(plan) == runs
    assert stages == sorted(stages, reverse=True)
    assert all(one.seed != next_one.seed for one, next_one in zip(plan, plan[1:], strict=False))
    assert all({f"seed={job.seed}", f"dataset.seed={job.seed}"} < set(job.command()) for job in plan)


def test_every_kind_of_command_is_a_valid_config(tmp_path: Path) -> None:
    plan = [job for name in bench.EXPERIMENTS for job in bench.plan(bench.Asked(name, quick=True, folder=tmp_path))]
    for job in ({j.method: j for j in plan} | {j.stage: j for j in plan} | {j.setting: j for j in plan}).values():
        command, *overrides = job.command()[3:]
        cfg = compose.load(command, overrides)
        assert (Path(cfg.run_dir), cfg.dataset.pairs) == (job.run_dir, 3000 if job.setting == "few" else 40000)


def test_every_column_is_a_metric_of_the_glossary() -> None:
    columns = [*bench.POLICY.values(), *(key for each in bench.EXPERIMENTS.values() for key in each.columns.values())]
    assert [key for key in columns if not known(key)] == ["gold_reward"]


def test_gold_reward_weighs_log_shares_and_what_is_off_the_set() -> None:
    # 0.75 log 0.5 + 0.05 log 0.5 - 0.2 * 5; the held-out question does not count
    rows = [distribution(), distribution(heldout=True, policy=[0.0, 0.0], policy_offset=1.0)]
    assert bench.gold_reward(rows) == pytest.approx(0.8 * log(0.5) - 1)
    assert bench.gold_reward(rows, "people") == pytest.approx(log(0.5))
    assert bench.gold_reward([distribution(), distribution(policy=[0, 1], policy_offset=0)]) == pytest.approx(
        (0.8 * log(0.5) - 1 + log(0.5)) / 2
    )


def test_a_cell_is_mean_and_sample_standard_deviation() -> None:
    # mean 2, deviations -1, 0, 1: variance 2 / (3 - 1) = 1
    rows = [{"rm/ece": value} for value in (1.0, 2.0, 3.0)]
    lines = bench.table({"bt": rows}, {"ECE": "rm/ece", "δ*/2": "rm/bound/half"})
    assert lines == ["| | ECE | δ*/2 |", "|---|---|---|", "| bt | 2.000 ± 1.000 | - |"]
    assert bench.spread([2.0]) == "2.000"


@pytest.mark.parametrize(
    ("key", "differences", "expected"),
    [
        # mean -0.2, sd 0.05: t = 0.2 / (0.05 / sqrt 3) = 6.93 > 4.30
        ("gold/tv", [-0.15, -0.2, -0.25], ("better", " (lower in 3 of 3)")),
        ("rm/accuracy", [-0.15, -0.2, -0.25], ("worse", " (lower in 3 of 3)")),
        ("gold_reward", [0.15, 0.2, 0.25], ("better", " (higher in 3 of 3)")),
        ("length/mean", [0.15, 0.2, 0.25], ("changed", " (higher in 3 of 3)")),
        ("gold/tv", [-0.1, -0.2, -0.3], ("no clear difference", " (lower in 3 of 3)")),  # sd 0.1: t = 3.46
        ("gold/tv", [0.0, 0.0, 0.3], ("no clear difference", " (higher in 1 of 3)")),
        ("gold/tv", [-0.01, 1.0, 1.0], ("no clear difference", " (higher in 2 of 3)")),
        ("gold/tv", [0.0, 0.0, 0.0], ("no clear difference", "")),
        ("gold/tv", [-0.5], ("one seed, no verdict", "")),
    ],
)
def test_a_difference_is_clear_where_its_interval_leaves_out_0(
    key: str, differences: list[float], expected: tuple
) -> None:
    assert bench.verdict(key, differences) == expected


def test_differences_are_paired_by_seed() -> None:
    # Seeds lie far apart (sd 10), and yet every one of them is lower by 1, 1 and 1.3: mean -1.1, sd 0.173
    base = [{"gold/tv": v, "reward/mean": 0.0, "pm/tv": v} for v in (0.0, 10.0, 20.0)]
    ours = [{"gold/tv": v, "reward/mean": 9.0} for v in (-1.0, 9.0, 18.7)]
    line = bench.compare("pm with x", ours, base, bench.POLICY)
    assert line == "- pm with x. better: gold/tv -1.100 ± 0.173 (lower in 3 of 3)."


def test_wall_time_is_the_union_of_the_runs() -> None:
    # [0, 10] and [5, 12] overlap, [3, 4] lies inside, the pause to 20 is not counted: 12 + 5
    assert bench.elapsed([[5, 12], [0, 10], [20, 25], [3, 4]]) == 17


def test_seconds_add_up_over_attempts_and_a_finished_run_adds_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = bench.plan(bench.Asked("warm", quick=True, folder=tmp_path))[0]
    codes = iter([1, 0, 0])
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=next(codes)))
    assert bench.run_job(job) is False
    write_run(job, {}, state="interrupted")
    assert bench.run_job(job) is True
    assert len(bench.spans(job)) == 2
    write_run(job, {})
    assert bench.run_job(job) is True  # rlhf says so itself; a changed config is its to refuse
    assert len(bench.spans(job)) == 2


def test_a_finished_run_of_the_same_config_is_not_started_again(tmp_path: Path) -> None:
    job = bench.plan(bench.Asked("warm", quick=True, folder=tmp_path))[0]
    command, *overrides = job.command()[3:]
    assert not bench.is_finished(job)
    write_run(job, {})
    config = job.run_dir / "config.yaml"
    config.write_text(compose.dump(compose.load(command, overrides)))
    assert bench.is_finished(job)
    config.write_text(compose.dump(compose.load(command, [*overrides, "reward.clip=4"])))
    assert not bench.is_finished(job)  # left to rlhf, which refuses
    config.write_text(compose.dump(compose.load(command, overrides)))
    write_run(job, {}, state="running")
    assert not bench.is_finished(job)


def test_a_failed_reward_model_leaves_its_policies_out_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = bench.Asked("warm", quick=True, folder=tmp_path)
    ran = []

    def run_job(job) -> bool:
        ran.append(job.name)
        job.run_dir.mkdir(parents=True, exist_ok=True)
        job.beside(".log").write_text("line\n" * 20 + "error: the reason\n")
        return not job.name.startswith("few/bt-rm")

    failed = bench.execute(bench.plan(asked), run_job)
    assert sorted(job.name for job in failed) == [f"few/bt-{stage}/seed0" for stage in ("kl_ppo", "pm", "rm")]
    assert sorted(ran)[0] == "few/bt-rm/seed0"
    assert len(ran) == 9 - 2
    out = capsys.readouterr().out
    assert out.count("error: the reason") == 1
    assert out.count("line") == 14
    monkeypatch.setattr(bench, "run_job", run_job)
    monkeypatch.setattr(bench, "execute", lambda jobs: failed)
    assert bench.main(["warm", "quick=true", f"folder={tmp_path}"]) == 1
    assert not list(tmp_path.glob("reward_models_*"))


@pytest.mark.parametrize("experiment", ["pcrm", "calibration", "warm"])
def test_the_page_has_its_tables_from_the_runs_numbers(
    experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = bench.Asked(experiment, folder=tmp_path / "runs")
    for job in bench.plan(asked):
        gain = 0.0 if job.method == "bt" else 0.1
        write_run(job, every_metric(asked, job.seed / 10 + gain))
        bench.write_json(job.beside(".spans.json"), {"spans": [[0, 60]]})
    monkeypatch.setattr(bench, "is_finished", lambda job: True)
    monkeypatch.setattr(bench, "execute", lambda jobs: jobs)
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results")
    assert bench.main([experiment, f"folder={tmp_path / 'runs'}"]) == 0
    page = (tmp_path / "results" / f"reward_models_{experiment}.md").read_text(encoding="utf-8")
    other = bench.EXPERIMENTS[experiment].methods[1]
    policy = f"- pm with `{other}` against `bt`. worse: gold/tv +0.100 ± 0.000 (higher in 3 of 3), pm/tv"
    # bt: 0, 0.1, 0.2; the other: 0.1 more
    assert "| 0.100 ± 0.100 |" in page
    assert "| 0.200 ± 0.100 |" in page
    assert policy in page
    assert f"`python benchmarks/reward_models.py {experiment}`\n" in page
    assert f"1.0 minutes, {len(bench.plan(asked))}.0 summed over the runs." in page
    assert ("Prediction ensemble against the mean of its members. no clear difference" in page) == (
        experiment == "warm"
    )
    assert ("default world: 40000 pairs" in page) == (experiment != "warm")
    table = (tmp_path / "results" / f"reward_models_{experiment}.csv").read_text(encoding="utf-8")
    assert f"few,{other},pm,2,gold/tv,0.300000\n" in table
