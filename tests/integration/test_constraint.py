"""A prior constraint on algorithms that learn from pairs: what it logs, changes and refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small_jobs import SMALL, SURVEY, gap, read_json, read_lines, refused, weights
from test_new_algorithm import HINGE_MODULE
from typer.testing import Result

Small = Callable[..., Path]
Finished = Callable[[str], Path]
# Smallest and largest delta*: 20 / 1.001 - 15 at equal lengths; 30 / 1.001 - 25 at equal embeddings.
BOUNDS = {"length": (4.98, 20_000), "cosine": (4.97, 35), "fixed": (5, 5), "random": (4, 5)}
LOGGED = {"bound", "bound_half", "beyond_bound", "constraint_loss"}
CASES = [("dpo", prior) for prior in BOUNDS] + [("rpo", "length"), ("dpm", "cosine"), ("dpm", "random")]


@pytest.mark.parametrize(("algo", "prior"), CASES)
def test_a_constrained_run(algo: str, prior: str, small: Small, finished: Finished, trained: list[str]) -> None:
    plain = finished(algo)
    trained.clear()
    run_dir = small("align", f"algo={algo}", f"algo/constraint={prior}")
    assert trained == ["PairwiseTrainer"], "the reward model serves every constraint"
    lines = [line for line in read_lines(run_dir / "training_log.jsonl") if "loss" in line]
    low, high = BOUNDS[prior]
    for line in lines:
        assert line.keys() >= LOGGED
        assert low <= line["bound"] <= high
        assert line["bound_half"] == pytest.approx(line["bound"] / 2)
        # Logits start at 0, but for dpm, which here has no reference on likely tokens.
        assert line["constraint_loss"] > 0
        assert (line["beyond_bound"] == 0 and line["constraint_loss"] < 0.05) or algo == "dpm"
        if algo != "rpo":
            assert line["loss"] == pytest.approx(line["dpo_loss"] + line["constraint_loss"], abs=1e-5)
    assert not any(LOGGED & line.keys() for line in read_lines(plain / "training_log.jsonl"))
    assert 1e-7 < gap(weights(run_dir / "model"), weights(plain / "model")) < 0.1
    metrics, before = (read_json(run / "metrics.json") for run in (run_dir, plain))
    assert [key for key in metrics if key.startswith("optimum/")] == [], "its optimum is not the algorithm's"
    assert ("optimum/tv" in before) == (algo != "rpo")
    assert metrics["reference/pm/tv"] == pytest.approx(before["reference/pm/tv"], abs=1e-6)


def test_a_tight_bound_holds_the_logits_back(small: Small) -> None:
    longer = ("trainer.pairwise.max_steps=30", "trainer.pairwise.eval_every_steps=30")
    common = ("align", "algo=dpo", "algo.beta=1", *longer)
    margins = []
    for name, more in {"free": [], "bound": ["algo/constraint=fixed", "algo.constraint.delta=0.1"]}.items():
        lines = read_lines(small(*common, *more, name=name) / "training_log.jsonl")
        margins.append([line["margin"] for line in lines if "loss" in line][-1])
    assert margins[1] < 0.15, "its optimum is 0.05"
    assert margins[0] > margins[1] + 0.1


def test_the_similarities_of_a_cosine_prior_are_computed_once(small: Small, tmp_path: Path) -> None:
    case = ("align", "algo=dpo", "algo/constraint=cosine")
    small(*case, store=tmp_path / "store", name="one")
    (folder,) = (tmp_path / "store" / "similarity").iterdir()
    before = (folder / "cosine.npy").stat().st_mtime_ns
    small(*case, "algo.constraint.beta3=-20", "algo.constraint.similarity=cosine", store=tmp_path / "store", name="two")
    assert [path.name for path in (tmp_path / "store" / "similarity").iterdir()] == [folder.name]
    assert (folder / "cosine.npy").stat().st_mtime_ns == before


@pytest.mark.usefixtures("no_figures")
def test_a_users_algorithm_without_logits_is_refused(rlhf: Callable[..., Result], tmp_path: Path, store: Path) -> None:
    for name, text in {"algo/hinge.yaml": "name: hinge\nbeta: 0.5\n", "algos/hinge.py": HINGE_MODULE}.items():
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text(text)
    common = ["--config-dir", "mine", *SMALL, *SURVEY, f"store_dir={store}", "algo=hinge", "run_dir=run"]
    line = refused(rlhf("align", *common, "algo/constraint=fixed"))
    assert "algo/constraint does not go with algo=hinge. its pair_loss returns no logits to bound" in line


def test_on_policy_algorithms_are_refused(rlhf: Callable[..., Result]) -> None:
    line = refused(rlhf("align", "algo=pm", "algo/constraint=length", "run_dir=run"))
    assert "algo/constraint=length does not go with algo=pm" in line
    assert "Use reward=pcrm_length, or algo=dpo, rpo or dpm" in line
    assert not Path("run").exists()
