from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_cli.errors import DataError, RunError
from rlhf_cli.stages.compare import find_runs, run

POLICIES = {"kl_ppo": [0.2, 0.7, 0.1], "pm": [0.5, 0.3, 0.2], "dpo": [0.4, 0.1, 0.1]}


def write_run(folder: Path, algo: str = "pm", seed: int = 0, **changes: Any) -> Path:
    """Write a finished run of the survey world; `changes` replaces config groups, state or metrics."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {"seed": seed, "algo": {"name": algo, "beta": 1.0}, "reward": {"name": "bt"}}
    config |= {"dataset": {"source": "survey", "seed": 0}, "model": {"name": "tiny"}}
    state = changes.pop("state", "finished")
    metrics = changes.pop("metrics", {"pm/tv": 0.1 + 0.01 * seed, "pm/offset_mass": 0.02, "reference/pm/tv": 0.6})
    policy = POLICIES.get(algo, [0.5, 0.3, 0.2])
    entry = {"question": 0, "prompt": "Which season?", "heldout": False, "answers": ["spring", "summer", "winter"]}
    entry |= {"people": [0.5, 0.3, 0.2], "reward_model": [0.5, 0.3, 0.2], "reference": [0.1, 0.8, 0.1]}
    entry |= {"policy": policy, "optimum": None, "policy_offset": 1 - sum(policy), "reference_offset": 0.0}
    log = [{"step": step, "loss": 1.0, "pm/tv": 0.5 - step / 100} for step in (0, 25)]
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, **changes}))
    (folder / "status.json").write_text(json.dumps({"state": state}))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    if "pm/tv" in metrics:
        (folder / "distributions.json").write_text(json.dumps([entry]))
    (folder / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


def test_a_folder_of_runs_becomes_a_table_and_two_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (algo, seed) in enumerate((a, s) for a in POLICIES for s in (0, 1)):
        write_run(tmp_path / f"{number}_algo={algo}", algo, seed)
    (tmp_path / "store").mkdir()
    out = run([tmp_path])
    assert out == tmp_path / "compare"
    assert sorted(path.name for path in out.iterdir()) == ["compare.csv", "compare.md", "compare.png", "curves.png"]
    table = (out / "compare.md").read_text()
    assert "| pm | 2 | 0.105 ± 0.007 |" in table
    assert "| sft | 2 | 0.600 ± 0.000 |" in table
    printed, notes = capsys.readouterr()
    assert "0.105" in printed
    assert f"wrote {out / 'compare.png'}" in printed
    assert notes == ""


def test_out_is_used_and_a_second_comparison_works_there(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "a" / "x"), write_run(tmp_path / "b" / "y", "dpo")
    out = run([one, two], tmp_path / "deep" / "out")
    assert out == tmp_path / "deep" / "out"
    before = (out / "compare.md").read_text()
    assert run([one, two, tmp_path / "a"], out) == out
    assert (out / "compare.md").read_text() == before, "a run named twice counts once"
    assert run([one, two]) == tmp_path / "compare"


def test_unfinished_runs_are_named_and_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "done")
    write_run(tmp_path / "going", "dpo", state="running")
    out = run([tmp_path])
    assert f"skipped {tmp_path / 'going'}: its state is 'running'" in capsys.readouterr().err
    assert "dpo" not in (out / "compare.md").read_text()


def test_nothing_finished_is_refused_with_nothing_written(tmp_path: Path) -> None:
    write_run(tmp_path / "going", state="interrupted")
    with pytest.raises(DataError, match="None of the 1 run folders can be compared"):
        run([tmp_path])
    assert [path.name for path in tmp_path.iterdir()] == ["going"]


def test_runs_of_earlier_stages_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "sft")
    (folder / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(DataError, match="can be compared"):
        run([folder])
    assert "no policy or reward model was measured there" in capsys.readouterr().err


def test_paths_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="missing is not a run folder. there is no such folder. Name folders"):
        run([tmp_path / "missing"])
    with pytest.raises(DataError, match=r"empty is not a run folder. it holds no config.yaml beside a status.json"):
        run([tmp_path / "empty"])


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x")
    (folder / "metrics.json").write_text("{")
    with pytest.raises(DataError, match=r"metrics.json cannot be read"):
        run([folder])


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"The comparison cannot be written to .*file"):
        run([folder], tmp_path / "file")


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"dataset": {"source": "survey", "seed": 1}}, "dataset.seed"), ({"reward": {"name": "gold"}}, "reward.name")],
)
def test_different_targets_are_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], key: str
) -> None:
    run([write_run(tmp_path / "x"), write_run(tmp_path / "y", "dpo", **changes)])
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"warning: the runs differ in {key}, so their pm/ metrics have different targets."


def test_a_policy_of_another_world_is_left_out_of_the_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_run(tmp_path / "y", "rpo", dataset={"source": "survey", "seed": 1})
    entries = json.loads((other / "distributions.json").read_text())
    (other / "distributions.json").write_text(json.dumps([{**entries[0], "prompt": "Which colour?"}]))
    out = run([write_run(tmp_path / "x"), other])
    assert "compare.png leaves out rpo: no run on the same questions" in capsys.readouterr().err
    assert (out / "compare.png").is_file()


def test_free_text_has_its_table_and_no_bars(tmp_path: Path) -> None:
    metrics = {"pm/pair_tv": 0.3, "pm/pair_tv/lo": 0.25, "pm/pair_tv/hi": 0.36, "reward/mean": None}
    folder = write_run(tmp_path / "x", metrics=metrics)
    (folder / "training_log.jsonl").unlink()
    out = run([folder], tmp_path / "out")
    assert "| pm | 1 | 0.300 [0.250, 0.360] | – |" in (out / "compare.md").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["compare.csv", "compare.md"]


def test_free_text_and_survey_are_not_mixed(tmp_path: Path) -> None:
    write_run(tmp_path / "x")
    write_run(tmp_path / "y", metrics={"pm/pair_tv": 0.3})
    with pytest.raises(DataError, match="x and .*y cannot be compared"):
        run([tmp_path])


def test_an_evaluated_policy_is_named_by_what_it_is(tmp_path: Path) -> None:
    aligned = write_run(tmp_path / "pm")
    runs = [write_run(tmp_path / "sft", "pm", policy=None), write_run(tmp_path / "hf", "pm", policy="models/opt-x")]
    runs.append(write_run(tmp_path / "ev", "dpo", policy=str(aligned)))
    table = (run(runs, tmp_path / "out") / "compare.md").read_text()
    assert [line.split(" |")[0] for line in table.splitlines()[2:5]] == ["| sft", "| dpo", "| opt-x"]


def test_jobs_of_a_multirun_keep_their_order(tmp_path: Path) -> None:
    for number in (10, 2, 0):
        write_run(tmp_path / str(number), seed=number)
    assert [path.name for path in find_runs([tmp_path])] == ["0", "2", "10"]


def test_a_lone_reference_is_drawn(tmp_path: Path) -> None:
    out = run([write_run(tmp_path / "sft", "pm", policy=None)], tmp_path / "out")
    assert (out / "compare.png").is_file()


def write_rm(folder: Path, reward: str, seed: int, accuracy: float, **more: Any) -> Path:
    """Write a finished run of a reward model."""
    metrics = {"rm/accuracy": accuracy, "rm/accuracy/lo": accuracy - 0.1, "rm/accuracy/hi": accuracy + 0.1}
    run_folder = write_run(folder, seed=seed, metrics=metrics, reward={"name": reward, "calibration": "none"}, **more)
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    if config.get("stage") != "rm":
        del config["algo"]
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config))
    log = [{"step": step, "rm/loss": 0.7 - step / 100} for step in (0, 10)]
    (run_folder / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return run_folder


def test_reward_models_have_a_table_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for reward, accuracy in (("pcrm_length", 0.7), ("bt", 0.8)):
        for seed in (0, 1):
            write_rm(tmp_path / f"{reward}{seed}", reward, seed, accuracy + 0.02 * seed)
    write_rm(tmp_path / "judged", "warm", 0, 0.9, stage="rm")  # of rlhf evaluate stage=rm
    out = run([tmp_path])
    table = (out / "compare.md").read_text()
    assert table.startswith("| reward model | seeds | right |")
    assert "| bt | 2 | 0.810 ± 0.014 |" in table  # (0.80 + 0.82) / 2, 0.02 / sqrt 2
    assert "| warm | 1 | 0.900 [0.800, 1.000] |" in table
    assert table.index("| bt |") < table.index("| pcrm_length |")
    assert sorted(path.name for path in out.iterdir()) == ["compare.csv", "compare.md", "curves.png"]
    assert capsys.readouterr().err == "", "another loss is no other target for a reward model"


def test_reward_models_beside_policies_are_left_out_and_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "pm"), write_rm(tmp_path / "rm", "bt", 0, 0.8)
    table = (run([tmp_path]) / "compare.md").read_text()
    assert table.startswith("| policy |")
    assert "| bt |" not in table
    assert "left out 1 runs of reward models" in capsys.readouterr().err


def test_reward_models_of_other_judges_are_compared_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    biased = {"source": "survey", "seed": 0, "length_bias": 0.3}
    write_rm(tmp_path / "a", "bt", 0, 0.8), write_rm(tmp_path / "b", "bt", 1, 0.7, dataset=biased)
    run([tmp_path])
    assert "differ in dataset.length_bias, so they were judged on different data" in capsys.readouterr().err
