"""The record an algorithm is: what it regularises towards, and its pairwise loss if it learns from pairs.

Algorithm modules are imported to learn their schema before a config is known to be valid, so they call tensor
methods and leave `import torch` to the modules that need it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """Per-token log-probs of a micro-batch of pairs under policy and reference, nats, (B, T); masks bool, True keeps.

    `token_share` is the number of its chosen tokens over the mean of the micro-batches of its optimizer step, which are
    averaged with equal weight: a mean over tokens takes it to be one over those of the whole batch.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_mask: Tensor
    rejected_mask: Tensor
    token_share: float = 1.0


@dataclass(frozen=True)
class Algorithm:
    """One algorithm.

    Args:
        name: of yaml, module and tracker group.
        family: "online" (samples from the policy) or "pairwise" (learns from pairs).
        effective_reference: (ref_token_logps, config) -> e_t, the one seam of every regulariser.
        pair_loss: pairwise only: (PairLogps, config) -> {"loss": scalar, "logits": implicit reward difference of each
            pair (B,), which a prior constraint bounds, and any term to be logged: scalar}.
        has_optimum: False where no closed-form optimum is known (rpo).
    """

    name: str
    family: str
    effective_reference: Callable[[Tensor, Any], Tensor]
    pair_loss: Callable[[PairLogps, Any], dict[str, Tensor]] | None = None
    has_optimum: bool = True


def require_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors have one shape; the message names each with its shape."""
    if len({tuple(tensor.shape) for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"tensors differ in shape: {shapes}. They must be equal.")


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of `values` (B, T) over the tokens that `mask` keeps, (B,). Masked values may be anything."""
    return values.masked_fill(~mask.bool(), 0.0).sum(-1)
