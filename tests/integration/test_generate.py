"""`rlhf generate`: answers of a policy and its reference, the same for the same command, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_jobs import files, read_json, read_lines, refused, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import Result

from rlhf_cli.data.encode import decode_response, encode_prompt, encode_response
from rlhf_cli.models.reward import ModelReward
from rlhf_cli.stages import generate, speakers
from rlhf_cli.stages.prompts import Asked

Rlhf = Callable[..., Result]
SEASON, MEAL = "Which season do you like best?", "What do you like for breakfast?"

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def run(finished: Callable[[str], Path]) -> Path:
    return finished("pm")


def answered(rlhf: Rlhf, run: Path, *args: str, name: str = "out.jsonl") -> list[dict[str, Any]]:
    result = rlhf("generate", str(run), *args, "--out", name)
    assert result.exit_code == 0, result.output
    return read_lines(Path(name))


def test_the_same_command_gives_the_same_answers(rlhf: Rlhf, run: Path) -> None:
    ask = [SEASON, MEAL, "--samples", "3"]
    first = answered(rlhf, run, *ask)
    assert [(line["prompt"], line["sample"]) for line in first] == [
        (text, n) for text in (SEASON, MEAL) for n in range(3)
    ]
    assert answered(rlhf, run, *ask, name="again.jsonl") == first
    assert answered(rlhf, run, *ask, "--seed", "1") != first
    assert len({line["completion"] for line in first}) > 1
    assert all(line["ended"] or line["tokens"] == 12 for line in first), "as long as in training"
    assert max(line["tokens"] for line in answered(rlhf, run, *ask, "--max-new-tokens", "2")) == 2


def test_the_reference_answers_beside_the_policy(rlhf: Rlhf, run: Path) -> None:
    sft = read_json(run / "stages.json")["reference policy"]
    beside = answered(rlhf, run, SEASON, "--samples", "8")
    itself = answered(rlhf, Path(sft) / "model", SEASON, "--samples", "8", "--max-new-tokens", "12")
    assert [line["reference"] for line in beside] == [line["completion"] for line in itself]
    assert not any("reference" in line for line in itself)
    alone = answered(rlhf, run, SEASON, "--samples", "8", "--no-reference")
    assert [line["completion"] for line in alone] == [line["completion"] for line in beside]
    assert not any("reference" in line for line in alone)
    result = rlhf("generate", sft + "/model", SEASON, "--max-new-tokens", "3")
    assert "no reference: no run tells of one" in result.stderr
    assert "reference" not in result.stdout


def test_temperature_0_is_greedy(rlhf: Rlhf, run: Path) -> None:
    (line,) = answered(rlhf, run, SEASON, "--temperature", "0")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = encode_prompt(tokenizer, SEASON)
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    greedy = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0, len(ids) :]
    assert line["completion"] == decode_response(tokenizer, greedy.tolist())
    assert line["completion"] in {text["completion"] for text in answered(rlhf, run, SEASON, "--top-p", "0.000001")}


def test_the_best_checkpoint_answers(rlhf: Rlhf, run: Path) -> None:
    last, best = (answered(rlhf, run, SEASON, "--samples", "8", "--checkpoint", which) for which in ("last", "best"))
    itself = answered(rlhf, run / "best", SEASON, "--samples", "8", "--max-new-tokens", "12")
    assert [line["completion"] for line in best] == [line["completion"] for line in itself]
    assert [line["reference"] for line in best] == [line["reference"] for line in last]


def test_rewards_are_the_reward_models(rlhf: Rlhf, run: Path) -> None:
    lines = answered(rlhf, run, SEASON, "--samples", "12", "--reward")
    folder = Path(read_json(run / "stages.json")["reward model"]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reward = ModelReward(folder, tokenizer.pad_token_id, "cpu")
    for key in ("completion", "reference"):
        # A special token in an answer is a word once it is read again.
        lines = [line for line in lines if "<" not in line[key]]
        ends = [line["ended" if key == "completion" else "reference_ended"] for line in lines]
        ids = [encode_response(tokenizer, line[key]) for line in lines]
        read = [tokens if ended else tokens[:-1] for tokens, ended in zip(ids, ends, strict=True)]
        scores = reward([encode_prompt(tokenizer, SEASON)] * len(read), read).tolist()
        found = [line["reward" if key == "completion" else "reference_reward"] for line in lines]
        assert len(set(found)) >= 3
        assert found == pytest.approx(scores, abs=1e-5)
    printed = rlhf("generate", str(run), SEASON, "--reward").stdout
    assert re.search(r"^policy \(reward -?\d\.\d{3}", printed, re.MULTILINE)


def test_prompts_come_from_files_and_pipes(rlhf: Rlhf, run: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from rlhf_cli import cli

    write_lines(tmp_path / "a.jsonl", [{"prompt": SEASON}, {"messages": [{"role": "user", "content": MEAL}]}])
    rows = answered(rlhf, run, "--file", "a.jsonl")
    assert [row["prompt"] for row in rows] == [SEASON, MEAL]
    assert rows == answered(rlhf, run, SEASON, MEAL)
    piped = CliRunner().invoke(cli.app, ["generate", str(run)], prog_name="rlhf", input=f"{SEASON}\n{MEAL}\n")
    assert piped.exit_code == 0
    assert [line for line in piped.stdout.splitlines() if line.startswith(">")] == [f"> {SEASON}", f"> {MEAL}"]
    assert all(f"    {row['completion']}\n" in piped.stdout for row in rows)
    assert "there is no prompt" in refused(rlhf("generate", str(run)))


def test_prompts_are_answered_alike_in_one_batch_or_many(
    rlhf: Rlhf, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = [SEASON, MEAL, SEASON, "--samples", "3", "--reward"]
    first = answered(rlhf, run, *ask)
    monkeypatch.setitem(speakers.BATCH, "cpu", 2)
    in_parts = answered(rlhf, run, *ask, name="parts.jsonl")
    assert [line["completion"] for line in in_parts] == [line["completion"] for line in first]
    assert [line["reward"] for line in in_parts] == pytest.approx([line["reward"] for line in first], abs=1e-5)
    assert [line["reference"] for line in in_parts] == [line["reference"] for line in first]


def test_nothing_is_answered_where_the_last_prompt_is_too_long(rlhf: Rlhf, run: Path) -> None:
    result = rlhf("generate", str(run), *[SEASON] * 20, "season " * 40)
    assert "a prompt has 41 tokens" in refused(result)
    assert result.stdout == ""


def test_what_is_no_answer_is_not_replaced(rlhf: Rlhf, run: Path, tmp_path: Path) -> None:
    pairs = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    (tmp_path / "pairs.jsonl").write_text(pairs)
    assert "holds something else than answers" in refused(rlhf("generate", str(run), SEASON, "--out", "pairs.jsonl"))
    assert (tmp_path / "pairs.jsonl").read_text() == pairs
    before = answered(rlhf, run, SEASON)
    line = refused(rlhf("generate", str(run), "--file", "out.jsonl", "--out", "out.jsonl"))
    assert "is the file of the prompts" in line
    assert read_lines(tmp_path / "out.jsonl") == before
    assert answered(rlhf, run, MEAL) != before, "earlier answers are"


def test_a_conversation_goes_on_until_an_empty_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter([SEASON, "season " * 40, SEASON, "", "never read"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    out = tmp_path / "talk.jsonl"
    generate.run(str(run), None, Asked(reference=False, device="cpu"), out)
    printed = capsys.readouterr()
    assert [line["completion"] for line in read_lines(out)] == re.findall(r"^    (.*)$", printed.out, re.MULTILINE)
    assert next(typed) == "never read"
    answers = re.findall(r"^    (.*)$", printed.out, re.MULTILINE)
    assert len(answers) == 2
    assert answers[0] != answers[1], "asked again, it is drawn again"
    assert "error: a prompt has 41 tokens" in printed.err, "and it goes on"


def test_ctrl_c_stops_an_answer_and_at_the_prompt_the_conversation(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    typed = iter([SEASON, interrupted])
    monkeypatch.setattr("builtins.input", lambda prompt: text() if callable(text := next(typed)) else text)
    monkeypatch.setattr(speakers, "draw", interrupted)
    generate.run(str(run), None, Asked(reference=False, device="cpu"))
    assert "stopped; an empty line ends" in capsys.readouterr().err
    assert next(typed, None) is None


def test_an_export_answers_as_its_run(rlhf: Rlhf, run: Path, tmp_path: Path) -> None:
    assert rlhf("export", str(run), str(tmp_path / "out")).exit_code == 0
    ask = [SEASON, "--samples", "4", "--no-reference"]
    assert answered(rlhf, tmp_path / "out", *ask) == answered(rlhf, run, *ask)


def test_a_closed_vocabulary_and_unknown_words_are_said(rlhf: Rlhf, finished: Callable[[str], Path]) -> None:
    closed = finished("pm_closed")
    result = rlhf("generate", str(closed), "Which quark?")
    assert result.exit_code == 0
    assert "closed vocabulary; here it may say anything" in result.stderr
    assert "does not know 1 of the words of: 'Which quark?'" in result.stderr
    line = refused(rlhf("generate", str(closed), SEASON, "--reward"))
    assert "has no reward model. its reward is the survey world's own" in line


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ("RUN", ["season " * 40], r"a prompt has 41 tokens: 'season .*…'. the model reads 36, 12 of them"),
        ("RUN", [SEASON, "--max-new-tokens", "35"], r"shorten it, or lower --max-new-tokens"),
        ("RUN", [SEASON, "--file", "none.txt"], r"prompts are given twice"),
        ("RUN", [SEASON, "--temperature", "-1"], r"--temperature -1.0 is out of range"),
        ("nowhere", [SEASON], r"RUN=nowhere is not a folder"),
        ("RM", [SEASON], r"holds a reward model, not a policy"),
        ("RUN", [SEASON, "--out", "file/x.jsonl"], r"--out=file cannot be a folder"),
        ("RUN", [SEASON, "--out", "answers.txt"], r"--out answers.txt is no .jsonl file"),
        ("RUN", [SEASON, "--out", f"{'x' * 300}.jsonl"], r"--out x+.jsonl cannot be written. File name too long"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    rlhf: Rlhf, run: Path, tmp_path: Path, what: str, options: list[str], message: str
) -> None:
    (tmp_path / "file").touch()
    rm = read_json(run / "stages.json")["reward model"]
    given = {"RUN": str(run), "RM": rm}.get(what, what)
    assert re.search(message, refused(rlhf("generate", given, *options)))
    assert files(tmp_path) == {"file"}


def test_a_reference_that_is_gone_is_said(rlhf: Rlhf, run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run, tmp_path / "moved", ignore=shutil.ignore_patterns("checkpoints", "wandb"))
    (tmp_path / "moved/stages.json").write_text(json.dumps({"reference policy": str(tmp_path / "gone")}))
    result = rlhf("generate", "moved", SEASON)
    assert result.exit_code == 0
    assert "no reference: it is no longer in" in result.stderr
    assert "has no reward model" in refused(rlhf("generate", "moved", SEASON, "--reward"))
