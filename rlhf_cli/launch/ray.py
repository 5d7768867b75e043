"""A job for a Ray cluster: the command line of `ray job submit`, and its submission."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

from rlhf_cli.config.launching import RayConfig
from rlhf_cli.errors import RunError
from rlhf_cli.launch.slurm import command_line


def words_of(command: str, words: list[str], launch: RayConfig, device: str) -> list[str]:
    """Return the words of `ray job submit`: one machine's GPUs for one command, run in this very folder."""
    asked = f"launch=accelerate launch.processes={launch.processes} launch.strategy={launch.strategy}"
    job = f"{command_line(command, words)} {asked if launch.processes > 1 else 'launch=local'}"
    gpus = 0 if device == "cpu" else launch.processes
    return [
        *("ray", "job", "submit", f"--address={launch.address}", f"--entrypoint-num-gpus={gpus}"),
        f"--entrypoint-num-cpus={launch.processes * launch.cpus_per_process}",
        *launch.options,
        *("--", "bash", "-c", _literal(f"cd {shlex.quote(str(Path.cwd()))} && exec {job}")),
    ]


def _literal(word: str) -> str:
    r"""Return `word`, which has spaces, so that it arrives as it is.

    Ray puts it between double quotes by subprocess.list2cmdline, which sees to " and to each \ before one, and has a
    shell read the line, to which \, $ and ` mean something too.
    """
    return re.sub(r'(\\+(?="|\Z))|([\\$`])', lambda found: found[1] or f"\\{found[2]}", word)


def submit(command: str, words: list[str], launch: RayConfig, device: str) -> str:
    """Hand the job to the cluster, or only show how, and return what to tell the user; Ray's own output is shown.

    Raises:
        RunError: Ray is not installed, or refuses the job, or the job fails while Ray shows its output.
    """
    line = words_of(command, words, launch, device)
    if launch.dry_run:
        return shlex.join(line)
    if shutil.which("ray") is None:
        todo = "pip install rlhf-cli[ray], or add launch.dry_run=true to see the command"
        raise RunError("launch=ray needs the program ray, and there is none here", "", todo)
    code = subprocess.run(line, check=False).returncode
    if code:
        raise RunError(f"ray job submit ended with exit code {code}", "It says why above", "Mend it and submit again")
    return f"Ray at {launch.address} has the job"
