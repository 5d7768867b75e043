"""Model folders: what tells their content apart, and how a name becomes a folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_cli.config.schema import ModelConfig
from rlhf_cli.errors import RunError
from rlhf_cli.models import folders
from rlhf_cli.models.folders import (
    base_folder,
    base_identity,
    fingerprint,
    has_tokenizer,
    is_reward_model,
    model_folder,
    same_weights,
)

REWARD_MODEL = {"architectures": ["OPTForSequenceClassification"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the files of a reward model; their content is never read as a model."""
    made = tmp_path / "rm"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(REWARD_MODEL))
    (made / "model.safetensors").write_bytes(b"weights")
    (made / "reward.json").write_text('{"chosen_mean_score": 1}')
    (made / "length_calibration.json").write_text('{"lengths": [1], "offsets": [0]}')
    return made


# -- fingerprint -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "reward.json", "length_calibration.json"])
@pytest.mark.parametrize("change", ["edit", "remove"])
def test_a_fingerprint_changes_with_what_decides_the_output(folder: Path, name: str, change: str) -> None:
    before = fingerprint(folder)
    if change == "edit":
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + b"!")  # of the same size
    else:
        (folder / name).unlink()
    assert fingerprint(folder) != before


def test_a_fingerprint_is_of_every_shard_and_tells_their_names(folder: Path) -> None:
    found = {fingerprint(folder)}
    (folder / "model-2.safetensors").write_bytes(b"more")
    found.add(fingerprint(folder))
    (folder / "model-2.safetensors").rename(folder / "model-3.safetensors")
    found.add(fingerprint(folder))
    (folder / "pytorch_model.bin").write_bytes(b"more")
    found.add(fingerprint(folder))
    assert len(found) == 4


def test_a_fingerprint_does_not_change_with_place_and_notes(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "model")
    (copy / "README.md").write_text("notes")
    (copy / "training_args.json").write_text("{}")
    assert fingerprint(copy) == fingerprint(folder)
    assert len(fingerprint(folder)) == 64


def test_weights_are_read_once_until_they_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, read = fingerprint(folder), []

    def digest(file: object, name: str) -> object:
        read.append(Path(file.name).name)  # type: ignore[attr-defined]
        return original(file, name)

    original = folders.file_digest
    monkeypatch.setattr(folders, "file_digest", digest)
    assert fingerprint(folder) == first
    assert read == []
    (folder / "model.safetensors").write_bytes(b"others!")
    assert fingerprint(folder) != first
    assert read == ["model.safetensors"]


def test_weights_are_the_same_whatever_lies_beside_them(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "config.json").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"the same again, never read")
    assert same_weights(folder, copy)
    (copy / "model.safetensors").write_bytes(b"weighty")
    assert not same_weights(folder, copy)
    (copy / "model.safetensors").write_bytes(b"more weights")
    assert not same_weights(folder, copy)


# -- kinds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (REWARD_MODEL, True),
        ({"architectures": ["OPTForCausalLM"]}, False),
        ({"architectures": None}, False),
        ({}, False),
        (None, False),
    ],
)
def test_a_reward_model_is_a_sequence_classifier(tmp_path: Path, config: object, found: bool) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert is_reward_model(tmp_path) is found


def test_a_damaged_config_is_no_reward_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": [')
    assert not is_reward_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "found"), [("tokenizer.json", True), ("tokenizer_config.json", True), ("config.json", False)]
)
def test_a_tokenizer_is_recognised_by_its_files(tmp_path: Path, name: str, found: bool) -> None:
    (tmp_path / name).touch()
    assert has_tokenizer(tmp_path) is found


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Exception | None], list[str]]:
    """Return a function that replaces the Hub: it fails with an error or has the model in tmp_path/snapshot."""

    def prepare(error: Exception | None) -> list[str]:
        asked: list[str] = []

        def download(name: str, **_: object) -> str:
            asked.append(name)
            if error is not None:
                raise error
            return str(tmp_path / "snapshot")

        (tmp_path / "snapshot").mkdir()
        (tmp_path / "snapshot" / "model.safetensors").touch()
        monkeypatch.setattr("rlhf_cli.hub.reachable", lambda *_: True)
        monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: ["model.safetensors"])
        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        return asked

    return prepare


def test_a_local_folder_wins_over_the_hub(
    hub: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = hub(None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("org/model").mkdir(parents=True)
    assert model_folder("policy", "org/model") == Path("org/model")
    assert model_folder("policy", str(tmp_path / "org" / "model")) == tmp_path / "org" / "model"
    assert model_folder("policy", "~/org") == tmp_path / "org"
    assert asked == []


def test_a_hub_name_is_its_snapshot(hub: Callable[..., list[str]], tmp_path: Path) -> None:
    asked = hub(None)
    assert model_folder("policy", "facebook/opt-125m") == tmp_path / "snapshot"
    assert asked == ["facebook/opt-125m"]


@pytest.mark.parametrize("given", ["nowhere", "runs/typo", "runs/a/b", "./x", "/nowhere/at", "a b/c"])
def test_a_typo_in_a_path_does_not_ask_the_hub(
    hub: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    asked = hub(None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(RunError, match=f"^policy={given} is not a folder. give a run folder, .*or a Hub name"):
        model_folder("policy", given)
    assert asked == []
    with pytest.raises(
        RunError, match=f"^model.path={given} is not a folder. give a Hugging Face model folder or a Hub"
    ):
        model_folder("model.path", given)


class RemoteProtocolError(Exception):
    """As of the library beneath the Hub's: a download that breaks off raises it."""


def test_a_download_that_breaks_off_is_one_line(hub: Callable[[Exception | None], list[str]]) -> None:
    hub(RemoteProtocolError("peer closed connection\nand a long story"))
    expected = "^reference=org/model could not be fetched. peer closed connection. try again, or set reference=FOLDER.$"
    with pytest.raises(RunError, match=expected):
        model_folder("reference", "org/model")


# -- bases -------------------------------------------------------------------------------------------------------------


def base(**changes: str | None) -> ModelConfig:
    """Return the config of a model to load; only its places matter here."""
    return SimpleNamespace(**{"path": None, "reward_path": None, **changes})  # type: ignore[return-value]


def test_the_base_of_a_reward_model_may_be_another(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    both = base(path=str(tmp_path / "a"), reward_path=str(tmp_path / "b"))
    assert base_folder(both) == tmp_path / "a"
    assert base_folder(both, reward=True) == tmp_path / "b"
    assert base_folder(base(path=str(tmp_path / "a")), reward=True) == tmp_path / "a"
    with pytest.raises(RunError, match="^model.reward_path=./c is not a folder"):
        base_folder(base(path=str(tmp_path / "a"), reward_path="./c"), reward=True)
    with pytest.raises(ValueError, match="this model is made from sizes"):
        base_folder(base())


def test_a_snapshot_is_known_by_its_commit_wherever_the_cache_lies(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    for cache in ("one", "two"):
        snapshot = tmp_path / cache / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(cache)
        assert base_identity(snapshot) == commit


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_local_base_edited_in_place_is_another(folder: Path, name: str) -> None:
    (folder / name).write_text("a")
    before = base_identity(folder)
    assert base_identity(folder) == before
    (folder / "README.md").write_text("notes")
    assert base_identity(folder) == before
    os.utime(folder / name, ns=(1, 1))
    assert base_identity(folder) == before, "copied there at another time"
    (folder / name).write_text("b")
    os.utime(folder / name, ns=(1, 1))
    assert base_identity(folder) != before, "of the same size and time"
