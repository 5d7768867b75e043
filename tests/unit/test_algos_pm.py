from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli import algos
from rlhf_cli.algos.pm import effective_reference

PROBABILITIES = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=8)
HALF_TENTH = torch.tensor([[0.5, 0.1, 0.25]]).log()  # (1, 3)


def test_likely_tokens_cost_entropy_and_unlikely_ones_kl() -> None:
    # threshold 0.2: .5 and .25 are above it, their e_t is 0; .1 is not, its e_t is log .1 = -2.302585
    found = effective_reference(HALF_TENTH, alpha=0.2)
    torch.testing.assert_close(found, torch.tensor([[0.0, -2.302585, 0.0]]))


def test_alpha_1_is_kl_and_none_is_unconditional() -> None:
    ref = torch.tensor([[0.0, -1e-8, -0.5, -1e4]], dtype=torch.float64)
    assert torch.equal(effective_reference(ref, alpha=1.0), ref)
    assert torch.equal(effective_reference(ref, alpha=1), ref)
    assert torch.equal(effective_reference(ref, alpha=None), torch.zeros_like(ref))


def test_alpha_towards_0_is_unconditional() -> None:
    assert torch.equal(effective_reference(HALF_TENTH, alpha=1e-9), torch.zeros(1, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_probability_of_exactly_alpha_is_not_likely(dtype: torch.dtype) -> None:
    for thousandths in range(1, 1000):
        alpha = thousandths / 1000
        ref = torch.tensor([alpha, alpha * 0.999, alpha * 1.001], dtype=dtype).log()
        assert (effective_reference(ref, alpha=alpha) == 0).tolist() == [False, False, True], alpha


@settings(deadline=None)
@given(PROBABILITIES, st.floats(0.001, 1.0))
def test_conditional_lies_between_kl_and_unconditional(probabilities: list[float], alpha: float) -> None:
    ref = torch.tensor([probabilities], dtype=torch.float64).log()
    found = effective_reference(ref, alpha=alpha)
    assert bool(((found == ref) | (found == 0)).all())
    assert bool((effective_reference(ref, alpha=1.0) <= found).all())
    assert bool((found <= effective_reference(ref, alpha=None)).all())


@settings(deadline=None)
@given(PROBABILITIES, st.floats(0.001, 1.0), st.floats(0.001, 1.0))
def test_a_lower_alpha_never_lowers_the_effective_reference(ps: list[float], one: float, other: float) -> None:
    ref = torch.tensor([ps], dtype=torch.float64).log()
    low, high = sorted((one, other))
    assert bool((effective_reference(ref, alpha=low) >= effective_reference(ref, alpha=high)).all())


@pytest.mark.parametrize("alpha", [0, 0.0, -0.1, 1.0001, 2, math.nan, math.inf])
def test_alpha_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha is .*: it is a probability threshold in \(0, 1\]"):
        effective_reference(HALF_TENTH, alpha=alpha)


def test_the_reference_is_not_changed_in_place() -> None:
    ref = HALF_TENTH.clone()
    effective_reference(ref, alpha=0.2)
    effective_reference(ref, alpha=None)
    assert torch.equal(ref, HALF_TENTH)


@pytest.mark.parametrize(("name", "alpha"), [("pm", 0.2), ("pm", None), ("dpm", 0.2), ("dpm", None)])
def test_pm_and_dpm_read_alpha_from_their_config(name: str, alpha: float | None) -> None:
    found = algos.get(name).effective_reference(HALF_TENTH, SimpleNamespace(alpha=alpha))
    assert torch.equal(found, effective_reference(HALF_TENTH, alpha=alpha))


@pytest.mark.parametrize("name", ["kl_ppo", "dpo", "rpo"])
def test_the_others_use_plain_kl(name: str) -> None:
    assert torch.equal(algos.get(name).effective_reference(HALF_TENTH, SimpleNamespace()), HALF_TENTH)


@pytest.mark.parametrize(
    ("name", "family"),
    [("pm", "online"), ("kl_ppo", "online"), ("dpo", "pairwise"), ("dpm", "pairwise"), ("rpo", "pairwise")],
)
def test_records(name: str, family: str) -> None:
    record = algos.get(name)
    assert (record.name, record.family) == (name, family)
    assert (record.pair_loss is not None) == (family == "pairwise")
    assert record.has_optimum == (name != "rpo")


def test_an_unknown_algorithm_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_algorithm"):
        algos.get("no_such_algorithm")
