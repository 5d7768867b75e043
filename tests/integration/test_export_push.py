"""Uploading an export, and every command of docs/export.md."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_jobs import files, read_lines, refused, write_lines
from typer.testing import CliRunner, Result

from rlhf_cli import cli, hub

Rlhf = Callable[..., Result]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"
PROMPT = "Which season do you like best?"

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def run(finished: Callable[[str], Path]) -> Path:
    return finished("pm")


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stand in for the Hub: what was made and uploaded there."""
    import huggingface_hub

    seen: list[dict[str, Any]] = []

    class Api:
        def create_repo(self, repo_id: str, **how: Any) -> Any:
            seen.append({"made": repo_id, **how})
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, **how: Any) -> None:
            seen.append({**how, "files": files(Path(how["folder_path"]))})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    monkeypatch.setattr(hub, "reachable", lambda: True)
    return seen


def test_pushing_uploads_the_folder(rlhf: Rlhf, run: Path, tmp_path: Path, uploads: list[dict[str, Any]]) -> None:
    out = tmp_path / "out"
    result = rlhf("export", str(run), str(out), "--push", "me/mine", "--private")
    assert result.exit_code == 0, result.output
    assert uploads[0] == {"made": "me/mine", "private": True, "exist_ok": True}
    assert uploads[1]["repo_id"] == "me/mine"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= uploads[1]["files"]
    assert 'from_pretrained("me/mine")' in (out / "README.md").read_text(encoding="utf-8")


def test_a_failed_push_leaves_the_folder(
    rlhf: Rlhf, run: Path, tmp_path: Path, uploads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def forbidden(*_: Any, **__: Any) -> Any:
        raise PermissionError("403 Forbidden: no write access\nmore lines")

    push = ["export", str(run), "out", "--push", "me/mine"]
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", forbidden)
    assert "--push me/mine failed: 403 Forbidden: no write access. the export stays in out" in refused(rlhf(*push))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "nobody is logged in" in refused(rlhf(*push))
    monkeypatch.setattr(hub, "reachable", lambda: False)
    assert "the Hub is out of reach" in refused(rlhf(*push))
    assert (tmp_path / "out/README.md").is_file()
    assert uploads == []


@pytest.mark.skipif(not PAGE.exists(), reason="docs/ is not there")
def test_the_commands_of_the_page_run(
    run: Path, tmp_path: Path, uploads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "FILE.jsonl", [{"prompt": PROMPT}, {"messages": [{"role": "user", "content": PROMPT}]}])
    block = "".join(re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
    lines = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    assert {line[0] for line in lines} == {"generate", "export"}
    for number, line in enumerate(lines):
        args = [{"RUN": str(run), "OUT": f"out-{number}"}.get(word, word) for word in line]
        result = CliRunner().invoke(cli.app, args, prog_name="rlhf", input=f"{PROMPT}\n")
        assert result.exit_code == 0, (line, result.output)
    assert len(read_lines(tmp_path / "answers.jsonl")) == 8
    assert [seen["made"] for seen in uploads if "made" in seen] == ["USER/NAME"]
