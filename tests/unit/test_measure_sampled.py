"""Drawing and reading samples and responses, their metrics, and the optimum's mass off the set."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import BOS, EOS, PAD, VOCAB, tiny_policy
from tiny_world import ENUMERATION, KL, PROMPTS, REWARDS, TREE, lookup, measure, sampled_measure, sampling
from torch import Tensor

from rlhf_cli import algos
from rlhf_cli.data.rows import Question
from rlhf_cli.measure import offset, sampled
from rlhf_cli.measure.exact import ExactMeasure, enumerate_answers
from rlhf_cli.measure.memo import Memo
from rlhf_cli.measure.sampled import SampledMeasure, read_logps, read_samples, score
from rlhf_cli.measure.samples import Samples, effective_logps, sample_metrics
from rlhf_cli.metrics.optimum import closed_form
from rlhf_cli.metrics.preference import divergence
from rlhf_cli.models.logps import frozen_token_logps, gather_logps, vocabulary_logps
from rlhf_cli.models.tokens import collate
from rlhf_cli.store import Store


def test_sampled_metrics_repeat_and_leave_the_global_random_state_alone() -> None:
    policy, work = tiny_policy().train(), sampled_measure(8)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = work.measure(policy)
    assert torch.equal(torch.rand(3), expected)
    torch.rand(7)
    second = work.measure(policy)
    assert first[0] == second[0]
    assert first[1] == second[1]
    assert policy.training
    assert sampled_measure(8, seed=1).measure(policy)[1] != first[1]


def test_sampled_metrics_agree_with_the_exact_ones() -> None:
    """On a closed vocabulary every expectation is a sum over the answers."""
    policy, reference = tiny_policy(2), tiny_policy(1)
    found, responses, rewards = sampled_measure(700, seed=15).measure(policy)  # of one seed, divergences are 16 % off
    assert len(responses) == len(rewards) == 2100
    batch, mask = ENUMERATION.batch, ENUMERATION.mask
    ours, theirs = (
        ENUMERATION.table(frozen_token_logps(model, batch, temperature=1.0, tree=TREE).sum(-1), -math.inf)
        for model in (policy, reference)
    )
    clipped = ENUMERATION.table(REWARDS.clamp(-5, 5), 0.0)
    share = ours.exp()
    lengths = ENUMERATION.table(batch.response_mask.sum(-1).float(), 0.0)
    expected = {
        "reward/mean": (share * clipped).sum(-1),
        "kl/sequence": (share * (ours - theirs)).nan_to_num().sum(-1),
        "length/mean": (share * lengths).sum(-1),
        "pm/divergence": divergence(clipped, ours, mask),
        "optimum/divergence": divergence(clipped + theirs.masked_fill(~mask, 0.0), ours, mask),
        "pm_beta/divergence": divergence(clipped, ours, mask),
    }
    for key, values in expected.items():
        assert found[key] == pytest.approx(values.mean().item(), rel=0.1, abs=0.05), key
    assert found["eos_rate"] == 1.0
    assert found["reward/mean/n"] == 3
    assert found["reward/mean/lo"] <= found["reward/mean"] <= found["reward/mean/hi"]


def test_a_policy_that_matches_its_reward_has_divergence_0() -> None:
    policy, reference = tiny_policy(), tiny_policy(1)

    def logps(model: Any, prompts: Any, responses: Any) -> Tensor:
        batch = collate(prompts, responses, PAD)
        return frozen_token_logps(model, batch, temperature=1.0, tree=None).sum(-1)

    def work(reward: Any, beta: float) -> dict[str, float]:
        algo = SimpleNamespace(beta=beta)
        measure = SampledMeasure(
            PROMPTS, 8, reference, reward, reward_clip=None, algorithm=algos.get("kl_ppo"), algo=algo,
            sampling=sampling(tree=None), seed=0,
        )  # fmt: skip
        return measure.measure(policy)[0]

    found = work(lambda p, r: logps(policy, p, r) + 3, 1.0)
    assert found["pm/divergence"] == pytest.approx(0.0, abs=1e-6)
    assert found["optimum/divergence"] > 0.1
    found = work(lambda p, r: 0.5 * logps(policy, p, r), 0.5)
    assert found["pm_beta/divergence"] == pytest.approx(0.0, abs=1e-6)
    assert found["pm/divergence"] > 0.1
    found = work(lambda p, r: 0.5 * (logps(policy, p, r) - logps(reference, p, r)), 0.5)
    assert found["optimum/divergence"] == pytest.approx(0.0, abs=1e-6)
    assert found["pm_beta/divergence"] > 0.1


def test_kl_of_the_reference_to_itself_is_0_and_cut_responses_are_counted() -> None:
    work = sampled_measure(20, tree=None, max_new_tokens=2)
    found, responses, _ = work.measure(tiny_policy(1))
    assert found["kl/sequence"] == pytest.approx(0.0, abs=1e-6)
    assert found["entropy/per_token"] > 0.1
    assert found["eos_rate"] == pytest.approx(np.mean([ids[-1] == EOS for ids in responses]))
    assert found["length/mean"] == pytest.approx(np.mean([len(ids) for ids in responses]))


def test_the_micro_batch_changes_no_metric_that_is_read() -> None:
    policy, work = tiny_policy(), sampled_measure(8)
    responses = work.draw(policy, work.prompts)
    pieces = [sampled_measure(8, micro_batch=size) for size in (1, 5, 128)]
    for other in pieces:
        other.draw = lambda *_: responses  # type: ignore[method-assign]
    first, *rest = (other.measure(policy)[0] for other in pieces)
    assert all(found == pytest.approx(first, abs=1e-4) for found in rest)


# -- samples that are kept ---------------------------------------------------------------------------------------------

FIELDS = ("logps", "kl", "entropy")
POLICY, REFERENCE = tiny_policy(2), tiny_policy(1)
SEVEN = [*PROMPTS, [BOS], [BOS, 7, 7, 7], [BOS, 9], [BOS, 4, 5]]  # of 2, 3, 3, 1, 4, 2, 3 tokens


def read(memo: Memo | None = None, samples: int = 3, seed: int = 0, models: Any = None, **how: Any) -> Samples:
    policy, reference = models or (POLICY, REFERENCE)
    settings = sampling(**{"tree": None, **how})
    return read_samples(policy, reference, SEVEN, samples, settings, memo or Memo(None), {"policy": "x"}, seed)


def assert_same(first: Samples, second: Samples, tolerance: float = 0.0) -> None:
    assert first.responses == second.responses
    for name in FIELDS:
        torch.testing.assert_close(first.columns[name], second.columns[name], rtol=0, atol=tolerance)
    for ours, theirs in zip(first.ref_token_logps, second.ref_token_logps, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def metrics_of(samples: Samples, rewards: Tensor | None = None, **how: Any) -> dict[str, float]:
    given = torch.arange(float(len(samples.responses))) if rewards is None else rewards
    return sample_metrics(samples, given, algorithm=algos.get("kl_ppo"), algo=KL, how=sampling(**how))


def test_samples_are_read_by_policy_and_reference() -> None:
    found = read()
    assert (found.prompts, found.per_prompt, len(found.responses)) == (SEVEN, 3, 21)
    batch = collate([prompt for prompt in SEVEN for _ in range(3)], found.responses, PAD)
    with torch.no_grad():
        ours, theirs = (vocabulary_logps(model, batch, temperature=1.0, tree=None) for model in (POLICY, REFERENCE))
    mask, reference = batch.response_mask, gather_logps(theirs, batch.response_ids)
    expected = {
        "logps": gather_logps(ours, batch.response_ids),
        "kl": (ours.exp() * (ours - theirs)).sum(-1),
        "entropy": -(ours.exp() * ours).sum(-1),
    }
    for name, values in expected.items():
        torch.testing.assert_close(found.columns[name], (values * mask).sum(-1), rtol=0, atol=1e-5)
    for row, tokens in enumerate(found.ref_token_logps):
        np.testing.assert_allclose(tokens, reference[row][mask[row]], rtol=0, atol=1e-5)
    assert found.table(torch.arange(21.0))[1].tolist() == [3, 4, 5]


def test_kept_samples_follow_the_policy() -> None:
    """On a closed vocabulary every expectation is a sum over the answers."""
    found = read_samples(POLICY, REFERENCE, PROMPTS, 700, sampling(), Memo(None), {}, 15)
    prompts = [prompt for prompt in PROMPTS for _ in range(700)]
    rewards = score(lookup, prompts, found.responses, Memo(None), {}, "rewards").clamp(-5, 5)
    share, before = (
        ENUMERATION.table(frozen_token_logps(m, ENUMERATION.batch, temperature=1.0, tree=TREE).sum(-1), -math.inf)
        for m in (POLICY, REFERENCE)
    )
    clipped = ENUMERATION.table(REWARDS.clamp(-5, 5), 0.0)
    expected = {
        "reward/mean": (share.exp() * clipped).sum(-1),
        "kl/sequence": (share.exp() * (share - before)).nan_to_num().sum(-1),
        "pm/divergence": divergence(clipped, share, ENUMERATION.mask),
    }
    for key, values in expected.items():
        assert metrics_of(found, rewards)[key] == pytest.approx(values.mean().item(), rel=0.1, abs=0.05), key


def test_kept_samples_repeat_and_leave_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = read()
    assert torch.equal(torch.rand(3), expected)
    torch.rand(7)
    assert_same(first, read())
    assert read(seed=1).responses != first.responses
    assert len({tuple(ids) for ids in first.responses}) > 10


def test_a_sample_does_not_depend_on_its_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> list[list[int]]:
        return read_samples(POLICY, REFERENCE, [[BOS, 4]] * 3, 20, sampling(None), Memo(None), {}, 0).responses

    whole = found()
    assert len({tuple(map(tuple, whole[start : start + 20])) for start in (0, 20, 40)}) == 3  # each its own luck
    monkeypatch.setattr(sampled, "DRAWN", 20)  # one prompt a piece
    assert found() == whole


def test_samples_depend_neither_on_the_memory_nor_on_the_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    first = read()
    assert_same(first, read(micro_batch=1), 1e-5)
    monkeypatch.setattr(sampled, "rows_that_fit", lambda *_: 2)
    assert_same(first, read(), 1e-5)


def test_interrupted_samples_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled, "DRAWN", 6)  # pieces of two prompts
    whole, memo, real = read(), Memo(Store(tmp_path)), sampled.draw
    drawn: list[list[int]] = []

    def draw(policy: Any, prompts: Any, *how: Any) -> Any:
        if len(drawn) in (2, 3):  # after two pieces, and after one more
            drawn.append([])
            raise KeyboardInterrupt
        drawn.append([len(ids) for ids in prompts])
        return real(policy, prompts, *how)

    monkeypatch.setattr(sampled, "draw", draw)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            read(memo)
    assert_same(whole, read(memo))
    # the longest prompts first, all samples of a prompt together
    assert drawn == [[4] * 3 + [3] * 3, [3] * 6, [], [], [2] * 6, [1] * 3]
    assert_same(whole, read(memo, models=(None, None)))  # nothing is drawn or read again
    assert len(drawn) == 6


def test_a_piece_that_does_not_fit_the_gpu_is_drawn_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    real, sizes = sampled.draw, []

    def draw(policy: Any, prompts: Any, *how: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(policy, prompts, *how)

    monkeypatch.setattr(sampled, "draw", draw)
    found = read()
    assert sizes == [21, 10, 5, 5, 5, 5, 1]
    assert all(1 <= len(ids) <= 4 for ids in found.responses)
    monkeypatch.undo()
    assert found.responses == read().responses


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": 4},
        {"seed": 1},
        {"max_new_tokens": 3},
        {"temperature": 0.5},
        {"sample_temperature": 0.5},
        {"top_p": 0.5},
        {"tree": TREE},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_samples_of_other_settings_are_not_re_used(tmp_path: Path, changes: dict[str, Any]) -> None:
    memo = Memo(Store(tmp_path))
    read(memo)
    again = read(memo, **changes)
    assert_same(again, read(None, **changes))
    assert len(list((tmp_path / "samples").iterdir())) == 2


def test_the_reference_beside_itself_is_read_once() -> None:
    found = read(models=(REFERENCE, REFERENCE))
    assert found.columns["kl"].tolist() == [0.0] * 21
    sums = torch.tensor([float(tokens.sum()) for tokens in found.ref_token_logps])
    torch.testing.assert_close(found.columns["logps"], sums, rtol=0, atol=1e-5)


def test_models_are_read_in_evaluation_mode_and_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, modes = tiny_policy(2).train(), []
    real = sampled.logps.vocabulary_logps

    def reading(model: Any, *args: Any, **kwargs: Any) -> Tensor:
        modes.append(model.training)
        return real(model, *args, **kwargs)

    monkeypatch.setattr(sampled.logps, "vocabulary_logps", reading)
    read(models=(policy, REFERENCE))
    assert modes == [False, False]
    assert policy.training

    def broken(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sampled, "sample", broken)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA"):
        sampled.draw(policy, SEVEN, sampling(None), 0)
    assert policy.training


# -- filtered samplers -------------------------------------------------------------------------------------------------


def test_a_filter_is_for_drawing_alone() -> None:
    """The nucleus of the likeliest token is greedy; log-probs stay those of the policy itself."""
    greedy = read(top_p=1e-6)
    for start in range(0, 21, 3):
        assert greedy.responses[start] == greedy.responses[start + 1] == greedy.responses[start + 2]
    batch = collate([prompt for prompt in SEVEN for _ in range(3)], greedy.responses, PAD)
    own = frozen_token_logps(POLICY, batch, temperature=1.0, tree=None).sum(-1)
    torch.testing.assert_close(greedy.columns["logps"], own, rtol=0, atol=1e-5)
    assert own.max() < -0.1
    assert_same(read(sample_temperature=1e-4), greedy, 1e-5)
    hot = read(temperature=2.0, sample_temperature=0.5)  # drawn as at 1, read as at 2
    assert hot.responses == read().responses
    batch = collate([prompt for prompt in SEVEN for _ in range(3)], hot.responses, PAD)
    own = frozen_token_logps(POLICY, batch, temperature=2.0, tree=None).sum(-1)
    torch.testing.assert_close(hot.columns["logps"], own, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.9), (0.7, 1.0), (0.7, 0.9)])
def test_a_filtered_sampler_leaves_out_what_needs_the_policy_itself(temperature: float, top_p: float) -> None:
    filtered = {"sample_temperature": temperature, "top_p": top_p}
    plain, found = metrics_of(read(samples=9)), metrics_of(read(samples=9, **filtered), **filtered)
    gone = {key for key in plain if key.startswith(("kl/", "entropy/")) or "/divergence" in key}
    assert {"kl/per_token", "kl/sequence", "entropy/per_token", "pm/divergence", "optimum/divergence/lo"} <= gone
    assert plain.keys() - found.keys() == gone
    assert found.keys() - plain.keys() == {"sampler/temperature", "sampler/top_p"}
    assert (found["sampler/temperature"], found["sampler/top_p"]) == (temperature, top_p)


def test_a_tempered_policy_is_not_a_filter() -> None:
    found = metrics_of(read(temperature=0.7), temperature=0.7)
    assert "pm/divergence" in found
    assert "sampler/temperature" not in found


# -- metrics of samples ------------------------------------------------------------------------------------------------


def by_hand(responses: list[list[int]], per_prompt: int) -> Samples:
    count = len(responses)
    columns = {"logps": torch.zeros(count), "kl": torch.arange(count) / 2, "entropy": torch.ones(count)}
    tokens = [np.full(len(ids), -0.5, dtype=np.float32) for ids in responses]
    return Samples(PROMPTS[: count // per_prompt], per_prompt, responses, columns, tokens)


def test_metrics_of_samples_by_hand() -> None:
    # Two prompts, two samples each, of 2, 1, 4 and 4 tokens; the last is cut.
    samples = by_hand([[7, EOS], [EOS], [7, 8, 9, EOS], [7, 8, 9, 9]], 2)
    rewards = torch.tensor([1.0, 3.0, -1.0, 0.0])
    found = sample_metrics(
        samples, rewards, algorithm=algos.get("kl_ppo"), algo=SimpleNamespace(beta=0.5), how=sampling()
    )
    expected = {
        "reward/mean": 0.75,
        "reward/std": math.sqrt((0.25**2 + 2.25**2 + 1.75**2 + 0.75**2) / 3),
        "reward/best_of_1": 0.75,
        "reward/best_of_2": (3 + 0) / 2,
        "reward/length_correlation": -1 / math.sqrt((1 + 1 + 0.25 + 0.25) * 0.5),  # deviations -1 1 -.5 .5, .5 -.5 0 0
        "length/mean": 11 / 4,
        "eos_rate": 0.75,
        "kl/sequence": 0.75,
        "kl/per_token": (0 + 0.5 + 1 / 4 + 1.5 / 4) / 4,
        "entropy/per_token": (1 / 2 + 1 + 1 / 4 + 1 / 4) / 4,
        "pm/divergence": (2**2 + 1**2) / 2,  # both prompts: squared difference of two rewards
        "pm_beta/divergence": (4**2 + 2**2) / 2,
        "optimum/divergence": ((1 - 5.5) ** 2 + 2**2) / 2,  # r / beta + sum e_t, e_t = -.5 a token: 1, 5.5; -4, -2
    }
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-6), key
        assert found[f"{key}/lo"] <= found[key] <= found[f"{key}/hi"], key
        assert found[f"{key}/n"] == 2, key
    assert found.keys() == {f"{key}{end}" for key in expected for end in ("", "/lo", "/hi", "/n")}


def test_equal_lengths_have_no_correlation() -> None:
    found = metrics_of(by_hand([[7, EOS], [8, EOS]], 2), torch.tensor([1.0, 2.0]))
    assert not [key for key in found if key.startswith("reward/length_correlation")]
    assert found["reward/best_of_2"] == 2.0


def test_padding_has_no_part_in_the_effective_reference() -> None:
    shifted = replace(algos.get("kl_ppo"), effective_reference=lambda logps, algo: logps - 1)  # not 0 under padding
    found = effective_logps([np.array([-0.5]), np.array([-0.5, -1.0, -2.0])], shifted, KL)
    assert found.tolist() == [-1.5, -6.5]


def test_an_algorithm_without_an_optimum_has_no_conditional_divergence() -> None:
    samples = by_hand([[7, EOS], [8, EOS]], 2)
    found = sample_metrics(samples, torch.zeros(2), algorithm=algos.get("rpo"), algo=KL, how=sampling())
    assert not [key for key in found if key.startswith("optimum/")]


# -- reading responses -------------------------------------------------------------------------------------------------

ASKED, GIVEN = ENUMERATION.prompt_ids * 3, ENUMERATION.response_ids * 3


def test_log_probs_do_not_depend_on_the_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in another order, in other batches, among longer ones: the same log-probs."""
    how = sampling(None)
    alone = [
        frozen_token_logps(POLICY, collate([prompt], [response], PAD), **how.reading)[0].numpy()
        for prompt, response in zip(ASKED, GIVEN, strict=True)
    ]

    def check(prompts: list[list[int]], responses: list[list[int]], expected: list[np.ndarray], **changes: Any) -> None:
        found = read_logps(POLICY, prompts, responses, sampling(None, **changes), Memo(None), {}, "responses")
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)

    check(ASKED, GIVEN, alone)
    check(ASKED[::-1], GIVEN[::-1], alone[::-1])
    check([*ASKED, [BOS] * 9], [*GIVEN, [7] * 7], [*alone, *read_one([BOS] * 9, [7] * 7)])
    check(ASKED, GIVEN, alone, micro_batch=1)
    monkeypatch.setattr(sampled, "rows_that_fit", lambda *_: 4)
    check(ASKED, GIVEN, alone)
    check(ASKED[:1], GIVEN[:1], alone[:1])


def read_one(prompt: list[int], response: list[int]) -> list[np.ndarray]:
    return [frozen_token_logps(POLICY, collate([prompt], [response], PAD), temperature=1.0, tree=None)[0].numpy()]


def test_batches_fit_the_memory_and_what_does_not_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, asked = [], []
    real = sampled.logps.frozen_token_logps

    def reading(model: Any, batch: Any, **how: Any) -> Tensor:
        sizes.append(len(batch.input_ids))
        if len(batch.input_ids) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, batch, **how)

    def rows_that_fit(width: int, vocab_size: int, device: str) -> int:
        asked.append((width, vocab_size, device))
        return 16

    expected = read_logps(POLICY, ASKED, GIVEN, sampling(None), Memo(None), {}, "responses")
    monkeypatch.setattr(sampled.logps, "frozen_token_logps", reading)
    monkeypatch.setattr(sampled, "rows_that_fit", rows_that_fit)
    found = read_logps(POLICY, ASKED, GIVEN, sampling(None), Memo(None), {}, "responses")
    assert sizes == [16, 8, *[4] * 6]
    assert asked == [(7, VOCAB, "cpu")]  # the longest prompt and the longest response
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_log_probs_are_kept_by_model_rows_and_reading(tmp_path: Path) -> None:
    memo = Memo(Store(tmp_path))

    def reading(model: Any, identity: str, responses: Any = GIVEN, **how: Any) -> list[np.ndarray]:
        return read_logps(model, ASKED, responses, sampling(**how), memo, {"policy": identity}, "responses")

    first = reading(POLICY, "a")
    for ours, theirs in zip(reading(None, "a"), first, strict=True):  # no model: nothing is read again
        np.testing.assert_array_equal(ours, theirs)
    others = [
        lambda: reading(REFERENCE, "b"),
        lambda: reading(POLICY, "a", temperature=0.5),
        lambda: reading(POLICY, "a", tree=None),
        lambda: reading(POLICY, "a", [GIVEN[-1], *GIVEN[1:]]),
    ]
    for number, other in enumerate(others):
        assert not all(np.array_equal(ours, theirs) for ours, theirs in zip(other(), first, strict=True))
        assert len(list((tmp_path / "logps").iterdir())) == number + 2


def test_scores_are_raw_and_in_the_order_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled, "SCORED", 5)
    calls: list[int] = []

    def reward(prompts: Any, responses: Any) -> Tensor:
        calls.append(len(prompts))
        return lookup(prompts, responses)

    memo = Memo(Store(tmp_path))
    found = score(reward, ASKED, GIVEN, memo, {"reward": "gold"}, "rewards")
    assert found.dtype == torch.float32
    assert torch.equal(found, REWARDS.repeat(3))  # -7 is not clipped
    assert calls == [5, 5, 5, 5, 4]
    assert torch.equal(score(reward, ASKED, GIVEN, memo, {"reward": "gold"}, "rewards"), found)
    assert len(calls) == 5
    backwards = score(reward, ASKED[::-1], GIVEN[::-1], memo, {"reward": "gold"}, "rewards")
    assert torch.equal(backwards, found.flip(0))
    score(reward, ASKED, GIVEN, memo, {"reward": "other"}, "rewards")
    assert len(calls) == 15
    assert score(reward, [], [], memo, {}, "rewards").tolist() == []


# -- the optimum's own mass off the set --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "alpha"), [("kl_ppo", 1.0), ("pm", 0.3), ("pm", 0.1)])
def test_offset_bound_is_the_optimum_s_mass_off_the_set(
    monkeypatch: pytest.MonkeyPatch, name: str, alpha: float
) -> None:
    """With responses of at most 2 tokens, every response there is can be enumerated."""
    monkeypatch.setattr(offset, "SAMPLES", 1500)
    reference, algo = tiny_policy(1), SimpleNamespace(beta=1.0, alpha=alpha)
    algorithm = algos.get(name)
    answers = [[[7, EOS], [8, EOS]], [[EOS]], [[9, 9], [4, EOS]]]
    questions = [Question(f"{i}", tuple("ab"[: len(rows)]), None, None, i, i == 2) for i, rows in enumerate(answers)]
    enumeration = enumerate_answers(questions, PROMPTS, answers, PAD, "cpu")

    def reward(prompts: Any, responses: Any) -> Tensor:
        return torch.tensor([1.0 if [*r] in ([7, EOS], [8, EOS], [EOS], [4, EOS]) else -1.0 for r in responses])

    work = ExactMeasure(
        enumeration, reference, reward, reward_clip=5.0, algorithm=algorithm, algo=algo, temperature=1.0, tree=None
    )
    drawn = SampledMeasure(
        PROMPTS, 2, reference, reward, reward_clip=5.0, algorithm=algorithm, algo=algo,
        sampling=sampling(tree=None, max_new_tokens=2), seed=0,
    )  # fmt: skip
    found = offset.offset_bound(work, drawn)
    everything = [[EOS]] + [[a, b] for a, b in product(range(VOCAB), repeat=2) if a != EOS]
    masses = []
    for prompt, valid in list(zip(PROMPTS, answers, strict=True))[:2]:  # the third is held out
        batch = collate([prompt] * len(everything), everything, PAD)
        token_logps = frozen_token_logps(reference, batch, temperature=1.0, tree=None)
        best = closed_form(
            token_logps, reward([prompt] * len(everything), everything), batch.response_mask, beta=1.0, alpha=alpha
        )
        on = torch.tensor([ids in valid for ids in everything])
        masses.append(best[~on].exp().sum().item())
    assert found["optimum/offset_bound"] == pytest.approx(np.mean(masses), rel=0.1)
    assert found["optimum/offset_bound/n"] == 2  # questions


def test_a_closed_vocabulary_has_nothing_off_the_set() -> None:
    work = measure(tiny_policy(1), tree=TREE)
    assert offset.offset_bound(work, sampled_measure(2))["optimum/offset_bound"] == 0.0


def test_the_curve_s_reward_is_the_mean_over_fewer_samples() -> None:
    policy, work = tiny_policy(2), sampled_measure(8)
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    rewards = work.clipped_rewards(prompts, work.draw(policy, prompts))
    found = work.mean_reward(policy, 4)
    assert found["reward/mean"] == pytest.approx(float(rewards.mean()))
    assert found.keys() == {"reward/mean", "reward/mean/lo", "reward/mean/hi", "reward/mean/n"}
