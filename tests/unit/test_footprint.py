"""What a command says about its memory before it reads any weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, OPTConfig

from rlhf_cli import ranks
from rlhf_cli.config import compose
from rlhf_cli.errors import RunError
from rlhf_cli.models import dry_run
from rlhf_cli.models.dry_run import Work
from rlhf_cli.stages import footprint
from rlhf_cli.stages.footprint import announce, plan_of, remedies, report, shapes, stages_needed

GB = 1e9


def passes(share: float) -> Callable[..., Work]:
    """Return what a pass takes, made up: a number of bytes a token, a third of it with checkpointing."""

    def taken(shape: Any, how: dry_run.Holding, tokens: dry_run.Tokens) -> Work:
        size = share * tokens.rows * (tokens.prompt + tokens.response) * (1 / 3 if how.checkpointing else 1)
        return Work(size / 2, size, size / 4)

    return taken


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes themselves are held in test_memory_shapes.py."""
    for name in ("trained_policy", "trained_values", "trained_on_text", "compared", "read"):
        monkeypatch.setattr(dry_run, name, passes(2e5))
    monkeypatch.setattr(dry_run, "generated", passes(1e4))


@pytest.fixture(autouse=True)
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "free_memory", lambda device: int(1e15))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a config.json alone: 30 million parameters, and none of them on the disk."""
    folder = tmp_path_factory.mktemp("memory") / "model"
    LlamaConfig(
        vocab_size=20_000, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


@cache
def config(command: str, *overrides: str, store: Path | str = "nowhere") -> Any:
    return compose.load(command, [f"store_dir={store}", "tracker=none", "device=cpu", *overrides], None)


def own(model: Path, *more: str) -> list[str]:
    return ["model=pretrained", f"model.path={model}", "dataset.path=data.jsonl", *more]


def free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(footprint, "free_memory", lambda device: int(size))


def total(cfg: Any, stage: str) -> float:
    return footprint.estimate(plan_of(cfg, stage), *shapes(cfg)).total


def test_a_model_that_is_made_here_takes_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    announce(config("train-rm"))
    said = capsys.readouterr().out
    assert said.startswith("memory: about ")
    assert said.endswith("of 1000000.0 GB free\n")
    assert said.count("\n") == 1


def test_a_pretrained_model_takes_a_table_of_its_roles(model: Path) -> None:
    cfg = config("align", *own(model))
    lines = report(cfg, ["online"])
    assert lines[0] == f"memory, GB: online {total(cfg, 'online') / GB:.1f}"
    assert [line.split("  ")[1] for line in lines[2:6]] == ["policy", "reference", "reward model", "critic"]
    assert [line.split(",")[0].strip() for line in lines[6:9]] == ["generation", "reading", "training"]
    assert [line for line in lines if line.endswith("<- the largest")] == [lines[8]]
    assert "cache" in lines[6]
    assert lines[9].endswith("in all): fits")
    assert len(lines) == 10


def test_only_what_is_missing_is_told_and_the_largest_stage_is_shown(model: Path) -> None:
    cfg = config("align", *own(model, "algo=dpo"))
    assert stages_needed(cfg) == ["sft", "rm", "pairwise"]
    lines = report(cfg, ["sft", "rm", "pairwise"])
    sizes = {stage: total(cfg, stage) for stage in ("sft", "rm", "pairwise")}
    assert max(sizes, key=lambda stage: sizes[stage]) == "pairwise"
    told = ", ".join(f"{stage} {size / GB:.1f}" for stage, size in sizes.items())
    assert lines[0] == f"memory, GB: {told}; the largest, pairwise:"
    assert stages_needed(config("train-sft", *own(model))) == ["sft"]
    assert stages_needed(config("align", *own(model, "trainer.sft.max_steps=0", "trainer.sft.epochs=null"))) == [
        "rm",
        "online",
    ]
    assert stages_needed(config("align", "reward=gold")) == ["sft", "online"]


def test_nothing_is_said_where_nothing_is_trained(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(footprint, "stages_needed", lambda cfg: [])
    announce(config("train-sft"))
    assert capsys.readouterr().out == ""


def test_too_little_memory_is_a_watch_out_with_settings_that_help(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config("align", *own(model))
    everything = total(cfg, "online")
    free(monkeypatch, 0.9 * everything)
    lines = report(cfg, ["sft", "online"])
    assert lines[-3].endswith("does not fit")
    assert lines[-2] == "  watch out: online needs more memory than cpu has free; what lowers it:"
    setting, told = lines[-1].split()
    assert setting == "trainer.online.micro_batch_size=2"
    assert float(told) == pytest.approx(total(config("align", *own(model, setting)), "online") / GB, abs=0.06)
    free(monkeypatch, 0.1 * everything)
    assert "online needs more memory than cpu has free, as does sft; what lowers it:" in "".join(
        report(cfg, ["sft", "online"])
    )


def test_each_remedy_does_what_is_said_of_it(model: Path) -> None:
    cfg = config("align", *own(model))
    everything = total(cfg, "online")
    found = remedies(cfg, footprint.estimate(plan_of(cfg, "online"), *shapes(cfg)), free=0.3 * everything)
    assert list(found) == [
        "trainer.online.micro_batch_size=2",
        "model.gradient_checkpointing=true",
        "peft=lora",
        "trainer.online.micro_batch_size=2 model.gradient_checkpointing=true peft=lora",
    ]
    for setting, told in found.items():
        assert total(config("align", *own(model, *setting.split())), "online") == pytest.approx(told), setting
        assert told < everything
    assert list(found.values())[-1] <= 0.3 * everything


def test_of_what_is_split_over_processes_each_is_told_its_part(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config("align", *own(model, "trainer.online.batch_size=64", "trainer.online.micro_batch_size=4"))
    plan = replace(plan_of(cfg, "online"), rollouts=16)  # of each of four processes
    found = footprint.estimate(plan, *shapes(cfg))
    monkeypatch.setenv(ranks.LAUNCHED, "1")
    monkeypatch.setenv(ranks.STRATEGY, "fsdp2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(footprint, "plan_of", lambda cfg, stage: plan)
    part = found.held / 4 + max(phase.total - 0.75 * phase.gradients for phase in found.phases)
    assert report(cfg, ["online"])[0] == f"memory, GB: online {part / GB:.1f}"
    assert not any("share_base" in setting for setting in remedies(cfg, found, free=0)), "it goes with ddp alone"
    monkeypatch.setenv(ranks.STRATEGY, "ddp")
    assert report(cfg, ["online"])[0] == f"memory, GB: online {found.total / GB:.1f}"
    assert any("share_base" in setting for setting in remedies(cfg, found, free=0))


def test_an_architecture_that_cannot_be_estimated_stops_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*asked: object) -> None:
        raise ValueError("Unrecognized configuration class\nand more")

    monkeypatch.setattr(footprint, "estimate", refuses)
    announce(config("train-sft", *own(model)))
    assert capsys.readouterr().out == "memory: no estimate for this model (Unrecognized configuration class)\n"


def test_a_target_that_matches_nothing_is_refused_before_weights_are_read(model: Path) -> None:
    with pytest.raises(RunError, match="query_key_value matches no linear layer of LlamaForCausalLM"):
        announce(config("train-sft", *own(model, "peft=lora", "peft.targets=[query_key_value]")))


def test_adapters_and_the_shared_base_reach_the_plan(model: Path) -> None:
    plan = plan_of(config("align", *own(model, "peft=lora", "peft.rank=7", "model.share_base=true")), "online")
    assert plan.how.adapters is not None
    assert (plan.how.adapters.rank, plan.how.adapters.targets) == (7, ("all-linear",))
    assert plan.share_base
    assert plan.weight_bytes is None
    assert (plan.rollouts, plan.micro_batch, plan.accumulates, plan.critic) == (64, 8, True, True)
    assert plan_of(config("align", *own(model, "peft=qlora")), "online").weight_bytes == footprint.FOUR_BITS_DOUBLE
    assert plan_of(config("align", *own(model, "peft=qlora", "peft.bits=int8")), "online").weight_bytes == 1.0
    tiny = config("align", "peft=lora")
    assert plan_of(tiny, "sft").how.adapters is None  # a model made here has no base worth keeping
    assert plan_of(tiny, "online").how.adapters is not None


def test_the_reward_models_body_may_be_another(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 64, "num_hidden_layers": 2}
    OPTConfig(**sizes, num_attention_heads=2).save_pretrained(other)
    policy, reward = shapes(config("align", *own(model, f"model.reward_path={other}")))
    assert (policy.config.hidden_size, reward and reward.config.hidden_size) == (512, 64)
    assert shapes(config("align", *own(model)))[1] is None
