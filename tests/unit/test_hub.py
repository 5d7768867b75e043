"""The Hub by id: its cache, and one line for all that keeps a model or a dataset away. No test asks the Hub itself."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors
from miniatures import save_miniature
from typer.testing import Result

from rlhf_cli import hub
from rlhf_cli.errors import RunError
from rlhf_cli.hub import local_folder, reachable
from rlhf_cli.models.check import check_model
from rlhf_cli.models.policy import load_policy
from rlhf_cli.models.tokenizers import load_tokenizer

CAUSAL = {"model_type": "opt", "architectures": ["OPTForCausalLM"]}
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Let each test ask anew whether the Hub answers, of an empty cache, and leave no mode behind."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub, "SILENT", [])
    hub._unreachable.cache_clear()
    yield
    hub._unreachable.cache_clear()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def answering(monkeypatch: pytest.MonkeyPatch, answer: Callable[[], object] | int = 200) -> list[str]:
    """Replace the request that asks whether the Hub is there, by a status or a call; return the addresses asked."""
    asked: list[str] = []

    def head(url: str, **_: object) -> object:
        asked.append(url)
        return SimpleNamespace(status_code=answer) if isinstance(answer, int) else answer()

    monkeypatch.setattr("huggingface_hub.get_session", lambda: SimpleNamespace(head=head))
    return asked


def refuse() -> object:
    raise httpx2.ConnectError("Name or service not known")


def cached(tmp_path: Path, kind: str = "models", name: str = "org--model") -> Path:
    """Return an empty snapshot in the cache, as hf_hub_download lays them out."""
    place = tmp_path / "hub" / f"{kind}--{name}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(SHA)
    (place / "snapshots" / SHA).mkdir(parents=True)
    return place / "snapshots" / SHA


# -- is the Hub there? -------------------------------------------------------------------------------------------------


def test_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://mirror.example")
    asked = answering(monkeypatch)
    assert reachable()
    assert reachable()
    assert asked == ["https://mirror.example"]


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize(("kind", "file"), [("model", "resolve/main/config.json"), ("dataset", ".gitattributes")])
def test_a_repository_that_is_not_served_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, status: int, kind: str, file: str
) -> None:
    asked = answering(monkeypatch, status)  # else the library tries six times, for half a minute
    with pytest.raises(RunError, match=rf"is not in the cache .* cannot be reached \(HTTP status {status}\). set key="):
        local_folder("key", "org/name", kind=kind)
    assert len(asked) == 1
    assert asked[0].endswith(file)
    assert "org/name" in asked[0]


def test_a_refusal_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, 401)
    assert reachable("org/model")


def test_without_an_answer_all_libraries_stay_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = SimpleNamespace(HF_HUB_OFFLINE=False, HF_DATASETS_OFFLINE=False)
    monkeypatch.setitem(sys.modules, "datasets.config", constants)
    with monkeypatch.context() as down:
        asked = answering(down, refuse)
        assert not reachable()
        assert not reachable()
        assert len(asked) == 1
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert constants.HF_HUB_OFFLINE
    assert constants.HF_DATASETS_OFFLINE
    with pytest.raises(errors.OfflineModeIsEnabled, match="offline mode is enabled"):
        huggingface_hub.get_session().get("https://huggingface.co/api/models")


def test_a_name_server_that_hangs_costs_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PATIENCE", 0.1)
    monkeypatch.setattr(hub, "MORE", 0.1)
    answering(monkeypatch, lambda: threading.Event().wait(60))
    start = time.monotonic()
    with pytest.raises(RunError, match=r"cannot be reached \(no answer in 0.2 seconds\)"):
        local_folder("model.path", "org/model")
    assert time.monotonic() - start < 2


# -- errors ------------------------------------------------------------------------------------------------------------


def refused(kind: type[errors.HfHubHTTPError], status: int = 404) -> errors.HfHubHTTPError:
    request = httpx2.Request("GET", "https://huggingface.co/api/models/org/model")
    return kind(f"{status} Client Error.\n\nA long story.", response=httpx2.Response(status, request=request))


def behind(cause: Exception) -> Exception:
    """Return what the library makes of an error where its cache has nothing either."""
    error = errors.LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub")
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            refused(errors.GatedRepoError, 403),
            r"a gated model. accept its licence at https://huggingface.co/org/model and",
        ),
        (
            refused(errors.RepositoryNotFoundError),
            r"the Hub has no such model. check the name; if it is private, log in",
        ),
        (refused(errors.RevisionNotFoundError), r"has no revision v9"),
        (refused(errors.RemoteEntryNotFoundError), r"is no model that can be opened. it has no config.json"),
        (refused(errors.HfHubHTTPError, 503), r"could not be fetched. 503 Client Error. try again, or set key=FOLDER"),
        (refused(errors.HfHubHTTPError, 403), r"the Hub refuses access \(HTTP status 403\).*log in with"),
        (behind(refused(errors.HfHubHTTPError, 401)), r"the Hub refuses access \(HTTP status 401\).*log in with"),
        (FULL, r"does not fit the disk. make room, or set HF_HOME"),
        (ValueError(), r"could not be fetched. ValueError. try again"),
    ],
    ids=["gated", "missing", "revision", "file", "down", "forbidden", "behind", "disk", "other"],
)
def test_what_keeps_a_model_away_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    answering(monkeypatch)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: ["model.safetensors"])
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(RunError, match=f"^key=org/model.*{expected}") as raised:
        local_folder("key", "org/model", revision="v9")
    assert "\n" not in str(raised.value)


def test_what_is_neither_cached_nor_reachable_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, refuse)
    expected = (
        r"^model.path=org/model is not in the cache \(.*hub\). https://huggingface.co cannot be reached "
        r"\(.*\). set model.path=FOLDER, or run `hf download org/model` .*; of a gated .*`hf auth login`.$"
    )
    with pytest.raises(RunError, match=expected):
        local_folder("model.path", "org/model")


@pytest.mark.usefixtures("offline")
def test_offline_by_choice_says_so() -> None:
    expected = "HF_HUB_OFFLINE is set.*`hf download org/rows --repo-type dataset`.*or unset HF_HUB_OFFLINE"
    with pytest.raises(RunError, match=expected):
        local_folder("dataset.path", "org/rows", kind="dataset")


def test_a_typo_in_a_path_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, refuse)
    with pytest.raises(RunError, match="^dataset.path=./nowhere is not a folder. give a file, a folder or a Hub name"):
        local_folder("dataset.path", "./nowhere", kind="dataset")
    assert asked == []


# -- what is fetched, and the cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("files", "bin_too"), [(["model.safetensors"], False), (["pytorch_model.bin"], True)])
def test_weights_are_fetched_in_one_format(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: list[str], bin_too: bool
) -> None:
    asked: list[dict[str, Any]] = []

    def download(_: str, **how: Any) -> str:
        asked.append(how)
        (tmp_path / files[0]).touch()
        return str(tmp_path)

    answering(monkeypatch)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert local_folder("model.path", "org/model") == tmp_path
    assert len(asked) == 1
    assert ("*.bin" not in asked[0]["ignore_patterns"]) is bin_too
    assert {"*.h5", "*.msgpack", "original/*"} <= set(asked[0]["ignore_patterns"])


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("family", ["opt", "opt-350m"])  # safetensors, and .bin alone
def test_a_model_in_the_cache_opens_without_a_network(tmp_path: Path, family: str) -> None:
    snapshot = cached(tmp_path)
    save_miniature(family, snapshot)
    check_model("model.path", "org/model")
    folder = local_folder("model.path", "org/model")
    assert folder == snapshot
    assert load_policy(folder).config.model_type == "opt"
    assert load_tokenizer(folder).eos_token == "</s>"


@pytest.mark.usefixtures("offline")
def test_a_model_of_which_the_cache_holds_a_part_says_what_is_missing(tmp_path: Path) -> None:
    snapshot = cached(tmp_path)

    def refused(missing: str) -> None:
        expected = rf"^model.path=org/model is in the cache in part \(.*\). {missing}. HF_HUB_OFFLINE is set"
        for ask in (check_model, local_folder):
            with pytest.raises(RunError, match=expected):
                ask("model.path", "org/model")

    (snapshot / "config.json").write_text(json.dumps(CAUSAL))
    refused("its weights are missing")
    whole = save_miniature("opt", tmp_path / "whole")
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "1.bin", "b": "2.bin"}}))
    (snapshot / "1.bin").write_bytes(b"\x80")
    refused("2.bin is missing")
    (snapshot / "2.bin").write_bytes(b"\x80")
    assert local_folder("model.path", "org/model") == snapshot
    (snapshot / "vocab.json").write_bytes((whole / "vocab.json").read_bytes())
    check_model("model.path", "org/model")
    (snapshot / "config.json").unlink()
    with pytest.raises(RunError, match="in the cache in part .*config.json is missing"):
        check_model("model.path", "org/model")


@pytest.mark.usefixtures("offline")
def test_adapters_and_datasets_in_the_cache(tmp_path: Path) -> None:
    adapter, rows = cached(tmp_path), cached(tmp_path, "datasets", "org--rows")
    (adapter / "adapter_model.safetensors").touch()
    assert local_folder("policy", "org/model") == adapter
    assert local_folder("dataset.path", "org/rows", kind="dataset", allow=["data/*"]) == rows


# -- the command -------------------------------------------------------------------------------------------------------


def test_online_the_config_alone_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    asked: list[tuple[str, str]] = []

    def download(name: str, file: str) -> str:
        asked.append((name, file))
        return str(tmp_path / file)

    answering(monkeypatch)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(RunError, match="BertForMaskedLM"):
        check_model("model.path", "org/model")
    assert asked == [("org/model", "config.json")]


def test_the_command_says_so_before_it_looks_at_the_data(
    monkeypatch: pytest.MonkeyPatch, rlhf: Callable[..., Result]
) -> None:
    answering(monkeypatch, refuse)
    start = time.monotonic()
    result = rlhf("align", "algo=pm", "model=opt-1.3b", "dataset.path=nowhere.jsonl")
    assert time.monotonic() - start < 5
    assert result.exit_code == 2
    assert "error: model.path=facebook/opt-1.3b is not in the cache" in result.output
    assert "Traceback" not in result.output
