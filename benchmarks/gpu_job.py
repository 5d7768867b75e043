"""Runs updates of `rlhf align` in this process and says what their phases took; `benchmarks/gpu.py` calls it.

    python benchmarks/gpu_job.py REPORT.json UPDATES [--memory] [OVERRIDES]

The models are put together and trained by the code of `rlhf align`; the trainer's own methods are wrapped by a clock.
Only measures, checkpoints and the tracker are left out. The first update is not counted: it warms up, and AdamW's
moments come to be in it. Memory is the peak of PyTorch's tensors on a GPU. On a CPU it is measured with --memory alone,
since that takes time: the peak of the tensors, and of resident memory above what there was before the first weights
were read (Linux: the kernel's high-water mark is reset).
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from gpu_arithmetic import GENERATE, LOGPS, REST, SCORE, UPDATE, limits, synchronise
from resident import RESET_PEAK, resident
from transformers import PrinterCallback

from rlhf_cli.models.meter import Meter

MEMORY = "--memory"
PLACES = {"_generate_single_turn": GENERATE, "_calculate_rewards": SCORE, "_read": LOGPS, "training_step": UPDATE}


class Phases:
    """Seconds and peak memory of each phase of each update; what lies within another does not count for that one."""

    def __init__(self, device: str, before: float) -> None:
        self.device, self.before = device, before
        self.weights, self.counter = 0.0, cast("Meter | None", None)  # there, memory of a CPU is measured
        self.updates: list[dict[str, dict[str, float]]] = [{}]  # the first holds what comes before any
        self.rows: list[list[tuple[int, int]]] = []
        self.open: list[str] = []
        self.since = 0.0

    def watch(self, trainer: Any) -> None:
        """Time what `trainer` does by wrapping its methods, and its optimizer's steps."""
        for method, phase in PLACES.items():
            setattr(trainer, method, self.watched(phase, getattr(trainer, method)))
        trainer._generate_and_score_completions = self._beginning(trainer._generate_and_score_completions)
        trainer.create_optimizer = self._with_steps(trainer.create_optimizer)
        trainer.train = self.watched(REST, trainer.train)

    def watched(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` as a part of `phase`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.enter(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return run

    def enter(self, phase: str) -> None:
        """Begin a phase within the one that is open."""
        self._note()
        self.open.append(phase)
        self._begin()

    def leave(self) -> None:
        """End the open phase; the one around it goes on."""
        self._note()
        self.open.pop()
        self._begin()

    def count(self, models: list[torch.nn.Module]) -> None:
        """Let the bytes of tensors be counted, those of the weights of `models` from the start."""
        whole = torch.nn.ModuleList(models)
        storages = {
            held.untyped_storage()._cdata: held.untyped_storage() for held in (*whole.parameters(), *whole.buffers())
        }
        self.weights = float(sum(storage.nbytes() for storage in storages.values()))
        self.counter = Meter(vocab_size=0, model=whole)

    def _beginning(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, which makes the rollouts of an update, as its beginning."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._note()
            self.updates.append({})
            self._begin()
            self.enter(REST)
            try:
                rollouts = function(*args, **kwargs)
            finally:
                self.leave()
            sampled = rollouts["response_mask"].sum(-1)
            prompts = rollouts["attention_mask"].sum(-1) - sampled
            self.rows.append(list(zip(prompts.tolist(), sampled.tolist(), strict=True)))
            return rollouts

        return run

    def _with_steps(self, create: Callable[..., Any]) -> Callable[..., Any]:
        """Return `create` with a clock around each step of the optimizer, the critic's in it."""

        def run(*args: Any, **kwargs: Any) -> Any:
            optimizer = create(*args, **kwargs)
            optimizer.register_step_pre_hook(lambda *_: self.enter(UPDATE))
            optimizer.register_step_post_hook(lambda *_: self.leave())
            return optimizer

        return run

    def _begin(self) -> None:
        synchronise(self.device)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif self.counter is not None:
            self.counter.restart()
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what has been freed is no part of the next phase
            Path("/proc/self/clear_refs").write_text(RESET_PEAK, encoding="ascii")
        self.since = time.perf_counter()

    def _note(self) -> None:
        if not self.open:
            return
        synchronise(self.device)
        part = self.updates[-1].setdefault(self.open[-1], {"seconds": 0.0, "peak": 0.0, "tensors": 0.0})
        part["seconds"] += time.perf_counter() - self.since
        if self.device == "cuda" or self.counter is not None:
            part["peak"] = max(part["peak"], held(self.device, peak=True) - self.before)
        if self.counter is not None:
            part["tensors"] = max(part["tensors"], self.weights + self.counter.peak)


def held(device: str, *, peak: bool = False) -> float:
    """Return the bytes that are held on a GPU, or by this process; since the last reset at most, where `peak`."""
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated())
    return resident("VmHWM" if peak else "VmRSS")


def measure(updates: int, overrides: list[str], folder: Path, *, memory: bool = False) -> dict[str, Any]:
    """Return what `updates` updates took, the first one left out, and what was estimated.

    Args:
        updates: >= 2; 0 only makes what comes before them, so that its memory does not count in another process.
        overrides: of `rlhf align`.
        folder: for the trainer's files.
        memory: of a CPU is measured, and seconds mean nothing.

    Raises:
        ConfigError, RunError: the overrides are wrong, or the engine cannot work here.
    """
    from rlhf_cli.config import compose
    from rlhf_cli.run import seed_everything
    from rlhf_cli.stages import align, footprint, roles
    from rlhf_cli.stages.opening import frozen
    from rlhf_cli.stages.session import quiet_libraries
    from rlhf_cli.stages.workspace import prepare
    from rlhf_cli.trainers import engines, online  # online before memory is looked at: it brings TRL
    from rlhf_cli.trainers.schedule import updates as planned

    cfg: Any = compose.load("align", overrides)
    how, block = frozen(cfg), cfg.trainer.online
    engines.require(cfg.generation, how.device)
    quiet_libraries()
    block.epochs, block.max_steps = None, max(updates, 1) * planned(cfg.algo, block, 1).steps
    plan, shapes = footprint.plan_of(cfg, "online"), footprint.shapes(cfg)
    estimate = footprint.estimate(plan, *shapes)
    found_roles = roles.of_config(cfg)
    if not updates:
        return {}
    phases = Phases(how.device, held(how.device))
    seed_everything(cfg.seed)
    work = prepare(cfg, found_roles, training=True)
    trainer: online.OnlineTrainer = align._trainer(work, work.models.policy, folder)
    trainer.args.save_strategy, trainer.args.logging_strategy = "no", "no"
    trainer.remove_callback(PrinterCallback)
    phases.watch(trainer)
    if memory:
        models = (trainer.model, trainer.reference, trainer.critic, getattr(work.reward, "model", None))
        phases.count([model for model in models if isinstance(model, torch.nn.Module)])
    with phases.counter or nullcontext():
        trainer.train()
    name = torch.cuda.get_device_name() if how.device == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    return {
        "device": asdict(limits(how.device, name, how.dtype)),
        "dtype": str(how.dtype).removeprefix("torch."),
        "shapes": [None if shape is None else shape.content for shape in shapes],
        "adapters": None if plan.how.adapters is None else asdict(plan.how.adapters),
        "micro_batch": plan.micro_batch,
        "epochs": cfg.algo.ppo_epochs,
        "steps": planned(cfg.algo, block, 1).steps,
        "samples": cfg.algo.num_generations,
        "updates": phases.updates[2:],  # not what comes before the first one, and not that one
        "rows": phases.rows[1:],
        "held": estimate.held,
        "estimated": {phase.phase: phase.total for phase in estimate.phases},
    }


def main() -> None:
    """Measure, and write the report; a mistake of the overrides, or an engine that is not there, is written too."""
    from rlhf_cli.errors import UserError

    report, updates, *overrides = [word for word in sys.argv[1:] if word != MEMORY]
    try:
        found = measure(int(updates), overrides, Path(report).parent / "trainer", memory=MEMORY in sys.argv)
    except UserError as error:
        found = {"refused": str(error)}
    Path(report).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
