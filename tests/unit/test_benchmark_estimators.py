"""The check of the estimators on a few prompts: exact values by hand and by another road, its verdicts, its page."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from math import log
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from rlhf_cli.models import logps
from rlhf_cli.models.tokens import collate

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as when it is run: its neighbours and its dataclasses find it
    spec.loader.exec_module(module)
    return module


enumerable = load("enumerable")
estimators = load("estimators")
EOS = enumerable.EOS
WORLD = enumerable.make_world(6, 0)
POLICY, REFERENCE = enumerable.new_policy(1), enumerable.new_policy(2)
TINY = estimators.Size(population=30, prompts=12, samples=2, repetitions=2, steps=8, pools=1)


def test_every_response_is_listed_once_and_their_probabilities_sum_to_1() -> None:
    # vocabulary 9: 1 + 8 + 8 * 8 that end, 8^3 that are cut at 3 tokens
    assert len({tuple(ids) for ids in WORLD.strings}) == len(WORLD.strings) == 1 + 8 + 64 + 512
    opened, closed = (enumerable.string_logps(POLICY, WORLD, tree) for tree in (None, WORLD.tree()))
    for table in (opened, closed):
        assert np.exp(table).sum(-1) == pytest.approx(np.ones(6), abs=1e-5)
    assert enumerable.off_answers(closed, WORLD) == pytest.approx(np.zeros(6), abs=1e-5)
    assert (enumerable.off_answers(opened, WORLD) > 0.5).all()
    assert [[WORLD.strings[i] for i in row] for row in WORLD.place] == WORLD.answers


def test_expectations_per_token_by_hand() -> None:
    # EOS with 1/4, else token 4 and then EOS for sure: entropy h at the first token, 0 at the second
    strings = [[EOS], [4, EOS]]
    shares = np.log(np.array([[0.25, 0.75]]))
    tokens = enumerable.token_table(shares, strings)
    assert tokens[0] == pytest.approx(np.array([[log(0.25), 0, 0], [log(0.75), 0, 0]]))
    h = -(0.25 * log(0.25) + 0.75 * log(0.75))
    assert enumerable.expected_per_token(shares, -tokens, strings) == pytest.approx(0.25 * h + 0.75 * h / 2)


def test_exact_kl_and_entropy_are_those_of_the_vocabulary_at_every_position() -> None:
    ours, theirs = (enumerable.string_logps(model, WORLD, None) for model in (POLICY, REFERENCE))
    tokens, other = (enumerable.token_table(table, WORLD.strings) for table in (ours, theirs))
    batch = collate([WORLD.prompts[0]] * len(WORLD.strings), WORLD.strings, enumerable.PAD)
    with torch.no_grad():
        read = [logps.vocabulary_logps(model, batch, temperature=1.0, tree=None) for model in (POLICY, REFERENCE)]
    mask, share = batch.response_mask.double().numpy(), np.exp(ours[0])
    for values, at_position in (
        (tokens - other, logps.kl(*read)),
        (-tokens, logps.entropy(read[0])),
    ):
        expected = (share * (at_position.double().numpy() * mask).sum(-1) / mask.sum(-1)).sum()
        assert enumerable.expected_per_token(ours, values, WORLD.strings)[0] == pytest.approx(expected, rel=1e-4)


def test_divergence_and_best_of_by_hand() -> None:
    # rewards 0 and 2 with 1/4 and 3/4: variance 4 * 3/16; the best of 2 is 0 with 1/16
    share, rewards = np.array([[0.75, 0.25]]), np.array([[2.0, 0.0]])
    assert estimators.twice_variance(share, rewards) == pytest.approx(1.5)
    found = estimators.best_of(share, rewards)
    assert found["reward/best_of_2"] == pytest.approx(2 * 15 / 16)
    assert found["reward/best_of_4"] == pytest.approx(2 * 255 / 256)


@pytest.mark.parametrize("closed", [False, True])
def test_estimates_of_many_samples_are_near_the_exact_values(closed: bool) -> None:
    tree = WORLD.tree() if closed else None
    tables = [enumerable.string_logps(model, WORLD, tree) for model in (POLICY, REFERENCE)]
    case = estimators.Case("x", POLICY, REFERENCE, tree, *tables)
    exact = estimators.exact_values(case, WORLD)
    found = estimators.estimate(case, WORLD, replace(TINY, prompts=60, samples=32), repetition=0)
    keys = ["reward/mean", "kl/sequence", "kl/per_token", "entropy/per_token", "length/mean", "reward/best_of_4"]
    for key in [*keys, "pm/divergence", "pm_beta/divergence", "optimum/divergence"]:
        assert found[key] == pytest.approx(exact[key], rel=0.2, abs=0.1), key
    assert ("pm/offset_mass" in found) == (not closed)


def test_an_interval_beside_the_exact_value_does_not_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    case = estimators.Case("x", None, None, None, np.zeros((1, 1)), np.zeros((1, 1)))
    exact = {"eos_rate": 0.99, "pm/offset_mass": 0.5, "reward/mean": 0.0, "length/mean": 2.0}
    rows = iter([0.9, 1.1] * 4)

    def found(*_: object) -> dict[str, float]:
        middle = next(rows)
        ends = {f"{key}{end}": middle + gap for key in exact for end, gap in (("/lo", -0.01), ("/hi", 0.01))}
        return {**dict.fromkeys(exact, middle), "length/mean": 2.0, **ends}

    monkeypatch.setattr(estimators, "exact_values", lambda *_: exact)
    monkeypatch.setattr(estimators, "estimate", found)
    table = {row.metric: row for row in estimators.coverage(case, WORLD, replace(TINY, prompts=10, samples=2))}
    assert {key: row.covered for key, row in table.items()} == {"eos_rate": 0, "pm/offset_mass": 0, "reward/mean": 0}
    assert table["reward/mean"].width == pytest.approx(0.02)


def test_candidates_are_a_pair_and_then_what_the_reference_says_most() -> None:
    rng = np.random.default_rng(0)
    reference = np.array([[0.94, 0.02, 0.02, 0.02]] * 300)
    pools = estimators.draw_candidates(reference, 3, rng)
    assert all(len(set(pool)) == 3 for pool in pools)
    first = [0 in pool[:2] for pool in pools]
    assert np.mean(first) == pytest.approx(0.5, abs=0.1)  # 2 of 4, evenly
    assert np.mean([pool[2] == 0 for pool, there in zip(pools, first, strict=True) if not there]) > 0.9
    assert all(sorted(pool) == [0, 1, 2, 3] for pool in estimators.draw_candidates(reference, 4, rng))


def test_a_pool_of_all_answers_is_the_answer_set_and_smaller_ones_differ() -> None:
    reference = enumerable.string_logps(REFERENCE, WORLD, WORLD.tree())
    rows = estimators.pool_table(WORLD, reference, TINY)
    assert estimators.whole_set_differs(rows) == []
    assert {row.size for row in rows} == {2, 3, 4, 6, 8}
    collapsed = {row.size: row for row in rows if row.policy == "collapsed"}
    assert collapsed[2].pool["pm/tv"] < collapsed[2].exact["pm/tv"] - 0.1
    wrong = replace(collapsed[8], pool={**collapsed[8].pool, "pm/tv": 0.5})
    assert len(estimators.whole_set_differs([wrong])) == 1


def test_hand_made_policies_are_ranked_rightly_and_wrongly_by_the_official_metric() -> None:
    reference = enumerable.placed(np.tile(enumerable.WRITER, (6, 1)), WORLD)
    table = estimators.hand_made_table(WORLD, reference)
    assert estimators.ranked_wrongly(table) == []
    assert tuple(estimators.order(table, "pm/tv")) == ("optimum", "uniform", "collapsed", "gibberish")
    assert estimators.order(table, "pm/divergence")[-1] == "uniform"
    assert table["optimum"]["pm/tv"] == pytest.approx(0, abs=1e-9)
    swapped = {**table, "optimum": table["collapsed"], "collapsed": table["optimum"]}
    problems = estimators.ranked_wrongly(swapped)
    assert len(problems) == 4
    assert problems[-1] == "the guard flags gibberish, optimum"


def test_the_page_has_all_three_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    code = estimators.main(TINY, tmp_path / "results" / "estimators.md", said.append)
    page = (tmp_path / "results" / "estimators.md").read_text(encoding="utf-8")
    assert code == int(bool(capsys.readouterr().err))  # with two repetitions some metric is not covered, or none
    for words in ("2 repetitions, each with 12 prompts", "| peaked, open | `pm/offset_mass` |", "| `pm/tv` | exact |"):
        assert words in page
    assert "Best first by `pm/tv`: optimum, uniform, collapsed, gibberish." in page
    assert "nan" not in page
