"""A vocabulary of eight words and OPT models of a few thousand parameters, sharp enough to tell tokens apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlhf_cli.config.schema import MadeModelConfig
from rlhf_cli.data.tokenizer import word_tokenizer
from rlhf_cli.models.policy import make_policy
from rlhf_cli.models.reward import new_reward_model

BOS, PAD, EOS, UNK = 0, 1, 2, 3
TOKENIZER = word_tokenizer(["a b c d e f g h"])  # a..h are 4..11
VOCAB = len(TOKENIZER)
CONFIG = MadeModelConfig(
    name="test", path=None, hidden_size=16, ffn_size=16, layers=2, heads=2, init_std=0.3, vocab_size=300
)


def tiny_policy(seed: int = 0) -> Any:
    """Return an OPT with random weights in evaluation mode, up to 16 positions; the global random state is kept."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make_policy(CONFIG, TOKENIZER, max_positions=16).eval()


def tiny_reward_model(folder: Path, seed: int = 0) -> Any:
    """Return a reward model whose body is `tiny_policy(seed)`, by way of `folder`."""
    tiny_policy(seed).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return new_reward_model(folder, init_std=0.5).eval()
