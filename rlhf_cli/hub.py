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
# Weights of other frameworks, the same weights again, and what training left.
OTHER_FILES = ["*.h5", "*.msgpack", "*.onnx", "*.ot", "*.gguf", "*.tflite", "*.mlmodel", "*.pth", "*.pt", "onnx/*"]
OTHER_FILES += ["openvino/*", "coreml/*", "original/*", "consolidated*", "checkpoint-*", "runs/*", "training_args.bin"]
CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "Model")  # a bare body may have a tied head


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
        place = "a run folder, a Hugging Face model folder" if kind == "model" else "a file, a folder"
        raise RunError(f"{key}={given} is not a folder", "", f"give {place} or a Hub name (ORG/NAME)")
    try:
        if kind == "model" and allow is None:
            return _model(given, revision)
        return _snapshot(given, revision, repo_type=kind, allow_patterns=allow)
    except Exception as error:  # a broken line shows in many ways, of other libraries too
        raise _explained(key, given, kind, revision, error) from error


def is_id(given: str) -> bool:
    """Return whether `given` looks like the id of a repository, ORG/NAME, and not like a path with a typo."""
    return bool(NAME.fullmatch(given)) and not Path(given).parent.is_dir()


def check_model(key: str, given: str) -> None:
    """Refuse a base model that is out of reach, or that is no causal language model: by its config, without weights.

    Raises:
        RunError: saying what is wrong and what to do.
    """
    folder = Path(given).expanduser()
    if not folder.is_dir() and is_id(given) and reachable():
        from huggingface_hub import hf_hub_download

        try:
            _require_causal(key, given, Path(hf_hub_download(given, "config.json")))
        except Exception as error:
            raise _explained(key, given, "model", None, error) from error
        return
    folder = local_folder(key, given)
    if not (folder / "config.json").is_file():
        inside, adapter = folder / "model", (folder / "adapter_config.json").is_file()
        raise RunError(
            f"{key}={given} holds {'an adapter alone' if adapter else 'no config.json'}",
            "a whole model in Hugging Face layout is needed",
            f"set {key}={inside}" if (inside / "config.json").is_file() else "name its folder, or a Hub id",
        )
    _require_causal(key, given, folder / "config.json")


def _require_causal(key: str, given: str, file: Path) -> None:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind, names = str(config["model_type"]), list(config.get("architectures") or [])
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        why = "config.json names no model_type" if isinstance(error, KeyError) else "config.json is damaged"
        raise RunError(
            f"{key}={given} is no model that can be opened", why, "fetch it again, or name another"
        ) from error
    if config.get("is_encoder_decoder") or (names and not any(name.endswith(CAUSAL) for name in names)):
        raise RunError(
            f"{key}={given} is a {', '.join(names) or kind} ({kind}), and a causal language model is needed",
            "",
            "name one, such as facebook/opt-1.3b",
        )


# -- reaching the Hub --------------------------------------------------------------------------------------------------


def reachable() -> bool:
    """Return whether the Hub answers. Asked once: where it does not, this process works from its cache from then on.

    Timeouts and retries of the libraries would otherwise add up to minutes.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if _unreachable() is None:
        return True
    _stay_offline()
    return False


@cache
def _unreachable() -> str | None:
    """Return why the Hub does not answer, None if it does."""
    from huggingface_hub import constants

    found: list[str | None] = []
    asking = threading.Thread(target=lambda: found.append(_ask(constants.ENDPOINT)), daemon=True)
    asking.start()  # in a thread, for looking up a name knows no time limit
    asking.join(PATIENCE + MORE)
    return found[0] if found else f"no answer in {PATIENCE + MORE:g} seconds"


def _ask(endpoint: str) -> str | None:
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=PATIENCE)
    except Exception as error:  # of the library beneath, which may be another one tomorrow
        return _line(error)
    return None


def _stay_offline() -> None:
    """Tell the libraries, imported already or later, not to try the Hub."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants = {"huggingface_hub.constants": ["HF_HUB_OFFLINE"]}
    constants["datasets.config"] = ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"]
    for module, names in constants.items():
        for name in names if module in sys.modules else []:
            setattr(sys.modules[module], name, True)


# -- fetching ----------------------------------------------------------------------------------------------------------


def _model(given: str, revision: str | None) -> Path:
    """Return the snapshot of a model with its weights; those in safetensors are not fetched as .bin again.

    Raises:
        LocalEntryNotFoundError: the cache holds a part of it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files: list[str] = []
    if reachable():
        with suppress(HfHubHTTPError):  # then the cache may do, and else the download says why
            files = HfApi().list_repo_files(given, revision=revision)
    only_bin = files and not any(name.endswith(".safetensors") and "/" not in name for name in files)
    if not only_bin:
        folder = _snapshot(given, revision, ignore_patterns=[*OTHER_FILES, "*.bin"])
        if _has_weights(folder):
            return folder
    folder = _snapshot(given, revision, ignore_patterns=OTHER_FILES)
    if not _has_weights(folder):
        raise LocalEntryNotFoundError("its weights are not there")
    return folder


def _snapshot(given: str, revision: str | None, **how: Any) -> Path:
    from huggingface_hub import snapshot_download

    reachable()  # where it is not, the cache alone is asked
    return Path(snapshot_download(given, revision=revision, **how))


def _has_weights(folder: Path) -> bool:
    """Return whether a model folder holds weights; where an index names several files, all of them."""
    for index in folder.glob("*.index.json"):
        with suppress(OSError, ValueError, KeyError, AttributeError):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return all((folder / name).is_file() for name in shards)
    return any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir())


# -- explaining --------------------------------------------------------------------------------------------------------


def _explained(key: str, given: str, kind: str, revision: str | None, error: Exception) -> RunError:
    """Return the one line for what kept a repository away."""
    from huggingface_hub import errors

    if isinstance(error, RunError):
        return error
    login = "log in with `hf auth login`"
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{given}"
    folder = f"set {key}=FOLDER"
    if isinstance(error, errors.GatedRepoError):
        return RunError(f"{key}={given} is a gated {kind}", f"accept its licence at {page} and {login}", f"or {folder}")
    if isinstance(error, errors.RevisionNotFoundError):
        return RunError(f"{key}={given} has no revision {revision}", "", f"see {page}/tree/main for those it has")
    if isinstance(error, errors.RepositoryNotFoundError):
        return RunError(f"{key}={given}: the Hub has no such {kind}", "", f"check the name; if it is private, {login}")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return RunError(f"{key}={given} is no {kind} that can be opened", _line(error), folder)
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _not_cached(key, given, kind, revision, error)
    if any(getattr(cause, "errno", None) == errno.ENOSPC for cause in (error, error.__cause__, error.__context__)):
        return RunError(f"{key}={given} does not fit the disk", "", "make room, or set HF_HOME to a folder on another")
    return RunError(f"{key}={given} could not be fetched", _line(error), f"try again, or {folder}")


def _not_cached(key: str, given: str, kind: str, revision: str | None, error: Exception) -> RunError:
    from huggingface_hub import constants

    asked = _unreachable() if _unreachable.cache_info().currsize else None
    if asked is not None:
        why = f"{constants.ENDPOINT} cannot be reached ({asked})"
    elif constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set, so nothing is fetched"
    else:
        why = _line(error)
    download = f"hf download {given}{' --repo-type dataset' if kind == 'dataset' else ''}"
    download += f" --revision {revision}" if revision else ""
    todo = f"set {key}=FOLDER, or run `{download}` once where there is a network and keep HF_HOME"
    offline = asked is None and constants.HF_HUB_OFFLINE
    return RunError(
        f"{key}={given} is not in the cache ({constants.HF_HUB_CACHE})",
        why,
        f"{todo}, or unset HF_HUB_OFFLINE" if offline else todo,
    )


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
