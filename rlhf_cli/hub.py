"""The Hub: a model or dataset named by its id becomes a local folder; what keeps it from that is said in one line."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_cli.errors import RunError

NAME = re.compile(r"[\w.-]+/[\w.-]+")
PATIENCE = 3.0  # seconds for the Hub to answer
MORE = 1.0  # seconds beyond that where looking up its name hangs
TOO_MANY, SERVER_ERROR, REFUSED = 429, 500, (401, 403)  # HTTP status
# Weights of other frameworks, the same weights again, and what training left.
OTHER_FILES = ["*.h5", "*.msgpack", "*.onnx", "*.ot", "*.gguf", "*.tflite", "*.mlmodel", "*.pth", "*.pt", "onnx/*"]
OTHER_FILES += ["openvino/*", "coreml/*", "original/*", "consolidated*", "checkpoint-*", "runs/*", "training_args.bin"]
# Where transformers and peft look for weights, in their order.
WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
WEIGHTS += ["adapter_model.safetensors", "adapter_model.bin"]
# A file that each repository has: asking for it shows whether the Hub answers for this one.
ANY_FILE = {"model": "config.json", "dataset": ".gitattributes"}
SILENT: list[str] = []  # why the Hub did not answer; then this process works from its cache


def local_folder(
    key: str, given: str, *, kind: str = "model", revision: str | None = None, allow: list[str] | None = None
) -> Path:
    """Return the folder that a config key names: a local one as it is, or the Hub's, downloaded or from its cache.

    Args:
        key: the config key, for messages.
        given: a folder, or the id of a repository: ORG/NAME.
        kind: "model" or "dataset".
        revision: branch, tag or commit; None: main.
        allow: patterns of the files to fetch; None: all, and of a model those that PyTorch reads.

    Raises:
        RunError: there is no such folder, and no such repository within reach.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        return path
    if not is_id(given):
        place = "a Hugging Face model folder" if kind == "model" else "a file, a folder"
        place = place if kind == "dataset" or key.startswith("model.") else f"a run folder, {place}"
        raise RunError(f"{key}={given} is not a folder", "", f"give {place} or a Hub name (ORG/NAME)")
    try:
        if kind == "model" and allow is None:
            return _model(key, given, revision)
        return _snapshot(given, revision, repo_type=kind, allow_patterns=allow)
    except Exception as error:  # a broken line shows in many ways, of other libraries too
        raise _explained(key, given, kind, revision, error) from error


def is_id(given: str) -> bool:
    """Return whether `given` looks like the id of a repository, ORG/NAME, and not like a path with a typo."""
    return bool(NAME.fullmatch(given)) and not Path(given).parent.is_dir()


# -- reaching the Hub --------------------------------------------------------------------------------------------------


def reachable(given: str | None = None, kind: str = "model", revision: str | None = None) -> bool:
    """Return whether the Hub answers; where it does not, this process works from its cache from then on.

    Each address is asked once. Timeouts and retries of the libraries would otherwise add up to minutes.

    Args:
        given: the id of a repository, whose files may be out of reach while the front page is not; None: that page.
        kind: "model" or "dataset".
        revision: branch, tag or commit; None: main.
    """
    from huggingface_hub import constants, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        return False
    address = constants.ENDPOINT
    if given is not None:
        address = hf_hub_url(given, ANY_FILE[kind], repo_type=kind, revision=revision)
    why = _unreachable(address)
    if why is not None:
        SILENT.append(f"{constants.ENDPOINT} cannot be reached ({why})")
        _stay_offline()
    return why is None


@cache
def _unreachable(address: str) -> str | None:
    """Return why the Hub does not answer, None if it does."""
    found: list[str | None] = []
    asking = threading.Thread(target=lambda: found.append(_ask(address)), daemon=True)
    asking.start()  # in a thread, for looking up a name knows no time limit
    asking.join(PATIENCE + MORE)
    return found[0] if found else f"no answer in {PATIENCE + MORE:g} seconds"


def _ask(address: str) -> str | None:
    """Return why there is no answer; a refusal is one, an overloaded or broken server is not."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers

    try:
        status = get_session().head(address, headers=build_hf_headers(), timeout=PATIENCE).status_code
    except Exception as error:  # of the library beneath, which may be another one tomorrow
        return _line(error)
    return f"HTTP status {status}" if status == TOO_MANY or status >= SERVER_ERROR else None


def _stay_offline() -> None:
    """Tell the libraries, imported already or later, not to try the Hub."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants = {"huggingface_hub.constants": ["HF_HUB_OFFLINE"]}
    constants["datasets.config"] = ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"]
    for module, names in constants.items():
        for name in names if module in sys.modules else []:
            setattr(sys.modules[module], name, True)


# -- fetching ----------------------------------------------------------------------------------------------------------


def config_file(key: str, given: str) -> Path | None:
    """Return config.json of a model on the Hub, fetched alone; None where the Hub is not asked: a folder, or offline.

    Args:
        key: the config key, for messages.
        given: a folder, or the id of a repository.

    Raises:
        RunError: the Hub refuses it, or has no such model.
    """
    if Path(given).expanduser().is_dir() or not is_id(given) or not reachable(given):
        return None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(given, "config.json"))
    except Exception as error:
        raise _explained(key, given, "model", None, error) from error


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights of the model in `folder`, there or not; [] if it holds none."""
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None or found.suffix != ".json":
        return [] if found is None else [found]
    with suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
        return [folder / name for name in sorted(set(json.loads(found.read_text("utf-8"))["weight_map"].values()))]
    return []


def _model(key: str, given: str, revision: str | None) -> Path:
    """Return the snapshot of a model with its weights; those in safetensors are not fetched as .bin again.

    Raises:
        RunError: the cache holds a part of it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    files: list[str] = []
    if reachable(given, "model", revision):
        with suppress(HfHubHTTPError):  # then the cache may do, and else the download says why
            files = HfApi().list_repo_files(given, revision=revision)
    only_bin = files and not any(name.endswith(".safetensors") and "/" not in name for name in files)
    if not only_bin:
        folder = _snapshot(given, revision, ignore_patterns=[*OTHER_FILES, "*.bin"])
        if _whole(folder):
            return folder
    folder = _snapshot(given, revision, ignore_patterns=OTHER_FILES)
    if not _whole(folder):
        lacking = [path.name for path in weight_files(folder) if not path.is_file()]
        raise incomplete(key, given, f"{lacking[0]} is missing" if lacking else "its weights are missing")
    return folder


def _snapshot(given: str, revision: str | None, **how: Any) -> Path:
    from huggingface_hub import snapshot_download

    reachable(given, how.get("repo_type", "model"), revision)  # where it is not, the cache alone is asked
    return Path(snapshot_download(given, revision=revision, **how))


def _whole(folder: Path) -> bool:
    files = weight_files(folder)
    return bool(files) and all(path.is_file() for path in files)


# -- explaining --------------------------------------------------------------------------------------------------------


def incomplete(key: str, given: str, why: str) -> RunError:
    """Return the error for a model of which a part is missing or damaged: `why`."""
    if Path(given).expanduser().is_dir():
        return RunError(f"the model in {key}={given} is not whole", why, "copy or download the folder again")
    from huggingface_hub import constants

    if not _silence():
        return RunError(f"{key}={given} is not whole on the Hub", why, f"name another, or set {key}=FOLDER")
    what = f"{key}={given} is in the cache in part ({constants.HF_HUB_CACHE})"
    return RunError(what, f"{why}. {_silence()}", f"set {key}=FOLDER, or run {_download(given, 'model', None)}")


def _explained(key: str, given: str, kind: str, revision: str | None, error: Exception) -> RunError:
    """Return the one line for what kept a repository away."""
    from huggingface_hub import errors

    if isinstance(error, RunError):
        return error
    login = "log in with `hf auth login`"
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{given}"
    folder = f"set {key}=FOLDER"
    cause: BaseException = error
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        cause = error.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, errors.GatedRepoError):
        return RunError(
            f"{key}={given} is a gated {kind}", "", f"accept its licence at {page} and {login}, or {folder}"
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return RunError(f"{key}={given} has no revision {revision}", "", f"see {page}/tree/main for those it has")
    if isinstance(cause, errors.RepositoryNotFoundError):
        return RunError(f"{key}={given}: the Hub has no such {kind}", "", f"check the name; if it is private, {login}")
    if status in REFUSED:
        what = f"{key}={given}: the Hub refuses access (HTTP status {status})"
        return RunError(what, "your login may have expired, or not cover it", f"{login}, or {folder}")
    if isinstance(cause, errors.RemoteEntryNotFoundError):
        why = f"it has no {ANY_FILE[kind]}" if kind == "model" else _line(cause)
        return RunError(f"{key}={given} is no {kind} that can be opened", why, f"name another, or {folder}")
    if isinstance(cause, errors.LocalEntryNotFoundError):
        return _not_cached(key, given, kind, revision, error)
    if any(getattr(cause, "errno", None) == errno.ENOSPC for cause in (error, error.__cause__, error.__context__)):
        return RunError(f"{key}={given} does not fit the disk", "", "make room, or set HF_HOME to a folder on another")
    return RunError(f"{key}={given} could not be fetched", _line(cause), f"try again, or {folder}")


def _not_cached(key: str, given: str, kind: str, revision: str | None, error: Exception) -> RunError:
    from huggingface_hub import constants

    todo = f"set {key}=FOLDER, or run {_download(given, kind, revision)}"
    return RunError(f"{key}={given} is not in the cache ({constants.HF_HUB_CACHE})", _silence() or _line(error), todo)


def _silence() -> str:
    """Return why nothing is fetched; empty if the Hub was asked."""
    from huggingface_hub import constants

    if SILENT:
        return SILENT[-1]
    return "HF_HUB_OFFLINE is set, so nothing is fetched" if constants.HF_HUB_OFFLINE else ""


def _download(given: str, kind: str, revision: str | None) -> str:
    from huggingface_hub import constants

    command = f"hf download {given}{' --repo-type dataset' if kind == 'dataset' else ''}"
    command += f" --revision {revision}" if revision else ""
    unset = ", or unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE and not SILENT else ""
    gated = "" if kind == "dataset" else "; of a gated model, first accept the licence on its page and `hf auth login`"
    return f"`{command}` once where there is a network and keep HF_HOME{unset}{gated}"


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
