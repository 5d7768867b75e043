"""WARM (arXiv 2401.12187): reward models fine-tuned from one initialisation, their weights averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_cli.config.schema import TrainedRewardConfig, setting
from rlhf_cli.rewards import bt

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Config(TrainedRewardConfig):
    """Keys of conf/reward/warm.yaml."""

    members: int = setting(ge=2)
    combine: str = setting(choices=["weights", "predictions"], reading=True)


def average_weights(members: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each tensor over the members: theta = 1/M sum_m theta_m      (arXiv:2401.12187, eq. 1).

    Summed in double precision and returned in the members' own, which half precision and integer buffers need.

    Args:
        members: state dicts of M models of one architecture and one initialisation.

    Raises:
        ValueError: fewer than two members, or members whose tensors differ in name or shape.
    """
    if len(members) < 2:
        raise ValueError(f"{len(members)} members: averaging needs two or more.")
    first = members[0]
    for number, member in enumerate(members[1:], 1):
        if {name: tensor.shape for name, tensor in member.items()} != {n: t.shape for n, t in first.items()}:
            raise ValueError(f"member {number} has other tensors than member 0: they are not of one architecture.")
    means = {name: sum(member[name].double() for member in members) / len(members) for name in first}
    return {name: mean.to(first[name].dtype) for name, mean in means.items()}  # type: ignore[union-attr]


LOSS = bt.LOSS
