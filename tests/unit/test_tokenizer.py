from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, OPTConfig, PreTrainedTokenizerFast

from rlhf_cli.data.tokenizer import bpe_tokenizer, word_tokenizer

TEXTS = [
    "Which season do you like best?",
    "I do not mind, but spring (early) is well-known.",
    "It's autumn: don't ask; winter!",
]
WORDS = word_tokenizer(TEXTS)
BPE = bpe_tokenizer(TEXTS * 20, 320)


@pytest.mark.parametrize("tokenizer", [WORDS, BPE], ids=["word", "bpe"])
def test_specials_have_the_ids_of_opt_and_are_never_added(tokenizer: PreTrainedTokenizerFast) -> None:
    specials = [tokenizer.bos_token, tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token]
    assert specials == ["<s>", "<pad>", "</s>", "<unk>"]
    assert tokenizer.convert_tokens_to_ids(specials) == [0, 1, 2, 3]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert not {0, 1, 2, 3} & set(tokenizer(TEXTS[0])["input_ids"])


@pytest.mark.parametrize("tokenizer", [WORDS, BPE], ids=["word", "bpe"])
def test_a_saved_folder_opens_as_the_same_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    OPTConfig().save_pretrained(tmp_path)  # beside an OPT model, AutoTokenizer must not take OPT's own class
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    for text in [*TEXTS, " spring</s><pad> 🙂\n\nunseen"]:
        ids = tokenizer(text)["input_ids"]
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == tokenizer.decode(ids)
    assert (loaded.bos_token_id, loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2, 3)


@pytest.mark.parametrize("tokenizer", [WORDS, BPE], ids=["word", "bpe"])
def test_special_tokens_written_in_a_text_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("spring </s><s><pad>")["input_ids"]
    assert not {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id} & set(ids)


def test_one_token_a_word_and_readable_text_back() -> None:
    ids = WORDS("I do not mind, it's well-known")["input_ids"]
    assert WORDS.convert_ids_to_tokens(ids) == ["I", "do", "not", "mind", ",", "<unk>", "well-known"]
    for text in TEXTS:
        assert WORDS.decode(WORDS(text)["input_ids"]) == text
    assert len(WORDS) == 4 + len(set(WORDS.tokenize(" ".join(TEXTS))))


def test_spaces_do_not_matter_to_words() -> None:
    assert WORDS("  spring \n winter")["input_ids"] == WORDS("spring winter")["input_ids"]


def test_unknown_words_stay_visible() -> None:
    assert WORDS.decode(WORDS("spring monsoon")["input_ids"]) == "spring <unk>"


def test_tokenizers_do_not_depend_on_the_order_of_the_texts() -> None:
    assert word_tokenizer(TEXTS[::-1]).get_vocab() == WORDS.get_vocab()
    assert bpe_tokenizer(TEXTS[::-1] * 20, 320).get_vocab() == BPE.get_vocab()


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_bring_any_text_back(text: str) -> None:
    assert BPE.decode(BPE(text)["input_ids"]) == text


def test_bytes_bring_emoji_newlines_and_specials_back() -> None:
    text = "\n\nHuman:  👩‍👩‍👧 naïve\t日本 </s>\r\n do n't , . \x00"
    ids = BPE(text)["input_ids"]
    assert BPE.decode(ids) == text
    assert BPE.unk_token_id not in ids


def test_bpe_learns_merges_up_to_its_bound() -> None:
    assert 260 < len(BPE) <= 320
    assert len(BPE(TEXTS[0])["input_ids"]) < len(TEXTS[0].encode()) / 2


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    assert len(bpe_tokenizer(TEXTS, 260)) == 260
    with pytest.raises(ValueError, match="at least 260, got 259"):
        bpe_tokenizer(TEXTS, 259)
