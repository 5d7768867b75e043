"""Weight averaging of reward models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rlhf_cli import rewards
from rlhf_cli.rewards.warm import average_weights


def linear(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(5, 1).double()


def test_average_by_hand() -> None:
    members = [{"w": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([value])} for value in (0.0, 3.0, 6.0)]
    members[2]["w"] = torch.tensor([[4.0, -1.0]])
    found = average_weights(members)
    assert list(found) == ["w", "b"]
    torch.testing.assert_close(found["w"], torch.tensor([[2.0, 1.0]]))
    torch.testing.assert_close(found["b"], torch.tensor([3.0]))


@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_average_of_linear_models_predicts_the_mean_of_their_predictions(count: int) -> None:
    models, inputs = [linear(seed) for seed in range(count)], torch.randn(9, 5, dtype=torch.float64)
    averaged = linear(99)
    averaged.load_state_dict(average_weights([model.state_dict() for model in models]))
    predictions = torch.stack([model(inputs) for model in models])
    assert predictions.std(0).min() > 1e-3  # the members disagree
    torch.testing.assert_close(averaged(inputs), predictions.mean(0))


def test_members_are_left_as_they_were_and_share_nothing_with_the_average() -> None:
    members = [linear(seed).state_dict() for seed in (0, 1)]
    before = [{name: tensor.clone() for name, tensor in member.items()} for member in members]
    found = average_weights(members)
    for tensor in found.values():
        tensor.zero_()
    for member, kept in zip(members, before, strict=True):
        assert all(torch.equal(member[name], kept[name]) for name in kept)


def test_equal_members_average_to_themselves_in_any_type() -> None:
    state = {
        "half": torch.tensor([60000.0, 0.1]).half(),  # a sum of two is beyond half precision
        "bfloat": torch.tensor([0.1, 1e30]).bfloat16(),
        "single": torch.tensor([0.1, 0.7]),
        "count": torch.tensor([3, 2**40]),
    }
    found = average_weights([state, dict(state), dict(state)])
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_members_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"{count} members: averaging needs two or more"):
        average_weights([{"w": torch.ones(2)}] * count)


@pytest.mark.parametrize(
    "other",
    [{"w": torch.ones(3)}, {"v": torch.ones(2)}, {}, {"w": torch.ones(2), "b": torch.ones(1)}],
    ids=["shape", "name", "missing", "extra"],
)
def test_members_of_another_architecture_are_refused(other: dict[str, Tensor]) -> None:
    first = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match="member 2 has other tensors than member 0: they are not of one architecture"):
        average_weights([first, dict(first), other])


def test_members_are_trained_with_bradley_terry() -> None:
    assert rewards.get("warm") is rewards.get("bt")
