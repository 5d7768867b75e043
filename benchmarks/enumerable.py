"""A small world in which every response can be enumerated: prompts, answers, rewards, policies, and exact expectations.

A prompt is five words, w1 w2 w3 w4 w5. Its eight valid answers copy from it: w1, w2, and either of them followed by w3,
w4 or w5. A response has at most LENGTH tokens, so that all there are can be listed, with their probabilities, valid or
not. An expectation is then a sum over that list, and takes no part of the code whose estimates it judges.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlhf_cli.config.schema import MadeModelConfig
from rlhf_cli.data.tokenizer import SPECIALS, word_tokenizer
from rlhf_cli.models.logps import frozen_token_logps, token_logps
from rlhf_cli.models.policy import make_policy
from rlhf_cli.models.prefix_tree import PrefixTree
from rlhf_cli.models.reward import GoldReward
from rlhf_cli.models.tokens import collate

TOKENIZER = word_tokenizer(["a b c d e"])
VOCABULARY = len(TOKENIZER)
BOS, PAD, EOS = (SPECIALS[name] for name in ("<s>", "<pad>", "</s>"))
LENGTH = 3  # tokens of a response, end-of-sequence included
WRITER = np.array([0.40, 0.22, 0.10, 0.08, 0.06, 0.06, 0.04, 0.04])  # shares of the answers in demonstrations
OFFSET_REWARD = -4.0
SIZES = MadeModelConfig(
    name="enumerable", path=None, hidden_size=32, ffn_size=64, layers=2, heads=2, init_std=0.2, vocab_size=300
)


@dataclass(frozen=True)
class World:
    """Prompts with their valid answers and rewards.

    Args:
        prompts: token ids, P lists.
        answers: token ids with end-of-sequence, P lists of A.
        strings: every response of at most LENGTH tokens, token ids, N lists.
        place: index of each answer in `strings`, (P, A).
        answer_rewards: of each answer, nats, (P, A).
    """

    prompts: list[list[int]]
    answers: list[list[list[int]]]
    strings: list[list[int]]
    place: np.ndarray
    answer_rewards: np.ndarray

    @property
    def rewards(self) -> np.ndarray:
        """Return the reward of every string, nats, (P, N)."""
        table = np.full((len(self.prompts), len(self.strings)), OFFSET_REWARD)
        np.put_along_axis(table, self.place, self.answer_rewards, axis=1)
        return table

    def reward(self) -> GoldReward:
        """Return the same as a function of token ids."""
        table: dict[tuple[int, ...], dict[tuple[int, ...], float]] = {}
        for prompt, answers, rewards in zip(self.prompts, self.answers, self.answer_rewards.tolist(), strict=True):
            table[tuple(prompt)] = {tuple(ids): value for ids, value in zip(answers, rewards, strict=True)}
        return GoldReward(table, centre=0.0, offset_reward=OFFSET_REWARD, device="cpu")

    def tree(self) -> PrefixTree:
        """Return the closed vocabulary of the valid answers."""
        pairs = zip(self.prompts, self.answers, strict=True)
        return PrefixTree(((prompt, ids) for prompt, rows in pairs for ids in rows), VOCABULARY, PAD)


def make_world(prompts: int, seed: int) -> World:
    """Return a world of at most 1200 prompts; softmax of an answer's reward has a favourite and a tail."""
    rng = np.random.default_rng([seed, 1])
    words = range(len(SPECIALS), VOCABULARY)
    every = [[*head, *tail] for head in itertools.permutations(words, 2) for tail in itertools.permutations(words, 3)]
    chosen = [every[row] for row in rng.permutation(len(every))[:prompts]]
    answers = [[[a], [b], [a, c], [a, d], [a, e], [b, c], [b, d], [b, e]] for a, b, c, d, e in chosen]
    ended = [[[*ids, EOS] for ids in rows] for rows in answers]
    strings = all_strings()
    index = {tuple(ids): row for row, ids in enumerate(strings)}
    place = np.array([[index[tuple(ids)] for ids in rows] for rows in ended])
    return World([[BOS, *words] for words in chosen], ended, strings, place, rng.normal(size=place.shape))


def all_strings() -> list[list[int]]:
    """Return every response of at most LENGTH tokens: it ends with end-of-sequence, or it is cut."""
    going = [token for token in range(VOCABULARY) if token != EOS]
    found: list[list[int]] = []
    for length in range(LENGTH):
        found += [[*ids, EOS] for ids in itertools.product(going, repeat=length)]
    return found + [list(ids) for ids in itertools.product(going, repeat=LENGTH)]


def new_policy(seed: int) -> Any:
    """Return a policy with random weights; the global random state is kept."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make_policy(SIZES, TOKENIZER, max_positions=16).eval()


def trained_policy(world: World, shares: np.ndarray, steps: int, seed: int) -> Any:
    """Return a policy trained for `steps` batches of answers drawn with `shares`, (A,)."""
    policy, rng = new_policy(seed), np.random.default_rng([seed, 2])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3, betas=(0.9, 0.98))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for _ in range(steps):
        rows, picks = rng.integers(len(world.prompts), size=64), rng.choice(len(shares), p=shares, size=64)
        responses = [world.answers[row][pick] for row, pick in zip(rows, picks, strict=True)]
        batch = collate([world.prompts[row] for row in rows], responses, PAD)
        logps = token_logps(policy, batch, temperature=1.0, tree=None)
        optimizer.zero_grad()
        (-logps.masked_fill(~batch.response_mask, 0.0).sum(-1).mean()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        decay.step()
    return policy.eval()


def string_logps(policy: Any, world: World, tree: PrefixTree | None) -> np.ndarray:
    """Return log pi of every string after every prompt, nats, (P, N).

    With the tree of the valid answers all others are impossible, -inf, and are not read.
    """
    if tree is not None:
        logps = np.full((len(world.prompts), len(world.strings)), -np.inf)
        np.put_along_axis(logps, world.place, _read(policy, world.prompts, world.answers, tree), axis=1)
        return logps
    pieces = [world.prompts[start : start + 16] for start in range(0, len(world.prompts), 16)]
    return np.concatenate([_read(policy, piece, [world.strings] * len(piece), None) for piece in pieces])


def _read(
    policy: Any, prompts: list[list[int]], responses: list[list[list[int]]], tree: PrefixTree | None
) -> np.ndarray:
    repeated = [prompt for prompt, rows in zip(prompts, responses, strict=True) for _ in rows]
    batch = collate(repeated, [ids for rows in responses for ids in rows], PAD)
    logps = frozen_token_logps(policy, batch, temperature=1.0, tree=tree, micro_batch=4096).double().sum(-1)
    return logps.view(len(prompts), -1).numpy()


def on_answers(table: np.ndarray, world: World) -> np.ndarray:
    """Return the columns of a table (P, N) that are the valid answers, (P, A)."""
    return np.take_along_axis(table, world.place, axis=1)


def off_answers(logps: np.ndarray, world: World) -> np.ndarray:
    """Return the mass on strings that are no valid answer, (P,)."""
    return np.clip(1 - np.exp(on_answers(logps, world)).sum(-1), 0, 1)


def prefixes(strings: list[list[int]]) -> np.ndarray:
    """Return a number for each string's first t tokens, t = 0 .. LENGTH, the same where they are, (N, LENGTH + 1)."""
    numbers: dict[tuple[int, ...], int] = {}
    rows = [[tuple(ids[:t]) for t in range(LENGTH + 1)] for ids in strings]
    return np.array([[numbers.setdefault(prefix, len(numbers)) for prefix in row] for row in rows])


def expected_per_token(logps: np.ndarray, values: np.ndarray, strings: list[list[int]]) -> np.ndarray:
    """Return E_y (1 / |y|) sum_t E[v_t | y_<t], the expectation given each prefix, mean over a response's tokens, (P,).

    With v_t = log pi - log pi_ref it is kl/per_token, with v_t = -log pi entropy/per_token: both sum exactly over the
    vocabulary at every position.

    Args:
        logps: log pi of every string, (P, N).
        values: v_t of every string, (P, N, LENGTH); 0 after its end.
    """
    number, share = prefixes(strings), np.exp(logps)
    lengths = np.array([len(ids) for ids in strings])
    total = np.zeros(len(logps))
    for t in range(LENGTH):
        mass = _by_prefix(share, number[:, t])
        mean = _by_prefix(share * values[..., t], number[:, t]) / np.where(mass > 0, mass, 1)
        total += (share * mean[:, number[:, t]] * (t < lengths) / lengths).sum(-1)
    return total


def token_table(logps: np.ndarray, strings: list[list[int]]) -> np.ndarray:
    """Return log pi of each token given the ones before it, (P, N, LENGTH), from those of whole strings (P, N).

    The mass of a prefix is the sum over the strings that begin with it; 0 after a string's end or where it has none.
    """
    number, share = prefixes(strings), np.exp(logps)
    masses = [_by_prefix(share, number[:, t])[:, number[:, t]] for t in range(LENGTH + 1)]
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = [np.log(after) - np.log(before) for before, after in itertools.pairwise(masses)]
    return np.stack([np.where(np.isfinite(step), step, 0.0) for step in steps], axis=-1)


def _by_prefix(values: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Return sums of values (P, N) over strings with the same number, (P, largest number + 1)."""
    return values @ np.eye(number.max() + 1)[number]


def made_by_hand(world: World, reference: np.ndarray) -> dict[str, np.ndarray]:
    """Return log pi of every string under hand-made policies, and under the reference given, (P, N)."""
    target = softmax(world.answer_rewards)
    favourite = np.eye(target.shape[1])[target.argmax(-1)]
    anywhere = np.full((len(world.prompts), len(world.strings)), 1 / len(world.strings))
    return {
        "optimum": placed(target, world),
        "KL optimum": placed(softmax(world.answer_rewards + on_answers(reference, world)), world),
        "reference": reference,
        "uniform": placed(np.full(target.shape, 1 / target.shape[1]), world),
        "collapsed": placed(0.999 * favourite + 0.001 / target.shape[1], world),
        "gibberish": np.log(anywhere),
    }


def softmax(values: np.ndarray) -> np.ndarray:
    """Return the softmax over the last dimension."""
    weights = np.exp(values - values.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def placed(shares: np.ndarray, world: World) -> np.ndarray:
    """Return log-probs of every string, (P, N), from shares of the answers, (P, A)."""
    logps = np.full((len(world.prompts), len(world.strings)), -np.inf)
    np.put_along_axis(logps, world.place, np.log(shares), axis=1)
    return logps
