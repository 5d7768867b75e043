"""An interrupted run goes on from its last whole checkpoint, to the bit, and says each thing once."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_jobs import SMALL, SURVEY, files, gap, read_json, read_lines, weights
from typer.testing import Result

from rlhf_cli.stages import results
from rlhf_cli.trainers.common import Reporter

Small = Callable[..., Path]
# Two passes over two minibatches: a rollout serves four steps, and checkpoints lie between rollouts.
GAE = ["algo=pm", "algo.ppo_epochs=2", "algo.minibatches=2", "trainer.online.max_steps=12"]
ADAPTIVE = ["algo=kl_ppo", "algo.beta_schedule=adaptive", "algo.cost_horizon=200", "algo.advantage=rloo"]
DPO = ["algo=dpo", "trainer.pairwise.max_steps=8", "trainer.pairwise.lr_scheduler=constant"]
CASES = {"gae": GAE, "adaptive_rloo": [*ADAPTIVE, "trainer.online.max_steps=8"], "dpo": DPO}


@contextmanager
def interrupted_at(step: int, title: str | None = None) -> Iterator[None]:
    """Within it, training (of the stage with this title) is interrupted after `step` steps."""
    on_step_end = Reporter.on_step_end

    def stop(self: Reporter, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == step and title in (None, self.title):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "on_step_end", stop)
        yield


def tensors(state: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor in nested containers, in order."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        yield from itertools.chain.from_iterable(map(tensors, state.values()))
    elif isinstance(state, (list, tuple)):
        yield from itertools.chain.from_iterable(map(tensors, state))


def same_training_state(one: Path, other: Path) -> int:
    """Require equal optimizers, critics and schedules in two checkpoints; return how many tensors were compared."""
    assert files(one) == files(other)
    compared = 0
    for name in ("optimizer.pt", "scheduler.pt", "critic.pt"):
        if (one / name).exists():
            left, right = (list(tensors(torch.load(path / name, weights_only=True))) for path in (one, other))
            assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True)), name
            compared += len(left)
    return compared


def said_once(log: list[dict[str, float]]) -> bool:
    return max(Counter((line["step"], key) for line in log for key in line if key != "step").values()) == 1


@pytest.fixture(scope="module")
def whole() -> dict[str, Path]:
    """The uninterrupted runs by case, filled on first use."""
    return {}


@pytest.mark.parametrize("stop", [2, 6], ids=["before-the-first-checkpoint", "after-a-checkpoint"])
@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    case: str, stop: int, small: Small, tmp_path: Path, whole: dict[str, Path]
) -> None:
    if case not in whole:
        whole[case] = small("align", *CASES[case], name="whole")
    with interrupted_at(stop), pytest.raises(KeyboardInterrupt, match="^$"):
        small("align", *CASES[case])
    status = read_json(tmp_path / "run" / "status.json")
    assert status["state"] == "interrupted"
    run_dir = small("align", *CASES[case])

    assert gap(weights(run_dir / "model"), weights(whole[case] / "model")) == 0
    assert gap(weights(run_dir / "best"), weights(whole[case] / "best")) == 0
    last = max((whole[case] / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1])).name
    assert same_training_state(run_dir / "checkpoints" / last, whole[case] / "checkpoints" / last) > 20
    log = read_lines(run_dir / "training_log.jsonl")
    assert said_once(log)
    assert log == read_lines(whole[case] / "training_log.jsonl")
    assert read_json(run_dir / "metrics.json") == read_json(whole[case] / "metrics.json")
    assert read_json(run_dir / "status.json")["state"] == "finished"
    assert read_json(run_dir / "status.json")["started"] == status["started"]
    assert files(run_dir) == files(whole[case])


@pytest.mark.parametrize(("stage", "title"), [("sft", "SFT"), ("rm", "reward model")])
def test_an_interrupted_stage_of_the_store_goes_on(small: Small, tmp_path: Path, stage: str, title: str) -> None:
    command = ["train-rm", f"trainer.{stage}.save_every_steps=2"]
    whole = small(*command, name="whole", store=tmp_path / "one")
    store = tmp_path / "two"
    with interrupted_at(5, title), pytest.raises(KeyboardInterrupt, match="^$"):
        small(*command, store=store)
    (work,) = (store / ".work").iterdir()
    assert (work / "checkpoints" / "checkpoint-4" / "complete").is_file()
    assert not (store / stage).exists(), "nothing half-trained is published"
    run_dir = small(*command, store=store)
    assert gap(weights(run_dir / "model"), weights(whole / "model")) == 0
    (published,) = (store / stage).iterdir()
    (other,) = (tmp_path / "one" / stage).iterdir()
    log = read_lines(published / "training_log.jsonl")
    assert [line["step"] for line in log] == [2, 4, 6]
    assert log == read_lines(other / "training_log.jsonl")
    assert files(store / ".work") == set()


def test_a_checkpoint_without_its_mark_is_ignored(small: Small, tmp_path: Path) -> None:
    case = ["algo=dpo", "trainer.pairwise.max_steps=6", "trainer.pairwise.save_every_steps=2"]
    whole = small("align", *case, name="whole")
    with interrupted_at(5), pytest.raises(KeyboardInterrupt, match="^$"):
        small("align", *case)
    torn = tmp_path / "run" / "checkpoints" / "checkpoint-4"
    (torn / "complete").unlink()
    (torn / "model.safetensors").write_bytes(b"half a file")
    run_dir = small("align", *case)
    assert gap(weights(run_dir / "model"), weights(whole / "model")) == 0
    assert said_once(read_lines(run_dir / "training_log.jsonl"))


@pytest.mark.parametrize("case", ["adaptive_rloo", "dpo"])
def test_a_run_interrupted_while_it_is_measured_is_not_trained_again(
    case: str, small: Small, whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if case not in whole:
        whole[case] = small("align", *CASES[case], name="whole")
    with monkeypatch.context() as patch:
        patch.setattr(results, "measure_policy", interrupt)
        with pytest.raises(KeyboardInterrupt, match="^$"):
            small("align", *CASES[case])
    steps: list[int] = []
    on_step_end = Reporter.on_step_end
    monkeypatch.setattr(Reporter, "on_step_end", lambda self, *args, **kw: steps.append(1) or on_step_end(self, *args))
    run_dir = small("align", *CASES[case])
    assert steps == []
    assert gap(weights(run_dir / "model"), weights(whole[case] / "model")) == 0
    assert read_json(run_dir / "metrics.json") == read_json(whole[case] / "metrics.json")


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("sweep", [["algo=dpo"], ["-m", "algo=dpo,rpo"]], ids=["one-job", "multirun"])
def test_ctrl_c_says_how_to_go_on(
    rlhf: Callable[..., Result], store: Path, monkeypatch: pytest.MonkeyPatch, sweep: list[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    command = ["align", *SMALL, *SURVEY, *sweep, "run_dir=run", f"store_dir={store}"]
    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "on_step_end", interrupt)
        result = rlhf(*command)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted: run the same command again to go on"
    assert "Traceback" not in result.output
    assert [read_json(path)["state"] for path in Path("run").rglob("status.json")] == ["interrupted"]
    again = rlhf(*command)
    assert again.exit_code == 0, again.output
    assert {read_json(path)["state"] for path in Path("run").rglob("status.json")} == {"finished"}
