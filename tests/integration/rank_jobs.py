"""Several small jobs, one after another, as one of several ranks; run by test_ranks.py, since starting ranks is slow.

What `launch=accelerate` does for one job, here for all of those in the file that the only argument names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from conftest import PIXEL

from rlhf_cli import jobs, ranks
from rlhf_cli.stages import results, trust


def main(plan: Path) -> None:
    torch.set_num_threads(1)
    results.preference_bars = lambda rows, path, **_: path.write_bytes(PIXEL)
    results.curves = lambda lines, path, keys: path.write_bytes(PIXEL)
    results.pair_figure = lambda pairs, path: bool(path.write_bytes(PIXEL))
    trust.trust_figure = lambda panels, path, **_: path.write_bytes(PIXEL)
    ranks.connect()
    for command, overrides in json.loads(plan.read_text(encoding="utf-8")):
        jobs.run_one(command, overrides, None)
    ranks.barrier()
    ranks.disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
