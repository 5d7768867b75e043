"""Tokenizers made on the spot from the data: one token a word, or byte-level BPE."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_cli.data.rows import PreferenceData

# Ids as in OPT. pad differs from eos, so that reward pooling and loss masks can tell them apart.
SPECIALS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}


def made_tokenizer(data: PreferenceData, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer made from the texts that SFT and reward model read: one token a word, or byte-level BPE.

    Args:
        data: the rows; `word_level` says which kind of tokenizer they want.
        vocab_size: upper bound of a BPE vocabulary.

    Raises:
        ValueError: vocab_size below 260.
    """
    return word_tokenizer(_texts(data)) if data.word_level else bpe_tokenizer(_texts(data), vocab_size)


def _texts(data: PreferenceData) -> Iterator[str]:
    """Yield the texts one by one: they may lie on disk."""
    for row in data.demonstrations:
        yield from (row.prompt, row.response)
    for pair in data.reward_pairs:
        yield from (pair.prompt, pair.chosen, pair.rejected)
    for question in data.questions:
        yield from (question.prompt, *question.answers)


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word and per punctuation mark of `texts`; any other word is <unk>.

    Words keep inner apostrophes and hyphens. Decoding puts one space between words and none before . , ; : ! ? ).
    """
    splitter = pre_tokenizers.Split(Regex(r"\w+(?:['’\-]\w+)*|[^\w\s]"), behavior="removed", invert=True)
    words = {word for text in set(texts) for word, _ in splitter.pre_tokenize_str(text)}
    vocabulary = SPECIALS | {word: len(SPECIALS) + i for i, word in enumerate(sorted(words - SPECIALS.keys()))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = splitter
    # This decoder only puts a space before every token but the first: none begins with a null character.
    spaces = decoders.WordPiece(prefix="\0", cleanup=False)
    tidy = [decoders.Replace(f" {mark}", mark) for mark in ".,;:!?)"]
    core.decoder = decoders.Sequence([spaces, decoders.Fuse(), *tidy, decoders.Replace("( ", "(")])
    return _wrapped(core)


def bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on `texts`; any text survives encoding and decoding unchanged.

    Args:
        vocab_size: upper bound of the vocabulary, specials included; at least 260 (256 bytes and 4 specials).

    Raises:
        ValueError: vocab_size below 260.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(SPECIALS):
        raise ValueError(f"vocab_size must be at least {len(alphabet) + len(SPECIALS)}, got {vocab_size}")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return _wrapped(core)


def _wrapped(core: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # "</s>" written in a text is text, it must not end the sequence
    )
