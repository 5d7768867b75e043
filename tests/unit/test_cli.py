from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import Result

from rlhf_cli import __version__, jobs
from rlhf_cli.config.catalog import PACKAGE, conf_dir
from rlhf_cli.config.validate import COMMANDS
from rlhf_cli.errors import DataError

Rlhf = Callable[..., Result]


class Stage(ModuleType):
    """Stands in for a stage module: remembers its configs, and fails where it is told to."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list = []
        self.config_dirs: list = []
        self.failures: dict[str, BaseException] = {}

    def run(self, cfg, overrides: list[str], config_dir: str | None) -> Path:
        self.calls.append((cfg, overrides))
        self.config_dirs.append(config_dir)
        if cfg.__class__.__name__ == "AlignConfig" and cfg.algo.name in self.failures:
            raise self.failures[cfg.algo.name]
        return Path(cfg.run_dir or f"runs/{len(self.calls)}")


class Compare(ModuleType):
    """Stands in for the comparison: remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__("compare")
        self.calls: list = []
        self.options: list = []

    def run(self, run_dirs, out=None, **options) -> None:
        self.calls.append((list(run_dirs), out))
        self.options.append(options)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Stage]:
    import rlhf_cli.stages

    fakes = {name: Stage(name) for name in ("train_sft", "train_rm", "align", "evaluate")} | {"compare": Compare()}
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, f"rlhf_cli.stages.{name}", fake)
        monkeypatch.setattr(rlhf_cli.stages, name, fake, raising=False)
    return fakes


def test_version(rlhf: Rlhf) -> None:
    assert rlhf("--version").output == f"rlhf {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_choices_of_every_group_and_two_examples(rlhf: Rlhf, command: str) -> None:
    text = rlhf(command, "--help").output
    groups = ["model", "trainer", "dataset", "tracker", "experiment"]
    groups += [] if command == "train-sft" else ["reward"]
    groups += ["algo", "algo/constraint", "generation"] if command in {"align", "evaluate"} else []
    section = text.split("Config groups")[1].split("Examples")[0].partition("\n")[2]
    unwrapped = re.sub(r"\n {3,}", " ", section)  # a long list of choices takes several lines
    listing = {line.split()[0]: line for line in unwrapped.splitlines() if line.strip()}
    for group in groups:
        for path in (conf_dir() / group).glob("*.yaml"):
            assert re.search(rf"\b{path.stem}\b", listing[group])
    assert ("algo" in listing) == (command in {"align", "evaluate"})
    assert text.count(f"  rlhf {command}") >= 2


def test_help_lists_a_users_choices(rlhf: Rlhf, tmp_path: Path) -> None:
    (tmp_path / "own/algo").mkdir(parents=True)
    (tmp_path / "own/algo/mine.yaml").write_text("name: mine\n")
    assert "mine" in rlhf("align", "--help", "--config-dir", str(tmp_path / "own")).output
    assert "mine" not in rlhf("align", "--help").output


def test_help_and_typo_are_quick() -> None:
    for args, code, limit in ((["--help"], 0, 0.5), (["align", "algo.bta=1"], 2, 1.5)):
        took = []
        for _ in range(3):
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-m", "rlhf_cli.cli", *args], capture_output=True)
            took.append(time.perf_counter() - start)
            assert done.returncode == code
        assert min(took) < limit


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_its_stage(rlhf: Rlhf, stages: dict[str, Stage], command: str) -> None:
    result = rlhf(command, "seed=3", "+dataset.seed=1", "run_dir=A")
    assert result.exit_code == 0, result.output
    [(cfg, overrides)] = stages[command.replace("-", "_")].calls
    assert (cfg.seed, cfg.dataset.seed, cfg.run_dir) == (3, 1, "A")
    assert overrides == ["seed=3", "+dataset.seed=1", "run_dir=A"]
    assert result.stderr.count("\n") == 1
    assert f"rlhf {command}: " in result.stderr
    assert "model=tiny trainer=survey dataset=survey seed=3" in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_cfg_job_prints_and_runs_nothing(rlhf: Rlhf, stages: dict[str, Stage], command: str) -> None:
    result = rlhf(command, "--cfg", "job", "seed=3")
    assert result.exit_code == 0
    assert result.output.startswith("seed: 3\nrun_dir: null\n")
    assert not stages[command.replace("-", "_")].calls


def test_cfg_job_of_a_multirun_prints_each_job(rlhf: Rlhf, stages: dict[str, Stage]) -> None:
    output = rlhf("align", "-m", "--cfg", "job", "algo=pm,dpo", "seed=0,1").output
    assert output.count("---\nseed: ") == 4
    assert not stages["align"].calls


def test_a_users_mistake_is_one_line_and_exit_code_2(rlhf: Rlhf, stages: dict[str, Stage]) -> None:
    result = rlhf("align", "algo.bta=1")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: unknown key algo.bta (set on the command line). The nearest valid key is algo.beta.\n"
    )
    stages["align"].failures["pm"] = DataError("the file is empty")
    result = rlhf("align")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, "error: the file is empty.")


def test_interruption_and_bugs(rlhf: Rlhf, stages: dict[str, Stage]) -> None:
    stages["align"].failures["pm"] = KeyboardInterrupt()
    result = rlhf("align")
    assert result.exit_code == 130
    assert result.stderr.endswith("interrupted: run the same command again to go on\n")
    stages["align"].failures["pm"] = ZeroDivisionError("a bug")
    assert isinstance(rlhf("align").exception, ZeroDivisionError)


def test_evaluate_hands_on_the_runs_overrides(rlhf: Rlhf, stages: dict[str, Stage], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    content = {"command": "align", "overrides": ["algo=dpo", "run_dir=run"], "config_dir": None}
    (tmp_path / "run/overrides.json").write_text(json.dumps(content))
    assert rlhf("evaluate", "policy=run").exit_code == 0
    [(cfg, overrides)] = stages["evaluate"].calls
    assert (cfg.algo.name, overrides) == ("dpo", ["algo=dpo", "policy=run"])


# --- multirun --------------------------------------------------------------------------------------------------


def test_multirun_runs_every_job_in_its_own_subfolder(rlhf: Rlhf, stages: dict[str, Stage], tmp_path: Path) -> None:
    result = rlhf("align", "-m", "algo=kl_ppo,pm", "seed=0,1", "algo.beta=0.5", "run_dir=A")
    assert result.exit_code == 0, result.output
    seen = [(cfg.algo.name, cfg.seed, cfg.algo.beta, cfg.run_dir) for cfg, _ in stages["align"].calls]
    assert seen == [(algo, seed, 0.5, f"A/algo={algo},seed={seed}") for algo in ("kl_ppo", "pm") for seed in (0, 1)]
    overrides = stages["align"].calls[1][1]
    assert overrides == ["algo=kl_ppo", "seed=1", "algo.beta=0.5", "run_dir='A/algo=kl_ppo,seed=1'"]
    folders = [Path(run_dir) for *_, run_dir in seen]
    assert stages["compare"].calls == [(folders, Path("A"))]
    assert list(tmp_path.iterdir()) == []


def test_multirun_without_run_dir_leaves_names_to_the_jobs(rlhf: Rlhf, stages: dict[str, Stage]) -> None:
    assert rlhf("align", "-m", "seed=0,1").exit_code == 0
    assert [cfg.run_dir for cfg, _ in stages["align"].calls] == [None, None]
    [(folders, out)] = stages["compare"].calls
    assert folders == [Path("runs/1"), Path("runs/2")]
    assert out.parent == Path("runs")
    assert out.name.startswith("compare-")


def test_only_align_compares(rlhf: Rlhf, stages: dict[str, Stage]) -> None:
    assert rlhf("train-sft", "-m", "seed=0,1").exit_code == 0
    assert len(stages["train_sft"].calls) == 2
    assert stages["compare"].calls == []


def test_a_bad_value_in_the_last_job_is_refused_before_the_first(rlhf: Rlhf, stages: dict[str, Stage]) -> None:
    result = rlhf("align", "-m", "algo=pm,dpo", "seed=0,x")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: job 2 of 4 (algo=pm,seed=x): seed=x ")
    assert result.stderr.count("\n") == 1
    assert stages["align"].calls == []


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (["algo=pm,pmm"], "job 2 of 2 .algo=pmm.: algo=pmm does not exist"),
        (["algo=pm,dpo", "algo.alpha=0.1"], "job 2 of 2 .algo=dpo.: algo.alpha .* It is a key of algo=dpm"),
        (["algo.beta=interval(0,1)"], "this sweep needs a sweeper plugin"),
        (["seed=0,1", "hydra/launcher=nowhere"], "Could not find 'hydra/launcher/nowhere'"),
    ],
)
def test_refused_sweeps(rlhf: Rlhf, stages: dict[str, Stage], sweep: list[str], message: str) -> None:
    import re

    result = rlhf("align", "-m", *sweep)
    assert result.exit_code == 2
    assert re.search(message, result.stderr)
    assert result.stderr.count("\n") == 1
    assert stages["align"].calls == []


def test_a_failed_job_does_not_stop_the_others(rlhf: Rlhf, stages: dict[str, Stage]) -> None:
    stages["align"].failures["dpo"] = DataError("no pairs are left")
    result = rlhf("align", "-m", "algo=dpo,pm,rpo")
    assert result.exit_code == 2
    assert [cfg.algo.name for cfg, _ in stages["align"].calls] == ["dpo", "pm", "rpo"]
    assert "error: algo=dpo: no pairs are left.\n" in result.stderr
    assert "error: 1 of 3 jobs failed: algo=dpo. " in result.stderr
    assert "Traceback" not in result.stderr
    assert len(stages["compare"].calls[0][0]) == 2
    assert stages["compare"].options == [{"failed": [("algo=dpo", "no pairs are left.")], "rank": None}], (
        "it left no folder"
    )


def test_a_bug_in_a_job_keeps_its_traceback(rlhf: Rlhf, stages: dict[str, Stage]) -> None:
    stages["align"].failures["dpo"] = ZeroDivisionError("a bug")
    result = rlhf("align", "-m", "algo=dpo,pm")
    assert result.exit_code == 1
    assert [cfg.algo.name for cfg, _ in stages["align"].calls] == ["dpo", "pm"]


def test_interruption_ends_a_multirun(rlhf: Rlhf, stages: dict[str, Stage]) -> None:
    stages["align"].failures["dpo"] = KeyboardInterrupt()
    result = rlhf("align", "-m", "algo=dpo,pm")
    assert result.exit_code == 130
    assert len(stages["align"].calls) == 1


def test_glob_sweeps_over_the_choices(rlhf: Rlhf, stages: dict[str, Stage]) -> None:
    assert rlhf("align", "-m", "algo=glob(dp*)").exit_code == 0
    assert [cfg.algo.name for cfg, _ in stages["align"].calls] == ["dpm", "dpo"]


def test_multirun_with_a_users_directory(rlhf: Rlhf, stages: dict[str, Stage], tmp_path: Path) -> None:
    (tmp_path / "own/experiment").mkdir(parents=True)
    (tmp_path / "own/experiment/mine.yaml").write_text("# @package _global_\nseed: 9\n")
    result = rlhf("align", "-m", "experiment=mine,quick", "--config-dir", "own")
    assert result.exit_code == 0, result.output
    assert [cfg.seed for cfg, _ in stages["align"].calls] == [9, 0]
    assert stages["align"].config_dirs == [str(tmp_path / "own")] * 2
    assert rlhf("align", "experiment=mine", "--config-dir", "own").exit_code == 0
    assert stages["align"].config_dirs[2] == str(tmp_path / "own")


def test_evaluating_several_runs_takes_each_ones_overrides(
    rlhf: Rlhf, stages: dict[str, Stage], tmp_path: Path
) -> None:
    for algo in ("dpo", "rpo"):
        (tmp_path / algo).mkdir()
        content = {"command": "align", "overrides": [f"algo={algo}"], "config_dir": None}
        (tmp_path / f"{algo}/overrides.json").write_text(json.dumps(content))
    assert rlhf("evaluate", "-m", "policy=dpo,rpo").exit_code == 0
    assert [cfg.algo.name for cfg, _ in stages["evaluate"].calls] == ["dpo", "rpo"]


def test_job_names_are_safe_and_distinct() -> None:
    sweep = ["dataset=hh_rlhf", "dataset.path=a/b,a_b"]
    names = [jobs.job_name(["dataset=hh_rlhf", f"dataset.path={path}"], sweep) for path in ("a/b", "a_b")]
    assert names[0].startswith("dataset.path=a_b-")
    assert names[1] == "dataset.path=a_b"
    long = jobs.job_name([f"run_dir={'x' * 500}"], [])
    assert len(long) < 140


# --- compare, data ---------------------------------------------------------------------------------------------


def test_compare_hands_on_its_folders(rlhf: Rlhf, stages: dict[str, Stage]) -> None:
    assert rlhf("compare", "a", "b", "--out", "c").exit_code == 0
    assert rlhf("compare", "a").exit_code == 0
    assert stages["compare"].calls == [(["a", "b"], Path("c")), (["a"], None)]
    assert rlhf("compare", "runs/**", "--baseline", "pm", "--rank", "gold/tv", "--wandb").exit_code == 0
    assert stages["compare"].calls[2] == (["runs/**"], None)
    assert stages["compare"].options[1:] == [
        {"baseline": None, "rank": None, "wandb": False},
        {"baseline": "pm", "rank": "gold/tv", "wandb": True},
    ]


def test_data_prints_the_world(rlhf: Rlhf) -> None:
    few, many = (rlhf("data", f"dataset.questions={count}") for count in (2, 3))
    assert few.exit_code == 0
    assert "3. " in many.output
    assert "3. " not in few.output


def test_data_summarises_a_file(rlhf: Rlhf, tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(200)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = rlhf("data", "dataset=preferences", "dataset.path=pairs.jsonl")
    assert result.exit_code == 0, result.output
    assert "\n       20  heldout_pairs   metrics, never trained on\n" in result.output


# --- packaging -------------------------------------------------------------------------------------------------

ROOT = PACKAGE.parent


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert set(listed) == there | {"rlhf_cli.conf"}


def test_wheel_holds_every_yaml(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    source.mkdir()
    import shutil

    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_text((ROOT / name).read_text(encoding="utf-8") if (ROOT / name).exists() else "")
    for name in ("rlhf_cli", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    [wheel] = (source / "out").glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"rlhf_cli/conf/{path.relative_to(conf_dir()).as_posix()}" for path in conf_dir().rglob("*.yaml")}
    expected |= {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.yaml")}
    assert len(expected) > 10
    assert expected <= inside
