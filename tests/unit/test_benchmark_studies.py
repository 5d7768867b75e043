"""The studies: what they run, what they find of earlier runs, pages and pictures of made-up runs. None is trained."""

from __future__ import annotations

import importlib.util
import json
import sys
from math import log
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import yaml

from rlhf_cli.config import compose
from rlhf_cli.errors import ConfigError, RunError

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
DIALOGUES = "dataset.path=/nowhere/dialogues.jsonl"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as when it is run: its neighbours and its dataclasses find it
    spec.loader.exec_module(module)
    return module


figures = load("study_figures")
pages = load("study_pages")
studies = load("studies")


def asked(name: str, tmp_path: Path, *more: str):
    """Return what `studies.py NAME` asks for, in tmp_path."""
    file = [DIALOGUES] if name == "grid" else []
    return studies.parse([name, f"folder={tmp_path / 'runs'}", *file, *more])


def write_run(sweep, job, metrics: dict[str, float], log_lines: list[dict] | None = None, **status: str) -> Path:
    """Write a run folder as rlhf does; where in the sweep's folder it lies does not matter."""
    folder = sweep.asked.place / sweep.name / f"any-name-{job.label}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "status.json").write_text(json.dumps({"state": "finished", **status}))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    places = {"run_dir": str(folder), "store_dir": "elsewhere", "tracker": {"name": "none"}, "device": "cpu"}
    (folder / "config.yaml").write_text(yaml.safe_dump({**job.config, **places}))
    (folder / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log_lines or []))
    if "hh" not in job.config["dataset"]["source"]:
        (folder / "distributions.json").write_text(json.dumps([distribution(), distribution(heldout=True)]))
    return folder


def distribution(**changes) -> dict:
    row = {"heldout": False, "people": [0.5, 0.3, 0.2], "reward_model": [0.6, 0.3, 0.1]}
    row |= {"reference": [0.2, 0.5, 0.2], "reference_offset": 0.1, "optimum": [0.5, 0.4, 0.1]}
    return row | {"policy": [0.4, 0.3, 0.1], "policy_offset": 0.2} | changes


def run_of(algo: dict, metrics: dict | None = None, log_lines: list[dict] | None = None):
    config = {"algo": algo, "dataset": {"gold_offset_reward": -5.0}}
    return figures.Run(
        config, metrics or {}, log_lines or [], [distribution(), distribution(heldout=True, policy=[1, 0, 0])]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No study is named. Give one of collapse, overoptimisation, grid"),
        (["colapse"], "'colapse' is no study"),
        (["collapse", "quik=true"], "'quik' is no argument"),
        (["collapse", "dry="], "dry has no value"),
        (["collapse", "dry=yes"], "dry=yes is neither true nor false"),
        (["grid"], "The study grid needs a file of dialogues"),
        (["collapse", "dataset.path=x"], "The study collapse reads no file"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        studies.parse(arguments)
    assert studies.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"folder=.*file cannot be a folder"):
        studies.parse(["collapse", f"folder={tmp_path / 'file'}"])


@pytest.fixture
def two_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose fewer configs."""
    assert studies.SEEDS == (0, 1, 2)
    monkeypatch.setattr(studies, "SEEDS", (0, 1))


# collapse: 6 betas and 5 alphas; overoptimisation: DPO and 3 reductions x 3 etas; grid: 3 betas and 3 x 3; two seeds
@pytest.mark.usefixtures("two_seeds")
@pytest.mark.parametrize(("name", "runs", "quick"), [("collapse", 22, 5), ("overoptimisation", 20, 7), ("grid", 24, 5)])
def test_every_job_is_a_valid_config_and_neighbours_share_no_open_stage(
    name: str, runs: int, quick: int, tmp_path: Path
) -> None:
    full, short = asked(name, tmp_path), asked(name, tmp_path, "quick=true")
    sweeps = studies.plan(full)
    jobs = [job for sweep in sweeps for job in sweep.jobs()]
    assert len({(job.label, job.seed) for job in jobs}) == len(jobs) == runs
    assert sum(len(sweep.jobs()) for sweep in studies.plan(short)) == quick
    assert {sweep.seed for sweep in studies.plan(short)} == {0}
    assert all(one.seed != other.seed for one, other in zip(sweeps, sweeps[1:], strict=False))
    assert len({json.dumps(job.config, sort_keys=True) for job in jobs}) == runs  # composed, so valid
    assert full.place != short.place
    assert (full.table.parent, short.table.parent) == (studies.RESULTS, tmp_path / "runs")


@pytest.mark.parametrize("name", ["collapse", "overoptimisation", "grid"])
def test_a_sweep_s_command_means_its_jobs(name: str, tmp_path: Path) -> None:
    from rlhf_cli import jobs

    for sweep in studies.plan(asked(name, tmp_path, "quick=true")):
        command = sweep.command()
        assert command[2:5] == ["rlhf_cli.cli", "align", "-m"]
        meant = [
            studies.without_places(compose.as_dict(compose.load("align", job)))
            for job in jobs.expand("align", command[5:], None)
        ]
        assert meant == [job.config for job in sweep.jobs()]


def test_finished_runs_are_known_by_their_config_wherever_they_lie(tmp_path: Path) -> None:
    sweeps = studies.plan(asked("collapse", tmp_path, "quick=true"))
    first, second, third = (sweeps[0].jobs())[:3]
    folder = write_run(sweeps[0], first, {"pm/tv": 0.1})
    write_run(sweeps[0], second, {}, state="interrupted")
    other = write_run(sweeps[0], third, {"pm/tv": 0.2})
    config = yaml.safe_load((other / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump({**config, "seed": 7}))
    state = studies.folders(sweeps)
    assert state[first] == folder
    assert [job for job, found in state.items() if found is not None] == [first]
    lines = studies.list_jobs(sweeps, state)
    assert f"    kl_ppo β=1: finished, {folder}" in lines
    assert "    kl_ppo β=0.2: to do" in lines
    assert lines[-1].startswith("5 runs, 4 to do: about 2 minutes")


def test_a_dry_run_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(studies.subprocess, "run", lambda *_, **__: pytest.fail("something was started"))
    assert studies.main(["overoptimisation", "dry=true", f"folder={tmp_path / 'runs'}"]) == 0
    out = capsys.readouterr().out
    assert out.count("rlhf align -m ") == 12
    assert "rpo seq_mean η=0.005: to do" in out
    assert not (tmp_path / "runs").exists()


def test_a_failed_sweep_is_shown_and_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = asked("collapse", tmp_path, "quick=true")
    kl, pm = studies.plan(ask)

    def start(command: list[str], **_: object) -> SimpleNamespace:
        sweep = next((each for each in (kl, pm) if command == each.command()), None)
        if sweep is kl:
            kl.beside(".log").write_text("line\n" * 20 + "error: the reason\n")
            return SimpleNamespace(returncode=1)
        if sweep is pm:
            for job in pm.jobs():
                write_run(pm, job, {"pm/tv": 0.1})
        return SimpleNamespace(returncode=0)  # rlhf compare too

    monkeypatch.setattr(studies.subprocess, "run", start)
    assert studies.main(["collapse", "quick=true", f"folder={ask.folder}"]) == 1
    out = capsys.readouterr().out
    assert out.count("error: the reason") == 1
    assert out.count("line") == 14
    page = ask.table.read_text(encoding="utf-8")
    assert "**Missing**, because they failed: kl_ppo β=1, seed 0; kl_ppo β=0.2, seed 0;" in page.replace("\n", " ")
    assert "2 of 5 runs" in page
    assert "| pm α=0.02 | 0.100 |" in page
    assert len(studies.spans(kl)) == len(studies.spans(pm)) == 1
    assert ask.image.stat().st_size > 5000


def test_an_interruption_starts_no_further_sweep(tmp_path: Path) -> None:
    sweeps, started = studies.plan(asked("overoptimisation", tmp_path)), []

    def run(sweep) -> bool:
        started.append(sweep)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        studies.execute(sweeps, run)
    assert len(started) < len(sweeps)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_gold_reward_is_the_run_s_own_or_from_its_distributions() -> None:
    # the held-out wording does not count: .4 log .5 + .3 log .3 + .1 log .2 - .2 * 5
    expected = 0.4 * log(0.5) + 0.3 * log(0.3) + 0.1 * log(0.2) - 1
    assert figures.gold_reward(run_of({"name": "dpo"})) == pytest.approx(expected)
    assert figures.gold_reward(run_of({"name": "dpo"}, {"gold/reward": -1.5})) == -1.5
    of_reference = 0.2 * log(0.5) + 0.5 * log(0.3) + 0.2 * log(0.2) - 0.5
    assert figures.gold_reward(run_of({"name": "dpo"}, {"gold/reward": -1.5}), "reference") == pytest.approx(
        of_reference
    )


def test_kl_s_optimum_from_shares() -> None:
    # reference .2, .5, .2 times q = .6, .3, .1 to the power of 1 / beta
    at_1, at_half = (figures.closed_form(distribution(), beta) for beta in (1.0, 0.5))
    assert at_1 == pytest.approx(np.array([0.12, 0.15, 0.02]) / 0.29)
    assert at_half == pytest.approx(np.array([0.072, 0.045, 0.002]) / 0.119)
    assert figures.closed_form(distribution(reference=[0.0, 0.5, 0.5]), 1.0)[0] == 0
    # against q: (.1 + .1 + 0) / 2, and all but the first
    assert figures.target_distance(distribution(), np.array([0.5, 0.4, 0.1])) == pytest.approx((0.1, 0.5))
    assert figures.optimum_distance(run_of({"name": "pm"})) == pytest.approx(0.1)


def test_the_first_curve_that_the_log_has_is_read() -> None:
    lines = [
        {"step": 0, "loss": 1.0},
        {"step": 10, "train/chosen_logps_change": -1.0},
        {"step": 20, "gold/reward": None},
    ]
    run = run_of(
        {"name": "dpo"}, log_lines=[*lines, {"step": 20, "gold/reward": -2.0}, {"step": 40, "gold/reward": -3.0}]
    )
    assert run.curve(("chosen_logps_change", "train/chosen_logps_change")) == [(10, -1.0)]
    assert figures.gold_curve(run) == [(20, -2.0), (40, -3.0)]
    assert (pages.best_gold(run), pages.best_gold_step(run)) == (-2.0, 20)
    assert pages.best_gold(run_of({"name": "dpo"})) is None


def test_a_cell_is_a_mean_with_student_s_interval() -> None:
    # mean 2, sd 1, n 3: 4.303 / sqrt 3
    assert pages.cell([1.0, 2.0, 3.0]) == "2.000 ± 2.484"
    assert pages.cell([8379.4]) == "8379"
    assert pages.cell([-0.0001]) == "0.000"
    assert pages.cell([]) == "–"


def test_a_flagged_setting_has_no_place_by_the_divergence() -> None:
    def runs(tv: float, divergence: float, crossed: float):
        metrics = {"pm/tv": tv, "pm/divergence": divergence, "guard/crossed": crossed}
        return {0: run_of({"name": "pm"}, metrics), 1: run_of({"name": "pm"}, {**metrics, "guard/crossed": 0.0})}

    found = {"good": runs(0.1, 0.5, 0), "collapsed": runs(0.6, 0.1, 1), "far": runs(0.4, 2.0, 0)}
    places = pages.places(found)
    assert places["place by TV"] == {"good": "1", "far": "2", "collapsed": "3"}
    assert places["by divergence"] == {"good": "1", "far": "2", "collapsed": "–"}
    assert places["were none flagged"] == {"collapsed": "1", "good": "2", "far": "3"}
    assert pages.flagged(found["collapsed"]) == "**1 of 2**"
    assert pages.flagged(found["good"]) == "no"


def test_changes_against_the_baseline_are_paired_by_seed() -> None:
    def runs(values: dict[int, float]):
        return {seed: run_of({"name": "pm"}, {"pm/tv": value}) for seed, value in values.items()}

    found = {"kl_ppo β=0.1": runs({0: 0.5, 1: 0.2}), "pm": runs({0: 0.25, 1: 0.1}), "other": runs({2: 0.1})}
    changes = pages.against_baseline(found)["TV against KL β=0.1"]
    assert changes == {"kl_ppo β=0.1": "–", "pm": "-50.0 % ± 0.0", "other": "–"}
    assert set(pages.against_baseline({"pm": runs({0: 0.1})})["TV against KL β=0.1"].values()) == {"–"}


def test_wall_time_is_the_union_of_the_sweeps() -> None:
    # [0, 10] and [5, 12] overlap, [3, 4] lies inside, the pause to 20 is not counted: 12 + 5
    assert pages.elapsed([[5, 12], [0, 10], [20, 25], [3, 4]]) == 17


# -- whole pages -------------------------------------------------------------------------------------------------------

MADE_UP = {
    "pm/tv", "pm/kl_rm_policy", "pm/minority_mass", "pm/minority_mass_target", "pm/minority_coverage", "pm/divergence",
    "pm/offset_mass", "pm/rank_correlation", "reward/mean", "kl/sequence", "entropy/per_token", "reference/pm/tv",
    "gold/tv", "chosen_logps_change", "optimum/tv", "win_rate/rm", "win_rate/gold",
}  # fmt: skip


# 0.2 and 0.25: mean 0.225, sd 0.05 / sqrt 2, and so 12.706 * 0.05 / 2
@pytest.mark.usefixtures("two_seeds")
@pytest.mark.parametrize(
    ("name", "row"),
    [("collapse", "| kl_ppo β=0.2 | 0.225 ± 0.318 |"), ("overoptimisation", "| rpo seq_mean η=1 |"),
     ("grid", "| pm α=0.1 β=0.5 | 0.225 ± 0.318 |")],
)  # fmt: skip
def test_the_page_the_numbers_and_the_picture_come_from_the_runs(
    name: str, row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = asked(name, tmp_path)
    for sweep in studies.plan(ask):
        for job in sweep.jobs():
            values = dict.fromkeys(MADE_UP, 0.2 + job.seed / 20) | {"guard/crossed": 0.0}
            lines = [{"step": step, "reward/mean": step / 10, "gold/reward": -2.0 - step / 40} for step in (0, 20, 40)]
            write_run(sweep, job, values, lines)
        studies.write_json(sweep.beside(".spans.json"), {"spans": [[0, 600]]})
    monkeypatch.setattr(studies, "execute", lambda sweeps: pytest.fail("a run is repeated") if sweeps else None)
    monkeypatch.setattr(studies, "compare", lambda *_: True)
    for place in ("RESULTS", "IMAGES"):
        monkeypatch.setattr(studies, place, tmp_path / place.lower())
    file = [DIALOGUES] if name == "grid" else []
    assert studies.main([name, f"folder={ask.folder}", *file]) == 0
    page = (tmp_path / "results" / f"studies_{name}.md").read_text(encoding="utf-8")
    count = len([job for sweep in studies.plan(ask) for job in sweep.jobs()])
    words = page.replace("\n", " ")
    assert row in page
    assert f"{count} of {count} runs" in words
    assert ": 10 minutes." in words
    assert "nan" not in page
    assert str(tmp_path) not in page
    assert "nowhere" not in page
    assert "Missing" not in page
    numbers = (tmp_path / "results" / f"studies_{name}.csv").read_text(encoding="utf-8").splitlines()
    assert numbers[0] == "setting,seed,column,value"
    assert len(numbers) > 4 * count
    assert (tmp_path / "images" / f"study_{name}.png").stat().st_size > 20_000


def test_pictures_do_without_what_the_runs_do_not_have() -> None:
    algos = {"collapse": {"name": "kl_ppo", "beta": 1.0}, "overoptimisation": {"name": "dpo", "beta": 0.1}}
    for name in ("collapse", "overoptimisation", "grid"):
        run = run_of(algos.get(name, {"name": "pm", "alpha": 0.1, "beta": 1.0}))
        assert figures.figure(name, {"one": {0: run}}).axes
        assert "| one |" in "\n".join(pages.table(name, {"one": {0: run}}))
