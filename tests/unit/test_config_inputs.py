"""What a run starts from, as config: a model chooses data and settings, adapters scale them, datasets are mixed."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_cli.config import compose
from rlhf_cli.config.inputs import (
    ChoicesConfig,
    LoraConfig,
    MadeModelConfig,
    MixtureConfig,
    ModelConfig,
    PreferencesConfig,
    QLoraConfig,
    TextConfig,
)
from rlhf_cli.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "dataset", "trainer", "lengths"),
    [
        ([], "survey", "survey", (24, 12)),
        (["dataset=tldr"], "tldr", "text", (192, 64)),
        (["model=opt-1.3b"], "hh_rlhf", "pretrained", (256, 256)),
        (["model=llama-3.2-1b"], "tldr", "pretrained", (256, 256)),
        (["model=mistral-7b-sft"], "ultrafeedback", "pretrained", (512, 512)),
        (["model=opt-1.3b", "dataset=survey"], "survey", "pretrained", (24, 12)),
        (["dataset=shp", "model=opt-1.3b"], "shp", "pretrained", (256, 256)),
        (["model=opt-1.3b", "trainer=text", "dataset.max_prompt_tokens=99"], "hh_rlhf", "text", (99, 256)),
    ],
)
def test_a_model_chooses_what_is_not_chosen(
    overrides: list[str], dataset: str, trainer: str, lengths: tuple[int, int]
) -> None:
    cfg = compose.load("align", overrides)
    assert (cfg.dataset.name, cfg.trainer.name) == (dataset, trainer)
    assert (cfg.dataset.max_prompt_tokens, cfg.dataset.max_completion_tokens) == lengths


def test_the_threshold_of_pm_is_the_worlds_on_the_survey_and_the_papers_on_text() -> None:
    def alpha(*overrides: str) -> float | None:
        return compose.load("align", list(overrides)).algo.alpha  # type: ignore[attr-defined]

    assert (alpha(), alpha("dataset=tldr"), alpha("algo=dpm"), alpha("algo=dpm", "model=opt-125m")) == (
        0.02, 0.1, 0.02, 0.1,
    )  # fmt: skip
    assert alpha("model=opt-125m", "algo.alpha=0.3") == 0.3


def test_adapters_scale_the_learning_rates_made_for_all_weights_and_no_others() -> None:
    def rates(*overrides: str) -> list[float]:
        trainer = compose.load("align", list(overrides)).trainer
        blocks = [trainer.sft, trainer.rm, trainer.online, trainer.pairwise]
        return [block.learning_rate for block in blocks] + [trainer.online.critic_learning_rate]

    full = rates("model=opt-1.3b")
    assert full == pytest.approx([1e-5, 1e-5, 1e-6, 5e-7, 1e-6])  # 2405.16455, 2405.16436
    assert rates("model=opt-1.3b", "peft=lora") == pytest.approx([10 * rate for rate in full])
    assert rates("model=opt-1.3b", "peft=lora", "peft.learning_rate_factor=2")[0] == pytest.approx(2e-5)
    assert rates("model=opt-1.3b", "peft=lora", "trainer.sft.learning_rate=3e-4")[0] == 3e-4
    assert rates("peft=lora") == rates()


def test_types_follow_model_adapters_and_source() -> None:
    assert type(compose.load("align", []).model) is MadeModelConfig
    cfg = compose.load("align", ["model=opt-125m", "peft=lora", "peft.targets=q_proj"])
    assert type(cfg.model) is ModelConfig
    assert type(cfg.peft) is LoraConfig
    assert cfg.peft.targets == ["q_proj"]
    assert type(compose.load("align", ["peft=qlora"]).peft) is QLoraConfig
    for name, kind in (("hh_rlhf", TextConfig), ("ultrafeedback", PreferencesConfig), ("shp", ChoicesConfig)):
        assert type(compose.load("align", [f"dataset={name}"]).dataset) is kind
    assert compose.load("align", ["dataset=choices", "dataset.path=x", "dataset.columns.first_value=1"])


def test_a_mixture_is_of_yaml_and_of_paths() -> None:
    asked = ["dataset=mixture", "dataset.parts=[tldr,my rows.jsonl]", "dataset.weights=[3,1]"]
    cfg = compose.load("align", asked)
    assert isinstance(cfg.dataset, MixtureConfig)
    first, second = cfg.dataset.sources
    assert (first["name"], first["columns"]["choice"]) == ("tldr", "choice")
    assert (second["source"], second["path"]) == ("preferences", "my rows.jsonl")
    assert cfg.dataset.weights == [3.0, 1.0]
    other = compose.load("align", [*asked[:1], "dataset.parts=[tldr,shp]", asked[2]])
    assert compose.identity(cfg) != compose.identity(other)
    assert compose.load("align", ["dataset=mixture", "dataset.parts=tldr", "dataset.weights=1"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("model=opt-1.3b model.hidden_size=3", r"model\.hidden_size .* is not a key here\. It is a key of model=tiny"),
        ("model=pretrained", r"model\.path is null.*model\.path=ORG/NAME"),
        ("model=opt-1.3b model.dtype=fp16", r"model\.dtype=fp16 .* is not a choice.*bfloat16"),
        ("model=opt-13b", r"model=opt-13b does not exist\. The nearest choice is opt-1\.3b"),
        ("peft.rank=4", r"peft\.rank .* is not a key here\. It is a key of peft=lora"),
        ("peft=lora peft.rank=0", r"peft\.rank=0 .* out of range"),
        ("peft.name=dora", r"peft\.name=dora is not a choice"),
        ("model.share_base=true", r"share_base=true needs adapters.*peft=lora"),
        ("peft=lora model.share_base=true model.reward_path=x", r"does not go with a reward model on another base"),
        ("peft=lora model.share_base=true reward=warm", r"reward=warm does not go with model\.share_base"),
        (
            "peft=lora model.share_base=true launch=accelerate launch.strategy=fsdp2",
            r"^launch\.strategy=fsdp2 does not go with model\.share_base=true.*launch\.strategy=ddp",
        ),
        (
            "algo=pm generation=continuous launch=accelerate launch.strategy=zero3",
            r"^generation=continuous does not go with launch\.strategy=zero3.*generation=default or vllm",
        ),
        ("dataset=mixture dataset.parts=[tldr,survey]", r"dataset\.parts has survey, which cannot be mixed"),
        ("dataset=mixture dataset.weights=[1]", r"2 datasets and dataset\.weights 1 numbers"),
        ("dataset=mixture dataset.weights=[1,-1]", r"a weight that is not a number > 0"),
        ("dataset=mixture dataset.weights=[1,x]", r"dataset\.weights=.*wrong type.*a list of numbers"),
        ("dataset=mixture dataset.sources=[]", r"dataset\.sources is not set by hand"),
        ("dataset=mixture dataset.path=x", r"dataset\.path .* is not a key here"),
        ("dataset=tldr dataset.columns.chosen=x", r"dataset\.columns\.chosen .* is a key of .*dataset=preferences"),
        ("dataset.columns=x dataset=tldr", r"dataset\.columns .* is a block of keys"),
    ],
)
def test_refusals(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose.load("align", overrides.split(" "))


@pytest.mark.parametrize("command", ["train-sft", "train-rm", "align", "evaluate"])
def test_one_experiment_serves_every_command(command: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: opt-350m\n  - override /dataset: shp\n"
        "  - override /peft: lora\n  - override /reward: pcrm_length\n  - override /algo: kl_ppo\nseed: 7\n"
    )
    cfg = compose.load(command, ["experiment=mine"], tmp_path)
    assert (cfg.model.name, cfg.dataset.name, cfg.trainer.name, cfg.peft.name, cfg.seed) == (
        "opt-350m", "shp", "pretrained", "lora", 7,
    )  # fmt: skip
    assert getattr(getattr(cfg, "algo", None), "name", "kl_ppo") == "kl_ppo"


def test_groups_of_other_commands_cannot_be_chosen() -> None:
    with pytest.raises(ConfigError, match="algo .* is not a key of train-sft. It belongs to align, evaluate"):
        compose.load("train-sft", ["algo=pm"])


def test_a_path_in_the_home_folder_needs_no_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/o'hara")
    given = [
        "model=pretrained",
        "dataset=preferences",
        "model.path=~/my-model",
        "dataset.path=~/a b.csv",
        "run_dir=~/r=1",
    ]
    cfg = compose.load("align", given)
    assert cfg.model.path == "/home/o'hara/my-model"
    assert cfg.dataset.path == "/home/o'hara/a b.csv"  # type: ignore[attr-defined]
    assert cfg.run_dir == "/home/o'hara/r=1"
    with pytest.raises(ConfigError, match="cannot read 'model.path=~/a,~/b'"):
        compose.load("align", ["model.path=~/a,~/b"])
