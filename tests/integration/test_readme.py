"""What README.md and docs/ tell people to type is right: every command composes, every target and link exists."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import Result

from rlhf_cli import cli, cli_help, rewards
from rlhf_cli.config import compose, sweeps
from rlhf_cli.config.catalog import Catalog
from rlhf_cli.config.inputs import PreferencesConfig
from rlhf_cli.data.preference_row import read_preference
from rlhf_cli.data.rows import Pair, Ranking
from rlhf_cli.rewards.base import PairScores, pair_loss
from rlhf_cli.store import write_json

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES if page.exists()}
REWARD_MODELS = TEXTS.get(ROOT / "docs" / "reward_models.md", "")
CONFIGURED = {"train-sft", "train-rm", "align", "evaluate"}

pytestmark = pytest.mark.skipif(README not in TEXTS, reason="README.md is not there")


@pytest.fixture(autouse=True)
def forget_own_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A page's own loss is not there for other tests."""
    monkeypatch.setattr(rewards, "__path__", list(rewards.__path__))
    yield
    sys.modules.pop("rlhf_cli.rewards.hinge", None)


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Return the lines of all bash blocks, comments left out and continued lines joined."""
    lines = "".join(blocks("bash", "\n".join(TEXTS.values()))).replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True, posix=False)) for line in lines if line.split("#")[0].strip()]


def inline_commands() -> list[str]:
    """Return the commands named in running text, in code font."""
    prose = re.sub(r"^```.*?^```", "", "\n".join(TEXTS.values()), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`((?:rlhf|make) [a-z][^`]*)`", prose)


def own_files() -> dict[str, str]:
    """Return the files that docs/reward_models.md writes into a directory `mine`, by path."""
    return dict(re.findall(r"`(mine/[\w./]+)`(?:(?!```).)*^```\w+\n(.*?)^```", REWARD_MODELS, re.MULTILINE | re.DOTALL))


def starting(word: str) -> list[str]:
    examples = [example for group in cli_help.EXAMPLES.values() for example in group]
    found = dict.fromkeys(line for line in [*commands(), *inline_commands(), *examples] if line.split()[0] == word)
    return [line for line in found if "COMMAND" not in line]


def filled_in(args: list[str], folder: Path) -> list[str]:
    """Return the arguments with files and folders in place of the placeholders, which are words in capitals."""
    rows = [{"prompt": f"Which {i}?", "chosen": "this", "rejected": "that"} for i in range(10)]
    (folder / "FILE.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "FILE.jsonl.gz").touch()
    for name in ("RUN", "RUN_DIR"):
        (folder / name).mkdir()
        write_json(
            folder / name / "overrides.json", {"command": "align", "overrides": ["algo=dpo"], "config_dir": None}
        )
    for name, text in own_files().items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
    placeholder = re.compile(r"\b(FILE\.jsonl(?:\.gz)?|RUN_DIR|RUN|FOLDER)\b")
    return [placeholder.sub(lambda match: str(folder / match[1]), arg) for arg in args]


def ends(arg: str) -> str:
    """Return a sweep over several values as one over the first and the last: each is composed in a second."""
    key, _, values = arg.partition("=")
    several = values.split(",")
    return arg if "[" in arg or len(several) < 3 else f"{key}={several[0]},{several[-1]}"


def test_blocks_hold_nothing_but_these_commands() -> None:
    lines = commands()
    assert len(lines) >= 5
    known = {"rlhf", "make", "source", "pip", "git", "cd", "wandb", "python", "export", "vllm"}
    assert [line for line in lines if line.split()[0] not in known] == []


@pytest.mark.parametrize("line", starting("rlhf"))
def test_an_rlhf_command_composes(line: str, rlhf: Callable[..., Result], tmp_path: Path) -> None:
    command, *args = filled_in(shlex.split(line)[1:], tmp_path)
    if any(arg.startswith("sweep=") for arg in args):  # many jobs: the first and the last
        sweep = sweeps.resolve([arg for arg in args if arg != "-m"], Catalog(command))
        parsed = [compose.parse(list(grid)) for grid in sweep.grids]
        for grid, position in ((parsed[0], 0), (parsed[-1], -1)):
            own = [item for item in grid if not compose.is_hydra(item.key_or_group)]
            compose.load(command, [sweeps.extreme(item, position) for item in own])
    elif command in CONFIGURED:
        args = [ends(arg) for arg in args] if "-m" in args else args
        result = rlhf(command, *(arg for arg in args if arg not in {"--cfg", "job"}), "--cfg", "job")
        assert result.exit_code == 0, result.output
        jobs = math.prod(1 + arg.count(",") for arg in args)
        assert result.stdout.count("---\n") == (jobs if "-m" in args else 0)
    elif command == "data" or command.startswith("-"):
        assert rlhf(command, *args).exit_code == 0
    else:
        names = {info.name or info.callback.__name__ for info in cli.app.registered_commands if info.callback}
        assert command in names
        assert rlhf(command, "--help").exit_code == 0


@pytest.mark.parametrize("line", starting("make"))
def test_a_make_target_exists(line: str) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {word for word in line.split()[1:] if "=" not in word} <= targets


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", TEXTS[page])
    assert links or page != README
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_loss_of_the_page_is_what_its_docstring_says(tmp_path: Path) -> None:
    import torch

    (tmp_path / "hinge.py").write_text(own_files()["mine/rewards/hinge.py"])
    rewards.__path__.append(str(tmp_path))
    scores = PairScores(*(torch.tensor([value]) for value in (0.5, 0.5, 1.0, 0.0, math.inf)))
    cfg = SimpleNamespace(gap=1.0, sharpness=4.0, label_smoothing=0.0, centering=0.0)
    found = pair_loss(rewards.get("hinge"), scores, cfg)
    assert found.item() == pytest.approx(math.log1p(math.exp(4)) / 4)  # d = 0


def test_the_rows_of_the_page_are_read() -> None:
    pairs, rankings = ([json.loads(line) for line in block.splitlines()] for block in blocks("json", REWARD_MODELS))
    dataset = compose.load("train-rm", ["dataset=preferences", "dataset.path=FILE"]).dataset
    assert isinstance(dataset, PreferencesConfig)
    found = [read_preference(row, dataset.columns, where="here") for row in pairs]
    assert [(pair.label, pair.margin) for pair in found if isinstance(pair, Pair)] == [(1, 0), (0.7, 0), (1, 1.5)]
    ranked = [read_preference(row, dataset.columns, where="here") for row in rankings]
    assert [len(row.responses) for row in ranked if isinstance(row, Ranking)] == [3, 2, 4]
