"""The page of benchmarks/gpu.py: what was measured, and what bounds each phase."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gpu_arithmetic import GENERATE, LOGPS, SCORE, UPDATE, Limits

GB, TERA = 1e9, 1e12
AUTHORS = (
    20.0  # prompts/s on 4 A100: 44,800 prompts of 256 + 256 tokens in 37 minutes (arXiv 2405.16455, OPT-1.3B on HH)
)
FAR = 0.3  # below this share of both limits, neither bounds a phase


@dataclass(frozen=True)
class Size:
    """What is measured.

    Args:
        model: sizes of an OPT in place of those of opt-125m; or a folder.
        prompt, response: tokens.
        rollouts: of an update, as of an optimizer step.
        micro_batch: sequences per forward pass.
        updates: measured, beside one that warms up.
    """

    model: dict[str, int] | Path
    prompt: int
    response: int
    rollouts: int
    micro_batch: int
    updates: int


@dataclass(frozen=True)
class Row:
    """What one phase of one variant with one engine took, per update.

    Args:
        phase: of an update.
        seconds: median over updates.
        tokens: sampled, read, or learned from.
        flops: asked for by the model.
        bytes: moved at least.
        peak: memory, bytes, beside what there was before the first weights; 0 where it was not measured.
        estimated: the same as `rlhf` prints it; None where it does not.
        tensors: of the peak, what PyTorch's tensors hold, where it is a process's; None where that is not known.
    """

    phase: str
    seconds: float
    tokens: int
    flops: float
    bytes: float
    peak: float
    estimated: float | None
    tensors: float | None = None


@dataclass(frozen=True)
class Measured:
    """One variant with one engine.

    Args:
        variant: full | LoRA | shared base.
        engine: generation=.
        limits: of the device.
        dtype: of computation.
        prompts: of an update.
        seconds: of a whole update, median.
        rows: of its phases.
    """

    variant: str
    engine: str
    limits: Limits
    dtype: str
    prompts: int
    seconds: float
    rows: list[Row]


def page(found: Sequence[Measured | tuple[str, str]], size: Size, *, dry: bool) -> str:
    """Return the page: of each variant with each engine, and a line for each engine that cannot work."""
    measured = _on_one_device([one for one in found if isinstance(one, Measured)])
    missing = [f"- `generation={one[0]}`: {one[1]}" for one in found if not isinstance(one, Measured)]
    first = measured[0]
    return TEXT.format(
        hand=DRY if dry else "",
        command="python benchmarks/gpu.py --dry-run" if dry else "python benchmarks/gpu.py",
        model=_model(size),
        prompt=size.prompt, response=size.response, dtype=first.dtype,
        rollouts=size.rollouts, micro_batch=size.micro_batch, updates=size.updates,
        limits=_limits(first.limits),
        load=f"; the machine's load average was {os.getloadavg()[1]:.1f}" if dry else "",
        whole="\n".join(_whole(one, dry=dry) for one in measured),
        phases="\n".join(_phase(one, row) for one in measured for row in one.rows),
        missing="\n".join(["", "Not measured:", "", *missing, ""]) if missing else "",
        memory="\n".join(_memory(one, row) for one in measured for row in one.rows if row.estimated and row.peak),
        bounds="\n".join(f"- **{row.phase}**: {_why(row, first)}" for row in first.rows),
    )  # fmt: skip


def _on_one_device(found: Sequence[Measured]) -> list[Measured]:
    """Return what was measured, all of it beside the best that the device did in any of the processes."""
    best = {name: max(getattr(one.limits, name) for one in found) for name in ("peak", "bandwidth", "matmul", "copy")}
    return [replace(one, limits=replace(one.limits, **best)) for one in found]


def bound(row: Row, limits: Limits) -> tuple[str, float]:
    """Return what bounds a phase at best, arithmetic or memory, and the share of that limit that was reached."""
    by_arithmetic, by_memory = row.flops / limits.peak, row.bytes / limits.bandwidth
    return ("arithmetic" if by_arithmetic >= by_memory else "memory"), max(by_arithmetic, by_memory) / row.seconds


def _model(size: Size) -> str:
    if isinstance(size.model, Path):
        return f"The model in `{size.model}`"
    words = "{vocab_size:,} words, {num_hidden_layers} layers of {hidden_size}".format(**size.model)
    return f"An OPT with random weights ({words})"


def _limits(limits: Limits) -> str:
    return (
        f"{limits.name}: {limits.peak / TERA:.3g} TFLOP/s and {limits.bandwidth / GB:,.0f} GB/s ({limits.source};\n"
        f"a large matrix product reaches {limits.matmul / TERA:.3g}, a copy {limits.copy / GB:,.0f}). So arithmetic\n"
        f"bounds what does more than {limits.ridge:.0f} FLOPs a byte, and memory what does fewer"
    )


def _whole(one: Measured, *, dry: bool) -> str:
    speed, sampled = one.prompts / one.seconds, next(row for row in one.rows if row.phase == GENERATE)
    shares = [f"{row.seconds / one.seconds:.0%}" for row in one.rows]
    rest = max(1 - sum(row.seconds for row in one.rows) / one.seconds, 0.0)  # medians need not add up
    beside = "–" if dry else f"{speed / AUTHORS:.2f}"
    cells = [one.variant, f"`{one.engine}`", f"{speed:.3g}", f"{sampled.tokens / one.seconds:,.0f}", beside]
    return f"| {' | '.join([*cells, f'{one.seconds:.2f}', *shares, f'{rest:.0%}'])} |"


def _phase(one: Measured, row: Row) -> str:
    rate, (what, share) = row.flops / row.seconds, bound(row, one.limits)
    cells = [one.variant, f"`{one.engine}`", row.phase, f"{row.seconds:.3g}", f"{row.tokens / row.seconds:,.0f}"]
    cells += [f"{rate / TERA:.3g}", f"{rate / one.limits.peak:.1%}", f"{row.flops / row.bytes:.0f}", what]
    return f"| {' | '.join([*cells, f'{share:.0%}', f'{row.peak / GB:.2f}' if row.peak else '–'])} |"


def _memory(one: Measured, row: Row) -> str:
    assert row.estimated is not None
    told, tensors = row.estimated, row.peak if one.limits.on_gpu else row.tensors
    cells = [one.variant, f"`{one.engine}`", row.phase, f"{told / GB:.2f}", *_beside(told, tensors)]
    return f"| {' | '.join([*cells, *_beside(told, None if one.limits.on_gpu else row.peak)])} |"


def _beside(told: float, took: float | None) -> list[str]:
    """Return what was measured, and how far the estimate is from it."""
    if not took:  # not measured, or it fitted into memory that the process already had
        return ["–", "–"]
    return [f"{took / GB:.2f}", f"{told / took - 1:+.0%}"]


def _why(row: Row, one: Measured) -> str:
    (what, share), intensity = bound(row, one.limits), row.flops / row.bytes
    side = "above" if intensity > one.limits.ridge else "below"
    found = (
        f"{intensity:.0f} FLOPs a byte, {side} {one.limits.ridge:.0f}. Its limit is {what}: {share:.0%} is reached. "
    )
    if share < FAR:
        found += "What it takes beyond that is neither: starting kernels, copies, padding, Python. "
    return found + WHY[row.phase]


WHY = {
    GENERATE: "Each token reads all weights, and all keys and values, for one product each; a larger batch shares the "
    "weights.",
    SCORE: "One forward of the reward model over whole sequences.",
    LOGPS: "One forward each of policy, reference and critic; log-probs, KL and entropy share the policy's. Over the "
    "vocabulary they pass several times.",
    UPDATE: "Forward and backward of policy and critic, then two AdamW steps, which memory bounds.",
}
DRY = (
    "No CUDA GPU was at hand: this is the dry run on a CPU. "
    "It shows that the benchmark works, not how fast a GPU is.\n\n"
)
TEXT = """{hand}# Phases of an update on one device

`{command}`: {model}, conditional
preference matching with PPO and a critic, {prompt} + {response} tokens, {dtype}, {rollouts} rollouts an update,
micro-batches of {micro_batch}, median of {updates} updates after one that warms up{load}.

{limits}.

## Speed

| variant | engine | prompts/s | tokens/s | of 20 | s an update | generate | score | log-probs | update | rest |
|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|
{whole}

The authors of preference matching report 20 prompts/s for OPT-1.3B with 256 + 256 tokens on 4 A100, 5 a GPU
(arXiv 2405.16455). Tokens are those sampled, a second of the whole update; after them, its phases' shares of the time.
Score, log-probs and update are the same code for every engine.
{missing}
## Phases

FLOPs are those the model asks for on real tokens: 2 a weight and token forward, 6 with backward (4 for frozen weights),
and attention; bytes are the least that must move (`benchmarks/gpu_arithmetic.py` derives both).

| variant | engine | phase | s | tokens/s | TFLOP/s | of peak | FLOPs/byte | limit | reached | peak GB |
|---|---|---|---:|---:|---:|---:|---:|---|---:|---:|
{phases}

What bounds each phase, first variant:

{bounds}

## Memory beside the estimate

What `rlhf` prints before it reads weights, beside the peak of each phase; rewards adapt their batches and have no
estimate. Tensors are what PyTorch's allocator counts on a GPU. On a CPU they are counted operator by operator, in a run
of its own, for one engine; its resident memory has the libraries' buffers in it, and freed memory that is in pieces.

| variant | engine | phase | estimated GB | tensors GB | difference | resident GB | difference |
|---|---|---|---:|---:|---:|---:|---:|
{memory}
"""
