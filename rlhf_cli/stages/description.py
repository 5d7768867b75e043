"""A dataset in the tokens of a model, for the terminal: what `rlhf data` and the SFT stage print."""

from __future__ import annotations

from typing import Any

from rlhf_cli import hub
from rlhf_cli.config.schema import DatasetConfig, MadeModelConfig, ModelConfig, SplitConfig
from rlhf_cli.data import describe, load
from rlhf_cli.data.encode import fit_to_context
from rlhf_cli.data.rows import PreferenceData
from rlhf_cli.data.statistics import token_statistics
from rlhf_cli.data.tokenizer import made_tokenizer
from rlhf_cli.models.tokenizers import load_tokenizer

TOKENIZER_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]  # of a model on the Hub; its weights stay there
FEW = 20_000  # rows; of more, a look at the data does not tokenise all, which takes minutes


def description(dataset: SplitConfig, model: ModelConfig) -> str:
    """Return what a run with this model would read: rows of each split, those left out, lengths in tokens, and a pair.

    The tokenizer is the one that SFT would train with: the model's own, or made from the data. Of up to FEW rows all
    are fitted to the context and counted; of more, the counts are those before, and the lengths are a sample's.

    Raises:
        DataError: the data cannot be read, or no row of some split fits the context.
        RunError: the model's tokenizer cannot be opened.
    """
    folder = hub.local_folder("model.path", model.path, allow=TOKENIZER_FILES) if model.path else None
    data = load(dataset)
    if folder is not None:
        tokenizer = load_tokenizer(folder, chat_template=model.chat_template)
    else:
        assert isinstance(model, MadeModelConfig)  # rules.py refuses a model with neither path nor sizes
        tokenizer = made_tokenizer(data, model.vocab_size)
    few = len(data.demonstrations) + len(data.reward_pairs) + len(data.policy_pairs) + len(data.heldout_pairs) <= FEW
    used = fit_to_context(data, tokenizer, dataset) if few else data
    return describe.describe(dataset, used, token_statistics(data, tokenizer, dataset, used).table())


def say_statistics(data: PreferenceData, tokenizer: Any, cfg: DatasetConfig, fitted: PreferenceData) -> None:
    """Print those lines for data that was loaded and fitted already; nothing for a world whose questions are known."""
    from rlhf_cli.stages.session import say  # brings the trainers, for which a look at data should not wait

    if not data.questions:
        for line in token_statistics(data, tokenizer, cfg, fitted).lines():
            say(line)
