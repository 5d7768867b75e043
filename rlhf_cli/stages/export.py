"""`rlhf export`: a finished run as a folder for the Hub, with merged weights, tokenizer and model card."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, GenerationConfig

from rlhf_cli import hub
from rlhf_cli.data.encode import encode_prompt
from rlhf_cli.errors import RunError
from rlhf_cli.models.adapters import ADAPTER_FILE, adapter_base, adapter_settings, is_adapter, merged, open_adapter
from rlhf_cli.models.calibration import CALIBRATION_FILE
from rlhf_cli.models.classifier import load_reward_model, new_reward_model
from rlhf_cli.models.folders import same_weights
from rlhf_cli.models.loading import REFUSALS, Loading, reason
from rlhf_cli.models.policy import load_policy, load_tokenizer
from rlhf_cli.models.reward import CENTRE_FILE, load_centre
from rlhf_cli.report.card import Facts, model_card
from rlhf_cli.report.card_names import on_hub
from rlhf_cli.stages import push_to_hub, results, trust
from rlhf_cli.stages.finished_run import MARKER, FinishedRun, model_of, prompt_form
from rlhf_cli.stages.session import quiet_libraries, replace_folder, say, warnings_of
from rlhf_cli.store import check_folder, make_folder, read_json, write_json, write_text

SHARD = "5GB"  # the Hub's advice
CARD = "README.md"
SHOWN = {"align": ["pm/tv", *results.SHOWN, "length/mean"], "train-rm": trust.SHOWN, "train-sft": ["sft/loss"]}


@dataclass(frozen=True)
class Wanted:
    """What is exported of a run.

    Args:
        checkpoint: last or best.
        dtype: float32, bfloat16, or as_is: as the run holds its weights.
        adapter: the adapter alone, to be put on the model of this name; None: whole weights.
    """

    checkpoint: str = "last"
    dtype: str = "as_is"
    adapter: str | None = None


def run(
    finished: FinishedRun, out: Path | None, wanted: Wanted, *, push: str | None = None, private: bool = False
) -> Path:
    """Export a run and return the folder: RUN/export, or `out`. With `push`, upload it too.

    Raises:
        ConfigError: `push` is no repository's name, or `private` stands alone.
        RunError: the run has no such model, the folder is in use, or pushing failed.
    """
    quiet_libraries()
    push_to_hub.check(push, private)
    source = model_of(finished, wanted.checkpoint)
    _check_adapter(source, wanted)
    folder = out or finished.folder / "export"
    made_from = {"run": finished.manifest.get("run_id"), **vars(wanted)}
    own_card = _check_place(folder, made_from)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial, "OUT")
    try:
        _write(finished, source, wanted, partial, push or folder.name, own_card, made_from)
        replace_folder(partial, folder)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise RunError(f"{folder} cannot be written", why, "make room, or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if own_card is not None:
        say(f"kept: your {CARD}")
    say(f"export: {folder}")
    if push is not None:
        say(f"pushed: {push_to_hub.upload(folder, push, private)}")
    return folder


def _write(
    finished: FinishedRun,
    source: Path,
    wanted: Wanted,
    folder: Path,
    place: str,
    own_card: str | None,
    made_from: dict[str, Any],
) -> None:
    """Write everything of an export into `folder`.

    Raises:
        RunError: the model cannot be opened.
        OSError, SafetensorError: a file cannot be written.
    """
    tokenizer = load_tokenizer(source, training=False)
    dtype = _write_model(finished, source, tokenizer, folder, wanted)
    facts = _facts(finished, tokenizer, folder, wanted, place)
    card = model_card(replace(facts, dtype=dtype))
    write_text(folder / CARD, own_card or card)
    # Of the card as it was made: an edited one stays known as edited.
    made = {**made_from, "prompts": facts.form, "card": sha256(card.encode()).hexdigest()}
    write_json(folder / MARKER, made)
    for path in folder.iterdir():  # safetensors makes files for their owner alone
        path.chmod((folder / MARKER).stat().st_mode)


def _check_adapter(source: Path, wanted: Wanted) -> None:
    """Refuse an adapter alone where there is none, or where its base has no name, and a merge without a base.

    Raises:
        RunError: saying which.
    """
    if wanted.adapter is None:
        if is_adapter(source):
            adapter_base(source)
        return
    if not is_adapter(source):
        what = f"{source} holds whole weights, not an adapter"
        raise RunError(what, "the run trained all weights, or merged its adapter", "leave out --adapter")
    if not hub.is_id(wanted.adapter) and not (Path(wanted.adapter) / "config.json").is_file():
        what = f"--adapter {wanted.adapter} names no model"
        raise RunError(what, "", "give the Hub id or the folder of the model that the adapter goes on")
    trained_on = Path(str(adapter_settings(source).get("base_model_name_or_path")))
    if Path(wanted.adapter).is_dir() and trained_on.is_dir() and not same_weights(Path(wanted.adapter), trained_on):
        what = f"the weights in --adapter {wanted.adapter} are not those that the adapter was trained on"
        raise RunError(what, f"it was trained on {trained_on}", "give that folder, a copy of it, or its Hub id")


def _check_place(folder: Path, made_from: dict[str, Any]) -> str | None:
    """Return the user's own card of an earlier export of the same model, None where there is none.

    Raises:
        RunError: the folder cannot be written, holds something else, or holds another export with an edited card.
    """
    check_folder(folder, "OUT")
    if folder.resolve() == Path.cwd():
        raise RunError(f"OUT={folder} is the folder you are in", "it would be replaced", "choose another")
    if not folder.exists() or not any(folder.iterdir()):
        return None
    before = read_json(folder / MARKER)
    if before is None or "card" not in before:
        raise RunError(f"{folder} is in use", "it holds files and is no export", "choose a new or an empty folder")
    try:
        card = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    if sha256(card.encode()).hexdigest() == before["card"]:
        return None
    if {key: before.get(key) for key in made_from} != made_from:
        what = f"{folder / CARD} was edited, and belongs to another model than the one to be exported"
        raise RunError(what, "", "choose another folder, or delete it")
    return card


def _write_model(finished: FinishedRun, source: Path, tokenizer: Any, folder: Path, wanted: Wanted) -> str:
    """Write weights, tokenizer and what else the model needs; return the dtype of the weights."""
    if wanted.adapter is not None:
        dtype = _copy_adapter(source, folder, wanted.adapter)
    else:
        model = whole_model(source, wanted.dtype, reward=finished.command == "train-rm")
        _set_generation(model, tokenizer, finished)
        model.save_pretrained(folder, max_shard_size=SHARD)
        dtype = str(model.dtype).removeprefix("torch.")
    save_tokenizer(tokenizer, folder)
    for name in (CENTRE_FILE, CALIBRATION_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return dtype


def whole_model(source: Path, dtype: str, *, reward: bool) -> Any:
    """Return the model in `source`, on the CPU, adapters merged in float32 before anything is rounded.

    Args:
        source: model or adapter folder.
        dtype: float32, bfloat16, or as_is: as the weights in `source`, or those of its base, are stored.
        reward: whether it is a reward model.

    Raises:
        RunError: it cannot be opened.
    """
    place = adapter_base(source) if is_adapter(source) else source
    try:
        stored = AutoConfig.from_pretrained(place).dtype or torch.float32
    except REFUSALS as error:
        raise RunError(f"no model could be opened in {place}", reason(error)) from error
    target = stored if dtype == "as_is" else getattr(torch, dtype)
    if is_adapter(source):
        exact = Loading(dtype=torch.float32)
        base = new_reward_model(place, init_std=1.0, how=exact) if reward else load_policy(place, how=exact)
        model = merged(open_adapter(base, source))  # of a reward model, the head comes with the adapter
    else:
        model = (load_reward_model if reward else load_policy)(source, how=Loading(dtype=target))
    model = model.to(target)
    model.config.use_cache = True  # training switched it off
    return model


def _set_generation(model: Any, tokenizer: Any, finished: FinishedRun) -> None:
    """Make `generate` sample from the policy itself, as it was trained and measured."""
    if finished.command == "train-rm":
        return
    before = model.generation_config.eos_token_id
    ends = dict.fromkeys([*(before if isinstance(before, list) else [before]), tokenizer.eos_token_id])
    known = [token for token in ends if token is not None]
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=finished.config.get("generation", {}).get("temperature", 1.0),
        top_k=0,
        top_p=1.0,
        max_new_tokens=finished.config["dataset"]["max_completion_tokens"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=known[0] if len(known) == 1 else known,
        pad_token_id=tokenizer.pad_token_id,
    )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save the tokenizer so that calling it on a prompt gives the ids that the model was trained on."""
    for key in ("is_local", "local_files_only"):  # of this machine
        tokenizer.init_kwargs.pop(key, None)
    own = getattr(tokenizer, "backend_tokenizer", None)
    if own is not None and not tokenizer.chat_template and tokenizer("a")["input_ids"] != encode_prompt(tokenizer, "a"):
        bos = tokenizer.bos_token
        own.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    tokenizer.save_pretrained(folder)


def _copy_adapter(source: Path, folder: Path, base: str) -> str:
    """Copy the adapter alone, its base under the name that others know it by; return the dtype of its weights."""
    settings = {**adapter_settings(source), "base_model_name_or_path": base}
    (folder / ADAPTER_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for path in source.glob("adapter_model*"):
        shutil.copyfile(path, folder / path.name)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return str(file.get_tensor(next(iter(file.keys()))).dtype).removeprefix("torch.")


def _facts(finished: FinishedRun, tokenizer: Any, folder: Path, wanted: Wanted, place: str) -> Facts:
    """Return what the card tells of the export in `folder`, but for the dtype."""
    last = wanted.checkpoint == "last" and finished.command == "align"
    return Facts(
        name=place.rpartition("/")[2] if place != "export" else finished.folder.resolve().name,
        place=place,
        command=finished.command,
        config=finished.config,
        metrics=finished.metrics,
        shown=list(dict.fromkeys(SHOWN[finished.command])),
        checkpoint=wanted.checkpoint,
        overrides=finished.overrides,
        config_dir=finished.config_dir,
        versions=finished.manifest.get("versions") or {},
        device=str(finished.manifest.get("device") or "cpu"),
        form=prompt_form(finished.config, tokenizer, finished.folder),
        warnings=warnings_of(finished.metrics) if last else (),
        centre=load_centre(folder) if (folder / CENTRE_FILE).is_file() else None,
        calibrated=(folder / CALIBRATION_FILE).is_file(),
        data_hash=(finished.manifest.get("identity") or {}).get("data"),
        base=wanted.adapter,
        local=_local_names(finished),
    )


def _local_names(finished: FinishedRun) -> frozenset[str]:
    """Return what its config names that is a file or folder here, though its name looks like one of the Hub."""
    model, dataset = finished.config["model"], finished.config["dataset"]
    parts = [source.get("path") for source in dataset.get("sources") or [dataset]]
    named = {name for name in [model["path"], model.get("reward_path"), *parts] if name and on_hub(name)}
    # The export may be made from another folder than the run was.
    roots = [Path(), *finished.folder.resolve().parents]
    found = {name for name in named if any((root / name).exists() for root in roots)}
    digest = (finished.manifest.get("identity") or {}).get("data") or ""
    local_data = {dataset["path"]} if dataset.get("path") in named and digest and "@" not in digest else set()
    return frozenset(found | local_data)
