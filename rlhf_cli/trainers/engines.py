"""What samples the rollouts of an on-policy run: our sampler, transformers' `generate` or continuous batching, vLLM.

All draw at one temperature and top_p and stop at the same tokens. The last two compute with numbers of their own, and
say how probable each token was to them: training weighs what they drew by the ratio (docs/generation.md).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import GenerationOutput

from rlhf_cli import ranks
from rlhf_cli.algos import ppo
from rlhf_cli.config.schema import GenerationConfig, VllmGeneration
from rlhf_cli.errors import RunError
from rlhf_cli.models.adapters import adapter_layers, plain
from rlhf_cli.models.sampling import row_streams, sample
from rlhf_cli.models.sharding import is_sharded

logger = logging.getLogger(__name__)

PREFILL = 2048  # tokens of a forward of continuous batching on a CPU
FAR = 0.1  # how far the mean ratio of tokens may be from 1, its expectation, before it is worth a word


class Drawn(NamedTuple):
    """Responses, and the engine's own log-probs of their tokens, nats; None where its numbers are training's."""

    responses: list[list[int]]
    logps: list[list[float]] | None = None


def require(generation: GenerationConfig, device: str) -> None:
    """Refuse an engine that cannot work here, before anything is trained.

    Args:
        generation: names the engine.
        device: cpu or cuda.

    Raises:
        RunError: vLLM is not installed, has no GPU, or fewer processes than one copy is split over.
    """
    if not isinstance(generation, VllmGeneration):
        return
    todo = "use generation=default or generation=continuous"
    if find_spec("vllm") is None:
        todo = f"pip install 'rlhf-cli[vllm]', or {todo}"
        raise RunError("generation=vllm needs vLLM, which is not installed", "it samples the rollouts", todo)
    if device != "cuda":
        raise RunError("generation=vllm needs a CUDA GPU", f"this run computes on the {device}", todo)
    if generation.mode == "colocate" and ranks.world() % generation.tensor_parallel:
        raise RunError(
            f"generation.tensor_parallel={generation.tensor_parallel} does not divide {ranks.world()} processes",
            "each copy of vLLM is split over so many of them",
            "use a divisor, or more processes: launch=accelerate launch.processes=N",
        )


def arguments(generation: GenerationConfig, *, longest: int, device: str) -> dict[str, Any]:
    """Return the keyword arguments by which RLOOConfig knows the engine.

    Args:
        generation: names the engine.
        longest: prompt and response at most, tokens.
        device: cpu or cuda.
    """
    if generation.engine == "continuous":
        cache = {"return_logprobs": generation.top_p == 1, "max_memory_percent": 0.5}
        if device == "cpu":  # where the share would be of all the memory: a page holds a sequence
            cache |= {"page_size": max(4, longest), "max_batch_tokens": PREFILL}
        return {"use_transformers_continuous_batching": True, "transformers_continuous_batching_config": cache}
    if isinstance(generation, VllmGeneration):
        return {
            "use_vllm": True,
            "vllm_mode": generation.mode,
            "vllm_server_base_url": generation.server_url,
            "vllm_gpu_memory_utilization": generation.gpu_memory_utilization,
            "vllm_tensor_parallel_size": generation.tensor_parallel,
            "vllm_max_model_length": longest,
        }
    return {}


def draw(trainer: Any, prompts: list[list[int]], inherited: Callable[[], list[list[int]]]) -> Drawn:
    """Return one response for each prompt of this process, drawn from the policy as it is.

    By our sampler a row's draw depends on seed, step and the row's number in the update; by transformers' two on seed,
    step and process; by vLLM on its own state.

    Args:
        trainer: an OnlineTrainer.
        prompts: token ids.
        inherited: TRL's own generation of them.
    """
    engine, place, rows = trainer.parts.generation.engine, trainer.accelerator.process_index, len(prompts)
    key = (trainer.args.seed, trainer.state.global_step)
    if engine == "vllm":
        return _vllm(trainer, prompts)
    if engine == "lean":
        streams = row_streams(*key, rows=range(place * rows, (place + 1) * rows))
        with cast_once(trainer):
            return Drawn(_lean(trainer, prompts, streams))
    device = trainer.accelerator.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(row_streams(*key, rows=[place])[0])
        if engine == "continuous":
            return _continuous(trainer, prompts)
        with cast_once(trainer):
            return Drawn(inherited())


def cast_once(trainer: Any) -> Any:
    """Within it, weights in float32 that are computed with in bfloat16 are cast once, not for every token.

    Not those of a sharded policy: the casts would be a whole copy of it.
    """
    return nullcontext() if is_sharded(trainer.model) else trainer.accelerator.autocast()


def _lean(trainer: Any, prompts: list[list[int]], streams: list[int]) -> list[list[int]]:
    generation = trainer.parts.generation
    return sample(
        trainer.accelerator.unwrap_model(trainer.model),
        prompts,
        streams=streams,
        max_new_tokens=trainer.max_completion_length,
        temperature=generation.temperature,
        top_p=generation.top_p,
        eos_ids=trainer.eos_token_ids,
        pad_id=trainer._tokenizer.pad_token_id,
        tree=trainer.parts.tree,
    )


def _continuous(trainer: Any, prompts: list[list[int]]) -> Drawn:
    """Return what continuous batching draws. TRL's own call keeps no log-probs, and casts the trained weights."""
    settings = dict(trainer.args.transformers_continuous_batching_config)
    if "page_size" in settings:
        settings["num_blocks"] = len(prompts)
    policy = plain(trainer.accelerator.unwrap_model(trainer.model))
    with in_its_own_precision(policy):
        manager = policy.init_continuous_batching(
            generation_config=trainer.generation_config, continuous_batching_config=ContinuousBatchingConfig(**settings)
        )
        names = manager.add_requests(prompts)  # before it starts, or threads would decide which rows go together
        gc.freeze()  # its stop collects garbage twice, and else among every object of the program: a second a time
        manager.start()
        try:
            found = _outputs(manager, names)
        finally:
            manager.stop(block=True)
            manager.destroy()
            gc.unfreeze()
    logps = [list(output.logprobs) for output in found] if settings["return_logprobs"] else None
    return Drawn([list(output.generated_tokens) for output in found], logps)


def _outputs(manager: Any, names: list[str]) -> list[GenerationOutput]:
    found: dict[str, GenerationOutput] = {}
    while len(found) < len(names):
        output = manager.get_result(timeout=1)
        if output is None and not manager.is_running():
            break
        if output is not None:
            found[output.request_id] = output
    errors = [output.error for output in found.values() if output.error]
    if errors or len(found) < len(names):
        reason = errors[0] if errors else "its thread ended early; its log says why"
        raise RunError("continuous batching failed", reason, "use generation=default")
    return [found[name] for name in names]


@contextmanager
def in_its_own_precision(policy: Any) -> Iterator[None]:
    """Within it, `policy` computes in the format of its weights: its paged cache has that one, autocast another."""
    autocast = policy.__dict__.pop("forward", None) if "_original_forward" in policy.__dict__ else None
    try:
        yield
    finally:
        if autocast is not None:
            policy.forward = autocast


def _vllm(trainer: Any, prompts: list[list[int]]) -> Drawn:
    """Return what vLLM draws from the policy's present weights, which TRL sends it."""
    vllm, step = trainer.vllm_generation, trainer.state.global_step
    if trainer._last_loaded_step != step:
        with unmoved(trainer.accelerator.unwrap_model(trainer.model)):
            vllm.sync_weights()
        trainer._last_loaded_step = step
    vllm.logprobs = 0 if trainer.parts.generation.top_p == 1 else None  # 0: of the drawn token alone
    vllm.generation_kwargs = {**vllm.generation_kwargs, "stop_token_ids": list(trainer.eos_token_ids)}
    _, responses, logps, _ = vllm.generate(prompts=prompts, images=None, num_generations=trainer.num_generations)
    if logps is None:
        return Drawn([list(ids) for ids in responses])
    if any(value is None for row in logps for (value,) in row):
        raise RunError("vLLM gave a log-prob that is no number", "the policy may have diverged", "lower learning_rate")
    return Drawn([list(ids) for ids in responses], [[value for (value,) in row] for row in logps])


@contextmanager
def unmoved(policy: Any) -> Iterator[None]:
    """Within it an adapter may be added to its base and taken out; afterwards the base is what it was, to the bit.

    What is taken out is rounded, and the base is the reference: over many updates it would drift.
    """
    weights = [layer.get_base_layer().weight for layer in adapter_layers(policy)]
    before = [weight.detach().to("cpu", copy=True) for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


def weigh(trainer: Any, engine_logps: Sequence[Sequence[float]], old_logps: Tensor, mask: Tensor) -> Tensor:
    """Return the importance weight of each token that an engine with other numbers drew, (B, T); note how far they are.

    Args:
        trainer: an OnlineTrainer.
        engine_logps: the engine's log-probs of the tokens, nats, B lists.
        old_logps: training's, nats, (B, T).
        mask: True on response tokens, (B, T).
    """
    flat = torch.tensor([value for row in engine_logps for value in row], dtype=old_logps.dtype, device=mask.device)
    theirs = torch.zeros_like(old_logps).masked_scatter(mask, flat)
    cap = trainer.parts.generation.correction_cap
    ratios = ppo.importance_weights(old_logps, theirs, mask, cap=None)
    mean = float(ppo.masked_mean(ratios, mask))
    trainer._note(**{
        "engine/ratio": mean,
        "engine/max_difference": (old_logps - theirs)[mask].abs().max(),
        "engine/capped": ppo.masked_mean((ratios > cap).float(), mask) if cap is not None else 0.0,
    })  # fmt: skip
    if abs(mean - 1) > FAR:
        logger.warning(
            "the engine's log-probs are far from training's: their mean ratio is %.3f, not 1 (docs/generation.md)", mean
        )
    return torch.ones_like(ratios) if cap is None else ppo.importance_weights(old_logps, theirs, mask, cap=cap)
