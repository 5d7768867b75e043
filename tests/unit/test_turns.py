"""Prompts and responses as token ids and back, for a tokenizer of each family, plain and in its chat template."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import FAMILIES, save_miniature

from rlhf_cli.data.tokenizer import bpe_tokenizer, word_tokenizer
from rlhf_cli.data.turns import prompt_ids, prompt_text, response_ids, response_text, same_turns
from rlhf_cli.errors import DataError
from rlhf_cli.models.tokenizers import load_tokenizer

PLAIN = ["opt", "llama-2", "llama-3.2", "pythia"]
TEMPLATED = ["llama-3.1-instruct", "qwen2.5", "qwen2.5-instruct", "mistral-sft", "gemma", "gemma-sft"]
DIALOGUE = "\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: What is 2 + 2?\n\nAssistant:"
ASKED = [
    {"role": "user", "content": "Hi!"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "What is 2 + 2?"},
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("families")
    return {name: load_tokenizer(save_miniature(name, folder / name)) for name in FAMILIES}


def ids_of(tokenizer: Any, prompt: str) -> list[int]:
    return prompt_ids(tokenizer, [prompt])[0]


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30))
def test_a_response_comes_back_as_it_was(tokenizers: dict[str, Any], name: str, text: str) -> None:
    tokenizer = tokenizers[name]
    if tokenizer.backend_tokenizer.normalizer is not None:
        text = tokenizer.backend_tokenizer.normalizer.normalize_str(text).replace("▁", " ")  # Qwen and Pythia: NFC
    (ids,) = response_ids(tokenizer, [text])
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[:-1]
    assert response_text(tokenizer, ids) == text.strip()


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_in_a_text_are_text(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer = tokenizers[name]
    specials = [tokenizer.eos_token, tokenizer.pad_token, *TURNS.get(name, [])]
    text = "one " + " two ".join(specials)
    (ids,) = response_ids(tokenizer, [text])
    assert not set(tokenizer.convert_tokens_to_ids(specials)) & set(ids[:-1])
    assert response_text(tokenizer, ids) == text
    asked, plain = (ids_of(tokenizer, f"\n\nHuman: {said}\n\nAssistant:") for said in (text, "one two"))
    for token in tokenizer.convert_tokens_to_ids(specials):
        assert asked.count(token) == plain.count(token), "the template writes its own, the text none"
    assert text in tokenizer.decode(asked)


TURNS = {
    "llama-3.1-instruct": ["<|begin_of_text|>", "<|start_header_id|>"],
    "qwen2.5": ["<|im_start|>"],
    "qwen2.5-instruct": ["<|im_start|>"],
    "gemma": ["<start_of_turn>", "<bos>"],
    "gemma-sft": ["<|im_start|>", "<bos>"],
}


def test_other_special_tokens_stay_visible_and_nothing_follows_the_end(tokenizers: dict[str, Any]) -> None:
    qwen = tokenizers["qwen2.5-instruct"]
    ids = response_ids(qwen, ["yes"])[0]
    start = qwen.convert_tokens_to_ids("<|im_start|>")
    assert response_text(qwen, [*ids, start, *ids]) == "yes"
    assert response_text(qwen, [*ids[:-1], start]) == "yes<|im_start|>"


SYSTEM = f"Be brief.{DIALOGUE}"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("prompt", [DIALOGUE, SYSTEM, "\n\nHuman: Only this?\n\nAssistant:"])
def test_a_dialogue_comes_back_from_its_ids(tokenizers: dict[str, Any], name: str, prompt: str) -> None:
    text = prompt_text(tokenizers[name], ids_of(tokenizers[name], prompt), dialogues=True)
    if name == "gemma" and prompt == SYSTEM:  # there the system text begins the first message
        prompt = DIALOGUE.replace("Hi!", "Be brief.\n\nHi!")
    assert text == prompt


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plain_prompt_comes_back_from_its_ids(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer, prompt = tokenizers[name], "SUBREDDIT: r/x\nPOST: I do </s> <|im_end|> it.\nTL;DR:"
    assert prompt_text(tokenizer, ids_of(tokenizer, prompt), dialogues=False) == prompt


@pytest.mark.parametrize("name", FAMILIES)
def test_any_other_tokenizer_reads_the_same_text_from_the_ids(tokenizers: dict[str, Any], name: str) -> None:
    written, answers = tokenizers[name], ["It is  four.\n\n日本", "</s> or <|eot_id|>?", "    code\n\tx", ""]
    for other, reader in tokenizers.items():
        for prompt in (DIALOGUE, "SUBREDDIT: r/x\nPOST: </s> it.\nTL;DR:"):
            text = prompt_text(written, ids_of(written, prompt), dialogues=prompt == DIALOGUE)
            assert ids_of(reader, text) == ids_of(reader, prompt), other
        texts = [response_text(written, ids) for ids in response_ids(written, answers)]
        assert response_ids(reader, texts) == response_ids(reader, answers), other


def test_tokenizers_are_the_same_if_all_that_writes_turns_is(tokenizers: dict[str, Any]) -> None:
    qwen = tokenizers["qwen2.5"]
    assert same_turns(qwen, qwen)
    assert same_turns(tokenizers["opt"], tokenizers["opt-350m"])
    assert not same_turns(qwen, tokenizers["opt"])
    assert qwen.get_vocab() == tokenizers["qwen2.5-instruct"].get_vocab()
    assert not same_turns(qwen, tokenizers["qwen2.5-instruct"]), "their templates differ"


# -- plain -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("opt", ["</s>"]),
        ("opt-350m", ["</s>"]),
        ("llama-2", ["<s>"]),
        ("llama-3.2", ["<|begin_of_text|>"]),
        ("pythia", []),
    ],
)
def test_a_plain_prompt_begins_as_its_family_s_texts_do(
    tokenizers: dict[str, Any], name: str, start: list[str]
) -> None:
    tokenizer = tokenizers[name]
    ids = ids_of(tokenizer, DIALOGUE)
    assert tokenizer.convert_ids_to_tokens(ids[: len(start)]) == start
    assert ids == tokenizer(DIALOGUE)["input_ids"]
    assert tokenizer.decode(ids[len(start) :]) == DIALOGUE


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_response_is_what_the_text_goes_on_with(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer = tokenizers[name]
    whole = tokenizer(f"{DIALOGUE} It is four.")["input_ids"]
    assert ids_of(tokenizer, DIALOGUE) + response_ids(tokenizer, ["It is four.\n"])[0][:-1] == whole


def test_where_bos_is_eos_the_tokenizer_itself_says_whether_a_prompt_begins_with_it(tokenizers: dict[str, Any]) -> None:
    for name, begins in (("opt", True), ("pythia", False)):
        tokenizer = tokenizers[name]
        assert tokenizer.bos_token_id == tokenizer.eos_token_id
        assert (ids_of(tokenizer, "What?")[0] == tokenizer.bos_token_id) is begins


# -- in a template -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATED)
def test_a_prompt_is_the_template_s_with_its_generation_prompt(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer = tokenizers[name]
    written = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False)
    assert ids_of(tokenizer, DIALOGUE) == tokenizer(written, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", TEMPLATED)
def test_prompt_and_response_are_the_template_s_whole_conversation(tokenizers: dict[str, Any], name: str) -> None:
    tokenizer = tokenizers[name]
    answered = [*ASKED, {"role": "assistant", "content": "It is four."}]
    whole = tokenizer(tokenizer.apply_chat_template(answered, tokenize=False), add_special_tokens=False)["input_ids"]
    ids = ids_of(tokenizer, DIALOGUE) + response_ids(tokenizer, ["It is four."])[0]
    assert ids == whole[: len(ids)]
    assert set(tokenizer.decode(whole[len(ids) :]).split()) <= {tokenizer.eos_token}  # gemma-sft ends it twice


def test_llama_3_begins_once_and_ends_its_turn(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["llama-3.1-instruct"]
    begin, end = tokenizer.convert_tokens_to_ids(["<|begin_of_text|>", "<|eot_id|>"])
    ids = ids_of(tokenizer, DIALOGUE)
    assert ids[0] == begin
    assert ids.count(begin) == 1
    assert response_ids(tokenizer, ["Yes"])[0][-1] == end


def test_a_system_text_goes_where_the_template_has_a_place_for_it(tokenizers: dict[str, Any]) -> None:
    prompt = "Be brief.\n\nHuman: Hi!\n\nAssistant:"
    qwen, gemma = tokenizers["qwen2.5"], tokenizers["gemma"]
    assert qwen.decode(ids_of(qwen, prompt)).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert gemma.decode(ids_of(gemma, prompt)).startswith("<bos><start_of_turn>user\nBe brief.\n\nHi!<end_of_turn>")


def test_a_prompt_without_markers_is_what_the_user_says(tokenizers: dict[str, Any]) -> None:
    qwen = tokenizers["qwen2.5-instruct"]
    assert "<|im_start|>user\nWhat is 2 + 2?<|im_end|>" in qwen.decode(ids_of(qwen, "What is 2 + 2?"))


ALPACA = (
    "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\n"
    "{% else %}A: {{ m.content }} {{ eos_token }}\n{% endif %}{% endfor %}"
)


def test_what_a_template_writes_before_an_answer_belongs_to_the_prompt() -> None:
    tokenizer: Any = bpe_tokenizer(["Q: Hi A: Hello"], 300)  # this template knows no generation prompt
    tokenizer.chat_template, tokenizer.split_special_tokens = ALPACA, False
    ids, answer = ids_of(tokenizer, "Hi"), response_ids(tokenizer, ["Hello"])[0]
    assert tokenizer.decode(ids) == "Q: Hi\nA:"
    assert tokenizer.decode(answer) == " Hello </s>"
    assert response_text(tokenizer, answer) == "Hello"
    for prompt in ("Hi", DIALOGUE):
        assert prompt_text(tokenizer, ids_of(tokenizer, prompt), dialogues=prompt == DIALOGUE) == prompt


def test_a_template_that_refuses_a_conversation_is_named() -> None:
    tokenizer: Any = bpe_tokenizer(["a"], 300)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.index > 2 %}{{ raise_exception('one question only') }}{% endif %}"
        "{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    tokenizer.split_special_tokens = False
    assert prompt_ids(tokenizer, ["a"]) == [[*tokenizer("a")["input_ids"], 2]]
    expected = "cannot write a conversation of user, assistant, user. one question only. set model.chat_template=none"
    with pytest.raises(DataError, match=expected):
        prompt_ids(tokenizer, ["\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"])


def test_another_template_is_seen() -> None:
    tokenizer: Any = bpe_tokenizer(["a b"], 300)
    before = response_ids(tokenizer, ["b"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.split_special_tokens = False
    assert response_ids(tokenizer, ["b"]) != before
    assert prompt_text(tokenizer, ids_of(tokenizer, DIALOGUE), dialogues=True) == DIALOGUE
    tokenizer.chat_template = None
    assert response_ids(tokenizer, ["b"]) == before


# -- speed, and what was there before ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt", "llama-2", "llama-3.1-instruct"])
def test_two_thousand_rows_take_seconds(tokenizers: dict[str, Any], name: str) -> None:
    prompts = [f"\n\nHuman: {'Tell me about it. ' * 20}{number}\n\nAssistant:" for number in range(2000)]
    start = time.perf_counter()
    prompt_ids(tokenizers[name], prompts)
    response_ids(tokenizers[name], prompts)
    assert time.perf_counter() - start < 10


def test_tokenizers_made_here_encode_as_ever() -> None:
    words, bpe = word_tokenizer(["a b ?"]), bpe_tokenizer(["Assistant: yes"], 300)
    assert prompt_ids(words, ["a b ?"]) == [[0, 5, 6, 4]]
    assert response_ids(words, ["a b\n"]) == [[5, 6, 2]]
    assert prompt_ids(bpe, [" a</s>"]) == [[0, *bpe(" a</s>")["input_ids"]]]
    assert response_ids(bpe, ["yes</s>"]) == [[*bpe(" yes</s>")["input_ids"], 2]]
