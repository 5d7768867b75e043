"""What Slurm and Ray are handed: golden scripts and command lines, and what is refused or said of a submission."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from rlhf_cli import ranks
from rlhf_cli.config.launching import RayConfig
from rlhf_cli.launch import ray

MULTI = """#!/bin/bash
#SBATCH --job-name=rlhf-align
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=runs/slurm/%j.log
#SBATCH --partition=gpu
#SBATCH --qos=high
set -eo pipefail
module load cuda
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
export head port
srun --kill-on-bad-exit=1 --cpus-per-task=64 bash -c 'exec PYTHON -m rlhf_cli.cli align algo=pm peft=lora \
launch=accelerate launch.processes=8 launch.strategy=fsdp2 launch.machines=2 launch.machine_rank=$SLURM_NODEID \
launch.main_address=$head launch.main_port=$port'
"""
ONE = """#!/bin/bash
#SBATCH --job-name=rlhf-train-sft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=runs/slurm/%j.log
set -eo pipefail
srun --kill-on-bad-exit=1 --cpus-per-task=8 PYTHON -m rlhf_cli.cli train-sft 'tracker.tags=[a,b]' launch=local
"""


@pytest.fixture(autouse=True)
def python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "PYTHON")
    monkeypatch.delenv(ranks.LAUNCHED, raising=False)


def program(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program in front of PATH."""
    (folder / "bin").mkdir()
    file = folder / "bin" / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=":")


def test_a_slurm_script_for_several_machines(rlhf: Callable[..., Result]) -> None:
    words = ["algo=pm", "peft=lora", "launch=slurm", "launch.processes=8", "launch.machines=2"]
    words += ["launch.strategy=fsdp2", "launch.partition=gpu", "launch.dry_run=true"]
    words += ["launch.options=['--qos=high']", "launch.setup=['module load cuda']"]
    result = rlhf("align", *words)
    assert result.exit_code == 0, result.output
    assert result.stdout == MULTI


def test_a_slurm_script_for_one_gpu_starts_no_ranks(rlhf: Callable[..., Result]) -> None:
    result = rlhf("train-sft", "tracker.tags=[a,b]", "launch=slurm", "launch.dry_run=true")
    assert result.stdout == ONE


def test_a_job_without_gpus_asks_for_none(rlhf: Callable[..., Result]) -> None:
    result = rlhf("train-sft", "device=cpu", "launch=slurm", "launch.log_dir=my logs", "launch.dry_run=true")
    assert "gpus" not in result.stdout
    assert "#SBATCH --output='my logs'/%j.log\n" in result.stdout
    assert "--entrypoint-num-gpus=0 " in rlhf("train-sft", "device=cpu", "launch=ray", "launch.dry_run=true").stdout


def test_a_submission_names_the_job_and_its_log(
    rlhf: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, "sbatch", 'cat > got.sh; echo "4711;cluster"', monkeypatch)
    result = rlhf("train-sft", "tracker.tags=[a,b]", "launch=slurm")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("submitted as job 4711; it prints into runs/slurm/4711.log.")
    assert Path("got.sh").read_text() == Path("runs/slurm/4711.sh").read_text() == ONE


def test_a_refused_submission_is_one_line(
    rlhf: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, "sbatch", "echo 'invalid partition' >&2; exit 1", monkeypatch)
    result = rlhf("train-sft", "launch=slurm", "launch.partition=nowhere")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: sbatch refuses the job. invalid partition. ")


@pytest.mark.parametrize("where", ["slurm", "ray"])
def test_without_the_clusters_program_it_says_so(
    rlhf: Callable[..., Result], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    result = rlhf("train-sft", f"launch={where}")
    assert result.exit_code == 2
    assert "launch.dry_run=true" in result.stderr


def test_a_ray_job_is_one_command_in_this_folder(rlhf: Callable[..., Result], tmp_path: Path) -> None:
    words = ["launch=ray", "launch.processes=4", "launch.strategy=zero3", "launch.options=[--no-wait]"]
    result = rlhf("align", "algo=dpo", *words, "launch.dry_run=true")
    assert result.exit_code == 0, result.output
    job = "exec PYTHON -m rlhf_cli.cli align algo=dpo launch=accelerate launch.processes=4 launch.strategy=zero3"
    assert result.stdout == (
        "ray job submit --address=http://127.0.0.1:8265 --entrypoint-num-gpus=4 --entrypoint-num-cpus=32 --no-wait -- "
        f"bash -c 'cd {tmp_path} && {job}'\n"
    )


@pytest.mark.parametrize(
    "word", ["${seed} `date` $HOME", 'a "b" c', "back\\slash", '\\" \\\\"', "it's", "ends with \\"]
)
def test_what_ray_hands_to_a_shell_arrives_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    program(tmp_path, "shown", "printf '%s\\n' \"$4\"", monkeypatch)  # -m rlhf_cli.cli align WORD
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "shown"))
    asked = {"address": "here", "strategy": "ddp", "processes": 1, "cpus_per_process": 1, "options": []}
    line = ray.words_of("align", [word], RayConfig(name="ray", **asked, dry_run=False), "cpu")
    joined = subprocess.list2cmdline(line[line.index("--") + 1 :])  # as `ray job submit` does
    assert subprocess.run(joined, shell=True, capture_output=True, text=True, check=True).stdout == f"{word}\n"


def test_a_ray_job_that_fails_is_told(
    rlhf: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, "ray", "exit 3", monkeypatch)
    result = rlhf("train-sft", "launch=ray")
    assert result.exit_code == 2
    assert "ray job submit ended with exit code 3" in result.stderr


def test_a_sweep_goes_to_a_cluster_through_hydra(rlhf: Callable[..., Result]) -> None:
    result = rlhf("align", "-m", "algo=pm,dpo", "launch=slurm")
    assert result.exit_code == 2
    assert "launch=slurm is for one job, and -m is for many" in result.stderr
    assert "hydra/launcher=submitit_slurm" in result.stderr


def test_a_policy_is_measured_by_several_on_a_cluster(rlhf: Callable[..., Result]) -> None:
    result = rlhf("evaluate", "policy=null", "launch=slurm", "launch.processes=4", "launch.dry_run=true")
    assert result.exit_code == 0, result.output
    assert "rlhf_cli.cli evaluate policy=null launch=accelerate launch.processes=4 " in result.stdout


def test_data_are_read_in_one_process(rlhf: Callable[..., Result]) -> None:
    result = rlhf("data", "launch=accelerate")
    assert result.exit_code == 2
    assert result.stderr == "error: launch=accelerate does not go with data. It reads in one process. Leave it out.\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launch.strategy=fsdp2", "device=cpu"], "launch.strategy=fsdp2 does not go with device=cpu"),
        (["launch.processes=0"], "launch.processes=0 .* is out of range"),
        (["launch.machines=2"], "launch.main_address is null with launch.machines=2"),
        (["launch.machines=2", "launch.main_address=a"], "launch.processes is null with launch.machines=2"),
        (["launch.machine_rank=1"], "launch.machine_rank=1 is not below launch.machines=1"),
        (["launch.strategy=fsdp"], "launch.strategy=fsdp .* is not a choice. The nearest choice is fsdp2"),
    ],
)
def test_a_launch_that_cannot_be_is_refused(rlhf: Callable[..., Result], words: list[str], message: str) -> None:
    result = rlhf("train-sft", "launch=accelerate", *words)
    assert result.exit_code == 2
    assert re.search(message, result.stderr), result.stderr


def test_a_launcher_without_its_plugin_says_what_to_install(
    rlhf: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_cli.config import sweeps

    monkeypatch.setattr(sweeps, "_is_installed", lambda package: False)
    result = rlhf("align", "-m", "algo=pm,dpo", "hydra/launcher=submitit_slurm")
    assert result.exit_code == 2
    assert "pip install rlhf-cli[submitit]" in result.stderr
