"""Adapters: fresh ones change nothing, stored ones come back, merged ones say the same, each failure is one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import BOS, EOS, PAD, tiny_policy
from tiny_roles import LORA, adapted_policy, disturb, reward_adapter
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_cli.config.schema import QLoraConfig
from rlhf_cli.errors import RunError
from rlhf_cli.models import quantisation
from rlhf_cli.models.adapters import (
    OWN,
    Switched,
    WithoutAdapter,
    adapter_base,
    adapter_layers,
    is_adapter,
    merged,
    open_adapter,
    plain,
    recompute_activations,
    save_model,
    trained_size,
    with_adapter,
)
from rlhf_cli.models.folders import fingerprint, has_model, is_reward_model
from rlhf_cli.models.loading import Loading
from rlhf_cli.models.logps import frozen_token_logps, token_logps
from rlhf_cli.models.policy import load_policy
from rlhf_cli.models.quantisation import keep_trainable, quantised
from rlhf_cli.models.reward import load_reward_model, new_reward_model, sequence_scores, token_values
from rlhf_cli.models.sampling import sample
from rlhf_cli.models.tokens import collate

BATCH = collate([[BOS, 4, 5], [BOS, 6]], [[7, 8, EOS], [9, EOS]], PAD)
READING: Any = {"temperature": 1.0, "tree": None}


def said(model: Any) -> torch.Tensor:
    return frozen_token_logps(model, BATCH, **READING)


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_comes_back_to_the_bit(tmp_path: Path) -> None:
    policy = adapted_policy(tmp_path / "base")
    assert torch.equal(said(policy), said(load_policy(tmp_path / "base")))
    disturb(policy, seed=1)
    assert (said(policy) - said(load_policy(tmp_path / "base"))).abs().max() > 0.1
    save_model(policy, tmp_path / "policy")
    assert {path.name for path in (tmp_path / "policy").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    again = load_policy(tmp_path / "policy")
    assert type(again) is type(load_policy(tmp_path / "base")), "an ordinary model, with layers that adapt"
    assert torch.equal(said(again), said(policy))


def test_only_the_adapter_is_trained_and_its_size_is_known(tmp_path: Path) -> None:
    policy = adapted_policy(tmp_path / "base")
    trained = {name for name, weight in policy.named_parameters() if weight.requires_grad}
    assert all("lora_" in name for name in trained)
    # 2 layers of q, k, v, out (16 x 16) and fc1, fc2 (16 x 16): rank 4 x (16 + 16) each.
    assert trained_size(policy)[0] == 2 * 6 * 4 * 32
    whole = sum(weight.numel() for weight in policy.parameters())
    assert trained_size(policy)[1] == pytest.approx(2 * 6 * 4 * 32 / whole)


def test_a_reward_model_comes_back_with_its_head_and_its_base_in_another_format(tmp_path: Path) -> None:
    tiny_policy().save_pretrained(tmp_path / "base")
    model = reward_adapter(tmp_path / "base", tmp_path / "rm")
    scores = sequence_scores(plain(model).eval(), BATCH).detach()
    again = load_reward_model(tmp_path / "rm").eval()
    assert torch.equal(sequence_scores(again, BATCH), scores)
    half = load_reward_model(tmp_path / "rm", how=Loading(dtype=torch.bfloat16)).eval()
    assert half.model.decoder.layers[0].fc1.base_layer.weight.dtype == torch.bfloat16
    assert {weight.dtype for name, weight in half.named_parameters() if "lora_" in name} == {torch.float32}
    found = sequence_scores(half, BATCH)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, scores, atol=0.1, rtol=0.05)


def test_merged_models_say_what_adapted_ones_do(tmp_path: Path) -> None:
    policy = adapted_policy(tmp_path / "base")
    disturb(policy, seed=1)
    before = said(policy)
    whole = merged(policy)
    assert not adapter_layers(whole)
    torch.testing.assert_close(said(whole), before, atol=1e-4, rtol=0)
    model = reward_adapter(tmp_path / "base", tmp_path / "rm")
    scores = sequence_scores(plain(model).eval(), BATCH).detach()
    one = merged(open_adapter(new_reward_model(adapter_base(tmp_path / "rm"), init_std=9.0), tmp_path / "rm")).eval()
    torch.testing.assert_close(sequence_scores(one, BATCH), scores, atol=1e-4, rtol=0)


def test_the_policy_without_its_adapter_is_the_reference_and_leaves_gradients_alone(tmp_path: Path) -> None:
    policy = adapted_policy(tmp_path / "base")
    disturb(policy, seed=1)
    adapted, before = said(policy), [weight.requires_grad for weight in policy.parameters()]
    reference = WithoutAdapter(policy)
    assert torch.equal(said(reference), said(load_policy(tmp_path / "base")))
    assert torch.equal(said(policy), adapted), "afterwards the adapter answers again"
    assert [weight.requires_grad for weight in policy.parameters()] == before
    names = {
        name for name, weight in policy.named_parameters() if any(weight is other for other in reference.parameters())
    }
    assert names
    assert not any("lora_" in name for name in names)
    assert not any(weight.requires_grad for weight in reference.parameters())


def test_the_adapter_answers_again_after_an_error(tmp_path: Path) -> None:
    policy = adapted_policy(tmp_path / "base")
    disturb(policy, seed=1)
    before = said(policy)
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        WithoutAdapter(policy)()
    assert torch.equal(said(policy), before)


def test_samplers_and_measures_take_a_policy_with_an_adapter(tmp_path: Path) -> None:
    policy = adapted_policy(tmp_path / "base")
    disturb(policy, seed=1)
    save_model(policy, tmp_path / "policy")
    how: Any = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0, "eos_ids": [EOS], "pad_id": PAD}
    how["streams"] = range(32)
    drawn = []
    for model in (policy.eval(), load_policy(tmp_path / "policy").eval(), WithoutAdapter(policy)):
        drawn.append(sample(model, [[BOS, 4]] * 32, **how))
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_recomputed_activations_give_the_same_gradients_to_the_adapter_of_the_forward(tmp_path: Path) -> None:
    """A critic's body runs again in the backward pass, when the adapter of its forward is in force no more."""
    gradients = []
    for again in (False, True):
        policy = adapted_policy(tmp_path / "base").train()
        disturb(policy, seed=1)
        policy.add_adapter("critic", replace(policy.peft_config[OWN]))
        critic = {name: weight.requires_grad_(True) for name, weight in policy.named_parameters() if ".critic." in name}
        draws = torch.Generator().manual_seed(3)
        for weight in critic.values():
            weight.data = 0.3 * torch.randn(weight.shape, generator=draws)
        if again:
            recompute_activations(policy)
        with Switched(adapter_layers(policy), "critic"):
            value = token_logps(policy, BATCH, **READING).sum()
        (value + token_logps(policy, BATCH, **READING).square().sum()).backward()
        gradients.append({name: weight.grad for name, weight in policy.named_parameters() if weight.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(".critic." in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-5)


def test_a_full_model_computes_its_activations_again_too(tmp_path: Path) -> None:
    tiny_policy().save_pretrained(tmp_path)
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        model = new_reward_model(tmp_path, init_std=0.5).train()
        if again:
            recompute_activations(model)
            assert model.model.decoder.layers[0].gradient_checkpointing
        token_values(model, BATCH).square().sum().backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_targets_are_modules_by_name(tmp_path: Path) -> None:
    policy = adapted_policy(tmp_path / "base", replace(LORA, targets=["q_proj", "layers.1.fc1"]))
    assert sum("lora_A" in name for name, _ in policy.named_parameters()) == 3
    assert json.loads(_saved(policy, tmp_path / "p").read_text())["base_model_name_or_path"] == str(tmp_path / "base")


def _saved(policy: Any, folder: Path) -> Path:
    save_model(policy, folder)
    return folder / "adapter_config.json"


@pytest.mark.parametrize(
    ("targets", "line"),
    [
        (
            ["q_proj", "c_attn"],
            r"c_attn matches no linear layer of OPTForCausalLM. its linear layers are called fc1, fc2, ",
        ),
        (["lm_head"], "lm_head gives the logits"),
    ],
)
def test_targets_that_match_nothing_are_refused_with_what_there_is(
    targets: list[str], line: str, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=line):
        adapted_policy(tmp_path / "base", replace(LORA, targets=targets))


def test_all_linear_leaves_logits_and_reward_head_alone(tmp_path: Path) -> None:
    sizes: dict[str, int] = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 2)
    config = LlamaConfig(vocab_size=12, hidden_size=8, intermediate_size=8, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    policy = with_adapter(load_policy(tmp_path), LORA, base=tmp_path)
    assert {name.split(".")[-4] for name, _ in policy.named_parameters() if "lora_A" in name} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    classifier = with_adapter(new_reward_model(tmp_path, init_std=0.1), LORA, base=tmp_path)
    trained = [name for name, weight in classifier.named_parameters() if weight.requires_grad and "score" in name]
    assert trained == ["base_model.model.score.modules_to_save.default.weight"]


# -- folders ----------------------------------------------------------------------------------------------------------


def test_folders_know_adapters(tmp_path: Path) -> None:
    policy = adapted_policy(tmp_path / "base")
    save_model(policy, tmp_path / "policy")
    reward_adapter(tmp_path / "base", tmp_path / "rm")
    found = [
        (is_adapter(p), has_model(p), is_reward_model(p)) for p in (tmp_path / n for n in ("base", "policy", "rm"))
    ]
    assert found == [(False, True, False), (True, True, False), (True, True, True)]
    assert adapter_base(tmp_path / "policy") == tmp_path / "base"


def test_the_fingerprint_of_an_adapter_is_that_of_its_weights_and_its_base_wherever_it_lies(tmp_path: Path) -> None:
    policy = adapted_policy(tmp_path / "base")
    save_model(policy, tmp_path / "policy")
    before = fingerprint(tmp_path / "policy")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    file = tmp_path / "policy" / "adapter_config.json"
    file.write_text(file.read_text().replace(str(tmp_path / "base"), str(tmp_path / "elsewhere")))
    assert fingerprint(tmp_path / "policy") == before
    tiny_policy(seed=5).save_pretrained(tmp_path / "elsewhere")
    other_base = fingerprint(tmp_path / "policy")
    assert other_base != before
    disturb(policy, seed=1)
    policy.save_pretrained(str(tmp_path / "policy"))
    file.write_text(file.read_text().replace(str(tmp_path / "base"), str(tmp_path / "elsewhere")))
    assert fingerprint(tmp_path / "policy") not in (before, other_base)


def test_an_adapter_without_its_base_is_one_line(tmp_path: Path) -> None:
    save_model(adapted_policy(tmp_path / "base"), tmp_path / "policy")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(
        RunError, match=r"policy needs its base, and .*base holds no model. put it back, or name its new"
    ):
        load_policy(tmp_path / "policy")
    (tmp_path / "policy" / "adapter_config.json").write_text("{")
    with pytest.raises(RunError, match=r"adapter_config.json is damaged"):
        load_policy(tmp_path / "policy")


def test_an_adapter_of_another_base_is_one_line(tmp_path: Path) -> None:
    save_model(adapted_policy(tmp_path / "base"), tmp_path / "policy")
    sizes: dict[str, int] = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 2)
    LlamaForCausalLM(LlamaConfig(vocab_size=12, hidden_size=8, **sizes)).save_pretrained(tmp_path / "base")
    with pytest.raises(RunError, match=r"the adapter in .*policy could not be put on its base"):
        load_policy(tmp_path / "policy")


# -- quantised bases --------------------------------------------------------------------------------------------------

QLORA = QLoraConfig(
    name="qlora", rank=4, alpha=8, targets=["all-linear"], learning_rate_factor=1, bits="nf4", double_quant=True
)


def test_qlora_without_bitsandbytes_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantisation, "find_spec", lambda _: None)
    with pytest.raises(RunError, match=r"peft=qlora needs bitsandbytes, .*pip install 'rlhf-cli\[qlora\]'"):
        quantised(Loading(), QLORA)


@pytest.mark.parametrize(
    ("bits", "expected"), [("nf4", (True, False, "nf4")), ("fp4", (True, False, "fp4")), ("int8", (False, True, None))]
)
def test_qlora_says_how_the_base_is_held(bits: str, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantisation, "find_spec", lambda _: object())
    found = quantised(Loading(dtype=torch.bfloat16), replace(QLORA, bits=bits)).quantization
    kind = found.bnb_4bit_quant_type if found.load_in_4bit else None
    assert (found.load_in_4bit, found.load_in_8bit, kind) == expected
    if bits != "int8":
        assert found.bnb_4bit_use_double_quant
        assert found.bnb_4bit_compute_dtype == torch.bfloat16
    assert quantised(Loading(), LORA) == Loading(), "LoRA holds it as it is"


@pytest.mark.parametrize("bits", ["nf4", "fp4", "int8"])
def test_an_adapter_learns_on_a_quantised_base_that_stays_as_it_is(bits: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_policy().save_pretrained(tmp_path)
    policy = load_policy(tmp_path, how=quantised(Loading(), replace(QLORA, bits=bits)))
    assert policy.model.decoder.layers[0].fc1.weight.dtype == (torch.int8 if bits == "int8" else torch.uint8)
    policy = with_adapter(keep_trainable(policy), LORA, base=tmp_path).train()
    before = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    optimizer = torch.optim.SGD([weight for weight in policy.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(2):
        said(policy)  # reading between the steps must not end the training
        token_logps(policy, BATCH, **READING).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, weight in policy.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "lora_" in name}
