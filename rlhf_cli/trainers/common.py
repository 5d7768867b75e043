"""What every trainer shares: arguments from config, checkpoints that are whole or ignored, logging to the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from torch.utils.data import RandomSampler, Sampler
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINING_ARGS_NAME

from rlhf_cli import ranks
from rlhf_cli.config.schema import StageTraining
from rlhf_cli.errors import ConfigError, RunError
from rlhf_cli.models.adapters import CHECKPOINTING, write_model
from rlhf_cli.run import latest_checkpoint, mark_complete
from rlhf_cli.trainers.reference_copy import no_copy

Log = Callable[[dict[str, float], int], None]


def resolve_device(device: str) -> str:
    """Return "cuda" or "cpu" for auto | cpu | cuda.

    Raises:
        RunError: cuda is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("device is cuda", "PyTorch finds no CUDA GPU here", "use device=cpu or device=auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


@dataclass(frozen=True)
class Computing:
    """How a trainer computes.

    Args:
        device: cpu or cuda.
        bf16: forward and backward in bfloat16 by autocast; weights that are trained stay float32.
        gradient_checkpointing: activations are computed again in the backward pass.
    """

    device: str
    bf16: bool = False
    gradient_checkpointing: bool = False


def share_of_batch(block: StageTraining, name: str) -> tuple[int, int]:
    """Return how one rank does its share of a batch: rows of a micro-batch, and micro-batches.

    `batch_size` is what an optimizer step learns from, whatever the number of ranks; `micro_batch_size` is the most
    that one of them holds at a time.

    Args:
        block: of the stage.
        name: of the block, in words of the config: sft, rm, online or pairwise.

    Raises:
        ConfigError: the ranks cannot have equal shares, or a share is no multiple of the micro-batch.
    """
    world = ranks.world()
    share, rest = divmod(block.batch_size, world)
    if rest or not share:
        raise ConfigError(
            f"trainer.{name}.batch_size={block.batch_size} cannot be shared equally by {world} processes",
            "It is the batch of one optimizer step, over all of them",
            f"Use a multiple of {world}, or another launch.processes",
        )
    micro = min(block.micro_batch_size or share, share)
    if share % micro:
        raise ConfigError(
            f"trainer.{name}.micro_batch_size={micro} does not divide the {share} rows that each of {world} processes "
            f"has of trainer.{name}.batch_size={block.batch_size}",
            todo=f"Use a divisor of {share}",
        )
    return micro, share // micro


def training_arguments(
    block: StageTraining, name: str, *, folder: Path, seed: int, computing: Computing
) -> dict[str, Any]:
    """Return the keyword arguments of a TRL config for one stage; `name` is its block's (sft, rm, ...).

    TRL's own defaults (bf16, gradient checkpointing) fail or slow down on a CPU and are set explicitly.
    """
    micro, accumulated = share_of_batch(block, name)
    length = {"max_steps": block.max_steps} if block.max_steps else {"num_train_epochs": block.epochs}
    return {
        **length,
        "output_dir": str(folder),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulated,
        "learning_rate": block.learning_rate,
        "lr_scheduler_type": block.lr_scheduler,
        "warmup_steps": block.warmup_fraction,
        "adam_beta2": block.adam_beta2,
        "weight_decay": block.weight_decay,
        "max_grad_norm": block.max_grad_norm,
        "logging_steps": block.log_every_steps,
        "save_steps": block.save_every_steps,
        "save_total_limit": 2,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": computing.device == "cpu",
        "bf16": computing.bf16,
        "gradient_checkpointing": computing.gradient_checkpointing,
        "gradient_checkpointing_kwargs": CHECKPOINTING if computing.gradient_checkpointing else None,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,  # every trained weight is used in every forward
        "dataloader_pin_memory": computing.device != "cpu",
        "report_to": [],
        "disable_tqdm": True,
        **_gradients_in_parts(),
    }


def _gradients_in_parts() -> dict[str, Any]:
    """Return what keeps FSDP2 from adding up the gradients of a step's micro-batches whole on every GPU."""
    if ranks.world() == 1 or ranks.strategy() != "fsdp2":
        return {}
    return {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}


@contextmanager
def reading(model: Any) -> Iterator[None]:
    """Within it, `model` is in evaluation mode: where activations are computed again, sampling has no cache else."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class AllRanks:
    """Mixin: a policy may be split over ranks; what is noted of training is logged as the mean over all of them.

    Each rank notes shares of equal weight.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        model = kwargs["model"] if "model" in kwargs else args[0]
        with no_copy(model):
            super().__init__(*args, **kwargs)
        for weight in model.parameters() if isinstance(model, PeftModel) else ():
            if weight.requires_grad:  # TRL casts adapters to bfloat16 over a quantised base
                weight.data = weight.data.float()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the trainer's numbers and the mean of what was noted since the last time."""
        noted = self._metrics["train"]  # type: ignore[attr-defined]
        for key, value in ranks.average({key: sum(values) / len(values) for key, values in noted.items()}).items():
            noted[key] = [value]
        super().log(logs, start_time)  # type: ignore[misc]


class WholeBatches(AllRanks):
    """Mixin: every optimizer step has a whole batch, the same rows for any number of ranks and size of micro-batch.

    The last batch of a pass is filled up with rows of a new order: a part of one would weigh its rows more, and ranks
    would have unequal shares of it.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        data, args = self.train_dataset if train_dataset is None else train_dataset, self.args  # type: ignore[attr-defined]
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return RandomSampler(data, num_samples=-(-len(data) // batch) * batch)


class WholeCheckpoints:
    """Mixin: a checkpoint counts once everything in it is written; no model card is written into it.

    Of a policy with several adapters in it, the one that is trained is written: loading others would freeze them.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not isinstance(self.model, PeftModel):  # type: ignore[attr-defined]
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        if not self.args.should_save:  # type: ignore[attr-defined]
            return
        folder = Path(output_dir or self.args.output_dir)  # type: ignore[attr-defined]
        write_model(self.model, folder, state_dict)  # type: ignore[attr-defined]
        self.processing_class.save_pretrained(folder)  # type: ignore[attr-defined]
        torch.save(self.args, folder / TRAINING_ARGS_NAME)  # type: ignore[attr-defined]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        Trainer._save_checkpoint(self, model, trial)  # type: ignore[arg-type]
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"  # type: ignore[attr-defined]
        self.save_extra(folder)
        ranks.barrier()  # each rank writes the state of its random numbers
        if ranks.is_main():
            mark_complete(folder)

    def save_extra(self, folder: Path) -> None:
        """Write what the trainer keeps beside policy and optimizer, on rank 0; nothing by default."""


class Reporter(TrainerCallback):
    """Sends curves to the run, shows one progress bar, and calls `evaluate` every `eval_every_steps` steps."""

    def __init__(
        self,
        title: str,
        log: Log,
        *,
        rename: Callable[[dict[str, float]], dict[str, float]] = lambda metrics: metrics,
        evaluate: Callable[[int], dict[str, float]] | None = None,
        eval_every_steps: int = 0,
    ) -> None:
        self.title, self.log, self.rename = title, log, rename
        self.evaluate, self.eval_every_steps = evaluate, eval_every_steps
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        shown: dict[str, Any] = {"desc": self.title, "unit": "step", "mininterval": 1, "disable": not ranks.is_main()}
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, **shown)
        if self.evaluate is not None and state.global_step == 0:
            self.log(self.evaluate(0), 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        self._require_finite(kwargs["model"], state.global_step)
        at_eval = self.eval_every_steps and state.global_step % self.eval_every_steps == 0
        if self.evaluate is not None and (at_eval or state.global_step == state.max_steps):
            metrics = self.evaluate(state.global_step)
            self.log(metrics, state.global_step)
            shown = {key: f"{metrics[key]:.3f}" for key in ("pm/tv", "pm/pair_tv", "pm/offset_mass") if key in metrics}
            if self.bar is not None:
                self.bar.set_postfix(shown)

    def _require_finite(self, model: Any, step: int) -> None:
        # ds_tensor: this process's part, where ZeRO-3 has left the weight itself empty.
        held = [getattr(weight, "ds_tensor", weight).detach() for weight in model.parameters() if weight.requires_grad]
        totals = [(weight.to_local() if isinstance(weight, DTensor) else weight).sum() for weight in held]
        if not bool(torch.stack(totals).isfinite().all()):
            raise RunError(
                f"{self.title} diverged: after step {step} its weights are not finite",
                "",
                "lower the learning_rate of this stage (trainer.sft, rm, online or pairwise)",
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        skipped = ("epoch", "total_flos", "train_runtime", "train_samples_per_second", "train_steps_per_second")
        numbers = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, (int, float)) and k not in skipped}
        if numbers and "train_loss" not in numbers:
            self.log(self.rename(numbers), state.global_step)

    def close(self) -> None:
        """End the progress bar's line, so that what is printed next begins a new one."""
        if self.bar is not None:
            self.bar.close()


def fit(trainer: Any, reporter: Reporter, *, rewind: Callable[[int], None]) -> int:
    """Train from the last whole checkpoint in the trainer's folder, or from the start; return the steps done.

    Args:
        trainer: any transformers trainer.
        reporter: its callback.
        rewind: called with the step that is gone on from, to drop later log lines; -1 for a run from the start.

    Raises:
        RunError: nothing was trained.
    """
    ranks.check_strategy(trainer.accelerator)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(reporter)
    checkpoint = ranks.on_main(lambda: latest_checkpoint(Path(trainer.args.output_dir)))
    rewind(int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else -1)
    if checkpoint is None or not _adopt_finished(trainer, checkpoint):
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            reporter.close()
    if trainer.state.global_step == 0:
        raise RunError(
            f"{reporter.title} trained 0 steps",
            "there is less data than one batch",
            "lower the batch size or add data",
        )
    return trainer.state.global_step


def _adopt_finished(trainer: Any, checkpoint: Path) -> bool:
    """Load a checkpoint after whose step there is nothing left to train: `train` would do one step more."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step < state.max_steps:
        return False
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = state
    return True
