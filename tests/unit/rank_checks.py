"""What one of two real processes finds with rlhf_cli.ranks; run by test_ranks.py, prints json."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(folder: Path) -> None:
    from rlhf_cli import ranks

    me = ranks.rank()
    found: dict[str, object] = {"rank": me, "local_rank": ranks.local_rank(), "world": ranks.world()}
    found["is_main"] = ranks.is_main()
    found["broadcast"] = ranks.broadcast({"run": "a"} if me == 0 else None)
    found["gather"] = ranks.gather(f"of {me}")
    found["average"] = ranks.average({"loss": 1.0 + me, f"only_{me}": 5.0}, weight=1 + 2 * me)
    found["idle"] = ranks.average({"loss": float("nan") if me else 3.0}, weight=1 - me)
    if me == 0:
        time.sleep(0.5)
        (folder / "late").touch()
    ranks.barrier()
    found["after_barrier"] = (folder / "late").exists()
    found["on_main"] = ranks.on_main(lambda: me + 40)
    found["main_first"] = ranks.main_first(lambda: once(folder, me))
    found |= dealt(folder, me)
    import torch.distributed as dist
    from accelerate import PartialState

    found["backend"], found["accelerate"] = dist.get_backend(), PartialState().num_processes
    ranks.disconnect()
    found["left"] = not dist.is_initialized()
    sys.stdout.write(json.dumps(found))


def dealt(folder: Path, me: int) -> dict[str, object]:
    """Return what comes of parts that the ranks deal out, which this one computed, and rows that a memo keeps."""
    import numpy as np

    from rlhf_cli import ranks
    from rlhf_cli.measure.memo import Memo
    from rlhf_cli.store import Store

    mine: list[int] = []

    def square(part: int) -> list[int]:
        mine.append(part)
        return [part**2, ranks.world(), ranks.rank(), *ranks.gather(part)]  # it waits for nobody

    found: dict[str, object] = {"dealt": list(ranks.dealt(range(5), square)), "mine": mine, "after": ranks.world()}
    asked: list[list[int]] = []

    def compute(indices: list[int]) -> list[dict[str, np.ndarray]]:
        asked.append(indices)
        return [{"value": np.array(index)} for index in indices]

    for again in range(2):  # the second time from the store
        rows = Memo(Store(folder / "store")).rows(
            "rows", {}, 7, compute, order=[6, 5, 4, 3, 2, 1, 0], piece=2, label=""
        )
        found[f"rows {again}"] = [int(row["value"]) for row in rows]
    return {**found, "asked": asked}


def once(folder: Path, me: int) -> str:
    """Return who made the file that both want."""
    made = folder / "cache"
    if not made.exists():
        made.write_text(str(me))
    return made.read_text()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
