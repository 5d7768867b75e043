"""What is checked of one stage of one model family: finite numbers, what moved, padding, re-opening, sampling.

Jobs go through `rlhf_cli.jobs.run_one`, as the command line's do, with the smallest settings; what was trained is kept
as it was in memory, so that the saved model is held against it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from miniatures import FAMILIES, miniature_pairs, save_miniature
from model_readings import RESPONSES, agrees, gap, greedy, padding_gap, policy_reader, probe, probe_batch, reward_reader
from model_weights import Outcome, adapters_moved, everything_moved, linear_layers_moved, weights_held
from torch import Tensor

from rlhf_cli import jobs
from rlhf_cli.data.encode import decode_response
from rlhf_cli.metrics.glossary import known
from rlhf_cli.models.adapters import plain
from rlhf_cli.models.policy import load_policy, load_tokenizer
from rlhf_cli.models.reward import load_reward_model
from rlhf_cli.trainers.common import reading

PADDING, REOPENED, MERGED = 1e-4, 1e-6, 1e-4  # the largest difference allowed, nats; merging adds in another order
START_KL = 1e-4  # of a policy that has not been trained from its reference, nats a sequence
BASES = {"full": 4.05, "lora": 3.05, "shared": 1.05}  # copies of the base with a critic: four roles; with heads
MODES = {"full": [], "lora": ["peft=lora"], "shared": ["peft=lora", "model.share_base=true"]}
FIRST = {"full": "full", "lora": "lora", "shared": "lora"}  # whose SFT policy and reward model a mode has
SMALL = ["tracker=none", "device=cpu", "model=pretrained", "dataset=preferences", "model.init_std=0.3"]
SMALL += ["dataset.max_prompt_tokens=192", "dataset.max_completion_tokens=16", "dataset.pool_samples=1"]
SMALL += ["dataset.eval_prompts=4", "dataset.eval_samples=2"]
for _stage, _steps in (("sft", 12), ("rm", 3), ("online", 2), ("pairwise", 2)):
    SMALL += [f"trainer.{_stage}.max_steps={_steps}", f"trainer.{_stage}.epochs=null"]
    SMALL += [f"trainer.{_stage}.batch_size=8", f"trainer.{_stage}.learning_rate={1e-2 if _stage == 'sft' else 1e-3}"]
    SMALL += [f"trainer.{_stage}.log_every_steps=1", f"trainer.{_stage}.lr_scheduler=constant"]
    SMALL += [f"trainer.{_stage}.warmup_fraction=0"]
SMALL += ["trainer.online.critic_learning_rate=1e-3"]
SMALL += [f"trainer.{_stage}.eval_every_steps=2" for _stage in ("online", "pairwise")]
CENTRED = ["reward.centering=0.1"]  # else a bias below the head has no gradient: margins do not see it
STAGES: dict[str, list[str]] = {
    "SFT": ["train-sft"],
    "RM": ["train-rm"],
    "PM gae": ["align", "algo=pm"],
    "PM rloo": ["align", "algo=pm", "algo.advantage=rloo", "generation=generate"],
    "DPO": ["align", "algo=dpo"],
    "RPO": ["align", "algo=rpo"],
    "evaluate": ["evaluate"],
}


class Family:
    """A miniature of one family in a folder of its own, with data and a store."""

    def __init__(self, name: str, folder: Path, *, rows: int = 96) -> None:
        self.name, self.folder = name, folder
        self.base = save_miniature(name, folder / "base")
        self.pairs = miniature_pairs(folder / "pairs.jsonl", rows)
        self.start = FAMILIES[name]

    def run(self, mode: str, stage: str, *more: str) -> Outcome:
        """Return the outcome of one stage, trained and checked."""
        command, *overrides = STAGES[stage]
        if stage != "SFT":
            overrides += CENTRED
        folder = self.place(mode, stage)
        if stage == "evaluate":
            overrides = [*overrides, f"policy='{self.place(mode, 'PM gae')}'"]
        places = [f"model.path='{self.base}'", f"dataset.path='{self.pairs}'", f"run_dir='{folder}'"]
        places += [f"store_dir='{self.folder / 'store'}'"]
        started = time.perf_counter()
        with trainers_kept() as trainers:
            jobs.run_one(command, [*SMALL, *MODES[mode], *places, *overrides, *more], None)
        found = Outcome(folder, trainers, time.perf_counter() - started)
        check_numbers(found)
        if stage == "RM":
            check_reward_model(found, self, mode)
        elif stage == "evaluate":
            check_evaluation(found, self.place(mode, "PM gae"))
        else:
            check_policy(found, self, mode, stage)
        return found

    def place(self, mode: str, stage: str) -> Path:
        """Return the run folder of a stage."""
        return self.folder / mode / stage.replace(" ", "_")

    def origin(self, mode: str, stage: str) -> dict[str, Tensor]:
        """Return the weights that a stage began with."""
        before = self.base if stage == "SFT" else self.place(FIRST[mode], "SFT") / "model"
        return dict(load_policy(before).state_dict())


@contextmanager
def trainers_kept() -> Iterator[list[Any]]:
    """Give a list that gains every trainer that trains within it; `said` is what its model answers in the end."""
    kept: list[Any] = []
    train = transformers.Trainer.train

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = train(self, *args, **kwargs)
        kept.append(self)
        read = reward_reader if hasattr(plain(self.model), "score") else policy_reader
        with reading(self.model):  # before an adapter is merged
            self.said = read(self.model)(probe_batch(self.processing_class))
        return result

    transformers.Trainer.train = noted  # type: ignore[method-assign]
    try:
        yield kept
    finally:
        transformers.Trainer.train = train  # type: ignore[method-assign]


# -- checks ------------------------------------------------------------------------------------------------------------


def check_numbers(found: Outcome) -> None:
    """Every metric and every line of the curves is known and finite; training starts at the reference."""
    lines = [json.loads((found.folder / "metrics.json").read_text(encoding="utf-8"))]
    log = found.folder / "training_log.jsonl"
    curves = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    for line in [*lines, *curves]:
        unknown = [key for key in line if not known(key)]
        broken = [key for key, value in line.items() if value is None or not math.isfinite(value)]
        found.require(not unknown, f"unknown metrics {unknown}")
        found.require(not broken, f"not finite: {broken}")
    kept = [line for line in curves if "kl/sequence" in line]
    if kept:
        found.bound("KL at the start", abs(kept[0]["kl/sequence"]), START_KL)


def check_policy(found: Outcome, family: Family, mode: str, stage: str) -> None:
    """Its weights moved as they should, and the saved one answers as the one in memory did."""
    saved, tokenizer = load_policy(found.folder / "model"), load_tokenizer(found.folder / "model")
    prompts, responses = probe(tokenizer)
    before = family.origin(mode, stage)
    live = found.trainers[-1]
    if mode == "full":
        everything_moved(found, before, dict(saved.state_dict()))
    elif stage == "SFT":
        linear_layers_moved(found, before, saved)
    else:
        adapters_moved(found, before, live.model)
    read = policy_reader(saved)
    found.bound("padding", padding_gap(read, prompts, responses, tokenizer.pad_token_id), PADDING)
    limit = MERGED if mode != "full" and stage == "SFT" else REOPENED
    found.bound("re-opened", gap(live.said, read(probe_batch(tokenizer))), limit)
    if stage != "SFT":
        sft = load_policy(family.place(FIRST[mode], "SFT") / "model")
        said = policy_reader(live.reference)(probe_batch(tokenizer))  # after training: with adapters it is a view
        found.bound("reference", gap(said, policy_reader(sft)(probe_batch(tokenizer))), REOPENED)
    tokens_fit(found, tokenizer, prompts, responses)
    found.require(greedy(saved, tokenizer, prompts), "sampling disagrees with reading")
    if stage.startswith("PM"):
        check_online(found, family, mode, stage, tokenizer, prompts)


def check_online(
    found: Outcome, family: Family, mode: str, stage: str, tokenizer: Any, prompts: list[list[int]]
) -> None:
    """The critic moved away from the reward model, which did not; transformers' own sampling agrees with reading."""
    trainer = found.trainers[-1]
    if stage == "PM rloo":
        trainer.generation_config.do_sample = False
        drawn = trainer._generate_single_turn(prompts, None, {})
        drawn = drawn[0] if isinstance(drawn, tuple) else drawn
        found.require(agrees(trainer.model, prompts, drawn, tokenizer), "transformers' sampling disagrees with reading")
    if stage != "PM gae":
        return
    origin = family.place(FIRST[mode], "RM") / "model"
    reward, batch = load_reward_model(origin), probe_batch(tokenizer)
    scores = reward_reader(reward)(batch)
    held = trainer.parts.reward.model
    found.bound("reward model", gap(reward_reader(held)(batch), scores), REOPENED)
    critic = trainer.critic.model
    found.require(gap(reward_reader(critic)(batch), scores) > 1e-5, "the critic was not trained")
    head = plain(critic).score
    head = getattr(head, "modules_to_save", {"default": head})["default"]
    found.require(head.weight.requires_grad, "the critic's head is frozen")
    base = sum(weight.numel() for weight in family.origin(mode, stage).values())
    roles = (trainer.model, trainer.reference, held, trainer.critic)
    found.bound("bases in memory", weights_held(roles) / base, BASES[mode])


def check_reward_model(found: Outcome, family: Family, mode: str) -> None:
    """Its weights and head moved as they should, and the saved one scores as the one in memory did."""
    saved, tokenizer = load_reward_model(found.folder / "model"), load_tokenizer(found.folder / "model")
    prompts, responses = probe(tokenizer)
    before = family.origin(mode, "RM")
    live = found.trainers[-1]
    if mode == "full":
        body = {key: weight for key, weight in saved.state_dict().items() if not key.startswith("score.")}
        everything_moved(found, {key: before[key] for key in body}, body)
    else:
        adapters_moved(found, before, live.model)
    read = reward_reader(saved)
    found.bound("padding", padding_gap(read, prompts, responses, tokenizer.pad_token_id), PADDING)
    found.bound("re-opened", gap(live.said, read(probe_batch(tokenizer))), REOPENED)


def check_evaluation(found: Outcome, aligned: Path) -> None:
    """A run evaluated again gives its own final metrics."""
    before, now = (
        json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in (aligned, found.folder)
    )
    expected = {key: value for key, value in before.items() if not key.startswith("best/")}
    found.require(now.keys() == expected.keys(), f"other metrics: {sorted(now.keys() ^ expected.keys())}")
    differences = [abs(now[key] - expected[key]) for key in now.keys() & expected.keys()]
    found.bound("re-opened", max(differences), 1e-3)


def tokens_fit(found: Outcome, tokenizer: Any, prompts: list[list[int]], responses: list[list[int]]) -> None:
    """Padding is no end, a response ends with the end and comes back as text, and a prompt begins once."""
    found.require(tokenizer.pad_token_id not in (None, tokenizer.eos_token_id), "padding is end-of-sequence")
    found.require(all(ids[-1] == tokenizer.eos_token_id for ids in responses), "a response does not end")
    texts = [decode_response(tokenizer, ids) for ids in responses]
    found.require(texts == list(RESPONSES), f"responses come back as {texts}")
    bos = tokenizer.bos_token_id
    twice = bos is not None and any(ids[:2] == [bos, bos] for ids in prompts)
    found.require(not twice, "a prompt begins with BOS twice")
    padded = [
        tokenizer.pad_token_id in [*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)
    ]
    found.require(not any(padded), "the padding token stands in a text")
