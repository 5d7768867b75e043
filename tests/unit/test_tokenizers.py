"""Tokenizers of published kinds, made fit for training: padding, the token that ends a turn, room in the embedding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from miniatures import save_miniature

from rlhf_cli.data.tokenizer import bpe_tokenizer, word_tokenizer
from rlhf_cli.errors import RunError
from rlhf_cli.models.policy import load_policy
from rlhf_cli.models.tokenizers import NEW_PAD, fit_embedding, has_tokenizer, load_tokenizer

WORDS = word_tokenizer(["a b c d"])


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that returns the folder of a miniature; it is not to be changed."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save_miniature(name, tmp_path_factory.mktemp("family") / name)
        return made[name]

    return folder


def edited(folder: Path, **changes: Any) -> Path:
    """Return `folder` with changes in tokenizer_config.json."""
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("name", "template", "pad", "eos"),
    [
        ("opt", "auto", "<pad>", "</s>"),
        ("llama-2", "auto", "<unk>", "</s>"),
        ("llama-3.2", "auto", "<|finetune_right_pad_id|>", "<|end_of_text|>"),
        ("llama-3.1-instruct", "auto", "<|finetune_right_pad_id|>", "<|eot_id|>"),
        ("qwen2.5", "auto", "<|endoftext|>", "<|im_end|>"),
        ("qwen2.5", "none", "<|fim_pad|>", "<|endoftext|>"),
        ("qwen2.5-instruct", "auto", "<|endoftext|>", "<|im_end|>"),
        ("pythia", "auto", "<|padding|>", "<|endoftext|>"),
        ("mistral-sft", "auto", "<unk>", "</s>"),
        ("gemma", "auto", "<pad>", "<end_of_turn>"),
        ("gemma", "none", "<pad>", "<eos>"),
        ("gemma-sft", "auto", "<pad>", "<|im_end|>"),
    ],
)
def test_padding_and_end_of_each_family(
    family: Callable[[str], Path], tmp_path: Path, name: str, template: str, pad: str, eos: str
) -> None:
    tokenizer: Any = load_tokenizer(family(name), chat_template=template)
    before = len(load_tokenizer(family(name), training=False))
    assert (tokenizer.pad_token, tokenizer.eos_token) == (pad, eos)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == before, "no token is added where one is there"
    assert (tokenizer.chat_template is None) == (
        template == "none" or name in ("opt", "llama-2", "llama-3.2", "pythia")
    )
    tokenizer.save_pretrained(tmp_path)  # a later stage reads what this one saved
    saved: Any = load_tokenizer(tmp_path)
    assert (saved.pad_token_id, saved.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert saved.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("made", [WORDS, bpe_tokenizer(["a b c"], 300)], ids=["word", "bpe"])
def test_tokenizers_that_are_made_here_stay_as_they_are(tmp_path: Path, made: Any) -> None:
    made.save_pretrained(tmp_path)
    loaded: Any = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == made.get_vocab()
    assert (loaded.bos_token_id, loaded.pad_token_id, loaded.eos_token_id, loaded.chat_template) == (0, 1, 2, None)


# -- a padding token of one's own --------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Return a tiny model whose tokenizer has no token to spare, with an embedding of exactly its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "b": 2}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(tmp_path)
    sizes = {"hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    OPTForCausalLM(OPTConfig(vocab_size=3, max_position_embeddings=8, pad_token_id=0, **sizes)).save_pretrained(
        tmp_path
    )
    return tmp_path


def test_without_a_token_to_spare_padding_is_a_new_one_and_the_embedding_grows(bare: Path) -> None:
    tokenizer: Any = load_tokenizer(bare)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (NEW_PAD, 3)
    policy = load_policy(bare)
    inputs = torch.tensor([[1, 2, 0]])
    before = policy(inputs).logits
    fit_embedding(policy, tokenizer)
    assert policy.get_input_embeddings().weight.shape[0] == policy.config.vocab_size == 4
    assert policy.config.pad_token_id == 3
    torch.testing.assert_close(policy(inputs).logits[..., :3], before)


def test_an_embedding_with_room_stays_as_it_is(bare: Path) -> None:
    tokenizer, policy = load_tokenizer(bare), load_policy(bare)
    policy.resize_token_embeddings(10)
    fit_embedding(policy, tokenizer)
    assert policy.get_input_embeddings().weight.shape[0] == 10


def test_a_vocabulary_larger_than_the_embedding_is_refused(bare: Path) -> None:
    WORDS.save_pretrained(bare)
    with pytest.raises(RunError, match=f"the tokenizer in {bare} has 8 tokens, the model's embedding 3"):
        fit_embedding(load_policy(bare), load_tokenizer(bare))


def test_one_token_ends_a_response_whatever_the_generation_config_says(family: Callable[[str], Path]) -> None:
    folder = family("llama-3.1-instruct")
    policy, tokenizer = load_policy(folder), load_tokenizer(folder)
    assert len(policy.generation_config.eos_token_id) == 3
    assert policy.generation_config.temperature == 0.6
    fit_embedding(policy, tokenizer)
    assert policy.generation_config.eos_token_id == policy.config.eos_token_id == tokenizer.eos_token_id
    assert policy.generation_config.pad_token_id == tokenizer.pad_token_id
    assert policy.generation_config.temperature in (None, 1.0)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_end_of_sequence_is_refused(tmp_path: Path) -> None:
    WORDS.save_pretrained(tmp_path)
    edited(tmp_path, eos_token=None)
    with pytest.raises(
        RunError, match="has no end-of-sequence token. every response ends with it. name one .*eos_token"
    ):
        load_tokenizer(tmp_path)


def test_where_models_are_only_read_any_padding_will_do(bare: Path) -> None:
    tokenizer: Any = load_tokenizer(bare, training=False)
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    assert len(tokenizer) == 3


TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"


def test_a_template_may_come_from_a_file(tmp_path: Path) -> None:
    WORDS.save_pretrained(tmp_path)
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    assert load_tokenizer(tmp_path, chat_template=str(tmp_path / "own.jinja")).chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read. .*No such file.* give auto, none, or a Jinja file"),
        ("{% for m in messages %}", "cannot be used. Unexpected end of template.* or model.chat_template=none"),
        ("{{ raise_exception('no assistant here') }}", "cannot be used. no assistant here"),
        ("{{ messages[0].content }}", "cannot be used. it leaves out what the assistant says"),
    ],
    ids=["missing", "syntax", "refuses", "forgets"],
)
def test_a_template_that_cannot_be_used_is_one_line(tmp_path: Path, content: str | None, expected: str) -> None:
    WORDS.save_pretrained(tmp_path)
    if content is not None:
        (tmp_path / "own.jinja").write_text(content)
    with pytest.raises(RunError, match=rf"^model.chat_template=.*own.jinja {expected}"):
        load_tokenizer(tmp_path, chat_template=str(tmp_path / "own.jinja"))


def test_a_damaged_tokenizer_is_one_line(tmp_path: Path) -> None:
    WORDS.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    assert has_tokenizer(tmp_path)
    with pytest.raises(RunError, match="^no tokenizer could be opened in"):
        load_tokenizer(tmp_path)


def test_code_that_a_tokenizer_brings_is_neither_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    WORDS.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "brandnew"}))
    edited(tmp_path, tokenizer_class="BrandNewTokenizer", auto_map={"AutoTokenizer": ["x.T", None]})
    with pytest.raises(RunError, match="^no tokenizer could be opened in .* it brings Python code of its own"):
        load_tokenizer(tmp_path)
