"""A base model is looked at before anything is loaded: what is missing, damaged or of another kind is one line."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from miniatures import FAMILIES, save_miniature

from rlhf_cli.errors import RunError
from rlhf_cli.models.check import check_model

CAUSAL = {"model_type": "opt", "architectures": ["OPTForCausalLM"]}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a whole model that a test may damage."""
    return save_miniature("pythia", tmp_path / "model")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(tmp_path: Path, family: str) -> None:
    check_model("model.path", str(save_miniature(family, tmp_path)))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {"model_type": "opt", "architectures": ["OPTModel"]},
        {"model_type": "llama"},
        {"model_type": "llama4_text"},  # a part of a family
        {"model_type": "bert", "architectures": ["BertLMHeadModel"], "is_decoder": True},
        {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}},  # its code is refused where it is opened
    ],
)
def test_a_causal_language_model_passes(model: Path, config: dict[str, Any]) -> None:
    (model / "config.json").write_text(json.dumps(config))
    check_model("model.path", str(model))


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, r"BertForMaskedLM \(bert\)"),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            r"T5ForConditionalGeneration \(t5\)",
        ),
        ({"model_type": "bert", "architectures": ["BertModel"]}, r"BertModel \(bert\)"),
        ({"model_type": "roberta"}, r"roberta \(roberta\)"),
        ({"model_type": "opt", "architectures": ["OPTForSequenceClassification"]}, "OPTForSequenceClassification"),
    ],
)
def test_another_kind_of_model_is_refused(model: Path, config: dict[str, Any], what: str) -> None:
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=f"^model.path=.* holds {what}.*a causal language model is needed. name one"):
        check_model("model.path", str(model))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "holds no config.json. a whole model in Hugging Face layout is needed. name its folder"),
        ({"config.json": '{"model_type": "foo"}'}, "is of the family foo. transformers .* does not know it. upgrade"),
        ({"adapter_config.json": "{}", "../status.json": "{}"}, r"merge it with `rlhf export (\S+)`, .*=\1/export"),
        ({"model/adapter_config.json": "{}", "status.json": "{}"}, r"merge it with `rlhf export (\S+)`, .*=\1/export"),
        ({"model/config.json": "{}"}, "holds no config.json.*set model.path=.*/model"),
        ({"adapter_config.json": "{}"}, "holds an adapter alone"),
        ({"config.json": "{"}, "is no model that can be opened. config.json is damaged"),
        ({"config.json": "[]"}, "is no model that can be opened. config.json is damaged"),
        ({"config.json": "{}"}, "is no model that can be opened. config.json names no model_type"),
        ({"config.json": json.dumps(CAUSAL)}, "is not whole. it holds no weights: model.safetensors or"),
        ({"config.json": json.dumps(CAUSAL), INDEX: "{"}, "is not whole. it holds no weights"),
        ({"config.json": json.dumps(CAUSAL), "model.safetensors": ""}, "model.safetensors is damaged .*too small"),
        ({"config.json": json.dumps(CAUSAL), "pytorch_model.bin": "PK"}, "pytorch_model.bin is damaged .it ends early"),
        (
            {"config.json": json.dumps(CAUSAL), "model.safetensors": "version https://git-lfs.github.com/spec/v1\n"},
            "model.safetensors is damaged .it is a pointer of Git LFS: run `git lfs pull`",
        ),
    ],
)
def test_a_folder_without_a_model_is_refused(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    tmp_path = tmp_path / "folder"
    tmp_path.mkdir()
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(RunError, match=expected) as raised:
        check_model("model.path", str(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("family", ["llama-3.2", "opt-350m"])  # safetensors, and .bin alone
def test_weights_that_end_early_are_refused(tmp_path: Path, family: str) -> None:
    folder = save_miniature(family, tmp_path)
    file = next(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(RunError, match=rf"is not whole. {file.name} is damaged .*copy or download the folder again"):
        check_model("model.path", str(folder))


def test_a_shard_that_is_missing_is_named(model: Path) -> None:
    (model / "model.safetensors").rename(model / "1.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    with pytest.raises(RunError, match="is not whole. 2.safetensors is missing"):
        check_model("model.path", str(model))
    (model / "2.safetensors").write_bytes((model / "1.safetensors").read_bytes())
    check_model("model.path", str(model))


def test_a_policy_needs_a_tokenizer_and_the_base_of_a_reward_model_does_not(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(RunError, match="is not whole. it holds no tokenizer: tokenizer.json, .* or vocab.txt"):
        check_model("model.path", str(model))
    check_model("model.reward_path", str(model))


def test_a_tokenizer_with_tokens_beyond_the_embedding_is_refused(model: Path) -> None:
    settings = json.loads((model / "config.json").read_text())
    check_model("model.path", str(model))
    (model / "config.json").write_text(json.dumps(settings | {"vocab_size": 9}))
    with pytest.raises(RunError, match=rf"the tokenizer in model.path={model} has \d+ tokens, the model's embedding 9"):
        check_model("model.path", str(model))
    (model / "tokenizer.json").unlink()
    for words, beyond in (({"a": 8}, False), ({"a": 9}, True)):
        (model / "vocab.json").write_text(json.dumps(words))
        with pytest.raises(RunError, match="has 10 tokens") if beyond else nullcontext():
            check_model("model.path", str(model))


def test_it_is_checked_without_torch(model: Path) -> None:
    code = "import sys; from rlhf_cli.models.check import check_model as c; c('model.path', sys.argv[1]); "
    code += "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
