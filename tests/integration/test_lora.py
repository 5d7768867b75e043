"""Adapters end to end: every stage and family of algorithms, roles on one base, other bases for the reward."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_jobs import SMALL, SURVEY, gap, read_json, read_lines, sft_folder, weights
from test_resume import interrupted_at, same_training_state
from transformers import XGLMConfig

from rlhf_cli.config.compose import load
from rlhf_cli.errors import ConfigError, RunError
from rlhf_cli.models.adapters import adapter_base, is_adapter
from rlhf_cli.models.policy import load_policy, load_tokenizer
from rlhf_cli.models.reward import ModelReward, load_reward_model
from rlhf_cli.stages import provide

Small = Callable[..., Path]
LORA = ["peft=lora", "peft.rank=4"]
FAMILIES = {
    "pm": ["algo=pm"],
    "pm_rloo": ["algo=pm", "algo.advantage=rloo"],
    "pm_gold": ["algo=pm", "reward=gold"],
    "dpo": ["algo=dpo", "model.dtype=bfloat16"],
}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter folder."""
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def stages(run_dir: Path) -> dict[str, Path]:
    return {name: Path(folder) for name, folder in read_json(run_dir / "stages.json").items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """Return a folder with a small causal language model and its tokenizer: a base as one would download it."""
    from small_jobs import job

    folder = tmp_path_factory.mktemp("bases")
    job("train-sft", run_dir=folder / "run", store=store)
    return Path(shutil.copytree(folder / "run" / "model", folder / "base"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_an_adapter_on_the_reference_and_is_measured_again_alike(
    family: str, small: Small, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = small("align", *LORA, *FAMILIES[family])
    said = capsys.readouterr()
    (line,) = [line for line in (said.out + said.err).splitlines() if line.startswith("policy: ")]
    # 1 layer: four of 32 x 32 and two of 32 x 64, rank 4.
    assert line.startswith(f"policy: adapter of {4 * (4 * 64 + 2 * 96):,} parameters (")
    assert line.endswith("%) on the reference")
    reference = sft_folder(store, run_dir) / "model"
    for name in ("model", "best"):
        assert is_adapter(run_dir / name)
        assert adapter_base(run_dir / name) == reference.resolve()
        assert load_tokenizer(run_dir / name).get_vocab() == load_tokenizer(reference).get_vocab()
    assert max(float(value.abs().max()) for key, value in adapter(run_dir / "model").items() if "lora_B" in key) > 1e-6
    metrics = read_json(run_dir / "metrics.json")
    assert all(value is None or math.isfinite(value) for value in metrics.values())
    assert metrics["kl/sequence"] > 1e-8
    evaluated = read_json(small("evaluate", f"policy='{run_dir}'", name="evaluated") / "metrics.json")
    assert evaluated["pm/tv"] == pytest.approx(metrics["pm/tv"], abs=1e-6)
    assert evaluated["kl/sequence"] == pytest.approx(metrics["kl/sequence"], rel=1e-4)


def test_roles_on_one_base_end_where_roles_on_their_own_do(small: Small, tmp_path: Path) -> None:
    how = [*LORA, "algo=pm", "trainer.online.micro_batch_size=8"]
    apart = small("align", *how, name="apart")
    one = small("align", *how, "model.share_base=true", "model.gradient_checkpointing=true", name="one")
    assert stages(apart) == stages(one), "the same SFT policy and reward model serve both"
    assert gap(adapter(apart / "model"), adapter(one / "model")) < 1e-5
    for left, right in zip(
        read_lines(apart / "training_log.jsonl"), read_lines(one / "training_log.jsonl"), strict=True
    ):
        assert left == pytest.approx(right, abs=1e-4)
    assert (one / "model" / "reward").exists() is False


@pytest.mark.parametrize("share", ["false", "true"], ids=["apart", "shared"])
def test_an_interrupted_run_with_adapters_ends_where_an_uninterrupted_one_does(
    share: str, small: Small, tmp_path: Path
) -> None:
    how = [*LORA, "algo=pm", f"model.share_base={share}", "trainer.online.max_steps=8"]
    whole = small("align", *how, name="whole")
    with interrupted_at(6), pytest.raises(KeyboardInterrupt, match="^$"):
        small("align", *how)
    run_dir = small("align", *how)
    assert gap(adapter(run_dir / "model"), adapter(whole / "model")) == 0
    assert same_training_state(run_dir / "checkpoints" / "checkpoint-8", whole / "checkpoints" / "checkpoint-8") > 20
    assert read_json(run_dir / "metrics.json") == read_json(whole / "metrics.json")


def test_the_reward_model_is_an_adapter_with_its_head_and_comes_back_with_its_scores(small: Small) -> None:
    run_dir = small("train-rm", *LORA)
    folder = run_dir / "model"
    assert is_adapter(folder)
    stored = adapter(folder)
    heads = [key for key in stored if "score" in key]
    assert len(heads) == 1
    reward = ModelReward(folder, 1, "cpu")
    found = load_reward_model(folder).eval()
    assert torch.equal(found.score.weight, stored[heads[0]])
    rows = [[4, 5, 2], [6, 2]]
    assert torch.equal(reward([[0, 4]] * 2, rows), ModelReward(folder, 1, "cpu")([[0, 4]] * 2, rows))
    metrics = read_json(run_dir / "metrics.json")
    assert 0 <= metrics["rm/accuracy"] <= 1
    assert metrics["rm/negative_accuracy"] >= 0


def test_sft_trains_an_adapter_and_keeps_an_ordinary_model(base: Path, small: Small) -> None:
    folder = small("train-sft", *LORA, f"model.path='{base}'") / "model"
    assert not is_adapter(folder)
    before, after = weights(base), weights(folder)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all(key.endswith("proj.weight") or ".fc" in key for key in changed), "layers that adapters are on"
    for key in changed:
        assert torch.linalg.matrix_rank(after[key] - before[key], rtol=1e-3) <= 4, key


def test_with_no_sft_steps_the_base_is_the_sft_policy(base: Path, small: Small, trained: list[str]) -> None:
    run_dir = small("train-sft", f"model.path='{base}'", "trainer.sft.max_steps=0")
    assert trained == []
    assert gap(weights(base), weights(run_dir / "model")) == 0


def test_members_with_adapters_are_averaged_as_whole_weights(small: Small) -> None:
    run_dir = small("train-rm", *LORA, "reward=warm", "reward.members=2")
    assert not is_adapter(run_dir / "model")
    assert load_reward_model(run_dir / "model").config.hidden_size == 32
    with pytest.raises(ConfigError, match=r"^reward=warm does not go with model.share_base=true"):
        small("align", *LORA, "reward=warm", "reward.members=2", "model.share_base=true", "algo=pm", name="shared")


# -- another base for the reward ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base with other tokens than the policy's."""
    from rlhf_cli.config.schema import MadeModelConfig
    from rlhf_cli.data.tokenizer import word_tokenizer
    from rlhf_cli.models.policy import make_policy

    folder, words = tmp_path_factory.mktemp("foreign"), sorted(set(load_tokenizer(base).get_vocab()) - {"<unk>"})
    tokenizer = word_tokenizer([" ".join(reversed(words)), "some more words"])
    sizes = MadeModelConfig(
        name="other", path=None, hidden_size=16, ffn_size=16, layers=1, heads=2, init_std=0.1, vocab_size=300
    )
    make_policy(sizes, tokenizer, max_positions=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("peft", [[], LORA], ids=["full", "lora"])
def test_a_reward_model_on_another_base_reads_its_own_tokens(
    peft: list[str], foreign: Path, small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = small("align", *peft, "algo=pm", f"model.reward_path='{foreign}'")
    folder = stages(run_dir)["reward model"] / "model"
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(foreign).get_vocab()
    assert load_reward_model(folder).config.hidden_size == 16
    assert load_policy(run_dir / "model").config.hidden_size == 32
    said = capsys.readouterr()
    assert "critic: starts from the SFT policy, because the reward model in" in said.out + said.err
    report = read_json(small("train-rm", *peft, f"model.reward_path='{foreign}'", name="rm") / "metrics.json")
    assert 0 <= report["rm/accuracy"] <= 1


def test_a_reward_model_may_start_from_the_policy_s_base(base: Path, small: Small) -> None:
    how = [f"model.path='{base}'", "model.reward_start=base", *LORA, "algo=pm"]
    run_dir = small("align", *how)
    assert adapter_base(stages(run_dir)["reward model"] / "model") == base
    with pytest.raises(ConfigError, match=r"model.reward_start=base needs a base"):
        small("align", "model.reward_start=base", "algo=pm", name="made")


# -- identities --------------------------------------------------------------------------------------------------------


def identities(*overrides: str) -> tuple[dict[str, Any], dict[str, Any]]:
    cfg = load("align", [*SMALL, *SURVEY, "algo=pm", *overrides])
    return provide.sft_identity(cfg), provide.rm_identity(cfg)


def test_what_belongs_to_the_reward_does_not_train_sft_again(base: Path, foreign: Path) -> None:
    path = f"model.path='{base}'"
    sft, rm = identities(path, *LORA)
    for other in ([f"model.reward_path='{foreign}'"], ["model.reward_start=base"]):
        assert identities(path, *LORA, *other)[0] == sft
        assert identities(path, *LORA, *other)[1] != rm
    assert identities(path, *LORA, "model.share_base=true") == (sft, rm)
    assert identities(path, *LORA, "peft.learning_rate_factor=3") == (sft, rm), "it is in the learning rates already"
    assert identities(path, *LORA, "peft.alpha=3")[0] != sft
    assert identities(path)[0] != sft
    made = ["model.hidden_size=64", "model=pretrained", "dataset=survey", "trainer=survey"]
    sizes = [text for text in SMALL if not text.startswith("model.")]
    named = load("align", [*sizes, *SURVEY, *LORA, path, "algo=pm", *made[1:], "model.dtype=float32"])
    assert provide.sft_identity(named) == sft, "sizes and names mean nothing to a model that is loaded"
    assert identities(path, *LORA, "model.init_std=0.3") == (sft, {**rm, "init_std": 0.3})
    assert identities(*LORA)[0] == identities()[0], "a model that is made is trained whole"
    assert identities(*LORA)[1] != identities()[1]


def test_a_base_is_known_by_its_content(base: Path, tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(base, tmp_path / "elsewhere"))
    assert identities(f"model.path='{elsewhere}'") == identities(f"model.path='{base}'")
    with (elsewhere / "config.json").open("a") as file:
        file.write("\n\n")
    assert identities(f"model.path='{elsewhere}'") != identities(f"model.path='{base}'")


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_qlora_without_bitsandbytes_is_refused_before_anything_is_trained_and_still_measured(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[str]
) -> None:
    from rlhf_cli.models import quantisation

    monkeypatch.setattr(quantisation, "find_spec", lambda _: None)
    with pytest.raises(RunError, match=r"peft=qlora needs bitsandbytes"):
        small("align", "peft=qlora", "algo=pm", store=tmp_path / "empty")
    assert trained == []
    run_dir = small("align", *LORA, "reward=gold", "algo=dpo")
    assert small("evaluate", "peft=qlora", "reward=gold", f"policy='{run_dir}'", name="evaluated").is_dir()


@pytest.mark.parametrize("what", ["tokenizer", "family"])
def test_a_base_that_the_reward_model_cannot_start_from_is_refused_before_anything_is_trained(
    what: str, foreign: Path, small: Small, tmp_path: Path, trained: list[str]
) -> None:
    folder = tmp_path / "bad"
    if what == "tokenizer":
        line = r"no tokenizer could be opened in .*bad. none of its files is there: tokenizer_config.json, "
        shutil.copytree(foreign, folder, ignore=shutil.ignore_patterns("*token*"))
    else:
        line = r"can start from the model in .*bad. transformers has no sequence classifier of the family xglm"
        shutil.copytree(foreign, folder)
        XGLMConfig(vocab_size=99_999, d_model=16, ffn_dim=16, num_layers=1, attention_heads=2).save_pretrained(folder)
    for command in ("align", "train-rm"):
        with pytest.raises(RunError, match=line):
            small(command, f"model.reward_path='{folder}'", store=tmp_path / "empty", name=command)
    assert trained == []


def test_targets_that_match_nothing_are_refused_before_anything_is_trained(
    small: Small, tmp_path: Path, trained: list[str]
) -> None:
    with pytest.raises(RunError, match=r"c_attn matches no linear layer of OPTForCausalLM"):
        small("align", *LORA, "peft.targets=[c_attn]", "algo=pm", store=tmp_path / "empty")
    assert trained == []
