"""Every command in README.md is one that exists: its config composes, its target is in the Makefile."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from rlhf_cli import cli
from rlhf_cli.store import write_json

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
CONFIGURED = {"train-sft", "train-rm", "align", "evaluate"}

pytestmark = pytest.mark.skipif(not README.exists(), reason="README.md is not there")


def commands() -> list[str]:
    """Return the lines of all bash blocks, comments left out and continued lines joined."""
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True, posix=False)) for line in lines if line.split("#")[0].strip()]


def inline_commands() -> list[str]:
    """Return the commands named in running text, in code font."""
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`((?:rlhf|make) [a-z][^`]*)`", prose)


def starting(word: str) -> list[str]:
    examples = [example for group in cli.EXAMPLES.values() for example in group]
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
    placeholder = re.compile(r"\b(FILE\.jsonl(?:\.gz)?|RUN_DIR|RUN|FOLDER)\b")
    return [placeholder.sub(lambda match: str(folder / match[1]), arg) for arg in args]


def test_blocks_hold_nothing_but_these_commands() -> None:
    lines = commands()
    assert len(lines) >= 5
    assert [line for line in lines if line.split()[0] not in {"rlhf", "make", "source", "pip", "git", "cd"}] == []


@pytest.mark.parametrize("line", starting("rlhf"))
def test_an_rlhf_command_composes(line: str, rlhf: Callable[..., Result], tmp_path: Path) -> None:
    command, *args = filled_in(shlex.split(line)[1:], tmp_path)
    if command in CONFIGURED:
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


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
