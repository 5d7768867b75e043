"""How models are opened: number format, attention, dropout, and which folders are refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from miniatures import save_miniature
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.integrations import deepspeed

from rlhf_cli.config.inputs import ModelConfig
from rlhf_cli.errors import RunError
from rlhf_cli.models import loading as loading_module
from rlhf_cli.models import reward as reward_module
from rlhf_cli.models.loading import Loading, loading, require_finite, without_dropout
from rlhf_cli.models.policy import freeze, load_policy
from rlhf_cli.models.reward import (
    ModelReward,
    load_reward_model,
    new_reward_model,
    rows_at_once,
    sequence_scores,
    token_values,
)
from rlhf_cli.models.tokens import collate

BFLOAT = Loading(dtype=torch.bfloat16)
BATCH = collate([[5, 9], [7]], [[11, 12, 13], [20]], 1)


def config(**changes: Any) -> ModelConfig:
    settings = {"dtype": "auto", "attention": "auto", "gradient_checkpointing": False, "chat_template": "auto"}
    settings |= {"init_std": 0.02, "reward_path": None, "reward_start": "sft", "share_base": False}
    return ModelConfig(name="test", path="x", prompt_tokens=8, completion_tokens=8, **(settings | changes))


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_miniature("opt", tmp_path_factory.mktemp("opt"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a family with tied embeddings."""
    return save_miniature("qwen2.5", tmp_path_factory.mktemp("qwen"))


def test_a_model_is_opened_whole_after_a_trainer_has_used_zero3(opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed splits what it trains; transformers would open every later model as parts of size 0."""
    trainers = SimpleNamespace(is_zero3=lambda: True, config={})
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: trainers)
    assert deepspeed.is_deepspeed_zero3_enabled()
    assert all(weight.numel() for weight in load_policy(opt).parameters())
    assert deepspeed.is_deepspeed_zero3_enabled(), "that trainer may go on"


# -- number format and attention ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "device", "able", "expected"),
    [
        ("auto", "cpu", True, torch.float32),
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float32),
        ("bfloat16", "cpu", False, torch.bfloat16),
        ("float32", "cuda", True, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_the_gpu_has_it(
    monkeypatch: pytest.MonkeyPatch, dtype: str, device: str, able: bool, expected: torch.dtype
) -> None:
    # older GPUs emulate it, and are slower with it than without
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: able or including_emulation)
    how = loading(config(dtype=dtype), device)
    assert how == Loading(device, expected, "auto")
    assert how.trained() == Loading(device, torch.float32, "auto")


def test_weights_are_held_as_asked_and_in_float32_where_they_are_trained(opt: Path) -> None:
    def formats(model: Any) -> set[torch.dtype]:
        return {weight.dtype for weight in model.parameters()}

    assert formats(load_policy(opt)) == {torch.float32}
    assert formats(load_policy(opt, how=BFLOAT)) == {torch.bfloat16}
    assert formats(load_policy(opt, how=BFLOAT, trained=True)) == {torch.float32}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_asked_for_is_used_and_says_the_same(opt: Path, attention: str) -> None:
    model = load_policy(opt, how=Loading(attention=attention))
    assert model.config._attn_implementation == attention
    torch.testing.assert_close(model(BATCH.input_ids).logits, load_policy(opt)(BATCH.input_ids).logits)


@pytest.mark.parametrize(
    ("installed", "dtype", "why"),
    [(False, "bfloat16", "the package flash-attn is not installed"), (True, "float32", "it computes in bfloat16")],
)
def test_flash_attention_where_it_cannot_be_is_one_line(
    monkeypatch: pytest.MonkeyPatch, installed: bool, dtype: str, why: str
) -> None:
    monkeypatch.setattr(loading_module, "is_flash_attn_2_available", lambda: installed)
    with pytest.raises(
        RunError, match=rf"^model.attention=flash_attention_2 cannot be used. {why}.*set model.attention"
    ):
        loading(config(attention="flash_attention_2", dtype=dtype), "cpu")


# -- dropout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["opt", "pythia", "llama-3.2", "qwen2.5", "mistral-sft", "gemma"])
def test_no_dropout_in_any_family(tmp_path: Path, family: str) -> None:
    folder = save_miniature(family, tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    names = {"dropout", "hidden_dropout", "attention_dropout", "activation_dropout", "layerdrop", "classifier_dropout"}
    (folder / "config.json").write_text(
        json.dumps(settings | dict.fromkeys(names & {*settings, "attention_dropout"}, 0.5))
    )
    torch.manual_seed(0)
    for model in (load_policy(folder).train(), new_reward_model(folder, init_std=1.0).train()):
        with torch.no_grad():
            first, second = (model(BATCH.input_ids[:1]).logits for _ in range(2))
        assert torch.equal(first, second)


def test_every_name_that_dropout_goes_by() -> None:
    gpt = without_dropout(GPT2Config())
    assert (gpt.resid_pdrop, gpt.embd_pdrop, gpt.attn_pdrop, gpt.summary_first_dropout) == (0, 0, 0, 0)


# -- what is refused ---------------------------------------------------------------------------------------------------


def without_weight(folder: Path, to: Path, name: str) -> Path:
    """Return `to`, with the model in `folder` less one weight."""
    weights = load_file(folder / "model.safetensors")
    weights.pop(name)
    to.mkdir()
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    return to


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(opt: Path, tmp_path: Path, value: float) -> None:
    weights = load_file(opt / "model.safetensors")
    name = sorted(weights)[3]
    weights[name].view(-1)[-1] = value
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((opt / "config.json").read_bytes())
    for how in (Loading(), BFLOAT):
        for open_ in (load_policy, lambda path, how: new_reward_model(path, init_std=1.0, how=how)):
            with pytest.raises(
                RunError, match=f"weights of the model in {tmp_path} are not finite. {name} holds NaN or"
            ):
                open_(tmp_path, how=how)


def test_finite_weights_whose_sum_is_not_are_taken() -> None:
    model = torch.nn.Linear(4, 1, bias=False)
    torch.nn.init.constant_(model.weight, 3e38)
    require_finite(model, "x")


def test_a_model_whose_head_was_never_trained_is_refused(tmp_path: Path) -> None:
    folder = save_miniature("pythia", tmp_path / "whole")
    head = next(name for name in load_file(folder / "model.safetensors") if "embed_out" in name or "lm_head" in name)
    with pytest.raises(RunError, match="no causal language model: its files lack lm_head.weight"):
        load_policy(without_weight(folder, tmp_path / "headless", head))


def test_a_tied_head_need_not_be_in_the_files(qwen: Path) -> None:
    assert "lm_head.weight" not in load_file(qwen / "model.safetensors")
    policy = load_policy(qwen)
    assert policy.lm_head.weight is policy.get_input_embeddings().weight


def test_a_reward_model_without_its_head_is_refused(opt: Path) -> None:
    with pytest.raises(RunError, match="no reward model could be opened in .*its files lack score.weight"):
        load_reward_model(opt)


def test_a_body_without_all_its_weights_starts_no_reward_model(opt: Path, tmp_path: Path) -> None:
    name = next(name for name in load_file(opt / "model.safetensors") if "layers.1.fc1.weight" in name)
    with pytest.raises(RunError, match="is damaged. its files lack .*fc1.weight"):
        new_reward_model(without_weight(opt, tmp_path / "part", name), init_std=1.0)


def test_a_classifier_that_reads_from_both_sides_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertForSequenceClassification(BertConfig(vocab_size=30, num_labels=1, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(RunError, match="is a BertForSequenceClassification. rewards are read at the last token"):
        load_reward_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hidden_size": 64}, "its weights have other shapes than its config.json says"),
        ({"hidden_size": "wide"}, "Validation error for field 'hidden_size': .*wide"),
        ({"model_type": "t5"}, "its family has no model of this kind in transformers"),
        ({"model_type": "brandnew"}, "has model type `brandnew` but Transformers does not recognize"),
        (
            {"model_type": "brandnew", "auto_map": {"AutoConfig": "x.C", "AutoModelForCausalLM": "x.Y"}},
            "it brings Python code of its own, which is not run",
        ),
    ],
    ids=["shapes", "type", "family", "new", "code"],
)
def test_a_config_that_does_not_fit_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], why: str
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to whether code should be run: nobody is asked
    file = save_miniature("llama-3.2", tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(RunError, match=f"^no policy could be opened in .*{why}") as raised:
        load_policy(tmp_path)
    assert "\n" not in str(raised.value)


def test_weights_that_are_no_pickle_are_one_line(tmp_path: Path) -> None:
    (save_miniature("opt-350m", tmp_path) / "pytorch_model.bin").write_bytes(b"garbage")
    with pytest.raises(RunError, match=r"^no policy could be opened in .*Weights only load failed\."):
        load_policy(tmp_path)


def test_gpt2_is_a_policy_too(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=16, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    assert load_policy(tmp_path).config.attn_pdrop == 0


# -- the reward head ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["opt", "qwen"])
def test_the_head_is_float32_whatever_the_body_is(request: pytest.FixtureRequest, tmp_path: Path, start: str) -> None:
    torch.manual_seed(0)
    model = new_reward_model(request.getfixturevalue(start), init_std=0.02, how=BFLOAT)
    assert model.score.weight.dtype == torch.float32
    body = getattr(model, model.base_model_prefix)
    assert {weight.dtype for weight in body.parameters()} == {torch.bfloat16}
    assert type(model).__name__.endswith("ForSequenceClassification")
    before = sequence_scores(freeze(model), BATCH)
    assert before.dtype == torch.float32
    model.save_pretrained(tmp_path)
    again = load_reward_model(tmp_path, how=BFLOAT)
    assert torch.equal(again.score.weight, model.score.weight), "not one bit of the head is lost"
    assert torch.equal(sequence_scores(freeze(again), BATCH), before)


def test_the_head_computes_outside_autocast(opt: Path) -> None:
    torch.manual_seed(0)
    model = freeze(new_reward_model(opt, init_std=1.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = token_values(model, BATCH)
        hidden = model.model(
            input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask.long(), position_ids=BATCH.position_ids
        ).last_hidden_state
    assert values.dtype == torch.float32
    assert torch.equal(values, (hidden.float() @ model.score.weight.T)[..., 0])


def test_a_new_reward_model_has_the_padding_of_its_tokenizer(qwen: Path, tmp_path: Path) -> None:
    model = new_reward_model(qwen, init_std=1.0)
    assert model.config.pad_token_id == 436  # <|endoftext|>: the template's <|im_end|> ends
    model.save_pretrained(tmp_path)
    assert load_reward_model(tmp_path).config.pad_token_id == 436


def test_rewards_are_read_in_pieces_that_fit(opt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    new_reward_model(opt, init_std=1.0).save_pretrained(tmp_path)
    reward = ModelReward(tmp_path, 1, "cpu")
    prompts, responses = [[5, 9], [7], [8, 8]], [[11, 12], [20], [21]]
    whole, sizes = reward(prompts, responses), []
    assert rows_at_once(reward.model, 100) == 256

    def two(model: Any, width: int) -> int:
        sizes.append(width)
        return 2

    monkeypatch.setattr(reward_module, "rows_at_once", two)
    torch.testing.assert_close(reward(prompts, responses), whole)
    assert sizes == [4]
    large = replace_config(reward.model.config, hidden_size=2**20)
    monkeypatch.setattr(reward.model, "config", large)
    assert rows_at_once(reward.model, 100_000) == 1


def replace_config(settings: Any, **changes: Any) -> Any:
    return type(settings).from_dict(settings.to_dict() | changes)
