"""From one GPU to a 70B policy: memory a GPU, bytes over links and time of an update, from the shapes alone.

An update samples a batch of rollouts, scores and reads them, and takes one optimizer step. `docs/growth.md` shows the
tables; `python benchmarks/growth.py plan` writes them into it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

GB, TERA, HOUR = 1e9, 1e12, 3600
BF16, FP32, ADAM = 2, 4, 8  # bytes a number; AdamW's two moments a weight
PROMPT, RESPONSE = 256, 256  # tokens
# One H100 SXM, from its data sheet; links in one direction. 0.4 of the peak and 0.7 of a bandwidth are what large
# models usually reach, not measured here.
MEMORY, PEAK, BANDWIDTH, NVLINK, NETWORK = 80 * GB, 989 * TERA, 3350 * GB, 450 * GB, 50 * GB
REACHED, STREAMED = 0.4, 0.7
NODE = 8  # GPUs of a machine, joined by NVLink


@dataclass(frozen=True)
class Model:
    """The shape of a decoder with gated or plain feed-forward layers; norms and biases are left out (< 0.1 %)."""

    name: str
    layers: int
    width: int
    cache_width: int  # of the keys of a token and layer: width / heads x key-value heads
    inner: int
    matrices: int  # of a feed-forward layer: 3 where it is gated
    words: int
    tied: bool = False

    @property
    def layer(self) -> int:
        """Return the weights of a layer."""
        return 2 * self.width * (self.width + self.cache_width) + self.matrices * self.width * self.inner

    @property
    def embedding(self) -> int:
        """Return the weights of the embedding, and of the head."""
        return self.words * self.width

    @property
    def weights(self) -> int:
        """Return all weights."""
        return self.layers * self.layer + self.embedding * (1 if self.tied else 2)

    @property
    def cache(self) -> int:
        """Return the bytes of keys and values that a token leaves."""
        return 2 * self.layers * self.cache_width * BF16


OPT = Model("OPT-1.3B", 24, 2048, 2048, 8192, 2, 50272, tied=True)
LLAMA_7B = Model("Llama-2-7B", 32, 4096, 4096, 11008, 3, 32000)
LLAMA_70B = Model("Llama-3.1-70B", 80, 8192, 1024, 28672, 3, 128256)


@dataclass(frozen=True)
class Scenario:
    """A way to run it.

    Args:
        model: of policy, reference, reward model and critic alike.
        full: whether all weights are trained; else LoRA of rank 16, on one base for all roles where it is not split.
        gpus: that train.
        servers: further GPUs of vLLM; 0: the GPUs that train sample, too.
        rollouts: of an update.
        micro_batch: sequences of a forward pass on a GPU.
    """

    model: Model
    full: bool
    gpus: int
    servers: int
    rollouts: int
    micro_batch: int

    @property
    def name(self) -> str:
        """Return it in words."""
        extra = f" + {self.servers} of vLLM" if self.servers else ""
        how = "full" if self.full else "LoRA, one base" if self.bases == 1 else "LoRA"
        return f"{self.model.name}, {how}, {self.gpus} GPU{extra}"

    @property
    def bases(self) -> int:
        """Return how many models are only read: with LoRA, those of policy and reference, reward model, critic."""
        return 2 if self.full else 1 if self.gpus == 1 else 3

    @property
    def link(self) -> float:
        """Return the bytes/s of the slowest link between training GPUs."""
        return NVLINK if self.gpus <= NODE else NETWORK

    @property
    def adapter(self) -> int:
        """Return the weights of an adapter of rank 16 on every linear layer."""
        model = self.model
        inputs = 4 * model.width + 2 * (model.width + model.cache_width) + model.matrices * (model.width + model.inner)
        return 16 * model.layers * inputs

    @property
    def micro_batches(self) -> int:
        """Return how many forward passes of training a GPU makes in an update."""
        return -(-self.rollouts // (self.gpus * self.micro_batch))


SCENARIOS = (
    Scenario(OPT, full=True, gpus=1, servers=0, rollouts=64, micro_batch=8),
    Scenario(LLAMA_7B, full=False, gpus=1, servers=0, rollouts=64, micro_batch=4),
    Scenario(LLAMA_7B, full=True, gpus=8, servers=0, rollouts=256, micro_batch=4),
    Scenario(LLAMA_70B, full=False, gpus=8, servers=0, rollouts=256, micro_batch=2),
    Scenario(LLAMA_70B, full=False, gpus=8, servers=8, rollouts=256, micro_batch=2),
    Scenario(LLAMA_70B, full=True, gpus=32, servers=0, rollouts=1024, micro_batch=2),
    Scenario(LLAMA_70B, full=True, gpus=64, servers=0, rollouts=1024, micro_batch=2),
    Scenario(LLAMA_70B, full=True, gpus=64, servers=16, rollouts=1024, micro_batch=2),
)


def memory(one: Scenario) -> dict[str, float]:
    """Return the bytes on each training GPU while training, of the cache while sampling, and while loading.

    And `host`: of the largest model, where it is read: on one machine, outside of its GPUs.
    """
    model, tokens = one.model, one.micro_batch * (PROMPT + RESPONSE)
    trained = 2 * (model.weights if one.full else one.adapter)
    gathered = 2 * model.layer + model.embedding  # the layer at work, the next one, and embedding or head
    layer_at_work = tokens * (10 * model.width + 3 * model.inner) * BF16
    found = {
        "frozen": one.bases * model.weights * BF16 / one.gpus,
        "weights": trained * FP32 / one.gpus,
        "gradients": trained * FP32 / one.gpus,
        "AdamW": trained * ADAM / one.gpus,
        "gathered": gathered * BF16 * (one.gpus > 1),
        "activations": 2 * tokens * model.width * BF16 * model.layers + layer_at_work,  # one backward pass serves both
        "logits": 3 * one.micro_batch * (RESPONSE + 1) * model.words * FP32,
    }
    found["training"] = sum(found.values())
    found["cache"] = 0.0 if one.servers else one.rollouts / one.gpus * (PROMPT + RESPONSE) * model.cache
    # Weights come a layer, or the embedding, at a time, from the memory of the one process that has read them.
    size = FP32 if one.full else BF16
    found["loading"] = found["frozen"] + found["weights"] + max(model.layer, model.embedding) * size * (one.gpus > 1)
    found["host"] = float(model.weights * size)
    return found


def link_bytes(one: Scenario) -> dict[str, float]:
    """Return the bytes that each training GPU receives in an update, by FSDP2 and for vLLM.

    FSDP2 gathers every layer of a model for each forward pass, again for its backward pass, and scatters the gradients
    of trained weights. Our own sampler makes a forward pass for each token, and so gathers the weights for each.
    """
    away = (one.gpus - 1) / one.gpus
    model = one.model.weights * BF16 * away
    reads = 4 * one.micro_batches  # policy, reference, reward model, critic
    trained = 2 * one.micro_batches
    return {
        "read": reads * model,
        "train": 2 * trained * model,
        "gradients": trained * away * (one.model.weights if one.full else one.adapter) * BF16,
        "sample": 0.0 if one.servers else RESPONSE * model,
        "to vLLM": float(one.model.weights * BF16) if one.servers else 0.0,
    }


def seconds(one: Scenario) -> dict[str, float]:
    """Return the least time of each part of an update, in seconds.

    Arithmetic at 0.4 of the peak: 2 FLOPs a weight and token for each forward, 6 with backward, 4 where weights are
    frozen, and one forward more for activations that are computed again. Links at 0.7 of their speed, not hidden
    behind arithmetic. Sampling reads weights and cache once a token: vLLM splits them over a machine.
    """
    model, moved, whole = one.model, link_bytes(one), one.rollouts * (PROMPT + RESPONSE)
    forward = 2 * model.weights * whole / (one.gpus * PEAK * REACHED)
    samplers = one.servers or one.gpus
    copies = max(1, samplers // NODE) if one.servers else samplers  # of the weights while sampling
    rows = one.rollouts / copies
    read = model.weights * BF16 + rows * (PROMPT + RESPONSE / 2) * model.cache
    token = read / (samplers / copies * BANDWIDTH * STREAMED)
    link = one.link * STREAMED
    return {
        "sample": RESPONSE * token + 2 * model.weights * one.rollouts * PROMPT / (samplers * PEAK * REACHED),
        "gather to sample": moved["sample"] / link,
        "send to vLLM": moved["to vLLM"] / (NETWORK * STREAMED),
        "read": 4 * forward,
        "train": 2 * (4 if one.full else 3) * forward,
        "gather to train": (moved["read"] + moved["train"] + moved["gradients"]) / link,
    }


def rollouts_an_hour(one: Scenario) -> float:
    """Return how many rollouts an hour has at best, one phase after another."""
    return one.rollouts * HOUR / sum(seconds(one).values())


# -- tables ------------------------------------------------------------------------------------------------------------


def tables() -> str:
    """Return the tables of docs/growth.md."""
    return "\n\n".join(
        [
            _table("GB on each training GPU", memory, GB, _fits),
            _table("GB that each training GPU receives in an update", link_bytes, GB),
            _table("seconds of an update", seconds, 1.0, _speed),
        ]
    )


def _fits(one: Scenario) -> dict[str, str]:
    found = memory(one)
    sampling = found["cache"] + sum(found[name] for name in ("frozen", "weights", "AdamW", "gathered"))
    return {f"fits in {MEMORY / GB:.0f} GB": "yes" if max(found["training"], sampling) < 0.9 * MEMORY else "no"}


def _speed(one: Scenario) -> dict[str, str]:
    return {"total": number(sum(seconds(one).values())), "rollouts an hour": f"{rollouts_an_hour(one):,.0f}"}


def _table(
    title: str,
    numbers: Callable[[Scenario], dict[str, float]],
    unit: float,
    more: Callable[[Scenario], dict[str, str]] = lambda one: {},
) -> str:
    rows = [{**{name: number(value / unit) for name, value in numbers(one).items()}, **more(one)} for one in SCENARIOS]
    lines = [f"| {title} | {' | '.join(rows[0])} |", f"|---|{'---:|' * len(rows[0])}"]
    lines += [f"| {one.name} | {' | '.join(row.values())} |" for one, row in zip(SCENARIOS, rows, strict=True)]
    return "\n".join(lines)


def number(value: float) -> str:
    """Return a number with two or three digits that count; – for none."""
    if not value:
        return "–"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
