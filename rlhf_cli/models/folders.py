"""Where models lie: local folders and the Hub, what they hold, and what tells their content apart."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from hashlib import file_digest, sha256
from pathlib import Path

from rlhf_cli.errors import RunError
from rlhf_cli.models.calibration import CALIBRATION_FILE
from rlhf_cli.models.reward import CENTRE_FILE

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHTS = ("*.safetensors", "*.bin")
TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
OTHER_FRAMEWORKS = ["*.h5", "*.msgpack", "*.onnx", "*.ot", "*.gguf", "*.tflite"]


def fingerprint(folder: Path) -> str:
    """Return the sha256 of what decides what the model in `folder` says: weights, architecture, tokenizer, reading."""
    digest = sha256()
    names = [path.name for pattern in WEIGHTS for path in folder.glob(pattern)]
    for name in sorted([*names, *TOKENIZER, "merges.txt", "config.json", CENTRE_FILE, CALIBRATION_FILE]):
        if (folder / name).is_file():
            seen = (folder / name).stat()
            changed = (seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
            digest.update(name.encode() + _file_hash(folder / name, changed))
    return digest.hexdigest()


@lru_cache(maxsize=256)
def _file_hash(path: Path, _changed: tuple[int, ...]) -> bytes:
    """Return the sha256 of a file; large weights are asked for many times, and read again once they are others."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").digest()


def model_folder(key: str, given: str) -> Path:
    """Return the folder that a config key names: a local one, or the Hub's model of that name in the local cache.

    Raises:
        RunError: there is no such folder, and no such model can be reached.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        return path
    if not HUB_NAME.fullmatch(given) or Path(given).parent.is_dir():
        raise RunError(
            f"{key}={given} is not a folder", "", "give a run folder, a Hugging Face model folder or a Hub name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(given, ignore_patterns=OTHER_FRAMEWORKS))
    except Exception as error:  # a broken line shows in many ways, of other libraries too
        raise RunError(
            f"{key}={given} is neither a folder nor a model that can be reached",
            next(iter(str(error).splitlines()), type(error).__name__),
            "check the name; for a gated model, log in with `hf auth login`",
        ) from error


def has_tokenizer(folder: Path) -> bool:
    """Return whether the model in `folder` brings a tokenizer of its own."""
    return any((folder / name).is_file() for name in TOKENIZER)


def is_reward_model(folder: Path) -> bool:
    """Return whether the config in `folder` is that of a sequence classifier."""
    try:
        architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError):
        return False
    return any(name.endswith("ForSequenceClassification") for name in architectures)
