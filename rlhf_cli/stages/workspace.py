"""What aligning and evaluating share: data, tokenizer, reference, reward, and the measures of a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_cli import algos
from rlhf_cli.algos.base import Algorithm
from rlhf_cli.config.schema import AlignConfig, CommandConfig, DatasetConfig, SurveyConfig, TextConfig
from rlhf_cli.data import load
from rlhf_cli.data.encode import decode_response, encode_pairs, encode_prompt, encode_response, fit_to_context
from rlhf_cli.data.rows import PreferenceData
from rlhf_cli.measure.exact import Enumeration, ExactMeasure, enumerate_answers
from rlhf_cli.measure.offset import offset_bound
from rlhf_cli.measure.sampled import PairMeasure, SampledMeasure, Sampling
from rlhf_cli.models.policy import freeze, load_policy, load_tokenizer
from rlhf_cli.models.prefix_tree import PrefixTree
from rlhf_cli.models.reward import EnsembleReward, GoldReward, ModelReward, Reward
from rlhf_cli.trainers.common import resolve_device

SURVEY_SAMPLES = 16  # responses per wording for the sampled metrics of an enumerable world
TEXT_PAIRS = 256  # held-out pairs on which pm/pair_tv is measured


@dataclass
class Workspace:
    """Everything an alignment run needs besides the policy.

    Args:
        data: rows that fit the context.
        tokenizer: of policy, reference and reward model.
        reference: the frozen SFT policy.
        reward: centred rewards of token ids.
        exact: None on free text.
    """

    cfg: AlignConfig
    algorithm: Algorithm
    device: str
    data: PreferenceData
    tokenizer: Any
    tree: PrefixTree | None
    reference: Any
    reward: Reward
    exact: ExactMeasure | None
    sampled: SampledMeasure
    pairs: PairMeasure

    def metrics_while_training(self, policy: Any) -> dict[str, float]:
        """Return the metrics that are cheap enough to follow as a curve."""
        if self.exact is not None:
            return self.exact.metrics(policy)
        return {**self.sampled.measure(policy)[0], **self.pairs.metrics(policy)}

    def final_metrics(self, policy: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Return every metric of `policy`, and its sampled completions as rows."""
        sampled, responses, rewards = self.sampled.measure(policy)
        found = {**sampled, **self.pairs.metrics(policy)}
        if self.exact is not None:  # exact numbers win over sampled ones of the same name
            replaced = [key for key in found if key.split("/")[1:2] == ["divergence"]]
            found = {key: value for key, value in found.items() if key not in replaced}
            found |= {**self.exact.metrics(policy), **self.exact.reference_metrics()}
            if self.algorithm.family == "online" and self.algorithm.has_optimum and self.tree is None:
                found |= offset_bound(self.exact, self.sampled)
        return found, self._completions(responses, rewards.tolist())

    def _completions(self, responses: list[list[int]], rewards: list[float]) -> list[dict[str, Any]]:
        eos = set(self.sampled.sampling.eos_ids)
        return [
            {
                "prompt": self.tokenizer.decode(prompt, skip_special_tokens=True),
                "completion": decode_response(self.tokenizer, response),
                "reward": reward,
                "tokens": len(response),
                "ended": response[-1] in eos,
            }
            for prompt, response, reward in zip(self.sampled.prompts, responses, rewards, strict=True)
        ]


def prepare(cfg: AlignConfig, sft: Path, rm: Path | None, members: Sequence[Path] = ()) -> Workspace:
    """Return the workspace of `cfg` with the SFT policy in `sft` and the reward model in `rm` (None: gold).

    `members`, if there are any, are the reward models whose predictions are averaged instead.
    """
    device = resolve_device(cfg.device)
    tokenizer = load_tokenizer(sft / "model")
    data = fit_to_context(load(cfg.dataset), tokenizer, cfg.dataset)
    algorithm = algos.get(cfg.algo.name)
    if not _has_optimum(cfg, algorithm):
        algorithm = replace(algorithm, has_optimum=False)
    reference = freeze(load_policy(sft / "model", device))
    reward = _reward(cfg, data, tokenizer, members or ([rm] if rm else []), device)
    enumeration = _enumeration(data, tokenizer, device)
    tree = answer_tree(cfg.dataset, data, tokenizer, reference.config.vocab_size, device)
    eos_ids = [tokenizer.eos_token_id]
    temperature = cfg.generation.temperature
    how = Sampling(cfg.dataset.max_completion_tokens, temperature, tree, eos_ids, tokenizer.pad_token_id, device)
    prompts, samples = measured_prompts(cfg, data)
    shared: dict[str, Any] = {"reward_clip": cfg.reward.clip, "algorithm": algorithm, "algo": cfg.algo}
    heldout: list[Any] = encode_pairs(data.heldout_pairs[:TEXT_PAIRS], tokenizer, cfg.dataset)
    return Workspace(
        cfg=cfg,
        algorithm=algorithm,
        device=device,
        data=data,
        tokenizer=tokenizer,
        tree=tree,
        reference=reference,
        reward=reward,
        exact=ExactMeasure(enumeration, reference, reward, temperature=temperature, tree=tree, **shared)
        if enumeration
        else None,
        sampled=SampledMeasure(
            [encode_prompt(tokenizer, prompt) for prompt in prompts],
            samples,
            reference,
            reward,
            sampling=how,
            seed=cfg.seed,
            **shared,
        ),  # fmt: skip
        pairs=PairMeasure(heldout, reference, reward, reward_clip=cfg.reward.clip, sampling=how),
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
    if isinstance(cfg.dataset, TextConfig):
        unique = list(dict.fromkeys(pair.prompt for pair in data.heldout_pairs))
        return unique[: cfg.dataset.eval_prompts], cfg.dataset.eval_samples
    return data.prompts, SURVEY_SAMPLES


def _enumeration(data: PreferenceData, tokenizer: Any, device: str) -> Enumeration | None:
    if not data.questions:
        return None
    prompts = [encode_prompt(tokenizer, question.prompt) for question in data.questions]
    answers = [[encode_response(tokenizer, answer) for answer in question.answers] for question in data.questions]
    return enumerate_answers(data.questions, prompts, answers, tokenizer.pad_token_id, device)


def mean_reward(members: Sequence[Reward]) -> Reward:
    """Return the reward of one model, or the mean of several."""
    return members[0] if len(members) == 1 else EnsembleReward(members)


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


def _reward(cfg: AlignConfig, data: PreferenceData, tokenizer: Any, folders: Sequence[Path], device: str) -> Reward:
    if folders:
        calibration = getattr(cfg.reward, "calibration", "none")
        pad_id = tokenizer.pad_token_id
        return mean_reward([ModelReward(folder / "model", pad_id, device, calibration) for folder in folders])
    gold = data.gold
    assert gold is not None
    table = {
        tuple(encode_prompt(tokenizer, question.prompt)): {
            tuple(encode_response(tokenizer, answer)): gold(question.prompt, answer) for answer in question.answers
        }
        for question in data.questions
    }
    chosen = [gold(pair.prompt, pair.chosen) for pair in data.reward_pairs]
    return GoldReward(table, centre=sum(chosen) / len(chosen), offset_reward=gold("", ""), device=device)
