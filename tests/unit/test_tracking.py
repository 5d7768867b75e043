from __future__ import annotations

import importlib.util
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_cli import wandb_run
from rlhf_cli.config.schema import TrackerConfig
from rlhf_cli.errors import RunError
from rlhf_cli.stages.compare_wandb import publish
from rlhf_cli.tracking import ForgivingTracker, NoTracker, Tracker, open_tracker
from rlhf_cli.wandb_run import WandbTracker

FAKE_KEY = "0123456789abcdef" * 2 + "01234567"  # 40 characters, as wandb wants them
ROWS = [{"prompt": "p", "reward": 0.5}, {"prompt": "q", "reward": None}]


def config(name: str, **changes: Any) -> TrackerConfig:
    blank = {"project": "rlhf", "entity": None, "group": None, "run_name": None, "tags": []}
    return TrackerConfig(**({"name": name, **blank} | changes))


def start(cfg: TrackerConfig, run_dir: Path) -> Tracker:
    arguments = {"name": "run", "group": "pm", "job_type": "align", "tags": ["align"], "run_id": "abc123"}
    return open_tracker(cfg, run_dir=run_dir, config={"algo": {"beta": 1.0}}, **arguments)


def use_everything(tracker: Tracker, figure: Path) -> None:
    for step in range(3):
        tracker.log({"train/loss": 1.0 / (step + 1)}, step)
    tracker.summary({"pm/tv": 0.25})
    tracker.table("completions", ROWS)
    tracker.figure("collapse", figure)
    tracker.close()


@pytest.fixture
def figure(tmp_path: Path) -> Path:
    from PIL import Image

    Image.new("RGBA", (4, 3), (255, 0, 0, 255)).save(tmp_path / "collapse.png")
    return tmp_path / "collapse.png"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def bare_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A wandb without account, settings or a process left from other tests."""
    import wandb

    for key in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(key, raising=False)
    for key, name in (("HOME", "home"), ("WANDB_CONFIG_DIR", "settings"), ("NETRC", "netrc")):
        monkeypatch.setenv(key, str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


class FakeRun:
    """A started wandb run that remembers what it was told."""

    def __init__(self, dir: str) -> None:
        self.dir, self.url = f"{dir}/wandb/run-1/files", "https://x/y"
        self.summary: dict[str, Any] = {}
        self.logged: list[tuple[dict[str, Any], int | None]] = []
        self.defined: dict[str, tuple[str, str | None]] = {}
        self.ended: int | None = None

    def define_metric(self, name: str, step_metric: str, summary: str | None) -> None:
        assert name not in self.defined, "once a key"
        self.defined[name] = (step_metric, summary)

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append((values, step))

    def finish(self, exit_code: int) -> None:
        self.ended = exit_code


class FakeWandb(SimpleNamespace):
    """As much of the wandb module as a start needs."""

    def __init__(self, *, mode: str = "online", account: bool = True) -> None:
        self.mode, self.account, self.started, self.torn_down = mode, account, [], False
        self.Settings = lambda **values: values

    def setup(self, settings: dict[str, Any]) -> SimpleNamespace:
        self.mode = settings.get("mode", self.mode)
        return SimpleNamespace(settings=SimpleNamespace(mode=self.mode))

    def login(self, **arguments: Any) -> bool:
        assert arguments == {"prompt": False, "verify": False}
        return self.account

    def init(self, **arguments: Any) -> FakeRun:
        self.started.append(arguments)
        return FakeRun(arguments["dir"])

    def teardown(self) -> None:
        self.torn_down = True


def fake_wandb(monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> FakeWandb:
    fake = FakeWandb(**arguments)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_none_writes_nothing(run_dir: Path, figure: Path) -> None:
    tracker = start(config("none"), run_dir)
    use_everything(tracker, figure)
    assert tracker.where == ""
    assert list(run_dir.iterdir()) == []


def test_tensorboard_events_can_be_read_back(run_dir: Path, figure: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = start(config("tensorboard"), run_dir)
    use_everything(tracker, figure)
    assert tracker.where == f"tensorboard --logdir {run_dir / 'tensorboard'}"
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (0, 1.0),
        (1, 0.5),
        (2, pytest.approx(1 / 3)),
    ]
    assert [event.value for event in events.Scalars("final/pm/tv")] == [0.25]
    assert (events.Images("collapse")[0].width, events.Images("collapse")[0].height) == (4, 3)
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert '"beta": 1.0' in texts["config/text_summary"]
    assert '{"prompt": "q", "reward": null}' in texts["completions/text_summary"]


def test_a_missing_tensorboard_says_what_to_install(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RunError, match=r"tensorboard is not installed\. pip install rlhf-cli\[tensorboard\]"):
        start(config("tensorboard"), run_dir)


def test_wandb_with_an_account_is_online_and_resumable(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_wandb(monkeypatch)
    tracker = start(config("wandb", tags=["mine", "align"], entity="team"), run_dir)
    assert tracker.where == "https://x/y"
    (arguments,) = fake.started
    settings = arguments.pop("settings")
    assert arguments == {
        "project": "rlhf",
        "entity": "team",
        "group": "pm",
        "job_type": "align",
        "tags": ["mine", "align"],
        "dir": str(run_dir),
        "name": "run",
        "config": {"algo": {"beta": 1.0}},
        "id": "abc123",
        "mode": "online",
        "resume": "allow",
    }
    assert settings["init_timeout"] + settings["finish_timeout"] <= 60
    assert settings["silent"]


def test_the_config_may_name_the_group(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_wandb(monkeypatch)
    start(config("wandb", group="mine"), run_dir)
    assert fake.started[0]["group"] == "mine"


@pytest.mark.parametrize("state", [{"account": False}, {"mode": "offline"}, {"mode": "dryrun"}])
def test_wandb_without_account_or_when_told_is_offline(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, Any]
) -> None:
    fake = fake_wandb(monkeypatch, **state)
    tracker = start(config("wandb"), run_dir)
    assert [arguments["mode"] for arguments in fake.started] == ["offline"]
    assert tracker.where == f"offline; to upload: wandb sync {run_dir / 'wandb' / 'run-1'}"


def test_wandb_disabled_by_the_user_is_no_tracker(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_wandb(monkeypatch, mode="disabled")
    assert isinstance(start(config("wandb"), run_dir), NoTracker)
    assert fake.started == []


def test_an_online_start_that_fails_is_offline_from_then_on(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = fake_wandb(monkeypatch)
    tries: list[str] = []

    def init(**arguments: Any) -> FakeRun:
        tries.append(arguments["mode"])
        if arguments["mode"] == "online":
            raise RuntimeError("no route\nto host")
        assert fake.torn_down
        return FakeRun(arguments["dir"])

    fake.init = init
    assert start(config("wandb"), run_dir).where.startswith("offline")
    assert start(config("wandb"), run_dir).where.startswith("offline")
    assert tries == ["online", "offline", "offline"]
    assert [record.getMessage() for record in caplog.records] == ["W&B cannot be reached (no route); tracking offline"]


def test_a_tracker_that_cannot_start_is_a_warning(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = fake_wandb(monkeypatch, account=False)
    fake.init = lambda **_: 1 / 0
    assert isinstance(start(config("wandb"), run_dir), NoTracker)
    assert "tracker=wandb could not start (division by zero); going on without it" in caplog.text


def test_wandb_gets_steps_summary_and_exit_code(run_dir: Path) -> None:
    run = FakeRun(str(run_dir))
    tracker = WandbTracker(run, online=True)
    tracker.log({"kl/per_token": 0.5}, 7)
    tracker.summary({"kl/per_token": 0.25})
    tracker.close(failed=True)
    assert run.logged == [({"step": 7, "kl/per_token": 0.5}, 7), ({}, None)], "{} sends the point that waits"
    assert (run.summary, run.ended) == ({"kl/per_token": 0.25}, 1)


def test_wandb_is_told_axis_and_summary_of_each_curve(run_dir: Path) -> None:
    run = FakeRun(str(run_dir))
    tracker = WandbTracker(run, online=True)
    for step, value in ((0, 0.5), (2, 0.1), (4, float("nan")), (6, 0.3)):
        tracker.log({"pm/tv": value, "rm/accuracy": value, "kl/per_token": value, "not/ours": value}, step)
    assert run.defined == {
        "pm/tv": ("step", "min,last"),  # less is better
        "rm/accuracy": ("step", "max,last"),
        "kl/per_token": ("step", None),  # neither is
        "not/ours": ("step", None),
    }
    tracker.summary({"pm/tv": 0.2, "rm/accuracy": 0.9, "kl/per_token": 0.7, "gold/tv": 0.4})
    assert run.summary == {
        "pm/tv": {"min": 0.1, "last": 0.2},  # the final number, though the curve ended at 0.3
        "rm/accuracy": {"max": 0.9, "last": 0.9},  # and it may be the best
        "kl/per_token": 0.7,
        "gold/tv": 0.4,  # not followed as a curve
    }


@pytest.mark.parametrize("online", [True, False])
def test_a_continued_run_repeats_its_curves_only_where_nobody_has_them(run_dir: Path, online: bool) -> None:
    run = FakeRun(str(run_dir))
    tracker = WandbTracker(run, online=online, earlier=[({"pm/tv": 0.1}, 0), ({"pm/tv": 0.4}, 2)])
    tracker.log({"pm/tv": 0.3}, 4)
    tracker.summary({"pm/tv": 0.3})
    steps = [step for _, step in run.logged if step is not None]
    assert steps == ([4] if online else [0, 2, 4])
    assert run.summary == {"pm/tv": {"min": 0.1, "last": 0.3}}, "the best is known either way"


def test_a_continued_run_reads_its_log(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ['{"step": 0, "pm/tv": 0.5, "loss": null}', '{"step": 2, "pm/tv": 0.4}', '{"step": 4, "pm']
    (run_dir / "training_log.jsonl").write_text("\n".join(lines))
    fake, runs = fake_wandb(monkeypatch, account=False), []
    fake.init = lambda **arguments: runs.append(FakeRun(arguments["dir"])) or runs[0]
    start(config("wandb"), run_dir)
    assert runs[0].logged == [({"step": 0, "pm/tv": 0.5}, 0), ({"step": 2, "pm/tv": 0.4}, 2)]


def test_failures_of_a_tracker_are_one_warning(figure: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        where = "somewhere"

        def __getattr__(self, name: str) -> Any:
            raise ConnectionError(f"{name} failed")

    with caplog.at_level(logging.WARNING):
        use_everything(ForgivingTracker(Broken()), figure)
    assert len(caplog.records) == 1
    assert "log failed" in caplog.text


def test_a_user_can_still_interrupt_a_tracker() -> None:
    class Slow(NoTracker):
        def log(self, metrics: dict[str, float], step: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="^$"):
        ForgivingTracker(Slow()).log({}, 0)


def is_written_offline(run_dir: Path, *words: bytes) -> bool:
    """Wait for words in the run file: wandb's own process writes its end a moment after finish() returns."""
    (file,) = run_dir.glob("wandb/offline-run-*-abc123/run-abc123.wandb")
    deadline = time.monotonic() + 10
    while missing := [word for word in words if word not in file.read_bytes()]:
        if time.monotonic() > deadline:
            raise AssertionError(f"{file} lacks {missing}")
        time.sleep(0.05)
    return True


def test_a_real_wandb_without_account_writes_into_the_run_folder(
    run_dir: Path, figure: Path, bare_wandb: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    tracker = start(config("wandb"), run_dir)
    use_everything(tracker, figure)
    assert is_written_offline(run_dir, b"train/loss", b"pm/tv", b"completions", b"collapse", b"beta")
    (folder,) = run_dir.glob("wandb/offline-run-*")
    assert tracker.where == f"offline; to upload: wandb sync {folder}"
    staged = [path.read_text() for path in folder.glob("artifacts/staging/*")]
    assert any('"q"' in text for text in staged)
    assert not (run_dir.parent / "home" / ".local").exists()
    output = capfd.readouterr()
    assert (output.out, output.err) == ("", "")


def test_a_real_wandb_whose_server_is_gone_falls_back_within_ten_seconds(
    run_dir: Path, figure: Path, bare_wandb: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bare_wandb.setattr(wandb_run, "ONLINE_START_SECONDS", 1.0)
    bare_wandb.setenv("WANDB_API_KEY", FAKE_KEY)
    bare_wandb.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: closed
    began = time.monotonic()
    tracker = start(config("wandb"), run_dir)
    assert time.monotonic() - began < 1.0 + 4.0
    use_everything(tracker, figure)
    assert is_written_offline(run_dir, b"train/loss", b"pm/tv")
    assert "W&B cannot be reached" in caplog.text


# --- a comparison as a run of its own ---------------------------------------------------------------------------


@pytest.fixture
def comparison(tmp_path: Path, figure: Path) -> Path:
    out = tmp_path / "comparison"
    (out / "figures").mkdir(parents=True)
    figure.rename(out / "figures" / "bars.png")
    (out / "compare.html").write_text("<p>all of it</p>")
    (out / "rows.csv").write_text("a,b")
    return out


def published(out: Path, trackers: list[dict[str, Any]]) -> str:
    figures = [out / "figures" / "bars.png"]
    return publish(out, "Two: of a kind", ROWS, figures, out / "compare.html", trackers)


def test_a_comparison_is_a_run_beside_those_it_compares(comparison: Path, bare_wandb: pytest.MonkeyPatch) -> None:
    import wandb

    asked: list[dict[str, Any]] = []
    init = wandb.init
    bare_wandb.setattr(wandb, "init", lambda **arguments: asked.append(arguments) or init(**arguments))
    place = {"project": "mine", "entity": None}
    where = published(comparison, [{**place, "group": "pm_grid"}, {**place, "group": "pm_grid"}])
    published(comparison, [{**place, "group": "pm_grid"}, {**place, "group": "rpo"}])
    assert where.startswith(f"offline; to upload: wandb sync {comparison / 'wandb'}")
    told = [{key: one[key] for key in ("project", "group", "job_type", "name")} for one in asked]
    assert told[0] == {"project": "mine", "group": "pm_grid", "job_type": "compare", "name": "Two: of a kind"}
    assert told[1]["group"] is None, "of two groups it is in neither"
    assert asked[0]["id"] != asked[1]["id"]


def test_a_comparison_that_cannot_be_logged_says_that_it_is_complete(
    comparison: Path, bare_wandb: pytest.MonkeyPatch
) -> None:
    import wandb

    bare_wandb.setattr(wandb, "Table", lambda **_: 1 / 0)
    with pytest.raises(RunError, match=r"could not be logged to W&B\. division by zero\. Its files are complete in"):
        published(comparison, [])
    assert wandb.run is None, "closed"


def test_a_comparison_leaves_a_disabled_wandb_alone(comparison: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_wandb(monkeypatch, mode="disabled")
    assert published(comparison, []) == ""
    assert fake.started == []
