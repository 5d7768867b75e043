"""What one rank of a launched job does: the stage, as this process's share. Run as `python -m rlhf_cli.rank_job`."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from rlhf_cli import ranks
from rlhf_cli.launch import failures

PR_SET_PDEATHSIG = 1  # linux/prctl.h
ENDED = "ended, because another rank failed or the job was stopped"


def main() -> None:
    """Run the job whose folder is the only argument."""
    scratch = Path(sys.argv[1])
    tempfile.tempdir = str(scratch)  # what a rank makes for itself is removed with it, though the rank was killed
    _end_with_parent()
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGINT, _interrupted)
    if not ranks.is_main():
        _print_into(scratch / f"rank-{ranks.rank()}.log")
    try:
        folder = _stage(json.loads((scratch / "job.json").read_text(encoding="utf-8")))
        of_main = ranks.gather(str(folder))[0]  # one that is done waits: it leaves none alone that still computes
        failures.leave(scratch, {"failure": None, "run_dir": of_main})
        ranks.disconnect()
    except Exception as error:
        failures.leave(scratch, failures.described(error))
        _leave(2 if failures.described(error)["failure"] == "user" else 1)
    except KeyboardInterrupt:
        _leave(130)
    except SystemExit:
        _leave(143)


def _stage(job: dict[str, Any]) -> Path:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command sets it
    from rlhf_cli import jobs
    from rlhf_cli.config import compose

    config_dir = None if job["config_dir"] is None else Path(job["config_dir"])
    cfg = compose.load(job["command"], job["overrides"], config_dir)
    cfg.tracker.group, cfg.tracker.run_name = job["tracker"]["group"], job["tracker"]["run_name"]
    ranks.connect()
    return jobs.run_stage(job["command"], cfg, job["overrides"], config_dir)


def _end_with_parent() -> None:
    """Ask Linux to end this rank with the process that has started it, however that ends."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):  # another system
        return


def _terminated(number: int, frame: Any) -> NoReturn:
    _ignore_more()
    raise SystemExit(ENDED)


def _interrupted(number: int, frame: Any) -> NoReturn:
    _ignore_more()
    raise KeyboardInterrupt


def _ignore_more() -> None:
    """Let nothing but a kill disturb the end: it writes how far the run came."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _print_into(file: Path) -> None:
    """Send all that this process prints, libraries included, to a file."""
    target = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(target, stream.fileno())


def _leave(code: int) -> NoReturn:
    """End at once: a pending collective would hold the interpreter's own end up."""
    ranks.drop_private()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
