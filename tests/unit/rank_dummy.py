"""A rank of a dummy job: `rlhf_cli.rank_job` with a stage that does what the job's command says, without models."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rlhf_cli import rank_job, ranks
from rlhf_cli.errors import DataError


def stage(job: dict[str, Any]) -> Path:
    """Do what the command of the job says; of two ranks, 1 is the one that fails."""
    folder, what = Path(job["overrides"][0]), job["command"]
    if what.startswith("connected"):
        ranks.connect()
    (ranks.private(folder) / "own").touch()
    meet(folder)
    sys.stdout.write(f"rank {ranks.rank()} has {os.environ['OMP_NUM_THREADS']} threads\n")
    if what == "both refuse":
        raise DataError("there is no data", "the file is empty", "name another")
    if ranks.rank() == 1:
        fail(what)
    if what == "connected kill":
        ranks.barrier()  # as a collective of a training step waits
    elif what != "connected":
        time.sleep(300)
    return folder


def meet(folder: Path) -> None:
    """Wait until both ranks are here."""
    (folder / f"pid-{ranks.rank()}").write_text(str(os.getpid()))
    while len(list(folder.glob("pid-*"))) < ranks.world():
        time.sleep(0.01)


def fail(what: str) -> None:
    """Fail in one of the ways that there are."""
    if what.endswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "bug":
        raise ZeroDivisionError("a bug\nin two lines")
    if what == "refuse":
        raise DataError("there is no data", "the file is empty", "name another")
    if what == "exit":
        os._exit(7)


if __name__ == "__main__":
    rank_job._stage = stage
    rank_job.main()
