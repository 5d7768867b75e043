"""The papers' presets: each composes, holds the papers' numbers, and says where each of them comes from.

That each also serves train-sft, train-rm and evaluate is in test_config.py, with every other yaml.
"""

from __future__ import annotations

import re
import shlex
import socket
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config import compose, sweeps
from rlhf_cli.config.catalog import Catalog, conf_dir
from rlhf_cli.errors import ConfigError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "presets.md"
PRESETS = [name for name in Catalog("align").choices("experiment") if name != "quick"]
PM = [name for name in PRESETS if name.startswith("pm_")]
SOURCE = re.compile(r"\b2\d{3}\.\d{5}\b|official code|our choice:")
COMMAND = re.compile(r"^#   (rlhf .+)$", re.MULTILINE)

# What the papers and their releases say, for every preset; a batch is per device there and whole here.
PM_PAPER = {
    "algo.name": "pm",
    "algo.beta": 1.0,  # of the grid of arXiv 2405.16455: 0.1, 0.5, 1
    "algo.alpha": 0.1,  # of the grid of arXiv 2405.16455: 0.1, 0.3, 0.5
    "algo.lam": 0.95,  # PM_RLHF dschat/rlhf/ppo_trainer.py, as the next four
    "algo.gamma": 1.0,
    "algo.clip_range": 0.2,
    "algo.value_clip_range": 0.2,
    "reward.clip": 5.0,
    "algo.advantage": "gae",
    "algo.num_generations": 1,  # PM_RLHF step3 main.py: a batch of prompts is a batch of rollouts
    "generation.top_p": 1.0,  # 0.9 there, and wrong: docs/paper_index.md
    "model.reward_start": "base",  # PM_RLHF training_scripts/rm: --model_name_or_path is the base
    "dataset.max_prompt_tokens": 256,  # PM_RLHF training_scripts/po/ppo: --max_prompt_seq_len
    "dataset.max_completion_tokens": 256,  # --max_answer_seq_len
    "dataset.sft_fraction": 0.2,  # --data_split 2,4,4
    "dataset.rm_fraction": 0.4,
    "trainer.sft.epochs": 2,  # PM_RLHF training_scripts/sft
    "trainer.sft.batch_size": 4 * 30,
    "trainer.sft.learning_rate": 1e-5,
    "trainer.sft.weight_decay": 0.0,
    "trainer.sft.warmup_fraction": 0.0,
    "trainer.rm.epochs": 2,  # PM_RLHF training_scripts/rm
    "trainer.rm.learning_rate": 1e-5,
    "trainer.rm.weight_decay": 0.1,
    "trainer.rm.warmup_fraction": 0.0,
    "trainer.online.epochs": 1,  # PM_RLHF training_scripts/po/ppo
    "trainer.online.learning_rate": 1e-6,
    "trainer.online.critic_learning_rate": 1e-6,
    "trainer.online.lr_scheduler": "cosine",
    "trainer.online.warmup_fraction": 0.0,
    "trainer.online.weight_decay": 0.1,
}
LLAMA = {"trainer.rm.batch_size": 4 * 36, "trainer.online.batch_size": 4 * 24}  # PM_RLHF training_scripts, *_llama*
PCRM = {  # DeepSpeed-Chat-Extension, branch PCRM
    "algo.beta": 0.1,
    "reward.token_wise": True,
    "reward.negative_share": 0.0,
    "trainer.sft.epochs": 3,
    "trainer.rm.epochs": 1,
    "trainer.rm.weight_decay": 0.1,
    "trainer.online.batch_size": 8 * 4 * 4,
    "trainer.online.learning_rate": 1e-5,
    "trainer.online.critic_learning_rate": 5e-6,
    "trainer.online.weight_decay": 0.1,
    "trainer.pairwise.learning_rate": 1e-6,
    "trainer.pairwise.batch_size": 8 * 4,
}
ALPACA = PCRM | {  # its scripts *_alpaca*.sh
    "dataset.name": "alpaca_farm",
    "dataset.max_prompt_tokens": 256,
    "dataset.max_completion_tokens": 384,
    "trainer.sft.batch_size": 8 * 16,
    "trainer.sft.learning_rate": 2e-5,
    "trainer.rm.batch_size": 4 * 4,
    "trainer.rm.learning_rate": 3e-6,
    "trainer.online.max_steps": 200 // 4,
    "trainer.online.warmup_fraction": 0.1,  # 100 updates there, more than the run has
}
TLDR = PCRM | {  # its scripts *_tldr*.sh
    "dataset.name": "tldr",
    "dataset.max_prompt_tokens": 768,
    "dataset.max_completion_tokens": 256,
    "trainer.sft.batch_size": 8 * 8,
    "trainer.sft.learning_rate": 1e-5,
    "trainer.rm.batch_size": 4 * 16,
    "trainer.rm.learning_rate": 1e-6,
    "trainer.online.max_steps": 1000 // 4,
    "trainer.online.warmup_fraction": 100 / 250,
}
PPO = {"algo.name": "kl_ppo", "algo.num_generations": 1, "algo.lam": 0.95, "generation.top_p": 1.0}
LENGTH = {"reward.name": "pcrm_length", "reward.beta1": 10.0, "reward.beta2": 0.001, "reward.beta3": -5.0}
BERT = {  # step2 main.py and reward_model.py; prompts are embedded too there, and wrongly
    "reward.name": "pcrm_cosine",
    "reward.encoder": "google-bert/bert-base-cased",
    "reward.pooling": "cls",
    "reward.similarity": "angle",
    "reward.embed_prompt": False,
    "reward.beta2": 0.001,
}
DPO = {"algo.name": "dpo", "algo.constraint.name": "none"}
RPO = {  # arXiv 2405.16436 and Regularized-Preference-Optimization, alignment-handbook/recipes
    "algo.name": "rpo",
    "algo.eta": 0.005,
    "algo.sft_reduction": "sum",
    "algo.sft_scale_by_beta": True,
    "dataset.max_prompt_tokens": 512,
    "dataset.max_completion_tokens": 1024 - 512,
    "trainer.sft.max_steps": 0,
    "trainer.pairwise.batch_size": 128,
    "trainer.pairwise.learning_rate": 5e-7,
    "trainer.pairwise.lr_scheduler": "cosine",
    "trainer.pairwise.warmup_fraction": 0.1,
    "trainer.pairwise.adam_beta2": 0.999,
}
GEMMA = {"model.path": "HuggingFaceH4/zephyr-7b-gemma-sft-v0.1", "dataset.path": "argilla/dpo-mix-7k"}
TABLE: dict[str, dict[str, Any]] = {
    "pm_opt-1.3b_hh": PM_PAPER | {
        "model.path": "facebook/opt-1.3b", "dataset.path": "Dahoas/full-hh-rlhf",
        "trainer.rm.batch_size": 4 * 24, "trainer.online.batch_size": 4 * 4,
    },
    "pm_llama-2-7b_hh": PM_PAPER | LLAMA | {
        "model.path": "meta-llama/Llama-2-7b-hf", "dataset.path": "Dahoas/full-hh-rlhf",
    },
    "pm_llama-2-7b_tldr": PM_PAPER | LLAMA | {"model.path": "meta-llama/Llama-2-7b-hf", "dataset.name": "tldr"},
    "pm_llama-3.2-1b_tldr": PM_PAPER | LLAMA | {"model.path": "meta-llama/Llama-3.2-1B", "dataset.name": "tldr"},
    "pm_llama-3.2-3b_tldr": PM_PAPER | LLAMA | {"model.path": "meta-llama/Llama-3.2-3B", "dataset.name": "tldr"},
    "pcrm_alpaca": ALPACA | PPO | {"reward.name": "bt"},
    "pcrm_alpaca_length": ALPACA | PPO | LENGTH,
    "pcrm_alpaca_cosine": ALPACA | PPO | BERT | {"reward.beta1": 20.0, "reward.beta3": -15.0},
    "pcrm_alpaca_fixed": ALPACA | PPO | {"reward.name": "pcrm_fixed", "reward.delta": 4.5},
    "pcrm_alpaca_random": ALPACA | PPO | {"reward.name": "pcrm_random", "reward.low": 4.0, "reward.high": 5.0},
    "pcrm_alpaca_dpo": ALPACA | DPO,
    "pcrm_tldr": TLDR | PPO | {"reward.name": "bt"},
    "pcrm_tldr_length": TLDR | PPO | LENGTH,
    "pcrm_tldr_cosine": TLDR | PPO | BERT | {"reward.beta1": 30.0, "reward.beta3": -25.0},
    "pcrm_tldr_fixed": TLDR | PPO | {"reward.name": "pcrm_fixed", "reward.delta": 5.0},
    "pcrm_tldr_random": TLDR | PPO | {"reward.name": "pcrm_random", "reward.low": 5.0, "reward.high": 6.0},
    "pcrm_tldr_dpo": TLDR | DPO,
    "rpo_zephyr-beta": RPO | {
        "model.path": "HuggingFaceH4/mistral-7b-sft-beta", "dataset.path": "HuggingFaceH4/ultrafeedback_binarized",
        "dataset.split": "train_prefs", "algo.beta": 0.01, "trainer.pairwise.epochs": 1,
    },
    "rpo_zephyr-gemma": RPO | GEMMA | {"algo.beta": 0.05, "trainer.pairwise.epochs": 2},
    "rpo_seq_mean": RPO | GEMMA | {  # OpenRLHF/train_rpo.sh and train_dpo.py
        "algo.beta": 0.5, "algo.eta": 0.2, "algo.sft_reduction": "seq_mean", "algo.sft_scale_by_beta": False,
        "trainer.pairwise.epochs": 2, "trainer.pairwise.warmup_fraction": 0.03, "trainer.pairwise.adam_beta2": 0.95,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reaches for the network fails the test."""

    def refuse(*_: object) -> None:
        raise AssertionError("a preset is composed without the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@cache
def composed(command: str, *overrides: str) -> Any:
    return compose.load(command, list(overrides))


def text(preset: str) -> str:
    return (conf_dir() / "experiment" / f"{preset}.yaml").read_text(encoding="utf-8")


def jobs(command: str) -> list[Any]:
    """Return the configs of what a `rlhf …` line runs; of a sweep, of the first and the last job of each grid."""
    _, name, *args = shlex.split(command, comments=True)
    if "-m" not in args:
        return [composed(name, *(arg for arg in args if arg not in ("--cfg", "job")))]
    sweep = sweeps.resolve([arg for arg in args if arg != "-m"], Catalog(name))
    grids = [compose.parse(list(grid)) for grid in sweep.grids]
    return [composed(name, *(sweeps.extreme(item, place) for item in grid)) for grid in grids for place in (0, -1)]


def test_the_table_has_every_preset() -> None:
    assert sorted(TABLE) == sorted(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_numbers_are_those_of_the_papers(preset: str) -> None:
    cfg = composed("align", f"experiment={preset}", "peft=none")  # learning rates for all weights
    found = {key: attrgetter(key)(cfg) for key in TABLE[preset]}
    assert found == pytest.approx(TABLE[preset])


@pytest.mark.parametrize("preset", PRESETS)
def test_seven_billion_parameters_are_trained_through_adapters(preset: str) -> None:
    cfg, whole = composed("align", f"experiment={preset}"), composed("align", f"experiment={preset}", "peft=none")
    assert (cfg.peft.name == "lora") == ("7b" in cfg.model.name)
    factor = getattr(cfg.peft, "learning_rate_factor", 1.0)
    for key in ("sft.learning_rate", "rm.learning_rate", "online.critic_learning_rate", "pairwise.learning_rate"):
        rate = attrgetter(f"trainer.{key}")
        assert rate(cfg) == pytest.approx(factor * rate(whole))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_header_has_commands_that_compose_and_the_hardware(preset: str) -> None:
    header = text(preset).partition("\ndefaults:")[0]
    commands = COMMAND.findall(header)
    assert f"rlhf align experiment={preset}" in commands
    for command in commands:
        for cfg in jobs(command):
            assert cfg.dataset == composed("align", f"experiment={preset}").dataset
    found = re.search(r"^# Hardware: .*GPU|Hardware and all else: (\w+)|^# Hardware: as (\S+):", header, re.MULTILINE)
    assert found, "no hardware"
    other = found[1] or found[2]
    assert other is None or "\n# Hardware: one GPU" in text(other)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_value_has_its_source(preset: str) -> None:
    body = text(preset).partition("\n  - _self_\n")[2]
    values = [line for line in body.splitlines() if re.match(r" +\w+: *[^ #]", line)]
    assert values
    assert [line for line in values if not SOURCE.search(line.partition("#")[2])] == []


def test_the_paper_s_grid_shares_sft_policy_and_reward_model() -> None:
    sweep = sweeps.resolve([f"experiment={PM[0]}", "sweep=pm_paper"], Catalog("align"))
    runs = [compose.load("align", job) for job in sweeps.jobs("align", sweep, None)]
    settings = [(cfg.algo.name, getattr(cfg.algo, "alpha", None), cfg.algo.beta) for cfg in runs]
    grid = [("pm", alpha, beta) for alpha in (0.1, 0.3, 0.5) for beta in (0.1, 0.5, 1.0)]  # arXiv 2405.16455
    assert settings == [("kl_ppo", None, 0.1), *grid]
    blocks = ("model", "dataset", "trainer", "reward", "generation", "peft", "seed")
    assert all(getattr(cfg, block) == getattr(runs[0], block) for cfg in runs for block in blocks)


@pytest.mark.parametrize("preset", PM)
def test_the_kl_baseline_differs_from_preference_matching_in_its_regulariser_alone(preset: str) -> None:
    pm, kl = composed("align", f"experiment={preset}"), composed("align", f"experiment={preset}", "algo=kl_ppo")
    assert {key for key in vars(pm.algo) if vars(pm.algo)[key] != vars(kl.algo).get(key)} == {"name", "alpha"}
    assert pm.trainer == kl.trainer


@pytest.mark.parametrize("data", ["alpaca", "tldr"])
def test_the_priors_differ_in_the_reward_model_alone(data: str) -> None:
    base = composed("align", f"experiment=pcrm_{data}")
    shared = ("negative_share", "token_wise", "clip", "calibration", "label_smoothing", "centering")
    for prior in ("length", "cosine", "fixed", "random"):
        cfg = composed("align", f"experiment=pcrm_{data}_{prior}")
        blocks = [field for field in vars(base) if field != "reward"]
        assert all(getattr(cfg, block) == getattr(base, block) for block in blocks)
        assert all(getattr(cfg.reward, key) == getattr(base.reward, key) for key in shared)


def test_the_constraints_of_dpo_are_those_of_the_paper() -> None:
    length, cosine = (
        composed("align", "experiment=pcrm_alpaca_dpo", f"algo/constraint={name}").algo.constraint
        for name in ("length", "cosine")
    )  # step2_dpo run_llama2_7b_PCRM_len_rat.sh and _cos_sim.sh
    assert (length.beta1, length.beta2, length.beta3) == (20.0, 0.001, -15.0)
    assert (cosine.beta1, cosine.beta2, cosine.beta3, cosine.similarity) == (30.0, 0.001, -25.0, "angle")


def test_the_page_names_every_preset_and_its_commands_compose() -> None:
    page = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([\w.-]+)` \|", page, re.MULTILINE))
    assert named == set(PRESETS)
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    commands = [line for line in blocks.splitlines() if line.startswith("rlhf ")]
    commands += re.findall(r"`(rlhf (?:align|train-rm|train-sft|evaluate) [^`]+)`", page)
    assert len(commands) >= len(PRESETS)
    for preset in PRESETS:
        assert any(f"experiment={preset}" in command.split() for command in commands), preset
    for command in commands:
        assert jobs(command)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.sft.max_steps=0"], r"trainer\.sft\.max_steps=0 leaves model=tiny untrained.*model\.path=FOLDER"),
        (["trainer.sft.max_steps=-1"], r"trainer\.sft\.max_steps=-1 .* out of range\. It must be >= 0"),
        (["trainer.rm.max_steps=0"], r"trainer\.rm\.max_steps=0 .* out of range\. It must be >= 1"),
        (["experiment=rpo_zephyr-beta", "trainer.sft.epochs=1"], r"max_steps and trainer\.sft\.epochs are both set"),
        (["experiment=pm_opt-1.3b_hh", "algo.advantage=rloo"], "algo.advantage=rloo needs algo.num_generations >= 2"),
        (
            ["experiment=pcrm_alpaca", "algo=dpo"],
            r"algo\.gamma .*experiment/pcrm_alpaca\.yaml.* It is a key of algo=kl_ppo",
        ),
    ],
)
def test_refusals(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose.load("align", overrides)


def test_an_sft_policy_is_taken_as_it_is() -> None:
    assert compose.load("align", ["model=opt-125m", "trainer.sft.max_steps=0", "trainer.sft.epochs=null"])
