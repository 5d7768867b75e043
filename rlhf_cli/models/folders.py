"""Where models lie: local folders and the Hub, what they hold, and what tells their content apart."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from hashlib import file_digest, sha256
from pathlib import Path

from rlhf_cli.config.schema import ModelConfig
from rlhf_cli.hub import local_folder, weight_files
from rlhf_cli.models.adapters import CLASSIFIER, adapter_base, adapter_settings, is_adapter
from rlhf_cli.models.calibration import CALIBRATION_FILE
from rlhf_cli.models.reward import CENTRE_FILE
from rlhf_cli.models.tokenizers import FILES, has_tokenizer

__all__ = ["base_folder", "base_identity", "fingerprint", "has_tokenizer", "is_reward_model", "model_folder"]

COMMIT = re.compile(r"[0-9a-f]{40}")
WEIGHTS = ("*.safetensors", "*.bin")


def fingerprint(folder: Path) -> str:
    """Return the sha256 of what decides what the model in `folder` says: weights, architecture, tokenizer, reading.

    Of an adapter its base belongs to it, wherever that lies.

    Raises:
        RunError: the base of an adapter is not there.
    """
    digest = sha256()
    if is_adapter(folder):
        settings = {**adapter_settings(folder), "base_model_name_or_path": fingerprint(adapter_base(folder))}
        digest.update(json.dumps(settings, sort_keys=True).encode())
    names = [path.name for pattern in WEIGHTS for path in folder.glob(pattern)]
    for name in sorted([*names, *FILES, "merges.txt", "config.json", CENTRE_FILE, CALIBRATION_FILE]):
        if (folder / name).is_file():
            seen = (folder / name).stat()
            changed = (seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
            digest.update(name.encode() + _file_hash(folder / name, changed))
    return digest.hexdigest()


def same_weights(first: Path, second: Path) -> bool:
    """Return whether the model files in two folders hold the same weights, byte by byte."""
    if first.resolve() == second.resolve():
        return True
    files = [weight_files(folder) for folder in (first, second)]
    seen = [[(path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in own] for own in files]
    if [size for size, *_ in seen[0]] != [size for size, *_ in seen[1]]:
        return False
    digests = [[_file_hash(*pair) for pair in zip(*both, strict=True)] for both in zip(files, seen, strict=True)]
    return digests[0] == digests[1]


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
    return local_folder(key, given)


def base_folder(model: ModelConfig, *, reward: bool = False) -> Path:
    """Return the folder of the model that training starts from.

    Args:
        model: whose `path` is set.
        reward: of the reward model, which may have a base of its own (`model.reward_path`).

    Raises:
        RunError: it is not within reach.
        ValueError: the model is made, not loaded.
    """
    key, given = (
        ("model.reward_path", model.reward_path) if reward and model.reward_path else ("model.path", model.path)
    )
    if given is None:
        raise ValueError("model.path is null: this model is made from sizes, it has no folder.")
    return local_folder(key, given)


def base_identity(folder: Path) -> str:
    """Return what tells the content of a base model apart, wherever it lies and whenever it was put there.

    The commit where the folder is a snapshot in the Hub's cache; else its fingerprint.
    """
    folder = folder.resolve()
    return folder.name if folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name) else fingerprint(folder)


def has_model(folder: Path) -> bool:
    """Return whether `folder` holds a model, whole or as an adapter."""
    return (folder / "config.json").is_file() or is_adapter(folder)


def is_reward_model(folder: Path) -> bool:
    """Return whether the config in `folder` is that of a sequence classifier, or of an adapter of one."""
    if is_adapter(folder):
        return bool(adapter_settings(folder).get("task_type") == CLASSIFIER)
    try:
        architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError):
        return False
    return any(name.endswith("ForSequenceClassification") for name in architectures)
