"""Who answers prompts: a policy, its reference and the reward model of its run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from rlhf_cli.config.schema import AlignConfig, ModelConfig
from rlhf_cli.data.dialogue import HUMAN
from rlhf_cli.data.encode import decode_response, encode_prompt
from rlhf_cli.data.rows import PreferenceData
from rlhf_cli.errors import DataError, RunError
from rlhf_cli.measure.sampled import draw
from rlhf_cli.measure.samples import Sampling
from rlhf_cli.models.batches import in_batches
from rlhf_cli.models.loading import loading
from rlhf_cli.models.policy import freeze, load_policy, load_tokenizer
from rlhf_cli.models.reward import CENTRE_FILE, Reward
from rlhf_cli.report.card import Form
from rlhf_cli.stages.finished_run import on_dialogues, prompt_form, read_config
from rlhf_cli.stages.prompts import Asked, Prompt, as_text
from rlhf_cli.stages.reward_reading import mean_reward, model_reward
from rlhf_cli.stages.roles import REFERENCE, REWARD, STAGES_FILE, policy_in
from rlhf_cli.store import read_json
from rlhf_cli.trainers.common import resolve_device

BATCH = {"cpu": 16, "cuda": 64}  # answers at a time
MAX_NEW_TOKENS = 256  # of a model that no run tells of
MOST_LIKELY = 1e-9  # a nucleus of one token

Line = dict[str, Any]
Read = tuple[str, list[int]]  # a prompt as the policy reads it, text and token ids


@dataclass(frozen=True)
class Speakers:
    """A policy, its reference and what is needed to ask them.

    Args:
        policy: frozen.
        reference: the same, or None.
        reward: scores answers, or None.
        tokenizer: of policy and reference.
        form: how prompts are written.
        how: how answers are sampled.
        positions: tokens of a prompt and its answer at most, or None.
    """

    policy: Any
    reference: Any | None
    reward: Reward | None
    tokenizer: Any
    form: Form
    how: Sampling
    positions: int | None

    @property
    def batch(self) -> int:
        """How many answers are drawn at a time."""
        return BATCH[self.how.device]

    def encoded(self, prompt: Prompt) -> Read:
        """Return a prompt as the policy reads it, text and token ids.

        Raises:
            DataError: it is no conversation, or too long.
        """
        text = as_text(prompt, self.form)
        ids = encode_prompt(self.tokenizer, text)
        room = None if self.positions is None else self.positions - self.how.max_new_tokens
        if room is not None and len(ids) > room:
            raise DataError(
                f"a prompt has {len(ids)} tokens: {_start(text)}",
                f"the model reads {self.positions}, {self.how.max_new_tokens} of them for the answer",
                "shorten it" + (", or lower --max-new-tokens" if len(ids) < cast(int, self.positions) else ""),
            )
        unknown = 0 if self.tokenizer.unk_token_id in self._special else ids.count(self.tokenizer.unk_token_id)
        if unknown:
            note(f"the tokenizer does not know {unknown} of the words of: {_start(text)}")
        return text, ids

    @property
    def _special(self) -> set[int | None]:
        """The tokens that a prompt may well have; OPT's unknown token is one of them."""
        return {self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, None}

    def answers(self, prompts: Sequence[Read], samples: int, seed: int, first: int = 0) -> list[Line]:
        """Return one line an answer, those of one prompt next to each other; keys as in completions.jsonl.

        Args:
            prompts: as `encoded` returns them.
            samples: answers a prompt.
            seed: with the number of an answer it decides what is drawn for it.
            first: number of the first prompt among all.
        """
        asked = [ids for _, ids in prompts for _ in range(samples)]
        ours = self._drawn(self.policy, asked, seed, first * samples)
        lines: list[Line] = [
            {"prompt": prompts[number // samples][0], "sample": number % samples, "samples": samples, **self._line(ids)}
            for number, ids in enumerate(ours)
        ]
        self._add(lines, "reward", asked, ours)
        if self.reference is not None:
            theirs = self._drawn(self.reference, asked, seed, first * samples)
            for line, ids in zip(lines, theirs, strict=True):
                said = self._line(ids)
                line |= {"reference": said["completion"], "reference_ended": said["ended"]}
            self._add(lines, "reference_reward", asked, theirs)
        return lines

    def _line(self, ids: list[int]) -> Line:
        text, ended = decode_response(self.tokenizer, ids), ids[-1] in self.how.eos_ids
        return {"completion": text, "tokens": len(ids), "ended": ended}

    def _drawn(self, model: Any, asked: list[list[int]], seed: int, first: int) -> list[list[int]]:
        def compute(part: list[int]) -> list[list[int]]:
            return draw(model, [asked[index] for index in part], self.how, seed, [first + index for index in part])

        return in_batches(range(len(asked)), compute, self.batch)

    def _add(self, lines: list[Line], key: str, asked: list[list[int]], answers: list[list[int]]) -> None:
        if self.reward is None:
            return
        reward = self.reward

        def compute(part: list[int]) -> list[float]:
            scores = reward([asked[index] for index in part], [answers[index] for index in part])
            return [float(score) for score in scores.float().cpu()]

        for line, score in zip(lines, in_batches(range(len(asked)), compute, self.batch), strict=True):
            line[key] = score


def gather(given: str, asked: Asked) -> Speakers:
    """Return who answers: the policy that `given` names, and where wanted its reference and reward model.

    Raises:
        RunError: a model cannot be opened, or a reward is wanted and there is none.
    """
    device = resolve_device(asked.device)
    path = policy_in("RUN", given, asked.checkpoint)
    config = read_config(Path(given)) or {}
    stages = {name: Path(str(place)) for name, place in (read_json(Path(given) / STAGES_FILE) or {}).items()}
    settings = config.get("model", {})
    how = loading(ModelConfig(dtype=settings.get("dtype", "auto"), attention=settings.get("attention", "auto")), device)
    tokenizer = load_tokenizer(path, training=False)
    reference = _reference(stages, config) if asked.reference else None
    rewards = _reward_folders(stages, config, given) if asked.reward else []
    note(f"policy: {path}")
    if reference is not None:
        note(f"reference: {reference}")
    policy = freeze(load_policy(path, how=how))
    most_likely = asked.temperature == 0
    longest, trained_at = _defaults(policy, config)
    sampling = Sampling(
        max_new_tokens=asked.max_new_tokens or longest,
        temperature=trained_at if asked.temperature is None or most_likely else asked.temperature,
        tree=None,
        eos_ids=_ends(policy, tokenizer),
        pad_id=tokenizer.pad_token_id,
        device=device,
        micro_batch=BATCH[device],
        top_p=MOST_LIKELY if most_likely else asked.top_p,
    )
    if config.get("dataset", {}).get("closed_vocabulary"):
        note("it was trained with a closed vocabulary; here it may say anything")
    return Speakers(
        policy=policy,
        reference=freeze(load_policy(reference, how=how)) if reference is not None else None,
        reward=_reward(rewards, config, tokenizer, device, Path(given)) if rewards else None,
        tokenizer=tokenizer,
        form=prompt_form(config, tokenizer, Path(given) if config else path),
        how=sampling,
        positions=getattr(policy.config, "max_position_embeddings", None),
    )


def _reference(stages: dict[str, Path], config: dict[str, Any]) -> Path | None:
    """Return the recorded reference; where there is none, say so."""
    folder = stages.get(REFERENCE)
    if folder is None:
        note("no reference: " + ("the run started from none" if config else "no run tells of one"))
        return None
    if not (folder / "model").is_dir():
        note(f"no reference: it is no longer in {folder}")
        return None
    return folder / "model"


def _reward_folders(stages: dict[str, Path], config: dict[str, Any], given: str) -> list[Path]:
    """Return the models whose mean is the run's reward.

    Raises:
        RunError: the run has none, or they are no longer there.
    """
    members = [folder for name, folder in stages.items() if name.startswith(f"{REWARD} ")]
    folders = [folder / "model" for folder in members or ([stages[REWARD]] if REWARD in stages else [])]
    if not folders:
        gold = config.get("reward", {}).get("name") == "gold"
        why = "its reward is the survey world's own" if gold else "it was not aligned to one"
        raise RunError(f"--reward: {given} has no reward model", why, "leave out --reward")
    for folder in folders:
        if not (folder / CENTRE_FILE).is_file():
            raise RunError(f"--reward: the reward model of {given} is not in {folder}", "", "leave out --reward")
    return folders


def _reward(folders: list[Path], config: dict[str, Any], tokenizer: Any, device: str, run: Path) -> Reward:
    """Return the reward as the run read it, centred; each folder brings its centre, so no rows are needed."""
    reading = SimpleNamespace(
        reward=SimpleNamespace(calibration=config["reward"].get("calibration", "none")),
        model=ModelConfig(dtype=config["model"]["dtype"], attention=config["model"]["attention"]),
    )
    prompts = [HUMAN] if on_dialogues(config, run) else []  # how the reward model is to read prompts
    rows = PreferenceData(demonstrations=[], reward_pairs=[], policy_pairs=[], prompts=prompts, heldout_pairs=[])
    cfg = cast(AlignConfig, reading)
    return mean_reward([model_reward(cfg, rows, tokenizer, folder, device) for folder in folders])


def _defaults(policy: Any, config: dict[str, Any]) -> tuple[int, float]:
    """Return the longest answer in tokens and the temperature: as in training, else as the model's folder says."""
    if config:
        return config["dataset"]["max_completion_tokens"], config.get("generation", {}).get("temperature", 1.0)
    own, positions = policy.generation_config, getattr(policy.config, "max_position_embeddings", None)
    longest = own.max_new_tokens or MAX_NEW_TOKENS
    return min(longest, positions // 2) if positions else longest, own.temperature or 1.0


def _ends(policy: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, and those that the model itself names."""
    named = getattr(policy.generation_config, "eos_token_id", None)
    return list(dict.fromkeys([tokenizer.eos_token_id, *(named if isinstance(named, list) else [])]))


def _start(text: str) -> str:
    """Return the beginning of a text, on one line."""
    line = " ".join(text.split())
    return repr(line if len(line) <= 40 else f"{line[:38]} …")


def note(line: str) -> None:
    """Print a line for the user that is no answer."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
