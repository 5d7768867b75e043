"""A base model before anything is loaded: is it within reach, a causal language model, and whole? Without torch."""

from __future__ import annotations

import json
from pathlib import Path
from zipfile import is_zipfile

from rlhf_cli.errors import RunError
from rlhf_cli.hub import config_file, incomplete, local_folder, weight_files

CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "Model")  # a bare body may have a tied head
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
PICKLE = b"\x80"  # begins .bin files of old


def check_model(key: str, given: str) -> None:
    """Refuse a base model that is out of reach, that is no causal language model, or of which files are missing.

    Of a model on the Hub only its config is read; what is in a folder, or in the cache, is looked at: are all weights
    there, and readable to their end?

    Args:
        key: the config key, for messages. `model.path` needs a tokenizer too.
        given: a folder, or the id of a repository.

    Raises:
        RunError: saying what is wrong and what to do.
    """
    fetched = config_file(key, given)
    if fetched is not None:
        _require_causal(key, given, fetched)
        return
    folder = local_folder(key, given)
    if not (folder / "config.json").is_file():
        raise _no_config(key, given, folder)
    _require_causal(key, given, folder / "config.json")
    _require_weights(key, given, folder)
    if key == "model.path" and not any((folder / name).is_file() for name in TOKENIZERS):
        raise incomplete(key, given, f"it holds no tokenizer: {', '.join(TOKENIZERS[:-1])} or {TOKENIZERS[-1]}")


def _no_config(key: str, given: str, folder: Path) -> RunError:
    if not Path(given).expanduser().is_dir():
        return incomplete(key, given, "config.json is missing")
    inside, adapter = folder / "model", (folder / "adapter_config.json").is_file()
    return RunError(
        f"{key}={given} holds {'an adapter alone' if adapter else 'no config.json'}",
        "a whole model in Hugging Face layout is needed",
        f"set {key}={inside}" if (inside / "config.json").is_file() else "name its folder, or a Hub id",
    )


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
            f"{key}={given} holds {', '.join(names) or kind} ({kind})",
            "a causal language model is needed",
            "name one, such as facebook/opt-1.3b",
        )


def _require_weights(key: str, given: str, folder: Path) -> None:
    files = weight_files(folder)
    if not files:
        raise incomplete(key, given, "it holds no weights: model.safetensors or pytorch_model.bin, or their index")
    for file in files:
        if not file.is_file():
            raise incomplete(key, given, f"{file.name} is missing")
        if damage := _damage(file):
            raise incomplete(key, given, f"{file.name} is damaged ({damage})")


def _damage(file: Path) -> str | None:
    """Return why a file of weights cannot be read to its end, None if it can; the weights themselves are not read."""
    with file.open("rb") as stream:
        start = stream.read(len(b"version https://git-lfs"))
    if start == b"version https://git-lfs":
        return "it is a pointer of Git LFS: run `git lfs pull`"
    if file.suffix == ".bin":
        return None if is_zipfile(file) or start.startswith(PICKLE) else "it ends early, or is no file of PyTorch"
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            return None
    except (SafetensorError, OSError) as error:
        return str(error)
