"""`rlhf evaluate` with other references, reward models, data, samplers and judges; what it re-uses and refuses."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from small_jobs import SMALL, files, read_json, read_lines, refused, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM
from typer.testing import Result

from rlhf_cli import jobs
from rlhf_cli.data.encode import encode_prompt, encode_response
from rlhf_cli.data.tokenizer import bpe_tokenizer
from rlhf_cli.errors import RunError
from rlhf_cli.measure import sampled
from rlhf_cli.metrics.glossary import known
from rlhf_cli.models.reward import ModelReward, new_reward_model

Rlhf = Callable[..., Result]
Small = Callable[..., Path]
Finished = Callable[[str], Path]
Metrics = dict[str, Any]

TEXT = ["dataset=preferences", "dataset.max_prompt_tokens=40", "dataset.max_completion_tokens=12"]
TEXT += ["dataset.eval_prompts=8", "dataset.eval_samples=2", "trainer.sft.batch_size=8", "trainer.rm.batch_size=8"]
CLIP = 5.0  # reward.clip of conf/reward/bt.yaml

pytestmark = pytest.mark.usefixtures("no_figures")


def rows(topics: list[str], count: int) -> list[dict[str, str]]:
    rng = random.Random(count)
    drawn = [rng.choice(topics) for _ in range(count)]
    return [
        {"prompt": f"What about {topic} {number}?", "chosen": f"I like {topic}.", "rejected": f"{topic}? No!"}
        for number, topic in enumerate(drawn)
    ]


@dataclass
class World:
    """Runs on one file of pairs (`pm`, `dpo`, another reward model `rm`), another file, and a place for evaluations."""

    home: Path
    here: Path = Path()

    def __getattr__(self, name: str) -> Path:
        return self.home / name  # type: ignore[no-any-return]

    def config(self, store: Path | None = None) -> list[str]:
        """Return the overrides of the runs, for models that lie in no run folder."""
        return [
            *SMALL,
            *TEXT,
            "seed=4",
            f"dataset.path={self.home / 'a.jsonl'}",
            f"store_dir={store or self.home / 'store'}",
        ]

    def evaluate(self, *overrides: str, name: str = "run") -> Metrics:
        """Evaluate into a folder of the test; return its metrics, every one known and finite."""
        return finite(jobs.run_one("evaluate", [*overrides, f"run_dir={self.here / name}"], None))


def finite(run: Path) -> Metrics:
    metrics = read_json(run / "metrics.json")
    assert [key for key in metrics if not known(key)] == []
    assert [key for key, value in metrics.items() if value is None or not math.isfinite(value)] == []
    return metrics


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    from rlhf_cli.stages import results, trust

    world = World(tmp_path_factory.mktemp("text"))
    write_lines(world.home / "a.jsonl", rows(["tea", "rain", "chess", "Zürich", "bread"], 80))
    write_lines(world.home / "b.jsonl", rows(["coffee", "snow", "go"], 60))
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((trust, "trust_figure"), (results, "curves"), (results, "pair_figure")):
            patch.setattr(module, name, lambda *_, **__: None)
        for algo in ("pm", "dpo"):
            jobs.run_one("align", [*world.config(), f"algo={algo}", f"run_dir={world.home / algo}"], None)
        other = ["reward.label_smoothing=0.2", f"run_dir={world.home / 'rm'}"]
        jobs.run_one("train-rm", [*world.config(), *other], None)
    return world


@pytest.fixture
def world(made: World, tmp_path: Path) -> World:
    return World(made.home, tmp_path)


def of(metrics: Metrics, prefix: str) -> Metrics:
    """Return the metrics under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}


# -- reference and reward models ---------------------------------------------------------------------------------------


def test_the_first_reward_model_is_the_reward_and_the_others_judge(world: World, trained: list[str]) -> None:
    """A judge says of the policy what it would say as the reward, but for the clip: that belongs to training."""
    plain = read_json(world.pm / "metrics.json")
    both = world.evaluate(f"policy={world.pm}", f"reward_model=[{world.pm},{world.rm}]")
    alone = world.evaluate(f"policy={world.pm}", f"reward_model={world.rm}", "reward.clip=null", name="alone")
    own = {key: value for key, value in both.items() if not key.startswith("by/")}
    assert own == {key: value for key, value in plain.items() if not key.startswith(("best/", "rm/", "data/reward"))}
    said = of(both, "by/rm/")
    assert both.keys() == own.keys() | {f"by/rm/{key}" for key in said}
    assert said == {key: alone[key] for key in said}
    assert said["reward/mean"] != plain["reward/mean"]
    kinds = {re.sub(r"(_max)?(/(lo|hi|n))?$", "", key) for key in said}
    assert kinds == {
        "pm/tv", "pm/kl_rm_policy", "pm/kl_policy_rm", "pm/rank_correlation", "pm/pair_tv", "win_rate/rm",
        "reward/mean", "reward/std", "reward/best_of_1", "reward/best_of_2", "reward/length_correlation",
    }  # fmt: skip
    stages = read_json(world.here / "run" / "stages.json")
    before = read_json(world.pm / "stages.json")
    assert stages["judge rm"] == str(world.rm / "model")
    assert stages["reward model"] == str(Path(before["reward model"]) / "model")
    measured = [read_json(folder / "measured.json") for folder in (world.here / "run", world.pm, world.here / "alone")]
    assert measured[0] == {**measured[1], "judges": {"rm": str(world.rm / "model")}}
    assert measured[2]["reward"] != measured[1]["reward"]
    assert measured[2]["pool"] == measured[1]["pool"], "the pool is the reference's"
    assert trained == []


def other_tokenizer(world: World, folder: Path) -> Path:
    """Make a reward model with a tokenizer of its own, without a centre."""
    tokenizer = bpe_tokenizer(["the quick brown fox", "What about tea 12? I like tea."], 290)
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32, "num_hidden_layers": 1}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 160, "num_attention_heads": 2}
    config = OPTConfig(**sizes, pad_token_id=tokenizer.pad_token_id)
    OPTForCausalLM(config).save_pretrained(folder)
    new_reward_model(folder, init_std=0.5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_model_with_its_own_tokenizer_reads_the_texts(world: World, tmp_path: Path) -> None:
    folder = other_tokenizer(world, tmp_path / "foreign")
    metrics = world.evaluate(f"policy={world.pm}", f"reward_model=[{folder},{world.rm}]")
    own = AutoTokenizer.from_pretrained(folder)
    reward = ModelReward(folder, own.pad_token_id, "cpu")

    def raw(prompt: str, response: str, *, ended: bool = True) -> float:
        ids = encode_response(own, response)
        return reward([encode_prompt(own, prompt)], [ids if ended else ids[:-1]]).item()

    completions = read_lines(tmp_path / "run" / "completions.jsonl")
    assert {row["ended"] for row in completions} == {True, False}, "some responses were cut"
    scores = [raw(row["prompt"], row["completion"], ended=row["ended"]) for row in completions]
    found = [row["reward"] for row in completions]
    inside = [n for n, value in enumerate(found) if abs(value) < CLIP]
    centres = [scores[n] - found[n] for n in inside]
    assert len(inside) > 8
    assert centres == pytest.approx([centres[0]] * len(inside), abs=1e-4), "one number centres all"
    assert metrics["reward/std"] > 0.1
    assert metrics["by/rm/reward/mean"] == pytest.approx(
        world.evaluate(f"policy={world.pm}", f"reward_model={world.rm}", name="rm")["reward/mean"]
    )


def test_a_judge_is_calibrated_as_a_reward_is(small: Small, finished: Finished, tmp_path: Path) -> None:
    """What was kept of its plain scores is not taken for the calibrated ones."""
    other = small("train-rm", "reward.label_smoothing=0.2", name="other")
    ask = ["evaluate", f"policy={finished('dpo')}"]
    found = {}
    for calibration in ("none", "length"):
        judged = small(*ask, f"reward_model=[{finished('dpo')},{other}]", f"reward.calibration={calibration}",
                       name=f"judged-{calibration}")  # fmt: skip
        alone = small(*ask, f"reward_model={other}", "reward.clip=null", f"reward.calibration={calibration}",
                      name=f"alone-{calibration}")  # fmt: skip
        said, metrics = of(finite(judged), "by/other/"), finite(alone)
        assert said == pytest.approx({key: metrics[key] for key in said}, abs=1e-6)
        found[calibration] = said["reward/std"]
    assert found["none"] != pytest.approx(found["length"], abs=1e-4)


def test_a_policy_beside_itself(world: World) -> None:
    metrics = world.evaluate(f"policy={world.pm}", f"reference={world.pm}")
    for end in ("", "/lo", "/hi"):
        assert metrics[f"kl/sequence{end}"] == metrics[f"kl/per_token{end}"] == 0
    assert metrics["win_rate/rm/lo"] <= 0.5 <= metrics["win_rate/rm/hi"]
    for key in ("pm/tv", "pm/kl_rm_policy", "pm/minority_mass", "pm/rank_correlation"):
        assert metrics[key] == pytest.approx(metrics[f"reference/{key}"], abs=1e-6)
    assert metrics["chosen_logps_change"] == 0
    assert metrics["guard/crossed"] == 0


def test_another_reference_is_what_the_policy_is_measured_beside(small: Small, finished: Finished) -> None:
    metrics = finite(small("evaluate", f"policy={finished('pm')}", f"reference={finished('dpo')}"))
    dpo, pm = (read_json(finished(name) / "metrics.json") for name in ("dpo", "pm"))
    assert metrics["reference/pm/tv"] == pytest.approx(dpo["pm/tv"], abs=1e-6)
    assert metrics["pm/tv"] == pytest.approx(pm["pm/tv"], abs=1e-6)
    assert metrics["reward/mean"] == pytest.approx(pm["reward/mean"], abs=1e-6), "the samples are the policy's"
    assert metrics["kl/sequence"] != pytest.approx(pm["kl/sequence"], abs=1e-4)
    assert metrics["kl/sequence"] > 0


# -- other data --------------------------------------------------------------------------------------------------------


def test_on_other_data_a_run_is_measured_with_its_own_models(world: World, trained: list[str], rlhf: Rlhf) -> None:
    ask = [f"policy={world.pm}", f"dataset.path={world.home / 'b.jsonl'}"]
    metrics = world.evaluate(*ask)
    assert trained == []
    assert read_json(world.here / "run" / "stages.json") == read_json(world.pm / "stages.json")
    measured, before = (read_json(folder / "measured.json") for folder in (world.here / "run", world.pm))
    assert {key for key in measured if measured[key] == before[key]} == {"reward", "reference", "sampler", "judges"}
    assert metrics["pool/prompts"] == 6
    assert all("coffee" in row["prompt"] or "snow" in row["prompt"] or "go" in row["prompt"]
               for row in read_lines(world.here / "run" / "completions.jsonl"))  # fmt: skip

    shutil.copytree(world.pm, "run-of-another-store")
    stages = read_json(world.pm / "stages.json")
    moved = {name: folder.replace(str(world.home), "gone") for name, folder in stages.items()}
    Path("run-of-another-store/stages.json").write_text(json.dumps(moved))
    ask[0] = "policy=run-of-another-store"
    line = refused(rlhf("evaluate", *ask, "run_dir=refused"))
    assert "the reference policy of policy=run-of-another-store is not in gone/store/sft" in line
    assert "name it: reference=FOLDER" in line
    assert not Path("refused").exists()
    named = [f"reference={stages['reference policy']}", f"reward_model={stages['reward model']}"]
    assert {**metrics, **world.evaluate(*ask, *named, name="named")} == metrics
    assert trained == []


def test_questions_in_words_that_the_policy_never_saw_are_refused(small: Small, finished: Finished) -> None:
    with pytest.raises(RunError, match="tokenizer does not know all words of 'What is .* and its answers"):
        small("evaluate", f"policy={finished('pm')}", "dataset.questions=3")


def test_rows_that_do_not_fit_are_refused(world: World, rlhf: Rlhf) -> None:
    long = [{**row, "prompt": row["prompt"] * 20} for row in read_lines(world.home / "a.jsonl")]
    ask = ["evaluate", f"policy={world.pm}", f"dataset.path={write_lines(Path('long.jsonl'), long)}", "run_dir=run"]
    assert "fits the context. dataset.max_prompt_tokens=40" in refused(rlhf(*ask))
    line = refused(rlhf(*ask, "dataset.max_prompt_tokens=400"))
    assert re.search(r"pm/model reads \d+ tokens at most. .* is 412. lower them", line)
    assert not Path("run").exists()


# -- samplers ----------------------------------------------------------------------------------------------------------

OF_POLICY = ("kl/sequence", "kl/per_token", "entropy/per_token", "pm/divergence", "pm_beta/divergence",
             "optimum/divergence")  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [("top_p", 0.9), ("temperature", 0.7)])
def test_another_sampler_is_named_and_what_needs_the_policy_itself_left_out(
    world: World, key: str, value: float
) -> None:
    plain = read_json(world.pm / "metrics.json")
    metrics = world.evaluate(f"policy={world.pm}", f"sampler.{key}={value}")
    gone = {
        name for name in plain if name.startswith(tuple(f"{who}{of}" for who in ("", "reference/") for of in OF_POLICY))
    }
    assert {"kl/sequence", "entropy/per_token/lo", "pm/divergence", "reference/pm/divergence"} <= gone
    named = {"sampler/temperature": 1.0, "sampler/top_p": 1.0, f"sampler/{key}": value}
    ours = {name for name in plain if not name.startswith(("best/", "guard/", *gone))}
    assert metrics.keys() == ours | named.keys()
    assert {name: metrics[name] for name in named} == named
    assert read_json(world.here / "run" / "measured.json")["sampler"][key] == value
    same = [
        name for name in ours if re.match(r"(reference/)?(pm|optimum|pool|perplexity|chosen|rm|sft|data)[/_]", name)
    ]
    assert "pm/tv" in same
    assert {name: metrics[name] for name in same} == {name: plain[name] for name in same}, "the pool is not drawn anew"
    assert metrics["reward/mean"] != plain["reward/mean"]


# -- a closed vocabulary -----------------------------------------------------------------------------------------------


def test_a_closed_vocabulary_says_only_answers(small: Small, finished: Finished) -> None:
    policy = finished("pm_closed")
    metrics = finite(small("evaluate", f"policy={policy}", f"reward_model=[{finished('pm')}]", "algo.alpha=null",
                           "dataset.closed_vocabulary=true", "sampler.top_p=0.8"))  # fmt: skip
    plain = read_json(policy / "metrics.json")
    assert metrics["eos_rate"] == 1
    assert metrics["pm/offset_mass"] == pytest.approx(0, abs=1e-6)
    assert metrics["gold/tv"] == pytest.approx(plain["gold/tv"], abs=1e-6)
    assert metrics["pm/divergence"] != pytest.approx(plain["pm/divergence"], abs=1e-4), "by a model, no longer by gold"
    questions = read_json(policy / "distributions.json")
    answers = {row["prompt"]: row["answers"] for row in questions}
    for row in read_lines(small("evaluate", f"policy={policy}", "algo.alpha=null", "dataset.closed_vocabulary=true",
                                "reward=gold", name="gold") / "completions.jsonl"):  # fmt: skip
        assert row["completion"] in answers[row["prompt"]]
        assert row["reference"] in answers[row["prompt"]]


# -- files -------------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves_for_compare(world: World) -> None:
    world.evaluate(f"policy={world.dpo}")
    run = world.here / "run"
    assert files(run) == {
        ".lock", "completions.jsonl", "config.yaml", "manifest.json", "measured.json", "metrics.json",
        "overrides.json", "pairs.json", "pairs.png", "stages.json", "status.json",
    }  # fmt: skip
    completions = read_lines(run / "completions.jsonl")
    assert len(completions) == 16
    for row in completions:
        assert row.keys() == {
            "prompt", "completion", "reward", "tokens", "ended", "reference", "reference_reward", "reference_ended",
        }  # fmt: skip
        assert abs(row["reward"]) <= CLIP
        assert row["tokens"] <= 12
        assert row["ended"] or row["tokens"] == 12
    metrics = read_json(run / "metrics.json")
    for key, column in (("reward/mean", "reward"), ("reference/reward/mean", "reference_reward")):
        assert metrics[key] == pytest.approx(sum(row[column] for row in completions) / 16, abs=1e-5)
    ties = [1.0 if row["reward"] > row["reference_reward"] else 0.0 for row in completions]
    assert metrics["win_rate/rm"] == pytest.approx(sum(ties) / 16)
    measured = read_json(run / "measured.json")
    assert measured.keys() == {"dataset", "prompts", "pool", "reward", "reference", "sampler", "judges"}
    assert measured == read_json(world.dpo / "measured.json") == read_json(world.pm / "measured.json")
    pairs = read_json(run / "pairs.json")
    assert len(pairs["edges"]) == 21
    assert pairs["counts"].keys() == {"reward_model", "reference", "policy"}
    assert {sum(counts) for counts in pairs["counts"].values()} == {pairs["pairs"]} == {len(pairs["length_difference"])}


# -- what is used again ------------------------------------------------------------------------------------------------


@dataclass
class Counts:
    drawn: int = 0
    scored: int = 0
    read: int = 0


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Count draws, reward model calls, and batches that a policy reads."""
    found = Counts()

    def counted(holder: Any, name: str, column: str) -> None:
        original = getattr(holder, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            setattr(found, column, getattr(found, column) + 1)
            return original(*args, **kwargs)

        monkeypatch.setattr(holder, name, call)

    counted(sampled, "sample", "drawn")
    counted(ModelReward, "__call__", "scored")
    counted(sampled.logps, "vocabulary_logps", "read")
    counted(sampled.logps, "frozen_token_logps", "read")
    return found


def test_what_was_computed_is_used_again(world: World, counts: Counts) -> None:
    first = world.evaluate(f"policy={world.pm}", name="first")
    assert counts == Counts(), "the run itself has kept everything"
    bare = shutil.copytree(world.pm / "model", world.here / "moved")
    again = world.evaluate(*world.config(), f"policy={bare}", "algo=pm", name="again")
    assert counts == Counts(), "weights are recognised wherever they lie"
    assert again == first
    world.evaluate(f"policy={world.pm}", f"reward_model={world.rm}", name="other")
    assert (counts.drawn, counts.read) == (0, 0), "another reward model reads the same samples"
    scored = counts.scored
    world.evaluate(f"policy={world.pm}", f"reward_model=[{world.pm},{world.rm}]", name="judge")
    assert counts.scored == scored, "its scores serve it as a judge"
    world.evaluate(f"policy={world.pm}", "dataset.eval_samples=3", name="more")
    assert counts.drawn == 2, "one piece of the policy, one of the reference; the pool stays"


def test_on_a_survey_too_nothing_is_drawn_again(small: Small, finished: Finished, counts: Counts) -> None:
    folder = finished("pm")
    counts.drawn = 0
    small("evaluate", f"policy={folder}", "algo=pm")
    assert counts.drawn == 0


def interrupted_at(monkeypatch: pytest.MonkeyPatch, holder: Any, name: str, call: int) -> list[int]:
    """Let the user interrupt before the given call of a function; return a list that grows with every finished one."""
    original, finished = getattr(holder, name), []

    def count(*args: Any, **kwargs: Any) -> Any:
        if len(finished) == call:
            raise KeyboardInterrupt
        result = original(*args, **kwargs)
        finished.append(1)
        return result

    monkeypatch.setattr(holder, name, count)
    return finished


@pytest.mark.parametrize(
    ("holder", "name", "calls"),
    [(sampled, "sample", (2, 3)), (ModelReward, "__call__", (3, 11))],
    ids=["draw", "score"],
)
def test_interrupted_twice_it_ends_with_the_same_numbers(
    world: World, monkeypatch: pytest.MonkeyPatch, holder: Any, name: str, calls: tuple[int, int]
) -> None:
    monkeypatch.setattr(sampled, "DRAWN", 4)
    monkeypatch.setattr(sampled, "SCORED", 4)

    def evaluate(place: str) -> Metrics:
        store = world.here / f"store-{place}"
        for stage in ("sft", "rm"):
            shutil.copytree(world.home / "store" / stage, store / stage, dirs_exist_ok=True)
        return world.evaluate(f"policy={world.pm}", f"store_dir={store}", name=place)

    with monkeypatch.context() as patch:
        whole = interrupted_at(patch, holder, name, 10**9)
        expected = evaluate("whole")
    done = 0
    for call in calls:
        with monkeypatch.context() as patch:
            done += len(finished := interrupted_at(patch, holder, name, call))
            with pytest.raises(KeyboardInterrupt):
                evaluate("broken")
            done += len(finished)
        assert read_json(world.here / "broken" / "status.json")["state"] == "interrupted"
        assert not (world.here / "broken" / "metrics.json").exists()
    with monkeypatch.context() as patch:
        rest = interrupted_at(patch, holder, name, 10**9)
        assert evaluate("broken") == expected
    assert done + len(rest) == len(whole), "nothing that was kept is done again"
    for file in ("completions.jsonl", "pairs.json", "measured.json", "metrics.json"):
        assert (world.here / "broken" / file).read_bytes() == (world.here / "whole" / file).read_bytes()


# -- policies that are no use ------------------------------------------------------------------------------------------


def changed(world: World, folder: Path, change: Callable[[Any], Any]) -> Path:
    """Save the aligned policy with its weights changed."""
    shutil.copytree(world.pm / "model", folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        (change(model) or model).save_pretrained(folder)
    return folder


def silent(model: Any) -> None:
    """Make every hidden state point at end-of-sequence: the first token is the last."""
    norm = model.model.decoder.final_layer_norm
    norm.weight.zero_()
    norm.bias.copy_(1e4 * model.get_input_embeddings().weight[model.config.eos_token_id])


def test_a_policy_that_says_nothing_has_finite_numbers(world: World, tmp_path: Path) -> None:
    folder = changed(world, tmp_path / "silent", silent)
    own = other_tokenizer(world, tmp_path / "foreign")
    metrics = world.evaluate(*world.config(), f"policy={folder}", "algo=pm", f"reward_model=[{world.rm},{own}]")
    assert metrics["length/mean"] == metrics["eos_rate"] == 1
    assert metrics["entropy/per_token"] == pytest.approx(0, abs=1e-6)
    assert metrics["guard/crossed"] >= 1
    assert metrics["pm/divergence"] == pytest.approx(0, abs=1e-6), "the official metric calls it perfect"
    assert metrics["pm/tv"] > 0
    assert {row["completion"] for row in read_lines(tmp_path / "run" / "completions.jsonl")} == {""}


def test_policies_that_cannot_be_measured_beside_the_reference_are_refused(world: World, tmp_path: Path) -> None:
    def refusal(policy: Path, message: str) -> None:
        with pytest.raises(RunError, match=message):
            world.evaluate(*world.config(), f"policy={policy}")
        assert not (tmp_path / "run").exists()

    def short(model: Any) -> Any:
        config = OPTConfig.from_dict({**model.config.to_dict(), "max_position_embeddings": 20})
        return OPTForCausalLM(config)

    def wide(model: Any) -> None:
        model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)

    refusal(changed(world, tmp_path / "short", short), r"short reads 20 tokens at most\. .* is 52")
    refusal(changed(world, tmp_path / "wide", wide), r"wide has \d+ logits a token and its reference \d+")
    foreign = changed(world, tmp_path / "foreign", lambda model: None)
    bpe_tokenizer(["other words entirely"], 300).save_pretrained(foreign)
    refusal(foreign, r"foreign has another vocabulary than its reference\. \d+ tokens against \d+, or other ids")
    (foreign / "model.safetensors").write_bytes(b"xx")
    refusal(foreign, r"no policy could be opened in \S+foreign")


# -- a language model as judge -----------------------------------------------------------------------------------------


class Endpoint:
    """A judge on this machine that prefers the longer response; it is down after `lives` replies."""

    def __init__(self) -> None:
        self.lives = 10**9
        self.asked: list[str] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                endpoint.serve(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.overrides = ["judge=openai", "judge.model=tester", "judge.parallel=1", "judge.retries=1"]
        self.overrides += [f"judge.base_url=http://127.0.0.1:{self.server.server_port}/v1"]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        self.asked.append(body["messages"][0]["content"])
        up, self.lives = self.lives > 0, self.lives - 1
        first, second = (
            re.search(f"<response_{name}>\n(.*)\n</response_{name}>", self.asked[-1], re.DOTALL)[1] for name in "ab"
        )
        message = {"role": "assistant", "content": "A" if len(first) >= len(second) else "B"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "tester", "choices": [choice]}
        data = json.dumps(reply if up else {"error": {"message": "out of memory"}}).encode()
        request.send_response(200 if up else 503)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    from openai._base_client import BaseClient

    monkeypatch.setattr(BaseClient, "_calculate_retry_timeout", lambda *_: 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


def test_a_judge_that_goes_down_loses_nothing(
    world: World, rlhf: Rlhf, endpoint: Endpoint, counts: Counts, tmp_path: Path
) -> None:
    store = shutil.copytree(world.home / "store", tmp_path / "store", ignore=shutil.ignore_patterns("samples", "logps"))
    ask = ["evaluate", f"policy={world.pm}", f"store_dir={store}", "run_dir=run", *endpoint.overrides]
    endpoint.lives = 5
    line = refused(rlhf(*ask))
    assert "did not answer. HTTP 503: out of memory (attempts: 2)" in line
    assert "the same command goes on" in line
    assert not Path("run").exists(), "its folder was new"
    kept, drawn = len(list(store.glob("judge/*.json"))), counts.drawn
    assert kept == 5
    assert drawn == 2

    before, endpoint.lives = len(endpoint.asked), 10**9
    result = rlhf(*ask)
    assert result.exit_code == 0, result.output
    metrics = finite(Path("run"))
    completions = read_lines(Path("run/completions.jsonl"))[::2]  # the first sample of a prompt
    different = [row for row in completions if row["completion"] != row["reference"]]
    assert len(endpoint.asked) - before == 2 * len(different) - kept, "only what is missing is asked for"
    assert counts.drawn == drawn + 1, "of the pool; the samples were kept"
    longer = [
        0.5
        if len(row["completion"]) == len(row["reference"])
        else float(len(row["completion"]) > len(row["reference"]))
        for row in completions
    ]
    assert metrics["win_rate/llm"] == pytest.approx(sum(longer) / len(longer))
    assert metrics["win_rate/llm/n"] == len(completions)
    plain = read_json(world.pm / "metrics.json")
    assert {key for key in metrics if key not in plain} == {
        "win_rate/llm", "win_rate/llm/lo", "win_rate/llm/hi", "win_rate/llm/n", "win_rate/llm_inconsistent",
        "win_rate/llm_unreadable",
    }  # fmt: skip


def test_a_judge_reads_empty_completions_and_no_more_than_it_may(
    world: World, endpoint: Endpoint, tmp_path: Path
) -> None:
    folder = changed(world, tmp_path / "silent", silent)
    ask = [*world.config(), f"policy={folder}", *endpoint.overrides, "judge.prompts=3"]
    metrics = world.evaluate(*ask)
    assert metrics["win_rate/llm/n"] == 3
    assert metrics["win_rate/llm"] < 0.5
    assert len(endpoint.asked) == 6
    assert all("\n(empty)\n" in question for question in endpoint.asked)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["judge=openai"], "judge=openai has no model. judge.model is null. set judge.model"),
        (["judge=openai", "judge.model=x"], "needs a key. the environment variable OPENAI_API_KEY is not set"),
        (["judge=openai", "judge.model=x", "judge.base_url=localhost"], "judge.base_url is not an address"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused_before_anything(
    rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch, world: World, counts: Counts, overrides: list[str], message: str
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert message in refused(rlhf("evaluate", f"policy={world.pm}", *overrides, "run_dir=run"))
    assert files(Path()) == set()
    assert counts == Counts()


def test_a_judge_without_its_package_is_refused(rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    from rlhf_cli.measure import judge

    monkeypatch.setattr(judge.importlib.util, "find_spec", lambda name: None)
    line = refused(rlhf("evaluate", f"policy={world.pm}", "judge=openai", "judge.model=x", "run_dir=run"))
    assert "the package openai is not installed. pip install 'rlhf-cli[judge]', or choose judge=none" in line


# -- names that lead nowhere -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reference=runs/typo"], "reference=runs/typo is not a folder"),
        (["reward_model=nowhere"], "reward_model=nowhere is not a folder"),
        (["reward_model=nobody/has-this"], "reward_model=nobody/has-this is not in the cache"),
        (["reference={world}/rm"], "rm/model holds a reward model, not a policy"),
        (["reward_model=[{world}/rm,{world}/dpo/model]"], "dpo/model holds no reward model"),
        (["reward_model={world}/rm", "stage=rm"], "reward_model= does not go with stage=rm"),
        (["reference={world}/dpo", "stage=rm"], "reference= does not go with stage=rm"),
    ],
)
def test_names_that_lead_nowhere(
    rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch, world: World, overrides: list[str], message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("runs").mkdir()
    asked = [override.format(world=world.home) for override in overrides]
    assert message in refused(rlhf("evaluate", f"policy={world.pm}", *asked, "run_dir=run"))
    assert files(Path()) == {"runs"}
