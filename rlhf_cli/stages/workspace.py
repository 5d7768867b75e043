"""What aligning and evaluating share: data, tokenizer, reference, reward, and the measures of a policy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rlhf_cli import algos
from rlhf_cli.algos.base import Algorithm
from rlhf_cli.config.compose import identity
from rlhf_cli.config.schema import (
    AlignConfig,
    CommandConfig,
    DatasetConfig,
    EvaluateConfig,
    SamplerConfig,
    SplitConfig,
    SurveyConfig,
)
from rlhf_cli.data import load
from rlhf_cli.data.encode import encode_pairs, encode_prompt, encode_response, fit_to_context
from rlhf_cli.data.rows import PreferenceData
from rlhf_cli.errors import RunError
from rlhf_cli.measure.exact import Enumeration, ExactMeasure, enumerate_answers
from rlhf_cli.measure.memo import Memo
from rlhf_cli.measure.pairs import PairMeasure
from rlhf_cli.measure.sampled import SampledMeasure
from rlhf_cli.measure.samples import Sampling
from rlhf_cli.models.folders import fingerprint
from rlhf_cli.models.policy import load_tokenizer
from rlhf_cli.models.prefix_tree import PrefixTree
from rlhf_cli.models.reward import CENTRE_FILE, Reward
from rlhf_cli.stages import provide
from rlhf_cli.stages.role_models import RoleModels, read_models, training_models
from rlhf_cli.stages.roles import Roles
from rlhf_cli.store import Store
from rlhf_cli.trainers.common import resolve_device

SURVEY_SAMPLES = 16  # responses per wording for the sampled metrics of an enumerable world
CURVE_SAMPLES = 4  # of them for the reward's curve: it shows a reward that rises while the people's falls
TEXT_PAIRS = 256  # held-out pairs on which pm/pair_tv is measured


@dataclass
class Workspace:
    """Everything an alignment run needs besides the policy.

    Args:
        roles: where reference and reward models lie.
        data: rows that fit the context.
        tokenizer: of policy and reference.
        models: what is in memory: reference, reward, and the policy where it is to be trained.
        exact: None on free text.
        sampled: what is followed while training.
        questions: number of the question that each of them words, (P,); None on free text.
        prompts, prompt_ids, samples: what a policy is sampled on for its final metrics, and how often.
        how: how it is sampled then.
        reward_id: what tells this reward from another, before clipping.
        memo: what was computed before.
    """

    cfg: AlignConfig
    roles: Roles
    algorithm: Algorithm
    device: str
    data: PreferenceData
    tokenizer: Any
    tree: PrefixTree | None
    models: RoleModels
    exact: ExactMeasure | None
    sampled: SampledMeasure
    pairs: PairMeasure
    prompts: list[str]
    prompt_ids: list[list[int]]
    questions: np.ndarray | None
    samples: int
    how: Sampling
    reward_id: str
    memo: Memo

    @property
    def reference(self) -> Any:
        """Return the frozen policy that others are measured beside."""
        return self.models.reference

    @property
    def reward(self) -> Reward:
        """Return the centred rewards of token ids."""
        return self.models.reward

    def metrics_while_training(self, policy: Any) -> dict[str, float]:
        """Return the metrics that are cheap enough to follow as a curve."""
        if self.exact is not None:
            return {**self.exact.metrics(policy), **self.sampled.mean_reward(policy, CURVE_SAMPLES)}
        return {**self.sampled.measure(policy)[0], **self.pairs.metrics(self.pairs.read(policy))}

    def clipped(self, rewards: Tensor) -> Tensor:
        """Return rewards as training used them, on the CPU."""
        clip = self.cfg.reward.clip
        rewards = rewards.cpu().float()
        return rewards if clip is None else rewards.clamp(-clip, clip)

    def exact_with(self, reward: Reward) -> ExactMeasure:
        """Return the exact measure against another reward, unclipped; only on enumerable answers."""
        assert self.exact is not None
        return ExactMeasure(
            self.exact.enumeration, self.reference, reward, reward_clip=None,
            algorithm=self.algorithm, algo=self.cfg.algo, temperature=self.how.temperature, tree=self.tree,
            gold_offset=self.exact.gold_offset,
        )  # fmt: skip


def prepare(cfg: AlignConfig, roles: Roles, *, training: bool = False) -> Workspace:
    """Return the workspace of `cfg` with the models in `roles`, with a policy to be trained where `training`.

    Raises:
        RunError: prompt and response may be longer than the reference can read, or it does not know their words.
    """
    device = resolve_device(cfg.device)
    tokenizer = load_tokenizer(roles.reference, training=False)
    data = fit_to_context(load(cfg.dataset), tokenizer, cfg.dataset)
    algorithm = algos.get(cfg.algo.name)
    if not _has_optimum(cfg, algorithm):
        algorithm = replace(algorithm, has_optimum=False)
    models = (training_models if training else read_models)(cfg, roles, data, tokenizer)
    reference, reward = models.reference, models.reward
    require_context(reference, cfg.dataset, str(roles.reference))
    tree = answer_tree(cfg.dataset, data, tokenizer, reference.config.vocab_size, device)
    temperature, sampler, length = cfg.generation.temperature, _sampler(cfg), cfg.dataset.max_completion_tokens
    how = Sampling(length, temperature, tree, [tokenizer.eos_token_id], tokenizer.pad_token_id, device)
    prompts, samples = measured_prompts(cfg, data)
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    shared: dict[str, Any] = {"reward_clip": cfg.reward.clip, "algorithm": algorithm, "algo": cfg.algo}
    memo, rewarded = Memo(Store(Path(cfg.store_dir))), reward_id(cfg, roles.rewards, tokenizer)
    known: dict[str, dict[str, Any]] = {
        "reward": {"reward": rewarded},
        "reference": {"policy": fingerprint(roles.reference)},
    }
    number = _numbers(data)
    return Workspace(
        cfg=cfg,
        roles=roles,
        algorithm=algorithm,
        device=device,
        data=data,
        tokenizer=tokenizer,
        tree=tree,
        models=models,
        exact=_exact(data, tokenizer, models, how, shared),
        sampled=SampledMeasure(prompt_ids, samples, reference, reward, sampling=how, seed=cfg.seed, **shared),
        pairs=_pairs(cfg, data, tokenizer, models, sampling=how, memo=memo, identity=known),
        prompts=prompts,
        prompt_ids=prompt_ids,
        questions=np.array([number[prompt] for prompt in prompts]) if number else None,
        samples=samples,
        how=replace(how, sample_temperature=sampler.temperature, top_p=sampler.top_p),
        reward_id=rewarded,
        memo=memo,
    )


def _exact(
    data: PreferenceData, tokenizer: Any, models: RoleModels, how: Sampling, shared: dict[str, Any]
) -> ExactMeasure | None:
    """Return the exact measure, where all answers can be enumerated."""
    enumeration = _enumeration(data, tokenizer, how.device)
    if not enumeration:
        return None
    offset = data.gold("", "") if data.gold else None
    reading: dict[str, Any] = {"temperature": how.temperature, "tree": how.tree, "gold_offset": offset}
    return ExactMeasure(enumeration, models.reference, models.reward, **reading, **shared)


def _pairs(cfg: AlignConfig, data: PreferenceData, tokenizer: Any, models: RoleModels, **reading: Any) -> PairMeasure:
    """Return the measure on held-out pairs."""
    rows, number = data.heldout_pairs[:TEXT_PAIRS], _numbers(data)
    heldout: Any = encode_pairs(rows, tokenizer, cfg.dataset)
    groups = [number[pair.prompt] for pair in rows] if number else None
    return PairMeasure(heldout, models.reference, models.reward, reward_clip=cfg.reward.clip, groups=groups, **reading)


def _numbers(data: PreferenceData) -> dict[str, int]:
    """Return the number of each question by its prompt; none where there are no questions."""
    return {question.prompt: question.index for question in data.questions}


def reward_id(cfg: AlignConfig, folders: Sequence[Path], tokenizer: Any) -> str:
    """Return what tells a reward from another, before clipping: models, reading, centre, the policy's tokens."""
    if not folders:
        return digest({"gold": identity(cfg.dataset)})
    calibration = getattr(cfg.reward, "calibration", "none")
    foreign = any(not (folder / CENTRE_FILE).is_file() for folder in folders)  # centred on the data at hand
    data = provide.dataset_identity(cfg) if foreign else None
    models = [fingerprint(folder) for folder in folders]
    tokens = digest(tokenizer.get_vocab())  # what a model with another tokenizer gets to read
    return digest({"models": models, "calibration": calibration, "data": data, "tokens": tokens})


def digest(value: Any) -> str:
    """Return the sha256 of a value in json, 16 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _sampler(cfg: AlignConfig) -> SamplerConfig:
    return cfg.sampler if isinstance(cfg, EvaluateConfig) else SamplerConfig(temperature=1.0, top_p=1.0)


def require_context(model: Any, dataset: DatasetConfig, name: str) -> None:
    """Refuse a model whose positions end before the longest prompt with the longest response does.

    Raises:
        RunError: they do.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = dataset.max_prompt_tokens + dataset.max_completion_tokens
    if positions is not None and longest > positions:
        raise RunError(
            f"the model in {name} reads {positions} tokens at most",
            f"dataset.max_prompt_tokens + dataset.max_completion_tokens is {longest}",
            "lower them",
        )


def _has_optimum(cfg: AlignConfig, algorithm: Algorithm) -> bool:
    """Return whether the algorithm's closed form is what these settings train towards."""
    if getattr(cfg.algo, "beta_schedule", "fixed") == "adaptive":  # it moves with beta
        return False
    biased = isinstance(cfg.dataset, SurveyConfig) and cfg.dataset.length_bias != 0  # pairs not drawn from gold
    bounded = cfg.algo.constraint.name != "none"
    return algorithm.has_optimum and not (algorithm.family == "pairwise" and (biased or bounded))


def measured_prompts(cfg: CommandConfig, data: PreferenceData) -> tuple[list[str], int]:
    """Return the prompts that a policy is sampled on for its metrics, and how many samples each gets."""
    if isinstance(cfg.dataset, SplitConfig):
        unique: dict[str, None] = {}
        for pair in data.heldout_pairs:  # not to the end: they may lie on disk
            unique[pair.prompt] = None
            if len(unique) == cfg.dataset.eval_prompts:
                break
        return list(unique), cfg.dataset.eval_samples
    return list(data.prompts), SURVEY_SAMPLES


def _enumeration(data: PreferenceData, tokenizer: Any, device: str) -> Enumeration | None:
    """Return the questions with all their answers as token ids; None on free text.

    Raises:
        RunError: the tokenizer was made from other words.
    """
    if not data.questions:
        return None
    prompts = [encode_prompt(tokenizer, question.prompt) for question in data.questions]
    answers = [[encode_response(tokenizer, answer) for answer in question.answers] for question in data.questions]
    for question, prompt, known in zip(data.questions, prompts, answers, strict=True):
        if any(tokenizer.unk_token_id in ids for ids in (prompt, *known)):
            raise RunError(
                f"the policies' tokenizer does not know all words of '{question.prompt}' and its answers",
                "a policy cannot say them",
                "evaluate it on questions of the dataset that it was trained on",
            )
    return enumerate_answers(data.questions, prompts, answers, tokenizer.pad_token_id, device)


def answer_tree(
    dataset: DatasetConfig, data: PreferenceData, tokenizer: Any, vocab_size: int, device: str
) -> PrefixTree | None:
    """Return the tree of valid answers where the vocabulary is closed to them, else None."""
    if not isinstance(dataset, SurveyConfig) or not dataset.closed_vocabulary:
        return None
    sequences = [
        (encode_prompt(tokenizer, question.prompt), encode_response(tokenizer, answer))
        for question in data.questions
        for answer in question.answers
    ]
    return PrefixTree(sequences, vocab_size, tokenizer.pad_token_id).to(device)
