"""A job for Slurm: the sbatch script of one command, and its submission."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from rlhf_cli.config.launching import SlurmConfig
from rlhf_cli.errors import RunError

HEAD = 'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
# Jobs that share a machine must not meet at one port.
PORT = "port=$((20000 + SLURM_JOB_ID % 20000))"


def here(words: list[str]) -> list[str]:
    """Return a command's overrides without those that say how it is started: they are for the cluster."""
    return [word for word in words if not word.lstrip("+").startswith(("launch=", "launch."))]


def command_line(command: str, words: list[str]) -> str:
    """Return the command as a shell takes it, by the Python that runs now: the cluster sees the same folders."""
    return shlex.join([sys.executable, "-m", "rlhf_cli.cli", command, *here(words)])


def script(command: str, words: list[str], launch: SlurmConfig, device: str) -> str:
    """Return the sbatch script: one task a machine, which starts that machine's ranks."""
    alone = launch.processes * launch.machines == 1
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in _options(command, launch, device))]
    lines += ["set -eo pipefail", *launch.setup]  # no -u: scripts that activate an environment read unset variables
    asked = "launch=local" if alone else f"launch=accelerate launch.processes={launch.processes}"
    asked += "" if alone else f" launch.strategy={launch.strategy}"
    job = f"{command_line(command, words)} {asked}"
    if launch.machines > 1:
        lines += [HEAD, PORT, "export head port"]
        job += f" launch.machines={launch.machines} launch.machine_rank=$SLURM_NODEID"
        job += " launch.main_address=$head launch.main_port=$port"
        job = f"bash -c {shlex.quote('exec ' + job)}"
    # srun does not take over the cores of the job by itself (Slurm 22.05 on).
    lines += [f"srun --kill-on-bad-exit=1 --cpus-per-task={_cores(launch)} {job}"]
    return "\n".join(lines) + "\n"


def _cores(launch: SlurmConfig) -> int:
    return launch.processes * launch.cpus_per_process


def _options(command: str, launch: SlurmConfig, device: str) -> list[str]:
    given = {"partition": launch.partition, "account": launch.account, "mem": launch.memory}
    return [
        f"--job-name=rlhf-{command}",
        f"--nodes={launch.machines}",
        "--ntasks-per-node=1",
        *([] if device == "cpu" else [f"--gpus-per-node={launch.processes}"]),
        f"--cpus-per-task={_cores(launch)}",
        f"--time={launch.time}",
        f"--output={shlex.quote(launch.log_dir)}/%j.log",
        *(f"--{name}={value}" for name, value in given.items() if value is not None),
        *launch.options,
    ]


def submit(command: str, words: list[str], launch: SlurmConfig, device: str) -> str:
    """Queue the job, or only show its script, and return what to tell the user.

    Raises:
        RunError: there is no sbatch here, or it refuses the job.
    """
    text = script(command, words, launch, device)
    if launch.dry_run:
        return text.rstrip()
    if shutil.which("sbatch") is None:
        todo = "run this where jobs are submitted, or add launch.dry_run=true to see the script"
        raise RunError("launch=slurm needs the program sbatch, and there is none here", "", todo)
    folder = Path(launch.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["sbatch", "--parsable"], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(
            "sbatch refuses the job", done.stderr or done.stdout, "add launch.dry_run=true to see the script"
        )
    number = done.stdout.strip().partition(";")[0]
    (folder / f"{number}.sh").write_text(text, encoding="utf-8")
    return f"submitted as job {number}; it prints into {folder}/{number}.log. Follow it: squeue -j {number}"
