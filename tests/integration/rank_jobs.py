"""Several small jobs, one after another, as one of several ranks; run by test_ranks.py, since starting ranks is slow.

What `launch=accelerate` does for one job, here for all of those in the file that the only argument names.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import rank_shards
import torch
from accelerate import DistributedType, PartialState
from conftest import PIXEL
from torch.distributed.fsdp import FSDPModule

from rlhf_cli import jobs, ranks
from rlhf_cli.measure import sampled
from rlhf_cli.stages import results, trust
from rlhf_cli.trainers.common import Reporter

DRAWN = 16  # sequences drawn at a time: few, so that there is something to deal out


def main(file: Path) -> None:
    plan = json.loads(file.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    sampled.DRAWN = DRAWN
    results.preference_bars = lambda rows, path, **_: path.write_bytes(PIXEL)
    results.curves = lambda lines, path, keys: path.write_bytes(PIXEL)
    results.pair_figure = lambda pairs, path: bool(path.write_bytes(PIXEL))
    trust.trust_figure = lambda panels, path, **_: path.write_bytes(PIXEL)
    if plan["shard"]:
        call_it_gpus()
        watch_gradients(file.with_name(f"gradients-{ranks.rank()}.txt"))
    ranks.connect()
    if plan["kill"] and not plan["shard"]:
        found = rank_shards.found()
        file.with_name(f"shards-{ranks.rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    if plan["kill"]:
        kill_rank_1(*plan["kill"])
    for command, overrides in plan["jobs"]:
        jobs.run_one(command, overrides, None)
    ranks.barrier()
    ranks.disconnect()


def call_it_gpus() -> None:
    """Let accelerate take this for GPUs: on CPUs it falls back to DDP, though PyTorch shards there too."""
    init = PartialState.__init__

    def called(self: PartialState, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = called


def watch_gradients(file: Path) -> None:
    """Write after each micro-batch but a step's last how many numbers of whole gradients split weights have."""

    def watching(self: Reporter, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        groups = [module._get_fsdp_state()._fsdp_param_group for module in model.modules() if is_split(module)]
        weights = [weight for group in groups if group is not None for weight in group.fsdp_params]
        assert weights, "nothing is split"
        whole = [weight.unsharded_accumulated_grad for weight in weights]
        whole += [weight._unsharded_param.grad for weight in weights if hasattr(weight, "_unsharded_param")]
        with file.open("a", encoding="utf-8") as lines:
            lines.write(f"{sum(gradient.numel() for gradient in whole if gradient is not None)}\n")

    Reporter.on_substep_end = watching


def is_split(module: Any) -> bool:
    return isinstance(module, FSDPModule)


def kill_rank_1(title: str, step: int) -> None:
    """Let rank 1 kill itself after a step of the trainer with this title."""
    on_step_end = Reporter.on_step_end

    def killing(self: Reporter, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_step_end(self, args, state, control, **kwargs)
        if ranks.rank() == 1 and self.title == title and state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Reporter.on_step_end = killing


if __name__ == "__main__":
    main(Path(sys.argv[1]))
