"""How much memory a stage takes, role by role, before any weights are read.

Held throughout are weights and the two moments of AdamW. On top of them come the gradients and what is at work: the
stage's peak is that of its largest phase. Weights that are trained take 4 bytes, their gradient 4 and AdamW 8 a
parameter; frozen ones take the size of their number format, and the base of adapters is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlhf_cli.models import dry_run
from rlhf_cli.models.dry_run import Holding, Tokens, Work
from rlhf_cli.models.shapes import CLASSIFIER, POLICY, ModelShape, Sizes

TRAINED, GRADIENT, ADAM = 4, 4, 8  # bytes a parameter
# Bytes a weight of a quantised linear layer: 4 bits and the scale of 64 weights, in float32 or, quantised itself, in
# 8 bits with a scale for 256 of them (arXiv 2305.14314); 8 bits.
FOUR_BITS, FOUR_BITS_DOUBLE, EIGHT_BITS = 0.5 + 4 / 64, 0.5 + 1 / 64 + 4 / (64 * 256), 1.0


@dataclass(frozen=True)
class Plan:
    """What decides the memory of a stage.

    Args:
        stage: sft | rm | pairwise | online.
        how: number format, attention, checkpointing, adapters.
        prompt_tokens, completion_tokens: of the longest row.
        micro_batch: sequences per forward; of rm and pairwise: pairs.
        accumulates: whether an optimizer step has several micro-batches.
        weight_bytes: of a weight that qlora quantises; None where nothing is quantised.
        share_base: the roles of online are adapters on one base.
        rollouts: sampled at once.
        critic: whether there is one.
        reward_models: how many are read.
    """

    stage: str
    how: Holding
    prompt_tokens: int
    completion_tokens: int
    micro_batch: int
    accumulates: bool
    weight_bytes: float | None = None
    share_base: bool = False
    rollouts: int = 0
    critic: bool = False
    reward_models: int = 1

    @property
    def sequences(self) -> int:
        """Return how many sequences a forward pass of training reads."""
        return self.micro_batch * (2 if self.stage in ("rm", "pairwise") else 1)

    def tokens(self, rows: int) -> Tokens:
        """Return a batch of the longest sequences."""
        return Tokens(rows, self.prompt_tokens, self.completion_tokens)


@dataclass(frozen=True)
class RoleMemory:
    """What one model holds throughout a stage, and its gradients, bytes.

    Args:
        role: policy | reference | reward model | critic.
        parameters: of the model with its adapters; those of another role's base count there.
        trained: of them.
        weights, optimiser, gradients: bytes.
    """

    role: str
    parameters: int
    trained: int
    weights: float
    optimiser: float = 0.0
    gradients: float = 0.0


@dataclass(frozen=True)
class PhaseMemory:
    """What is at work in one phase of a stage beside weights and AdamW, bytes.

    Args:
        phase: in words.
        activations: and all else that passes by.
        logits: numbers over the vocabulary.
        cache: keys and values of sampling.
        gradients: of all trained weights, where they are there in this phase.
    """

    phase: str
    activations: float
    logits: float = 0.0
    cache: float = 0.0
    gradients: float = 0.0

    @property
    def total(self) -> float:
        """Return the sum, bytes."""
        return self.activations + self.logits + self.cache + self.gradients


@dataclass(frozen=True)
class Estimate:
    """The memory of a stage: what is held by its roles, and its phases, which come one after another."""

    stage: str
    roles: list[RoleMemory]
    phases: list[PhaseMemory]

    def over(self, processes: int) -> Estimate:
        """Return what one of several processes takes that hold a part each of weights, gradients and AdamW."""
        roles = [
            replace(role, **{name: getattr(role, name) / processes for name in ("weights", "optimiser", "gradients")})
            for role in self.roles
        ]
        phases = [replace(phase, gradients=phase.gradients / processes) for phase in self.phases]
        return replace(self, roles=roles, phases=phases)

    @property
    def largest(self) -> PhaseMemory:
        """Return the phase that takes the most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def held(self) -> float:
        """Return what weights and AdamW take, bytes."""
        return sum(role.weights + role.optimiser for role in self.roles)

    @property
    def total(self) -> float:
        """Return the stage's peak, bytes."""
        return self.held + self.largest.total


def estimate(plan: Plan, policy: ModelShape, reward: ModelShape | None = None) -> Estimate:
    """Return the memory of a stage with real batches of the longest rows; shorter rows take less.

    Not in it: what PyTorch and the libraries take by themselves, and what an allocator cannot use for its being in
    pieces. Rewards and measures adapt their batches to the memory that is left (models/batches.py).

    Args:
        plan: how the stage is run.
        policy: shape of the policy.
        reward: shape of the reward model's and critic's body; None: the policy's.

    Raises:
        ValueError: transformers has no such class for a model, or its code is not part of transformers.
        RunError: a target of the adapters matches nothing.
    """
    roles = _roles(plan, policy, reward or policy)
    gradients = sum(role.gradients for role in roles)
    return Estimate(plan.stage, roles, _phases(plan, policy, reward or policy, gradients))


# -- roles -------------------------------------------------------------------------------------------------------------


def _roles(plan: Plan, policy: ModelShape, reward: ModelShape) -> list[RoleMemory]:
    adapters = plan.how.adapters
    of_policy = policy.sizes(POLICY, adapters)
    if plan.stage == "sft":
        return [_trained("policy", of_policy, plan)]
    if plan.stage == "rm":
        return [_trained("reward model", reward.sizes(CLASSIFIER, adapters), plan)]
    reference = replace(_frozen("reference", of_policy, plan), parameters=of_policy.total)
    if adapters is not None:  # the policy, its adapters switched off
        reference = RoleMemory("reference", 0, 0, 0.0)
    found = [_trained("policy", of_policy, plan), reference]
    if plan.stage == "pairwise":
        return found
    of_values = reward.sizes(CLASSIFIER, adapters)
    if plan.share_base:
        of_values = replace(of_values, total=0, linear=0)
    if plan.reward_models:
        one = _frozen("reward model", of_values, plan)
        number = plan.reward_models
        found.append(replace(one, parameters=one.parameters * number, weights=one.weights * number))
    return found + ([_trained("critic", of_values, plan)] if plan.critic else [])


def _trained(role: str, sizes: Sizes, plan: Plan) -> RoleMemory:
    if plan.how.adapters is None:
        count, base = sizes.total, 0.0
    else:
        count, base = sizes.adapter, _base(sizes, plan, quantised=True)
    total = sizes.total if plan.how.adapters is None else sizes.total + sizes.adapter
    return RoleMemory(role, total, count, base + TRAINED * count, ADAM * count, GRADIENT * count)


def _frozen(role: str, sizes: Sizes, plan: Plan) -> RoleMemory:
    return RoleMemory(
        role, sizes.total + sizes.adapter, 0, _base(sizes, plan, quantised=False) + TRAINED * sizes.adapter
    )


def _base(sizes: Sizes, plan: Plan, *, quantised: bool) -> float:
    size = plan.how.dtype.itemsize
    if not quantised or plan.weight_bytes is None:
        return float(size * sizes.total)
    return size * (sizes.total - sizes.linear) + plan.weight_bytes * sizes.linear


# -- phases ------------------------------------------------------------------------------------------------------------


def _phases(plan: Plan, policy: ModelShape, reward: ModelShape, gradients: float) -> list[PhaseMemory]:
    how, batch = plan.how, plan.tokens(plan.sequences)
    if plan.stage == "sft":
        return _training(plan, dry_run.trained_on_text(policy, how, batch), gradients)
    if plan.stage == "rm":
        return _training(plan, dry_run.trained_values(reward, how, batch), gradients)
    ours = dry_run.trained_policy(policy, how, batch)
    if plan.stage == "pairwise":
        return _training(plan, _beside(ours, dry_run.read(policy, how, batch)), gradients)
    reading = dry_run.compared(policy, how, batch)
    if plan.critic:
        ours = _beside(ours, dry_run.trained_values(reward, how, batch))
        if how.adapters is None and how.dtype.itemsize < TRAINED:  # its weights, cast once for all batches
            reading = replace(reading, peak=reading.peak + how.dtype.itemsize * reward.sizes(CLASSIFIER, None).linear)
    return [
        _phase(f"generation, {plan.rollouts}", plan, dry_run.generated(policy, how, plan.tokens(plan.rollouts))),
        _phase(f"reading, {plan.micro_batch}", plan, reading),
        *_training(plan, ours, gradients),
    ]


def _beside(first: Work, second: Work) -> Work:
    """Return what two passes take where the second runs between forward and backward of the first."""
    inside = replace(second, peak=first.saved + second.peak, logits=second.logits)
    larger = max(first, inside, key=lambda work: work.peak)
    return Work(first.saved + second.saved, larger.peak, larger.logits)


def _training(plan: Plan, work: Work, gradients: float) -> list[PhaseMemory]:
    """Return forward and backward; of a step's only micro-batch, gradients come as activations go."""
    name = f"training, {plan.sequences}"
    if plan.accumulates:
        return [_phase(name, plan, work, gradients)]
    last = Work(0.0, work.peak - work.saved, 0.0)
    return [_phase(name, plan, work), _phase("gradients", plan, last, gradients)]


def _phase(name: str, plan: Plan, work: Work, gradients: float = 0.0) -> PhaseMemory:
    cache = work.saved if name.startswith("generation") else 0.0
    words = f"{name} x {plan.prompt_tokens + plan.completion_tokens} tokens" if "," in name else name
    return PhaseMemory(words, max(work.peak - work.logits - cache, 0.0), work.logits, cache, gradients)
