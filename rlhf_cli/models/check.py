"""A base model before anything is loaded: is it within reach, a causal language model, and whole? Without torch."""

from __future__ import annotations

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from zipfile import is_zipfile

from rlhf_cli.errors import RunError
from rlhf_cli.hub import config_file, incomplete, local_folder, weight_files

CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "Model")  # a bare body may have a tied head
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
ADAPTER = "adapter_config.json"
# Families that read both ways: a bare body of theirs cannot be told from a causal one by the name of its class.
ENCODERS = {"albert", "bert", "big_bird", "camembert", "convbert", "deberta", "deberta-v2", "distilbert", "electra"}
ENCODERS |= {"ernie", "eurobert", "longformer", "modernbert", "mpnet", "nomic_bert", "roberta", "xlm", "xlm-roberta"}
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
    _require_vocabulary(key, given, folder)
    if key == "model.path" and not any((folder / name).is_file() for name in TOKENIZERS):
        raise incomplete(key, given, f"it holds no tokenizer: {', '.join(TOKENIZERS[:-1])} or {TOKENIZERS[-1]}")


def _no_config(key: str, given: str, folder: Path) -> RunError:
    if not Path(given).expanduser().is_dir():
        return incomplete(key, given, "config.json is missing")
    inside, adapter = folder / "model", (folder / ADAPTER).is_file()
    run = folder if (inside / ADAPTER).is_file() else folder.resolve().parent if adapter else None
    todo = f"set {key}={inside}" if (inside / "config.json").is_file() else "name its folder, or a Hub id"
    if run is not None and (run / "status.json").is_file():
        todo = f"merge it with `rlhf export {run}`, and set {key}={run / 'export'}"
    what = f"{key}={given} holds {'an adapter alone' if adapter else 'no config.json'}"
    return RunError(what, "a whole model in Hugging Face layout is needed", todo)


def _require_causal(key: str, given: str, file: Path) -> None:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind, names = str(config["model_type"]), list(config.get("architectures") or [])
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        why = "config.json names no model_type" if isinstance(error, KeyError) else "config.json is damaged"
        raise RunError(
            f"{key}={given} is no model that can be opened", why, "fetch it again, or name another"
        ) from error
    if not _is_known(kind) and not config.get("auto_map"):  # of code that a model brings, opening it speaks
        what = f"{key}={given} is of the family {kind}"
        todo = "upgrade transformers, or name another model"
        raise RunError(what, f"transformers {version('transformers')} does not know it", todo)
    encoder = kind in ENCODERS and not any(name.endswith(CAUSAL[:-1]) for name in names)
    if encoder or config.get("is_encoder_decoder") or (names and not any(name.endswith(CAUSAL) for name in names)):
        raise RunError(
            f"{key}={given} holds {', '.join(names) or kind} ({kind})",
            "a causal language model is needed",
            "name one, such as facebook/opt-1.3b",
        )


def _is_known(kind: str) -> bool:
    """Return whether transformers knows a model_type; it is imported, for seconds, only if its files do not show it."""
    spec = find_spec("transformers")
    for place in (spec and spec.submodule_search_locations) or []:
        if (Path(place) / "models" / kind.replace("-", "_") / "__init__.py").is_file():
            return True
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return kind in CONFIG_MAPPING_NAMES


def _require_vocabulary(key: str, given: str, folder: Path) -> None:
    """Refuse a tokenizer in JSON with tokens beyond the vocabulary of config.json, as opening the model would."""
    try:
        known = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
        whole = (folder / "tokenizer.json").is_file()
        tokenizer = json.loads((folder / ("tokenizer.json" if whole else "vocab.json")).read_text("utf-8"))
        words, added = (tokenizer["model"]["vocab"], tokenizer.get("added_tokens") or []) if whole else (tokenizer, [])
        ids = words.values() if isinstance(words, dict) else range(len(words))
        needed = 1 + max([*ids, *(token["id"] for token in added)])
        beyond = needed > known
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return  # none of this kind: it is looked at when it is opened
    if beyond:
        raise RunError(
            f"the tokenizer in {key}={given} has {needed} tokens, the model's embedding {known}",
            "tokens beyond it cannot be read",
            "give a model folder whose tokenizer is the model's own",
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
