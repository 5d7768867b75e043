from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fabricated_runs import run_of

from rlhf_cli.errors import DataError
from rlhf_cli.report.comparison import Comparison, Row, check_baseline, check_rank, compare
from rlhf_cli.report.run_groups import Run, group_runs, latest_of_each_seed
from rlhf_cli.report.run_sets import comparable_sets, titles

T_3 = 4.302653  # Student's t, 0.975, 2 degrees of freedom


def stopped(name: str, seed: int, state: str = "failed", reason: str = "the reward is not finite") -> Run:
    return replace(run_of(name, seed, {}), state=state, reason=reason)


def compared(runs: Sequence[Run], **options: Any) -> Comparison:
    return compare("a world", runs[0].kind, runs, **options)


def rows_of(runs: Sequence[Run], **options: Any) -> dict[str, Row]:
    return {row.name: row for row in compared(runs, **options).rows}


# --- groups and names


def test_settings_that_differ_name_the_row_and_places_do_not() -> None:
    runs = [run_of("pm", 0, algo__alpha=0.02), run_of("pm", 0, algo__alpha=None), run_of("kl_ppo", 0)]
    runs.append(run_of("pm", 1, algo__alpha=0.02, tracker={"name": "wandb"}, store_dir="elsewhere"))
    groups = group_runs(runs)
    assert {name: [run.seed for run in group] for name, group in groups.items()} == {
        "kl_ppo": [0],
        "pm alpha=0.02": [0, 1],
        "pm alpha=null": [0],
    }


def test_a_group_s_name_stands_for_the_values_it_brings() -> None:
    runs = [run_of("pm", reward={"name": "bt", "negative_share": 0.25})]
    runs.append(run_of("pm", reward={"name": "gold", "negative_share": 0.0}))
    assert list(group_runs(runs)) == ["pm reward=bt", "pm reward=gold"]
    runs.append(run_of("pm", reward={"name": "bt", "negative_share": 0.5}))
    names = list(group_runs(runs))
    assert len(names) == 3
    assert "pm reward=bt reward.negative_share=0.5" in names


def test_rows_are_ordered_and_unknown_algorithms_follow() -> None:
    assert list(rows_of([run_of(name) for name in ("zeta", "rpo", "pm", "sft", "kl_ppo")])) == [
        *("sft", "kl_ppo", "pm", "rpo", "zeta")
    ]


def test_what_evaluate_leaves_at_its_defaults_makes_no_row_of_its_own() -> None:
    added: dict[str, Any] = {"checkpoint": "last", "reference": None, "reward_model": [], "judge": {"name": "none"}}
    added |= {"sampler": {"temperature": 1.0, "top_p": 1.0}}
    assert list(group_runs([run_of("pm"), run_of("pm", 1, **added)])) == ["pm"]
    assert list(group_runs([run_of("pm"), run_of("pm", 1, **{**added, "checkpoint": "best"})])) == [
        *("pm checkpoint=best", "pm checkpoint=last")
    ]


def test_models_with_one_name_and_two_places_stay_apart() -> None:
    runs = [replace(run_of("pm", policy=f"{place}/opt"), algorithm="opt") for place in ("a", "b")]
    assert list(group_runs(runs)) == ["opt policy=a/opt", "opt policy=b/opt"]


def test_the_same_seed_twice_is_one_draw_and_the_latest_is_kept() -> None:
    log = [{"step": 0.0}]
    trained = replace(run_of("pm"), path=Path("trained"), ended="2026-01-01", log=log)
    judged = replace(run_of("pm", checkpoint="last"), path=Path("judged"), ended="2026-01-02")
    other, failed = run_of("pm", 1), stopped("pm", 0)
    for order in ([trained, judged, other, failed], [judged, trained, other, failed]):
        kept, left_out = latest_of_each_seed(order)
        assert {run.path.name for run in kept} == {"judged", "pm1", "pm0"}
        assert left_out == [trained]
        assert next(run for run in kept if run.path.name == "judged").log == log, "an evaluation trained nothing"


# --- numbers


def test_several_seeds_have_student_s_interval() -> None:
    # 0.1, 0.2, 0.3: mean 0.2, sample deviation 0.1, half = t * 0.1 / sqrt 3
    row = rows_of([run_of("pm", seed, {"pm/tv": 0.1 * (seed + 1)}) for seed in range(3)])["pm"]
    cell = row.cells["pm/tv"]
    assert (len(row.runs), cell.seeds, cell.source) == (3, 3, "seeds")
    assert cell.mean == pytest.approx(0.2)
    assert cell.half == pytest.approx(T_3 * 0.1 / 3**0.5, rel=1e-5)
    assert (cell.low, cell.high) == pytest.approx((0.2 - cell.half, 0.2 + cell.half))


def test_one_seed_has_its_own_interval_over_prompts_or_none() -> None:
    metrics = {"pm/tv": 0.1, "reward/mean": 0.5, "reward/mean/lo": 0.4, "reward/mean/hi": 0.7, "reward/mean/n": 40}
    cells = rows_of([run_of("pm", 0, metrics)])["pm"].cells
    assert set(cells) == {"pm/tv", "reward/mean"}
    assert (cells["pm/tv"].low, cells["pm/tv"].half, cells["pm/tv"].source) == (None, None, "none")
    assert (cells["reward/mean"].low, cells["reward/mean"].high, cells["reward/mean"].half) == (0.4, 0.7, None)
    assert cells["reward/mean"].source == "prompts"


def test_each_metric_counts_its_own_seeds() -> None:
    cells = rows_of([run_of("pm", 0, {"pm/tv": 0.1, "gold/tv": 0.3}), run_of("pm", 1, {"pm/tv": 0.3})])["pm"].cells
    assert (cells["pm/tv"].seeds, cells["gold/tv"].seeds, cells["gold/tv"].half) == (2, 1, None)


def test_reference_row_counts_each_seed_once_and_has_no_optimum() -> None:
    metrics = {"pm/tv": 0.1, "optimum/tv": 0.2, "reference/pm/tv": 0.6, "reference/optimum/tv": 0.7}
    runs = [
        run_of(name, seed, metrics, algo__beta=beta) for name, beta in (("pm", 1.0), ("dpo", 0.1)) for seed in (0, 1)
    ]
    rows = rows_of(runs)
    assert len(rows["sft"].runs) == 2
    assert rows["sft"].cells["pm/tv"].mean == pytest.approx(0.6)
    assert "optimum/tv" not in rows["sft"].cells
    assert rows["pm"].cells["optimum/tv"].mean == pytest.approx(0.2)


def test_a_reference_that_the_config_does_not_train_is_named() -> None:
    metrics = {"pm/tv": 0.1, "reference/pm/tv": 0.6, "reference/pm_beta/tv": 0.7}
    sft = replace(run_of("pm", 0, metrics, policy=None, reference="models/opt-x"), algorithm="sft")
    rows = rows_of([run_of("pm", 0, metrics, reference="models/opt-x"), sft])
    assert {name: row.cells["pm/tv"].mean for name, row in rows.items()} == {
        **{"reference opt-x": 0.6, "sft": 0.1, "pm": 0.1}
    }
    assert rows["reference opt-x"].is_reference
    assert not rows["sft"].is_reference
    assert set(rows["reference opt-x"].cells) == {"pm/tv"}
    assert rows["pm"].baseline == "reference opt-x"


def test_unfinished_runs_are_listed_and_not_averaged() -> None:
    runs = [run_of("pm", 0, {"pm/tv": 0.2}), stopped("pm", 1), stopped("rpo", 2, "running", "")]
    found = compared(runs, failed=[("algo=dpo", "no pairs are left")])
    assert [(row.name, row.cells["pm/tv"].mean, row.cells["pm/tv"].seeds) for row in found.rows] == [("pm", 0.2, 1)]
    assert [(run.name, run.seed, run.state, run.reason) for run in found.stopped] == [
        ("pm", 1, "failed", "the reward is not finite"),
        ("rpo", 2, "running", ""),
        ("algo=dpo", None, "failed", "no pairs are left"),
    ]


def test_no_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one run"):
        compare("a world", "exact", [])


# --- baseline


def test_differences_are_paired_by_seed() -> None:
    # What a seed does to both cancels: the differences are 0.1, 0.1, 0.1, and the seeds' own spread is far larger.
    base = [run_of("kl_ppo", seed, {"pm/tv": 0.3 + seed}) for seed in (0, 1, 2, 5)]
    ours = [run_of("pm", seed, {"pm/tv": 0.2 + seed}) for seed in (0, 1, 2, 7)]
    row = rows_of([*base, *ours])["pm"]
    difference = row.cells["pm/tv"].difference
    assert row.baseline == "kl_ppo"
    assert difference is not None
    assert (difference.mean, difference.half, difference.count) == (pytest.approx(-0.1), pytest.approx(0, abs=1e-9), 3)
    # Improvement over the seeds both have: (0.3 + 1.3 + 2.3 - 0.2 - 1.2 - 2.2) / 3.9
    assert row.improvement["pm/tv"] == pytest.approx(100 * 0.3 / 3.9)


def test_improvement_is_positive_where_a_distance_fell_and_only_for_tv_and_divergence() -> None:
    base = run_of("kl_ppo", 0, {"pm/tv": 0.4, "pm/divergence": 2.0, "reward/mean": 1.0})
    ours = run_of("pm", 0, {"pm/tv": 0.1, "pm/divergence": 3.0, "reward/mean": 2.0})
    rows = rows_of([base, ours])
    assert rows["pm"].improvement == pytest.approx({"pm/tv": 75.0, "pm/divergence": -50.0})
    assert rows["pm"].cells["pm/tv"].difference.half is None, "one seed: no interval is invented"
    assert (rows["kl_ppo"].is_baseline, rows["kl_ppo"].baseline, rows["kl_ppo"].improvement) == (True, None, {})


def test_no_difference_without_a_common_seed_and_no_share_of_nothing() -> None:
    apart = rows_of([run_of("kl_ppo", 0), run_of("pm", 1)])["pm"]
    assert (apart.cells["pm/tv"].difference, apart.improvement) == (None, {})
    nothing = rows_of([run_of("kl_ppo", 0, {"pm/divergence": 0.0}), run_of("pm", 0, {"pm/divergence": 1.0})])["pm"]
    assert nothing.improvement == {}


def test_the_baseline_is_the_kl_ppo_of_nearest_beta_else_the_reference() -> None:
    metrics = {"pm/tv": 0.1, "reference/pm/tv": 0.6}
    runs = [run_of("kl_ppo", 0, metrics, algo__beta=beta) for beta in (0.1, 1.0)]
    runs += [run_of("pm", 0, metrics, algo__beta=beta) for beta in (0.2, 0.9)]
    rows = rows_of(runs)
    assert {name: row.baseline for name, row in rows.items()} == {
        "sft": "kl_ppo beta=0.1",  # it has no beta: the first
        "kl_ppo beta=0.1": None,
        "kl_ppo beta=1.0": None,
        "pm beta=0.2": "kl_ppo beta=0.1",
        "pm beta=0.9": "kl_ppo beta=1.0",
    }
    assert rows_of(runs[2:])["pm beta=0.2"].baseline == "sft"
    assert rows_of([run_of("pm")])["pm"].baseline is None


def test_a_named_baseline_is_used_for_every_row() -> None:
    runs = [run_of(name) for name in ("kl_ppo", "pm", "dpo")]
    assert {name: row.baseline for name, row in rows_of(runs, baseline="dpo").items()} == {
        "kl_ppo": "dpo",
        "pm": "dpo",
        "dpo": None,
    }


def test_an_unknown_baseline_is_named_with_the_nearest_and_all() -> None:
    found = [compared([run_of("kl_ppo"), run_of("pm", 0, algo__alpha=0.1), run_of("pm", 0, algo__alpha=0.2)])]
    check_baseline("pm alpha=0.2", found)
    names = "kl_ppo, pm alpha=0.1, pm alpha=0.2"
    with pytest.raises(DataError, match=rf"'pm alpha=0.3' is no row. The rows are: {names}. Did you mean 'pm alpha="):
        check_baseline("pm alpha=0.3", found)


# --- ranks and the guard


def test_ranks_are_by_tv_and_leave_the_order_alone_unless_asked() -> None:
    values = {"kl_ppo": 0.3, "pm": 0.1, "dpo": 0.1, "rpo": 0.2}
    runs = [run_of(name, 0, {"pm/tv": value, "reference/pm/tv": 0.6}) for name, value in values.items()]
    found = compared(runs)
    assert found.rank_by == "pm/tv"
    assert [(row.name, row.rank) for row in found.rows] == [
        *(("sft", 5), ("kl_ppo", 4), ("pm", 1), ("dpo", 1), ("rpo", 3))
    ]
    assert [row.name for row in compared(runs, rank_by="pm/tv").rows] == ["pm", "dpo", "rpo", "kl_ppo", "sft"]


def test_higher_is_better_where_the_glossary_says_so_and_rows_without_the_metric_come_last() -> None:
    runs = [run_of("kl_ppo", 0, {"reward/mean": 1.0}), run_of("pm", 0, {"reward/mean": 2.0}), run_of("dpo", 0, {})]
    runs[2] = run_of("dpo", 0, {"pm/pair_tv": 0.3})
    found = compared(runs, rank_by="reward/mean")
    assert [(row.name, row.rank) for row in found.rows] == [("pm", 1), ("kl_ppo", 2), ("dpo", None)]
    assert compared(runs).rank_by == "reward/mean", "text without pools"


def collapsed(seed: int = 0, entropy: float = 0.01) -> Run:
    metrics = {"pm/tv": 0.5, "pm/divergence": 0.001, "entropy/per_token": entropy, "reference/entropy/per_token": 1.0}
    return run_of("kl_ppo", seed, metrics)


def test_a_collapsed_row_is_flagged_and_never_ranked_by_divergence() -> None:
    healthy = run_of("pm", 0, {"pm/tv": 0.1, "pm/divergence": 2.0})
    found = compared([collapsed(), healthy], rank_by="pm/divergence")
    # The reference here has an entropy and no divergence.
    assert [(row.name, row.rank, bool(row.flags)) for row in found.rows] == [
        *(("pm", 1, False), ("sft", None, False), ("kl_ppo", None, True))
    ]
    assert "entropy per token 0.01" in found.rows[2].flags[0]
    assert found.notes == ["Not ranked by pm/divergence, which is near zero after a collapse too: kl_ppo."]
    by_tv = {row.name: row.rank for row in compared([collapsed(), healthy], rank_by="pm/tv").rows}
    assert by_tv == {"pm": 1, "kl_ppo": 2, "sft": None}


@pytest.mark.parametrize(
    "key", ["pm/divergence_max", "optimum/divergence", "heldout/pm/divergence", "by/x/pm/divergence"]
)
def test_no_kind_of_divergence_ranks_a_collapsed_row(key: str) -> None:
    bad = replace(collapsed(), metrics={**collapsed().metrics, key: 0.001})
    found = compared([bad, run_of("pm", 0, {"pm/tv": 0.1, key: 2.0})], rank_by=key)
    assert {row.name: row.rank for row in found.rows} == {"pm": 1, "sft": None, "kl_ppo": None}
    assert found.rank_by == key


def test_other_seeds_in_other_rows_are_said() -> None:
    words = "Not every row has the same seeds: ranks compare means over different seeds."
    assert compared([run_of("pm", 0), run_of("pm", 1), run_of("dpo", 0)]).notes == [words]
    assert compared([run_of("pm", 0), run_of("dpo", 0)]).notes == []


def test_one_collapsed_seed_of_several_is_flagged_with_its_seed() -> None:
    # The mean entropy (0.01 + 0.9 + 0.9) / 3 = 0.6 is above a quarter of the reference's 1.
    row = rows_of([collapsed(0), collapsed(1, 0.9), collapsed(2, 0.9)])["kl_ppo"]
    assert len(row.flags) == 1
    assert row.flags[0].startswith("seed 0: entropy per token 0.01")
    assert rows_of([collapsed(1, 0.9)])["kl_ppo"].flags == []


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("pm/tvv", r"--rank pm/tvv: no run has this metric. Did you mean pm/tv\?"),
        ("reward/meen", "--rank reward/meen: no run has this metric. Did you mean reward/mean"),
        ("pm/minority_mass", "neither a lower nor a higher value is better in itself. Rank by .* for example pm/tv"),
        ("mine", "it cannot rank"),
        ("pm/tv/lo", "no run has this metric"),
    ],
)
def test_metrics_that_cannot_rank_are_refused(key: str, message: str) -> None:
    runs = [run_of("pm", 0, {"pm/tv": 0.1, "pm/tv/lo": 0.0, "pm/minority_mass": 0.3, "mine": 1.0})]
    check_rank("pm/tv", runs)
    with pytest.raises(DataError, match=message):
        check_rank(key, runs)


# --- sets


def sets_of(runs: Sequence[Run]) -> dict[str, set[str]]:
    found = comparable_sets(runs)
    return {title: {run.path.name for run in one.runs} for title, one in zip(titles(found), found, strict=True)}


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"dataset__seed": 1}, "Survey world 1, reward bt: other dataset: dataset.seed=1"),
        ({"reward": {"name": "gold"}}, "Survey world 0, reward gold: other reward: reward.name=gold"),
        ({"reward__clip": 3.0}, "Survey world 0, reward bt: other reward: reward.clip=3.0"),
        ({"reward_model": ["x/rm"]}, "Survey world 0, reward rm: other reward model: reward_model=['x/rm']"),
        ({"sampler": {"temperature": 0.5}}, "Survey world 0, reward bt: other sampler: sampler.temperature=0.5"),
        ({"dataset__eval_samples": 8}, "Survey world 0, reward bt: other dataset: dataset.eval_samples=8"),
    ],
)
def test_another_target_is_another_set_and_says_why(settings: dict[str, Any], difference: str) -> None:
    runs = [run_of("other", 0, **settings), run_of("pm"), run_of("dpo", 0, algo__beta=0.1)]
    assert sets_of(runs) == {"Survey world 0, reward bt": {"pm0", "dpo0"}, difference: {"other0"}}


def test_exact_answers_pools_and_reward_models_are_sets_of_their_own() -> None:
    text = {"dataset": {"source": "hh_rlhf", "path": "data/hh.jsonl.gz"}}
    pool = run_of("pm", 1, {"pm/tv": 0.1, "pool/size": 9.0}, **text)
    pairs = run_of("dpo", 2, {"pm/pair_tv": 0.3}, **text)
    judge = run_of("bt", 3, {"rm/accuracy": 0.7}, stage="rm")
    same = run_of("rpo", 4, {"pm/pair_tv": 0.3})  # free text beside exact answers, with nothing else to tell them apart
    assert (pool.kind, pairs.kind, judge.kind) == ("text", "text", "rm")
    assert sets_of([judge, run_of("pm"), pool, pairs, same]) == {
        "hh_rlhf hh.jsonl.gz, reward bt": {"pm1", "dpo2"},
        "Survey world 0, reward bt: other dataset: dataset.source=survey": {"pm0"},
        "Survey world 0, reward bt: other dataset: dataset.source=survey (3)": {"rpo4"},
        "Survey world 0, reward models": {"bt3"},
    }
    assert list(sets_of([run_of("pm"), same]))[1] == "Survey world 0, reward bt: free text"


def test_what_was_measured_tells_runs_of_one_seed_apart() -> None:
    def measured(name: str, seed: int, reward: str, **settings: Any) -> Run:
        return replace(run_of(name, seed, **settings), measured={"dataset": "d", "pool": None, "reward": reward})

    alike = [measured("pm", 0, "a"), measured("pm", 1, "b"), measured("dpo", 0, "a"), run_of("old", 0)]
    assert len(comparable_sets(alike)) == 1, "another seed has another reward model, an old run says nothing"
    runs = [*alike, measured("rpo", 0, "c", trainer={"rm": {"max_steps": 9}})]
    assert list(sets_of(runs).values()) == [{"pm0", "pm1", "dpo0", "old0"}, {"rpo0"}]
    assert list(sets_of(runs))[1].endswith(": other reward: trainer.rm.max_steps=9")
    assert list(sets_of([*alike, measured("rpo", 0, "c")]))[1].endswith(": other reward (measured.json)")


def test_an_unfinished_run_stands_in_the_set_of_its_target() -> None:
    gold = replace(stopped("dpo", 1), config=run_of("dpo", 1, reward={"name": "gold"}).config)
    assert list(sets_of([stopped("rpo", 0), gold, run_of("pm")]).values()) == [{"pm0", "rpo0"}, {"dpo1"}]


def test_reward_models_of_other_losses_are_one_set_and_of_other_judges_two() -> None:
    def judge(name: str, seed: int, **dataset: Any) -> Run:
        world = {"source": "survey", "seed": 0, **dataset}
        return run_of(name, seed, {"rm/accuracy": 0.7}, stage="rm", reward={"name": name}, dataset=world)

    assert len(comparable_sets([judge("bt", 0), judge("pcrm_length", 0)])) == 1
    found = sets_of([judge("bt", 0), judge("bt", 1, length_bias=0.3)])
    assert list(found)[1] == "Survey world 0, reward models: other dataset: dataset.length_bias=0.3"


def measured_run(name: str, seed: int, about: dict[str, Any], **settings: Any) -> Run:
    base = {"dataset": "d", "prompts": "p", "pool": None, "reward": f"r{seed}", "reference": f"s{seed}"}
    return replace(run_of(name, seed, **settings), measured={**base, **about})


def test_data_agrees_over_all_seeds_and_the_reference_within_one() -> None:
    first = [measured_run("pm", seed, {}) for seed in (0, 1)]
    found = sets_of([*first, measured_run("dpo", 2, {"dataset": "e"})])
    assert found == {
        "Survey world 0, reward bt": {"pm0", "pm1"},
        "Survey world 0, reward bt: other dataset (measured.json)": {"dpo2"},
    }
    other = measured_run("dpo", 1, {"reference": "x"}, trainer={"sft": {"max_steps": 9}})
    assert list(sets_of([*first, other]))[1].endswith(": other reference: trainer.sft.max_steps=9")
    assert len(comparable_sets([*first, measured_run("dpo", 2, {"reference": "x"})])) == 1


def test_one_reward_under_two_names_is_one_target() -> None:
    own = [measured_run("pm", seed, {}) for seed in (0, 1)]
    named = [measured_run("dpo", seed, {}, reward_model=["store/rm/model"], reference="x/sft") for seed in (0, 1)]
    assert list(sets_of([*own, *named]).values()) == [{"pm0", "pm1", "dpo0", "dpo1"}]
    again = replace(measured_run("pm", 0, {}, reward_model=["store/rm/model"]), path=Path("ev"), ended="2")
    (one,) = comparable_sets([*own, again])
    assert {run.path.name for run in one.runs} == {"ev", "pm1"}
    assert [run.path.name for run in one.left_out] == ["pm0"]


def test_a_reward_that_agrees_in_some_seeds_only_is_another_target() -> None:
    own = [measured_run("pm", seed, {}) for seed in (0, 1)]
    fixed = [measured_run("dpo", seed, {"reward": "r0"}, reward_model=["store/rm/model"]) for seed in (0, 1)]
    found = sets_of([*own, *fixed])
    assert list(found.values()) == [{"pm0", "pm1"}, {"dpo0", "dpo1"}]
    assert list(found)[1].startswith("Survey world 0, reward rm r0: other reward model: ")
    later = [measured_run("dpo", 5, {}, reward_model=["store/rm/model"])]
    assert len(comparable_sets([*own, *later])) == 2, "no common seed says that they are the same"
    clipped = [measured_run("rpo", seed, {}, reward__clip=3.0) for seed in (0, 1)]
    assert len(comparable_sets([*own, *clipped])) == 2
