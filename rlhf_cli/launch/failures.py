"""How ranks end: each leaves its outcome in a file, and of several failures the one that began it is told, once."""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli import ranks
from rlhf_cli.errors import RUN_FOLDER, RankError, UserError

# What a rank says when another one has gone: gloo, NCCL, the store.
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Socket closed",
    "recvValue failed",
    "sendBytes failed",
    "DistNetworkError",
    "DistBackendError",
    "DistStoreError",
    "NCCL error",
    "ncclRemoteError",
    "Gloo connectFullMesh failed",
    "gloo/transport",
    "TCPStore",
)
ENDED = (-signal.SIGTERM, 128 + signal.SIGTERM, 130)  # exit codes of ranks that were told to end
PATIENCE = 20  # seconds; the agent kills ranks that do not end within 30
RESUME = "The same command goes on from the last checkpoint"


@dataclass(frozen=True)
class Exit:
    """How a process ended: its exit code (below 0: the signal that killed it) and when, in seconds."""

    code: int
    time: float


def leave(scratch: Path, outcome: dict[str, Any]) -> None:
    """Write down how this rank ended, for the process that has started it."""
    file = scratch / f"rank-{ranks.rank()}.json"
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps({"time": time.time(), **outcome}), encoding="utf-8")
    os.replace(partial, file)


def described(error: BaseException) -> dict[str, Any]:
    """Return an error as an outcome."""
    notes = [note for note in getattr(error, "__notes__", []) if note.startswith(RUN_FOLDER)]
    if isinstance(error, UserError):
        return {"failure": "user", "said": [error.what, error.why, error.todo], "notes": notes}
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    text = "".join(traceback.format_exception(error)).rstrip()
    return {"failure": "bug", "reason": reason, "text": text, "notes": notes}


def settle(scratch: Path, exits: dict[int, Exit], *, machines: int) -> str:
    """Return the run folder, which rank 0 has told the others.

    Args:
        scratch: where the ranks of this machine left their outcomes.
        exits: those that were found dead first.
        machines: how many there are; another's failure is told there.

    Raises:
        UserError: a rank's.
        RankError: a rank broke or was killed.
    """
    left = {int(file.stem[5:]): json.loads(file.read_text(encoding="utf-8")) for file in scratch.glob("rank-*.json")}
    failed = {rank: outcome for rank, outcome in left.items() if outcome.get("failure")}
    if not exits and not failed:
        return str(next(iter(left.values()))["run_dir"])
    silent = {rank: found for rank, found in exits.items() if rank not in failed}
    first = min([found.time for found in exits.values()], default=0.0)
    order = sorted(
        [(_place(outcome), outcome["time"], rank) for rank, outcome in failed.items()]
        + [(_place_of_exit(found, first), found.time, rank) for rank, found in silent.items()]
    )
    rank = order[0][2]
    error = _killed(rank, silent[rank]) if rank in silent else _error(rank, failed[rank], machines, scratch)
    for note in {note for outcome in failed.values() for note in outcome["notes"]}:
        error.add_note(note)
    raise error


def _place_of_exit(found: Exit, first: float) -> int:
    """Return how likely a rank that left no word only followed another: 0 not at all, 5 surely."""
    if found.code in ENDED or (found.code == -signal.SIGKILL and found.time > first + PATIENCE):
        return 5
    return 3 if found.code == -signal.SIGABRT else 0  # NCCL's watchdog aborts ranks that have lost another


def _place(outcome: dict[str, Any]) -> int:
    """Return how likely an error follows from another rank's: 1 hardly, 4 surely."""
    if outcome["failure"] == "user":
        return 1
    return 4 if any(sign in outcome["text"] for sign in LOST) else 2


def _killed(rank: int, found: Exit) -> RankError:
    if found.code >= 0:
        what, why = f"rank {rank} ended with exit code {found.code} and said nothing", ""
    else:
        what = f"rank {rank} was killed by {signal.Signals(-found.code).name}"
        why = ". That is how Linux ends what takes too much memory" if -found.code == signal.SIGKILL else ""
    return RankError(f"{what}{why}. All ranks were ended. {RESUME}.")


def _error(rank: int, outcome: dict[str, Any], machines: int, scratch: Path) -> Exception:
    if outcome["failure"] == "user":
        return UserError(*outcome["said"])
    reason = f"rank {rank} failed: {outcome['reason']}"
    if _place(outcome) == 4:
        where = "on another machine, which tells why" if machines > 1 else f"and left no reason; see {scratch}"
        reason = f"rank {rank} lost the others: one has ended, {where}"
        return RankError(reason, f"{outcome['text']}\nerror: {reason}. {RESUME}.")
    return RankError(reason, f"{outcome['text']}\nerror: rank {rank} failed as shown. All ranks were ended.")
