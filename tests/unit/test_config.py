from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

import pytest
import yaml

from rlhf_cli import cli
from rlhf_cli.algos.pm import Config as PmConfig
from rlhf_cli.config import compose
from rlhf_cli.config.catalog import Catalog, conf_dir
from rlhf_cli.config.schema import (
    EvaluateConfig,
    FixedPrior,
    LengthPrior,
    Prior,
    SurveyConfig,
    TextConfig,
    setting,
)
from rlhf_cli.config.validate import COMMANDS
from rlhf_cli.errors import ConfigError
from rlhf_cli.jobs import expand, job_name
from rlhf_cli.rewards.pcrm import CosineConfig
from rlhf_cli.rewards.warm import Config as WarmConfig

TEXT = ["dataset=hh_rlhf", "dataset.path=pairs.jsonl"]


def every_choice() -> list[tuple[str, str]]:
    """Return (command, group=choice) for every yaml of every group of every command."""
    return [
        (command, f"{group}={choice}")
        for command in COMMANDS
        for group in Catalog(command).groups
        for choice in Catalog(command).choices(group)
        if (command, group, choice) != ("train-rm", "reward", "gold")
    ]


@pytest.mark.parametrize(("command", "choice"), every_choice())
def test_every_yaml_composes(command: str, choice: str) -> None:
    extra = ["dataset.path=pairs.jsonl"] if choice in {"dataset=choices", "dataset=preferences"} else []
    if choice == "model=pretrained":
        extra = ["model.path=x/y"]
    if choice.startswith("algo/constraint="):
        extra = ["algo=dpo"]
    cfg = compose.load(command, [choice, *extra])
    assert type(cfg) is COMMANDS[command]
    group, name = choice.split("=")
    if group != "experiment":
        block = attrgetter(group.replace("/", "."))(cfg)
        assert block.name == name


def test_every_yaml_of_conf_is_reached_by_some_command() -> None:
    reached = {f"{choice.replace('=', '/')}.yaml" for _, choice in every_choice()} | {"reward/gold.yaml"}
    primaries = {f"{Catalog(command).primary}.yaml" for command in COMMANDS}
    there = {path.relative_to(conf_dir()).as_posix() for path in conf_dir().rglob("*.yaml")}
    sweeps = {f"sweep/{name}.yaml" for name in Catalog("align").choices("sweep")}  # of test_sweeps.py
    assert there == reached | primaries | sweeps


@pytest.mark.parametrize(
    ("given", "found"),
    [("a", ["a"]), ("null", []), ("[]", []), ("[a,b]", ["a", "b"]), ("'a,b'", ["a,b"]), ("[1,x]", ["1", "x"])],
)
def test_one_text_is_a_list_of_it_and_null_an_empty_one(given: str, found: list[str]) -> None:
    assert compose.load("align", [f"tracker.tags={given}"]).tracker.tags == found
    assert compose.load("evaluate", [f"reward_model={given}"]).reward_model == found


def test_types_follow_algorithm_and_dataset() -> None:
    cfg = compose.load("align", ["algo=pm", "algo.alpha=null", "seed=3"])
    assert type(cfg.algo) is PmConfig
    assert cfg.algo.alpha is None
    assert type(cfg.dataset) is SurveyConfig
    assert cfg.seed == 3
    assert type(compose.load("train_rm", TEXT).dataset) is TextConfig


def test_survey_picks_its_trainer_and_the_command_line_wins() -> None:
    assert compose.load("align", []).trainer.name == "survey"
    assert compose.load("align", ["trainer=text"]).trainer.name == "text"
    assert compose.load("align", TEXT).trainer.name == "text"


def test_experiment_wins_over_groups_and_the_command_line_over_it() -> None:
    cfg = compose.load("align", ["experiment=quick"])
    assert (cfg.dataset.questions, cfg.trainer.online.max_steps) == (4, 60)
    assert cfg.trainer.online.batch_size == 64
    assert compose.load("align", ["experiment=quick", "dataset.questions=7"]).dataset.questions == 7


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_plus_changes_nothing(prefix: str) -> None:
    assert compose.load("align", [f"{prefix}algo.beta=0.5", f"{prefix}algo=dpo"]).algo.beta == 0.5


REFUSED = {
    # unknown keys, groups and choices
    "algo.bta=1": r"unknown key algo\.bta .*command line.*nearest valid key is algo\.beta",
    "+algo.bta=1": r"unknown key algo\.bta .*nearest valid key is algo\.beta",
    "++algo.bta=1": r"unknown key algo\.bta .*nearest valid key is algo\.beta",
    "beta=1": r"unknown key beta .*algo\.beta",
    "ago=pm": r"unknown key ago .*nearest valid key is algo\.$",
    "trainer.onlin.max_steps=3": r"nearest valid key is trainer\.online\.max_steps",
    "algo=pmm": r"algo=pmm does not exist\. The nearest choice is pm\. Choose from dpm, dpo, kl_ppo, pm, rpo",
    "experiment=quik": "nearest choice is quick",
    "algo.name=nonsense": "algo.name=nonsense does not name an algorithm",
    "algo.name=ppo": "algo.name=ppo does not name an algorithm",
    "dataset.source=web": "dataset.source=web is not a source",
    "policy=x": "policy .* is not a key of align. It belongs to evaluate",
    "algo=dpo algo.alpha=0.1": r"algo\.alpha .* It is a key of algo=dpm, algo=pm",
    "trainer.sft=3": r"trainer\.sft .* is a block of keys",
    # syntax
    "~algo": "~algo is not possible",
    "algo@x=pm": "algo@x=pm is not possible",
    "=3": "=3 is not possible",
    "trainer/sft=x": "trainer.sft .* is not a key here",
    "algo": "cannot read 'algo'",
    "algo.beta=[": r"cannot read 'algo\.beta=\['",
    "seed=0,1": "seed=0,1 lists several values.* Add -m",
    "algo=[pm,dpo]": "does not exist",
    "algo=null": "algo=null does not exist",
    "algo.beta=${nothing}": r"algo\.beta cannot be resolved",
    "hydra.lancher=x": "Could not override 'hydra.lancher'",
    "hydra.searchpath=[x]": "Use --config-dir",
    # missing, types
    "algo.beta=???": r"algo\.beta has no value",
    "seed=x": r"seed=x .*wrong type\. It must be an integer",
    "seed=1.5": "must be an integer",
    "seed=null": r"seed=null .*wrong type\. It must be an integer",
    "algo.alpha=[1]": "must be a number or null",
    "algo.beta=true": r"algo\.beta=true .* It must be a number",
    "algo.beta.x=1": r"algo\.beta=.* command line.* must be a number",
    "algo.whiten_advantages=maybe": "must be true or false",
    "tracker.tags=1": r"tracker\.tags=1 .*wrong type\. It must be a list of texts: \[a,b\]",
    "tracker.tags=[a,null]": r"tracker\.tags=\['a', None\] .* must be a list of texts",
    "tracker.tags=[[a]]": r"tracker\.tags=.* must be a list of texts",
    "tracker.tags=[{a:1}]": r"tracker\.tags=.* must be a list of texts",
    # ranges
    "algo.beta=0": r"algo\.beta=0.* out of range\. It must be > 0\.$",
    "algo.alpha=2": r"algo\.alpha=2.* It must be > 0 and <= 1",
    "algo.beta=inf": "not a finite number",
    "algo.gamma=nan": "not a finite number",
    "trainer.sft.max_steps=-3": "must be >= 0",
    "device=gpu": "device=gpu .* is not a choice",
    "algo.advantage=rlo": "nearest choice is rloo",
    # rules between keys
    "trainer.rm.epochs=1": r"trainer\.rm\.max_steps and trainer\.rm\.epochs are both set",
    "trainer.rm.max_steps=null": "are both null",
    "trainer.online.micro_batch_size=7": "batch_size=64 is not divisible by .*micro_batch_size=7",
    "model.heads=5": "hidden_size=64 is not divisible by model.heads=5",
    "algo.num_generations=5": "64 rollouts is not divisible by algo.num_generations=5",
    "algo.advantage=rloo algo.num_generations=1": "rloo needs algo.num_generations >= 2",
    "dataset.closed_vocabulary=true generation.engine=generate": "does not go with generation.engine=generate",
    "dataset.closed_vocabulary=true generation=continuous": "does not go with generation.engine=continuous",
    "generation.engine=vllm": "has keys that generation=default lacks: .*server_url.* as a whole: generation=vllm",
    "generation.engine=trl": "generation.engine=trl is not a choice. Choose from lean, generate, continuous, vllm",
    "generation=continuous generation.top_p=0.9": "correction_cap=3.0 does not go with generation.top_p=0.9",
    "generation=continuous generation.correction_cap=0.5": "correction_cap=0.5 .* It must be >= 1",
    "generation=vllm generation.mode=server": "generation.mode=server needs generation.server_url",
    "generation=vllm generation.mode=serve": "generation.mode=serve .* is not a choice",
    "generation=vllm generation.gpu_memory_utilization=1": "gpu_memory_utilization=1.* It must be > 0 and < 1",
    "generation=vllm generation.tensor_parallel=0": "tensor_parallel=0.* It must be >= 1",
    "generation=vllm peft=qlora": "generation=vllm does not go with peft=qlora",
    "generation.mode=server": "generation.mode .* is not a key here. It is a key of generation=vllm",
    "dataset=preferences": "dataset.path is null",
    "dataset=preferences dataset.path=f dataset.sft_fraction=0.6": "is 1 or more",
    "dataset=hh_rlhf dataset.path=f reward=gold": "reward=gold needs dataset=survey",
    "dataset=hh_rlhf dataset.path=f dataset.closed_vocabulary=true": "It is a key of dataset=survey",
    # rewards
    "reward=pcrm": r"reward=pcrm does not exist\. The nearest choice is pcrm_.*Choose from bt, gold, pcrm_cosine",
    "reward.name=pcrm_x": r"reward\.name=pcrm_x does not name a reward",
    "+reward.foo=1": r"unknown key reward\.foo .*nearest valid key is reward",
    "+reward.clp=1": r"unknown key reward\.clp .*nearest valid key is reward\.clip",
    "reward=gold reward.negative_share=0.1": r"reward\.negative_share .* It is a key of reward=bt, reward=pcrm_cosine",
    "reward.members=3": r"reward\.members .* It is a key of reward=warm\.$",
    "reward=pcrm_length reward.delta=4": r"reward\.delta .* It is a key of reward=pcrm_fixed\.$",
    "reward=warm reward.members=1": r"reward\.members=1 .* out of range\. It must be >= 2",
    "reward=warm reward.combine=mean": r"not a choice\. .*Choose from weights, predictions",
    "reward.label_smoothing=0.5": r"reward\.label_smoothing=0\.5 .* It must be >= 0 and < 0\.5",
    "reward.centering=-1": r"reward\.centering=-1.* It must be >= 0",
    "reward.calibration=width": r"reward\.calibration=width .* Choose from none, length",
    "reward.token_wise=1.5": "must be true or false",
    "reward=pcrm_fixed reward.delta=0": r"reward\.delta=0.* It must be > 0",
    "reward=pcrm_length reward.beta2=0": r"reward\.beta2=0.* It must be > 0",
    "reward=pcrm_length reward.beta3=nan": r"reward\.beta3=nan .* not a finite number",
    # 10 / 1.001 - 10 = -.00999: equal responses would be bounded below 0
    "reward=pcrm_length reward.beta3=-10": r"beta3=-10\.0 bound equal responses by -0\.00999001\. ",
    "reward=pcrm_cosine reward.beta1=15": "bound equal responses by .* Raise reward.beta3 or reward.beta1",
    "reward=pcrm_random reward.low=6": r"reward\.low=6\.0 is above reward\.high=5\.0",
    "reward=pcrm_cosine reward.pooling=cls": r"reward\.pooling=cls does not go with reward\.encoder=sft",
    # constraints
    "algo/constraint=length": r"algo/constraint=length does not go with algo=pm.*Use reward=pcrm_length, or algo=dpo",
    "algo=kl_ppo algo/constraint=random": "does not go with algo=kl_ppo.*Use reward=pcrm_random",
    "algo=dpo algo/constraint=lenght": r"algo/constraint=lenght does not exist\. The nearest choice is length",
    "algo=dpo algo/constraint=null": "algo/constraint=null does not exist",
    "algo=dpo algo.constraint=length": r"algo\.constraint=length .* Write algo/constraint=CHOICE\. Choose from none, l",
    "algo=dpo algo.constraint=null": r"algo\.constraint=null .* Write algo/constraint=CHOICE",
    "algo/constrain=length": r"unknown key algo\.constrain .*nearest valid key is algo/constraint",
    "algo=dpo algo.constraint.name=soft": r"algo\.constraint\.name=soft is not a constraint\. .* from none, length",
    "algo=dpo algo.constraint.name=cosine": r"algo\.constraint\.beta1 has no value",
    "algo=dpo algo.constraint.delta=4": r"algo\.constraint\.delta .* It is a key of algo/constraint=fixed\.$",
    "algo=rpo algo/constraint=fixed algo.constraint.low=4": r"It is a key of algo/constraint=random\.$",
    "algo=dpo algo/constraint=length algo.constraint.beta4=1": r"nearest valid key is algo\.constraint\.beta\d",
    "algo=dpo algo/constraint=fixed algo.constraint.delta=-1": r"algo\.constraint\.delta=-1.* It must be > 0",
    "algo=dpo algo/constraint=length algo.constraint.beta3=-20": r"algo\.constraint\.beta1=20\.0, .* by -0\.01998",
    "algo=dpm algo/constraint=random algo.constraint.high=3": r"constraint\.low=4\.0 is above algo\.constraint\.high",
    "algo=dpo algo/constraint=cosine algo.constraint.pooling=cls": r"algo\.constraint\.pooling=cls does not go with",
    "algo=dpo algo/constraint=none,length": "lists several values.* Add -m",
    "stage=rm": r"stage .* is not a key of align\. It belongs to evaluate",
}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.items())
def test_refusals(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        compose.load("align", overrides.split(" "))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("command", "override", "message"),
    [
        ("train-rm", "reward=gold", "train-rm reward=gold trains nothing"),
        ("train-sft", "algo=pm", "algo .* is not a key of train-sft. It belongs to align, evaluate"),
        ("train-sft", "algo.beta=1", "algo.beta .* is not a key of train-sft. It belongs to align, evaluate"),
        ("train-sft", "reward.clip=1", "reward.clip .* is not a key of train-sft. It belongs to train-rm, align"),
        ("train-rm", "algo/constraint=length", "algo.constraint .* is not a key of train-rm. It belongs to align"),
        ("train-rm", "stage=rm", "stage .* is not a key of train-rm. It belongs to evaluate"),
        ("evaluate", "reward_model=[a,null]", r"reward_model=\['a', None\] .* It must be a list of texts"),
        ("evaluate", "reference=[a]", r"reference=.* It must be text or null"),
        ("evaluate", "sampler.top_p=0", r"sampler\.top_p=0.* It must be > 0 and <= 1"),
        ("evaluate", "sampler.temperature=0", r"sampler\.temperature=0.* It must be > 0"),
        ("align", "sampler.top_p=0.9", r"sampler\.top_p .* is not a key of align. It belongs to evaluate"),
        ("align", "judge=openai", r"judge .* is not a key of align. It belongs to evaluate"),
        ("evaluate", "stage=sft", r"stage=sft .* is not a choice\. .*Choose from policy, rm"),
        ("evaluate", "stage=null", "stage=null .* It must be text"),
    ],
)
def test_refusals_of_other_commands(command: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose.load(command, [override])


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("reward_model=a", "reward_model="),
        ("reference=a", "reference="),
        ("sampler.top_p=0.9", "sampler.top_p=0.9"),
        ("sampler.temperature=0.5", "sampler.temperature=0.5"),
        ("judge=openai", "judge=openai"),
    ],
)
def test_what_is_for_policies_alone_does_not_go_with_the_trust_report(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named} does not go with stage=rm. The trust report judges"):
        compose.load("evaluate", ["stage=rm", override])
    assert compose.load("evaluate", ["stage=policy", override])


def test_typos_are_answered_without_heavy_imports() -> None:
    program = (
        "import sys; from rlhf_cli import cli\n"
        "sys.argv = ['rlhf', 'align', *sys.argv[1:]]\n"
        "try: cli.main()\n"
        "except SystemExit as end: code = end.code\n"
        "print(code, [name for name in ('torch', 'transformers', 'trl', 'numpy', 'wandb') if name in sys.modules])"
    )
    for overrides in (["algo.bta=1"], ["-m", "algo=pm,dpo", "seed=0,x"], ["--help"], ["--cfg", "job"]):
        done = subprocess.run([sys.executable, "-c", program, *overrides], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == ("0 []" if overrides[0].startswith("--") else "2 []")


# --- rewards and constraints -----------------------------------------------------------------------------------


def test_types_follow_the_reward_and_the_constraint() -> None:
    cfg = compose.load("align", ["algo=dpo", "algo/constraint=length", "reward=pcrm_cosine", "reward.encoder=bert-x"])
    assert type(cfg.reward) is CosineConfig
    assert (cfg.reward.beta1, cfg.reward.beta2, cfg.reward.beta3, cfg.reward.encoder) == (20.0, 0.001, -15.0, "bert-x")
    assert type(cfg.algo.constraint) is LengthPrior
    assert type(compose.load("align", []).algo.constraint) is Prior
    assert type(compose.load("train-rm", ["reward=warm", "reward.members=5"]).reward) is WarmConfig


@pytest.mark.parametrize("algo", ["dpo", "rpo", "dpm"])
@pytest.mark.parametrize("overrides", [["algo/constraint=fixed", "algo={}"], ["algo={}", "+algo/constraint=fixed"]])
def test_a_constraint_goes_with_every_pairwise_algorithm_in_any_order(algo: str, overrides: list[str]) -> None:
    cfg = compose.load("align", [text.format(algo) for text in [*overrides, "algo.constraint.delta=4.5"]])
    assert (cfg.algo.name, cfg.algo.constraint) == (algo, FixedPrior(name="fixed", delta=4.5))


def test_the_classifier_token_goes_with_an_encoder_of_its_own() -> None:
    for overrides in (["reward=pcrm_cosine", "reward.pooling=cls", "reward.encoder=bert-base-uncased"],):
        assert compose.load("train-rm", overrides).reward.pooling == "cls"


@pytest.mark.parametrize("group", ["reward", "algo/constraint"])
def test_every_prior_bounds_equal_responses_above_zero(group: str) -> None:
    checked = 0
    for name in Catalog("align").choices(group):
        values = Catalog("align").read(f"{group}/{name}")
        if "beta1" in values:
            checked += 1
            assert values["beta1"] / (1 + values["beta2"]) + values["beta3"] > 0
    assert checked == 2  # length and cosine


def test_a_sweep_over_constraints_expands() -> None:
    jobs = expand("align", ["algo=dpo", "algo/constraint=none,length", "seed=0,1"], None)
    assert [job[1:] for job in jobs] == [
        [f"algo/constraint={name}", f"seed={seed}"] for name in ("none", "length") for seed in (0, 1)
    ]
    asked = ["algo=dpo", "algo/constraint=none,length"]
    assert [job_name(job, asked) for job in expand("align", asked, None)] == [
        "algo.constraint=none",
        "algo.constraint=length",
    ]
    assert len(expand("align", ["algo=dpo", "algo/constraint=glob(*)"], None)) == 5
    with pytest.raises(ConfigError, match=r"job 2 of 2 \(algo\.constraint=length\): .* does not go with algo=pm"):
        expand("align", ["algo/constraint=none,length"], None)
    with pytest.raises(ConfigError, match=r"job 1 of 2 .*algo/constraint=lenght does not exist"):
        expand("align", ["algo=dpo", "algo/constraint=lenght,none"], None)


def test_the_printed_config_shows_the_constraint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.app(["align", "algo=dpo", "algo/constraint=length", "--cfg", "job"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)["algo"]
    assert printed["constraint"] == {"name": "length", "beta1": 20.0, "beta2": 0.001, "beta3": -15.0}


def test_identity_tells_constraints_and_rewards_apart() -> None:
    choices = [[f"algo/constraint={name}"] for name in ("none", "length", "cosine", "fixed", "random")]
    choices += [[f"reward={name}"] for name in ("pcrm_length", "pcrm_cosine", "pcrm_fixed", "pcrm_random", "warm")]
    identities = [json.dumps(compose.identity(compose.load("align", ["algo=dpo", *choice]))) for choice in choices]
    assert len(set(identities)) == len(choices)


@pytest.mark.parametrize("stage", ["policy", "rm"])
def test_evaluate_has_two_stages(stage: str) -> None:
    assert compose.load("evaluate", [f"stage={stage}"]).stage == stage
    assert compose.load("evaluate", []).stage == "policy"


# --- a user's own directory ------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a user's directory, with a quote in its name, whose modules are forgotten after the test."""
    import rlhf_cli.algos
    import rlhf_cli.rewards

    folder = tmp_path / "ann's conf"
    folder.mkdir()
    for package in (rlhf_cli.algos, rlhf_cli.rewards):
        monkeypatch.setattr(package, "__path__", list(package.__path__))
    yield folder
    for name in [name for name in sys.modules if name.startswith(("rlhf_cli.algos.own", "rlhf_cli.rewards.own"))]:
        del sys.modules[name]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def own_algorithm(folder: Path, name: str, *, yaml_text: str) -> None:
    write(folder / f"algo/{name}.yaml", yaml_text)
    write(
        folder / f"algos/{name}.py",
        "from dataclasses import dataclass\n"
        "from rlhf_cli.config.schema import AlgoConfig, setting\n"
        "@dataclass\n"
        "class Config(AlgoConfig):\n"
        "    gain: float = setting(ge=0)\n",
    )


def test_an_algorithm_is_one_yaml_and_one_module(own: Path) -> None:
    own_algorithm(own, "own_one", yaml_text="name: own_one\nbeta: 1.0\ngain: 2.0\n")
    cfg = compose.load("align", ["algo=own_one", "algo.gain=3"], own)
    assert type(cfg.algo).__module__ == "rlhf_cli.algos.own_one"
    assert cfg.algo.gain == 3.0
    with pytest.raises(ConfigError, match="algo.gain=-1.* out of range"):
        compose.load("align", ["algo=own_one", "algo.gain=-1"], own)
    with pytest.raises(ConfigError, match=r"algo=own_one does not exist"):
        compose.load("align", ["algo=own_one"])


@pytest.mark.parametrize(
    ("name", "yaml_text", "message"),
    [
        (
            "own_typo",
            "name: own_typo\nbeta: 1.0\ngian: 2.0\ngain: 1.0\n",
            r"algo\.gian \(set in .*own_typo\.yaml.* algo\.gain",
        ),
        ("own_gap", "name: own_gap\nbeta: 1.0\n", r"algo\.gain has no value"),
        (
            "own_range",
            "name: own_range\nbeta: 1.0\ngain: -1\n",
            r"algo\.gain=-1.*set in .*own_range\.yaml.*out of range",
        ),
        ("own_bad", "name: [\n", "own_bad.yaml"),
    ],
)
def test_mistakes_in_a_users_yaml(own: Path, name: str, yaml_text: str, message: str) -> None:
    own_algorithm(own, name, yaml_text=yaml_text)
    with pytest.raises(ConfigError, match=message) as caught:
        compose.load("align", [f"algo={name}"], own)
    assert "\n" not in str(caught.value)


def test_algorithm_without_module_or_config(own: Path) -> None:
    write(own / "algo/own_none.yaml", "name: own_none\nbeta: 1.0\n")
    with pytest.raises(ConfigError, match="'own_none' has no module"):
        compose.load("align", ["algo=own_none"], own)
    write(own / "algo/own_empty.yaml", "name: own_empty\nbeta: 1.0\n")
    write(own / "algos/own_empty.py", "")
    with pytest.raises(ConfigError, match="'own_empty' has no Config class"):
        compose.load("align", ["algo=own_empty"], own)
    write(own / "algo/own_import.yaml", "name: own_import\nbeta: 1.0\n")
    write(own / "algos/own_import.py", "import not_installed_anywhere")
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        compose.load("align", ["algo=own_import"], own)


def own_reward(folder: Path, name: str, *, base: str = "TrainedRewardConfig", **values: object) -> None:
    settings = {**Catalog("train-rm").read("reward/bt"), "name": name, "gain": 2.0, **values}
    write(folder / f"reward/{name}.yaml", yaml.safe_dump(settings))
    write(
        folder / f"rewards/{name}.py",
        "from dataclasses import dataclass\n"
        f"from rlhf_cli.config.schema import {base}, setting\n"
        "@dataclass\n"
        f"class Config({base}):\n"
        "    gain: float = setting(ge=0)\n",
    )


def test_a_reward_is_one_yaml_and_one_module(own: Path) -> None:
    own_reward(own, "own_one")
    for command in ("train-rm", "align", "evaluate"):
        cfg = compose.load(command, ["reward=own_one", "reward.gain=3", "reward.centering=0.5"], own)
        assert type(cfg.reward).__module__ == "rlhf_cli.rewards.own_one"
        assert (cfg.reward.gain, cfg.reward.centering) == (3.0, 0.5)
    with pytest.raises(ConfigError, match="reward.gain=-1.* out of range"):
        compose.load("train-rm", ["reward=own_one", "reward.gain=-1"], own)
    with pytest.raises(ConfigError, match=r"reward=own_one does not exist"):
        compose.load("train-rm", ["reward=own_one"])
    own_reward(own, "own_typo", gian=1)
    with pytest.raises(
        ConfigError, match=r"reward\.gian \(set in .*own_typo\.yaml\)\. The nearest valid key is reward\.gain"
    ):
        compose.load("train-rm", ["reward=own_typo"], own)


def test_a_variant_of_a_loss_is_one_yaml(own: Path) -> None:
    write(own / "reward/pcrm_length_mine.yaml", "defaults: [pcrm_length]\nname: pcrm_length_mine\nbeta3: -4.0\n")
    reward = compose.load("train-rm", ["reward=pcrm_length_mine", "reward.beta1=12"], own).reward
    assert type(reward).__name__ == "LengthConfig"
    assert (reward.beta1, reward.beta3) == (12.0, -4.0)
    write(own / "reward/pcrm_other.yaml", "defaults: [pcrm_length]\nname: pcrm_other\n")
    with pytest.raises(ConfigError, match=r"'pcrm_other' has no Config\(TrainedRewardConfig\) class"):
        compose.load("train-rm", ["reward=pcrm_other"], own)


def test_reward_without_module_or_config(own: Path) -> None:
    write(own / "reward/own_none.yaml", "name: own_none\nclip: 5.0\n")
    with pytest.raises(ConfigError, match=r"'own_none' has no module rlhf_cli/rewards/own_none\.py"):
        compose.load("align", ["reward=own_none"], own)
    write(own / "rewards/own_none.py", "import not_installed_anywhere")
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        compose.load("align", ["reward=own_none"], own)
    own_reward(own, "own_bare", base="RewardConfig")  # lacks the keys that training reads
    with pytest.raises(ConfigError, match=r"'own_bare' has no Config\(TrainedRewardConfig\) class in .*own_bare\.py"):
        compose.load("train-rm", ["reward=own_bare"], own)


def test_a_users_constraint_settings(own: Path) -> None:
    write(own / "algo/constraint/own_wide.yaml", "name: fixed\ndelta: 9.0\n")
    assert compose.load("align", ["algo=dpo", "algo/constraint=own_wide"], own).algo.constraint.delta == 9.0
    write(own / "algo/constraint/own_wide.yaml", "name: fixed\ndelta: -9.0\n")
    with pytest.raises(ConfigError, match=r"algo\.constraint\.delta=-9.* \(set in .*constraint/own_wide\.yaml\) .*> 0"):
        compose.load("align", ["algo=dpo", "algo/constraint=own_wide"], own)
    text = "# @package _global_\ndefaults:\n  - override /algo: dpo\n  - override /algo/constraint: fixed\n"
    write(own / "experiment/bounded.yaml", f"{text}algo: {{constraint: {{delta: 4.5}}}}\n")
    cfg = compose.load("align", ["experiment=bounded"], own)
    assert (cfg.algo.name, cfg.algo.constraint.delta) == ("dpo", 4.5)


def test_a_users_experiment(own: Path) -> None:
    text = "# @package _global_\ndefaults:\n  - override /trainer: text\nalgo: {beta: 0.25}\nseed: 5\n"
    write(own / "experiment/mine.yaml", text)
    cfg = compose.load("align", ["experiment=mine"], own)
    assert (cfg.algo.beta, cfg.seed, cfg.trainer.name) == (0.25, 5, "text")
    assert compose.load("train-sft", ["experiment=mine"], own).seed == 5
    write(own / "experiment/typo.yaml", "# @package _global_\ntrainer: {sft: {max_stps: 3}}\n")
    with pytest.raises(ConfigError, match=r"max_stps \(set in .*typo\.yaml.*nearest.*trainer\.sft\.max_steps"):
        compose.load("align", ["experiment=typo"], own)
    assert compose.load("align", ["experiment=[quick,mine]"], own).seed == 5
    with pytest.raises(ConfigError, match=r"max_stps \(set in .*typo\.yaml"):
        compose.load("align", ["experiment=[quick,typo]"], own)


def test_a_users_yaml_wins_over_ours(own: Path) -> None:
    ours = yaml.safe_load((conf_dir() / "model/tiny.yaml").read_text(encoding="utf-8"))
    write(own / "model/tiny.yaml", yaml.safe_dump({**ours, "layers": 3}))
    assert compose.load("align", [], own).model.layers == 3


def test_config_dir_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a directory"):
        compose.load("align", [], tmp_path / "nowhere")


# --- evaluate policy=RUN_DIR -----------------------------------------------------------------------------------


def record(folder: Path, **content: object) -> Path:
    write(folder / "overrides.json", json.dumps(content))
    return folder


def test_evaluate_starts_from_the_runs_overrides(tmp_path: Path) -> None:
    run = record(
        tmp_path / "run",
        command="align",
        overrides=["++algo=kl_ppo", "algo.gamma=0.9", "seed=4", "dataset.seed=2", "run_dir=old", "hydra.verbose=true"],
        config_dir=None,
    )
    cfg = compose.load("evaluate", [f"policy={run}", "dataset.seed=1"])
    assert isinstance(cfg, EvaluateConfig)
    assert (cfg.algo.name, cfg.algo.gamma, cfg.seed, cfg.dataset.seed, cfg.run_dir) == ("kl_ppo", 0.9, 4, 1, None)
    again = compose.with_base("evaluate", [f"policy={run}", "dataset.seed=1"], None)[0]
    assert again == ["algo=kl_ppo", "algo.gamma=0.9", "seed=4", f"policy={run}", "dataset.seed=1"]
    assert compose.with_base("evaluate", again, None)[0] == again


def test_a_run_folder_of_a_multirun_needs_no_quotes(tmp_path: Path) -> None:
    run = record(tmp_path / "algo=dpo,seed=1", command="align", overrides=["algo=dpo", "seed=1"], config_dir=None)
    cfg = compose.load("evaluate", [f"policy={run}"])
    assert (cfg.algo.name, cfg.seed, cfg.policy) == ("dpo", 1, str(run))


def test_another_choice_drops_the_runs_values_of_that_group(tmp_path: Path) -> None:
    run = record(tmp_path / "run", command="align", overrides=["algo.alpha=0.5"], config_dir=None)
    assert compose.load("evaluate", [f"policy={run}"]).algo.alpha == 0.5
    assert compose.load("evaluate", [f"policy={run}", "algo=dpo"]).algo.name == "dpo"


def test_another_algorithm_or_constraint_drops_the_runs_constraint(tmp_path: Path) -> None:
    asked = ["algo=dpo", "algo/constraint=fixed", "algo.constraint.delta=4.5", "algo.beta=0.2"]
    run = record(tmp_path / "run", command="align", overrides=asked, config_dir=None)
    same = compose.load("evaluate", [f"policy={run}"]).algo
    assert (same.name, same.beta, same.constraint) == ("dpo", 0.2, FixedPrior(name="fixed", delta=4.5))
    assert compose.load("evaluate", [f"policy={run}", "algo=pm"]).algo.constraint.name == "none"
    other = compose.load("evaluate", [f"policy={run}", "algo/constraint=length"]).algo
    assert (other.beta, other.constraint.name) == (0.2, "length")
    finer = compose.load("evaluate", [f"policy={run}", "algo.constraint.delta=3"]).algo
    assert (finer.beta, finer.constraint) == (0.2, FixedPrior(name="fixed", delta=3.0))


def test_evaluate_finds_the_runs_own_directory(own: Path, tmp_path: Path) -> None:
    own_algorithm(own, "own_two", yaml_text="name: own_two\nbeta: 1.0\ngain: 2.0\n")
    run = record(tmp_path / "run", command="align", overrides=["algo=own_two"], config_dir=str(own))
    assert compose.load("evaluate", [f"policy={run}"]).algo.name == "own_two"


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "overrides.json", "{}")
    with pytest.raises(ConfigError, match="overrides.json is damaged"):
        compose.load("evaluate", [f"policy={tmp_path}"])


# --- dump and identity -----------------------------------------------------------------------------------------


def test_dump_is_the_whole_config_in_schema_order() -> None:
    cfg = compose.load("align", ["tracker.group=x"])
    loaded = yaml.safe_load(compose.dump(cfg))
    assert loaded == compose.as_dict(cfg)
    assert list(loaded)[:4] == ["seed", "run_dir", "store_dir", "device"]
    assert loaded["trainer"]["sft"]["learning_rate"] == 6e-3


def test_identity_leaves_out_what_cannot_change_the_result() -> None:
    @dataclass
    class Inner:
        kept: int = 1
        place: str = setting(identity=False)

    @dataclass
    class Outer:
        inner: Inner = field(default_factory=Inner)
        run_dir: str = setting(identity=False)

    assert compose.identity(Outer(Inner(2, "here"), "there")) == {"inner": {"kept": 2}}
    one, other = (compose.load("align", [f"run_dir={place}", "tracker=none"]) for place in ("a", "b"))
    assert compose.identity(one) == compose.identity(other)
    assert compose.identity(compose.load("align", ["seed=1", "tracker=none"])) != compose.identity(one)
