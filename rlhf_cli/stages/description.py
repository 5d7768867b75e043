"""A dataset in the tokens of a model, for the terminal: what `rlhf data` and the SFT stage print."""

from __future__ import annotations

from typing import Any

from rlhf_cli import hub
from rlhf_cli.config.schema import DatasetConfig, MadeModelConfig, ModelConfig
from rlhf_cli.data import load
from rlhf_cli.data.encode import fit_to_context
from rlhf_cli.data.rows import PreferenceData
from rlhf_cli.data.statistics import token_statistics
from rlhf_cli.data.tokenizer import made_tokenizer
from rlhf_cli.models.tokenizers import load_tokenizer
from rlhf_cli.stages.session import say

TOKENIZER_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]  # of a model on the Hub; its weights stay there


def describe(dataset: DatasetConfig, model: ModelConfig, data: PreferenceData | None = None) -> list[str]:
    """Return the lines that say how long a dataset is in tokens, what is left out, and how many rows are where.

    The tokenizer is the one that SFT would train with: the model's own, or made from the data.

    Args:
        dataset, model: of the config.
        data: the rows, if they are loaded already.

    Raises:
        DataError: the data cannot be read, or no row of some split fits the context.
        RunError: the model's tokenizer cannot be opened.
    """
    data = data or load(dataset)
    if model.path:
        folder = hub.local_folder("model.path", model.path, allow=TOKENIZER_FILES)
        tokenizer = load_tokenizer(folder, chat_template=model.chat_template)
    else:
        assert isinstance(model, MadeModelConfig)  # rules.py refuses a model with neither path nor sizes
        tokenizer = made_tokenizer(data, model.vocab_size)
    return token_statistics(data, tokenizer, dataset, fit_to_context(data, tokenizer, dataset)).lines()


def say_statistics(data: PreferenceData, tokenizer: Any, cfg: DatasetConfig, fitted: PreferenceData) -> None:
    """Print those lines for data that was loaded and fitted already; nothing for a world whose questions are known."""
    if not data.questions:
        for line in token_statistics(data, tokenizer, cfg, fitted).lines():
            say(line)
