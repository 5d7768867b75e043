from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_cli.config import compose
from rlhf_cli.config.catalog import conf_dir
from rlhf_cli.report import methods
from rlhf_cli.report.card import Facts, model_card
from rlhf_cli.report.card_names import command_line
from rlhf_cli.report.card_tables import data_rows, metric_table

METRICS: dict[str, float | None] = {
    "pm/tv": 0.25, "pm/tv/lo": 0.2, "pm/tv/hi": 0.3, "pm/tv/n": 40, "pm/tv_max": 0.9, "reference/pm/tv": 0.5,
    "kl/sequence": 0.00004, "eos_rate": None, "best/pm/tv": 0.125, "data/reward_pairs": 1234,
    "data/dropped/prompt_too_long": 7, "data/dropped/response_truncated": 3, "data/dropped/no_direction": 0,
}  # fmt: skip
HH = ["dataset=hh_rlhf", "dataset.path=Anthropic/hh-rlhf"]


def facts(*overrides: str, command: str = "align", **changes: Any) -> Facts:
    config = compose.as_dict(compose.load(command, list(overrides), None))
    given = {"name": "mine", "place": "me/mine", "metrics": METRICS, "shown": ["pm/tv", "kl/sequence", "eos_rate"]}
    return Facts(**{**given, "command": command, "config": config, "overrides": list(overrides), **changes})


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def section(card: str, title: str) -> str:
    return card.split(f"\n## {title}\n")[1].partition("\n## ")[0]


@pytest.mark.parametrize(
    ("overrides", "papers", "formula"),
    [
        (["algo=pm"], {"2405.16455", "1506.02438"}, "e_t = 0 where π_ref(y_t) > α, else log π_ref(y_t)"),
        (["algo=pm", "algo.alpha=null"], {"2405.16455"}, "its optimum:  π(y) ∝ exp(r(x, y) / β)\n"),
        (["algo=kl_ppo", "algo.advantage=rloo"], {"1707.06347", "2402.14740"}, "π(y) ∝ π_ref(y) · exp(r(x, y) / β)"),
        (["algo=dpo"], {"2305.18290"}, "minimise  −log σ( β [ (log π(y_w) − log π_ref(y_w)) − (log π(y_l)"),
        (["algo=dpo", "algo/constraint=length"], {"2305.18290", "2404.00978"}, "minimise  −log σ( β ["),
        (["algo=rpo"], {"2405.16436"}, "] ) − η β · log π(y_w)\n"),
        (
            ["algo=rpo", "algo.sft_scale_by_beta=false", "algo.sft_reduction=seq_mean"],
            {"2405.16436"},
            "− η · log π(y_w) /",
        ),
        (["algo=dpm", "algo.alpha=null"], {"2506.01523"}, "minimise  −log σ( β [ log π(y_w) − log π(y_l) ] )"),
    ],
)
def test_the_method_is_that_of_the_settings(overrides: list[str], papers: set[str], formula: str) -> None:
    text = section(model_card(facts(*overrides)), "Method")
    assert formula in text
    before_reward = text.partition("The reward: ")[0]
    assert papers <= set(re.findall(r"arxiv.org/abs/([\d.]+)", before_reward))
    learns_from_pairs = any(name in overrides[0] for name in ("dpo", "rpo", "dpm"))
    assert ("the reward serves the metrics alone" in text) == learns_from_pairs


def test_every_algorithm_and_reward_is_known() -> None:
    algorithms = {path.stem for path in (conf_dir() / "algo").glob("*.yaml")}
    assert algorithms == methods.ALGORITHMS.keys()
    for path in sorted((conf_dir() / "reward").glob("*.yaml")):
        config = {"reward": yaml.safe_load(path.read_text())}
        assert methods.reward(config).formula, path.stem
    assert methods.alignment({"algo": {"name": "mine"}}).formula == ()


def test_a_bound_is_told_with_its_numbers() -> None:
    text = section(model_card(facts("reward=pcrm_fixed", "reward.delta=2.5", command="train-rm")), "Method")
    assert "−log σ(d) − log σ(δ* − d)" in text
    assert "δ* = 2.5 for every pair." in text


def test_the_front_matter_names_what_is_on_the_hub() -> None:
    found = front_matter(model_card(facts(*HH, "model=opt-125m", "algo=rpo")))
    assert found["base_model"] == ["facebook/opt-125m"]
    assert found["datasets"] == ["Anthropic/hh-rlhf"]
    assert found["library_name"] == "transformers"
    assert found["pipeline_tag"] == "text-generation"
    assert "rpo" in found["tags"]
    assert "license" not in found, "whoever publishes it says so"


def test_local_things_are_named_by_their_last_part_and_are_not_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    overrides = ["dataset=hh_rlhf", f"dataset.path={tmp_path}/pairs.jsonl", f"model.path={tmp_path}/base"]
    card = model_card(facts(*overrides, f"run_dir={tmp_path}/run", "tracker.project=secret", data_hash="ab" * 32))
    assert str(tmp_path) not in card
    assert "secret" not in card
    assert {"base_model", "datasets"}.isdisjoint(front_matter(card))
    assert "`pairs.jsonl`, sha256 `abababababababab…`" in card
    assert "`base`, fine-tuned" in card


def test_a_relative_path_is_not_taken_for_a_name_of_the_hub() -> None:
    overrides = ["dataset=hh_rlhf", "dataset.path=data/mine", "model.path=models/opt", "+x=models/opt-2"]
    assert front_matter(model_card(facts(*overrides[:3])))["base_model"] == ["models/opt"]
    card = model_card(facts(*overrides[:3], local={"data/mine", "models/opt"}, data_hash="ab" * 32))
    assert {"base_model", "datasets"}.isdisjoint(front_matter(card))
    assert "models/" not in card
    assert "data/mine" not in card
    assert "| from | `mine`, sha256 `abababababababab…` |" in card
    found = command_line("align", overrides, None, {"data/mine", "models/opt"})
    assert found == "rlhf align dataset=hh_rlhf dataset.path=mine model.path=opt +x=models/opt-2"


def test_no_setting_tells_where_something_lies() -> None:
    card = model_card(facts(*HH, "reward=pcrm_cosine", "reward.encoder=/home/me/bert", base="/home/me/sft"))
    assert "encoder=bert" in card
    assert "/home/me" not in card
    assert "base_model" not in front_matter(card)
    parts = ["dataset=mixture", "dataset.parts=[hh_rlhf,/home/me/a.jsonl]", "dataset.weights=[1,3]"]
    assert "| mixture | `hh_rlhf` × 1, `a.jsonl` × 3 |" in model_card(facts(*parts))


def test_quotes_in_the_command_stay_readable() -> None:
    given = ["dataset.path='/my data/a b.jsonl'", "tag='$x'"]
    text = command_line("align", given, None)
    assert text.startswith("""rlhf align "dataset.path='a b.jsonl'" """)
    assert shlex.split(text)[2:] == ["dataset.path='a b.jsonl'", "tag='$x'"]


def test_a_reward_model_says_where_it_started() -> None:
    opt = [*HH, "model=opt-125m"]
    after_sft = model_card(facts(*opt, command="train-rm"))
    assert "Made from: `facebook/opt-125m`, fine-tuned on demonstrations." in after_sft
    assert "| | SFT | reward model |" in after_sft
    base = model_card(facts(*opt, "model.reward_start=base", command="train-rm"))
    assert "Made from: `facebook/opt-125m`." in base
    assert "| | reward model |\n" in base


def test_learning_rates_are_those_that_were_used() -> None:
    text = section(model_card(facts(*HH, "model=opt-125m", "peft=lora", "trainer=pretrained")), "Training")
    assert "| learning rate | 0.0001 | 0.0001 |" in text, "ten times those for training all weights"
    assert "learning_rate_factor" not in text, "it is in them"


def test_an_adapter_names_its_base_and_its_library() -> None:
    card = model_card(facts(*HH, "model=opt-125m", "peft=lora", base="me/opt-sft"))
    found = front_matter(card)
    assert (found["base_model"], found["base_model_relation"]) == (["me/opt-sft"], "adapter")
    assert found["library_name"] == "peft"
    assert "AutoPeftModelForCausalLM" in card
    assert "means nothing on another model than `me/opt-sft`" in card


def test_the_command_keeps_what_changes_the_result() -> None:
    given = ["algo=pm", "run_dir='/home/me/x'", "+store_dir=/s", "tracker=none", "tracker.tags=[a]", "seed=1"]
    given += ["dataset.path='/my data/x y/a b.jsonl'", "model.path=facebook/opt-125m", "reward_model=[/a/b,~/c/d]"]
    found = command_line("align", given, "/home/me/own")
    assert shlex.split(found) == [
        "rlhf", "align", "algo=pm", "seed=1", "dataset.path='a b.jsonl'", "model.path=facebook/opt-125m",
        "reward_model=[b,d]", "--config-dir", "own",
    ]  # fmt: skip


def test_metrics_have_intervals_references_and_units() -> None:
    table = metric_table(METRICS, ["pm/tv", "kl/sequence", "eos_rate", "length/mean"], "last", "hh_rlhf")
    assert table.headers == ["metric", "value", "95 % interval", "reference", "meaning"]
    assert [row[0] for row in table.rows] == ["`pm/tv`", "`kl/sequence`"], "what was not measured is left out"
    assert table.rows[0][1:4] == ["0.250 (worst 0.900)", "0.200 to 0.300", "0.500"]
    assert table.rows[1][1:4] == ["4.0e-05", "–", "–"]
    assert table.rows[0][4].endswith("[share, lower is better]")
    assert r"KL(policy \|\| reference)" in table.rows[1][4], "a bar would end the cell"
    assert "held-out prompts (40 at most)" in table.note


def test_metrics_of_the_best_checkpoint_are_its_own() -> None:
    table = metric_table(METRICS, ["pm/tv", "kl/sequence"], "best", "hh_rlhf")
    assert [row[:4] for row in table.rows] == [["`pm/tv`", "0.125", "–", "0.500"]]
    assert "flatter" in table.note


def test_the_data_say_how_they_were_split_and_what_was_left_out() -> None:
    dataset = facts(*HH, "dataset.max_rows=5000").config["dataset"]
    rows = dict(data_rows(dataset, METRICS, "Anthropic/hh-rlhf@0123456789"))
    assert rows["splits"] == "by prompt, seed 0: 10 % held out; of the rest 20 % SFT, 40 % reward model, 40 % alignment"
    assert rows["from"] == "`Anthropic/hh-rlhf`, commit `0123456789`"
    assert rows["split"] == "`train`"
    assert rows["rows read, at most"] == "5,000"
    assert rows["pairs for the reward model"] == "1,234"
    assert rows["left out: the prompt is longer than dataset.max_prompt_tokens"] == "7"
    assert rows["responses cut to that length"] == "3"
    assert not any("label 0.5" in name for name in rows), "nothing was left out for that"


@pytest.mark.parametrize("form", ["text", "dialogue", "chat"])
@pytest.mark.parametrize("kind", ["align", "train-sft", "train-rm"])
@pytest.mark.parametrize("base", [None, "me/base"])
def test_the_code_is_python_and_no_table_is_broken(form: Any, kind: str, base: str | None) -> None:
    card = model_card(facts(*HH, command=kind, form=form, base=base, centre=-0.5, place='a"b\\c'))
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    literals = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert literals.count('a"b\\c') == 2
    assert ("\n\nHuman:" in str(literals) or "\\n\\nHuman:" in str(literals)) == (form == "dialogue")
    assert ("apply_chat_template" in code) == (form == "chat")
    for block in re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block


def test_limits_say_what_the_settings_imply() -> None:
    closed = section(model_card(facts("dataset.closed_vocabulary=true")), "What to know")
    assert "vocabulary closed to the valid answers" in closed
    assert "knows the words of its survey questions and no others" in closed
    both = ["reward=warm", "reward.combine=predictions"]
    assert "the metrics are of its members' mean" in model_card(facts(*both, command="train-rm"))
    assert "Its metrics say: it fell over." in model_card(facts(warnings=["it fell over"]))
    lora = section(model_card(facts(*HH, "model=opt-125m", "peft=lora", dtype="bfloat16")), "What to know")
    assert "Weights are bfloat16. LoRA adapters are merged into them." in lora
    assert "gold" not in lora
    assert "no others" not in lora
