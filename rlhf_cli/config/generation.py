"""Structured configs of how responses are sampled, one for each engine that samples the rollouts."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from rlhf_cli.config.setting import setting

ENGINES = ("lean", "generate", "continuous", "vllm")


@dataclass
class GenerationConfig:
    """How responses are sampled; the temperature also divides the logits of every log-prob.

    The engine samples the rollouts of the on-policy algorithms; metrics are always sampled by ours, `lean`.
    """

    name: str = MISSING
    temperature: float = setting(gt=0)
    top_p: float = setting(gt=0, le=1)
    engine: str = setting(choices=ENGINES)


@dataclass
class CorrectedGeneration(GenerationConfig):
    """An engine whose numbers differ from those of training: importance weights correct what was drawn from it."""

    correction_cap: float | None = setting(ge=1)


@dataclass
class VllmGeneration(CorrectedGeneration):
    """vLLM, on the GPUs of training or behind a server."""

    mode: str = setting(choices=["colocate", "server"], identity=False)
    server_url: str | None = setting(identity=False)
    gpu_memory_utilization: float = setting(gt=0, lt=1, identity=False)
    tensor_parallel: int = setting(ge=1, identity=False)


SCHEMAS: dict[str, type[GenerationConfig]] = {"continuous": CorrectedGeneration, "vllm": VllmGeneration}
