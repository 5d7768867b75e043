"""`rlhf export`: the folder is the run's model for anyone with transformers, its card is true, nothing is half done."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from small_jobs import files, job, read_json, refused, weights
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig
from typer.testing import Result

from rlhf_cli.data.encode import encode_prompt, encode_response
from rlhf_cli.models.adapters import is_adapter
from rlhf_cli.models.policy import load_policy
from rlhf_cli.models.reward import ModelReward, load_centre
from rlhf_cli.stages import export

Rlhf = Callable[..., Result]
PROMPT, ANSWER = "Which season do you like best?", "I like spring."

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def made(workshop: Path, store: Path, finished: Callable[[str], Path]) -> dict[str, Path]:
    """Runs of every kind: a policy and its two earlier stages, and a policy and a reward model with adapters."""
    from rlhf_cli.stages import results, trust

    def small(command: str, *overrides: str, name: str) -> Path:
        return job(command, *overrides, run_dir=workshop / name, store=store)

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((trust, "trust_figure"), (results, "preference_bars"), (results, "curves")):
            patch.setattr(module, name, lambda *_, **__: None)
        patch.setattr(results, "pair_figure", lambda *_: False)
        patch.setattr("rlhf_cli.run.Run.add_figure", lambda *_: None)
        return {
            "pm": finished("pm"),
            "rm": small("train-rm", name="export-rm"),
            "sft": small("train-sft", name="export-sft"),
            "lora": small("align", "algo=dpo", "peft=lora", name="export-lora"),
            "lora-rm": small("train-rm", "peft=lora", name="export-lora-rm"),
        }


def exported(rlhf: Rlhf, run: Path, out: Path, *options: str) -> Path:
    result = rlhf("export", str(run), str(out), *options)
    assert result.exit_code == 0, result.output
    return out


def logits(model: Any, text: str = PROMPT) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    with torch.no_grad():
        return model(torch.tensor([encode_prompt(tokenizer, text)])).logits.float()


def code_of(folder: Path) -> str:
    """Return the code of the card, with the folder's path for its name."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code.count(f'"{folder.name}"') == 2
    return code.replace(f'"{folder.name}"', repr(str(folder)))


def printed_by(folder: Path, source: str) -> str:
    printed = StringIO()
    with redirect_stdout(printed):
        exec(compile(source, str(folder / "README.md"), "exec"), {})  # what a newcomer pastes
    return printed.getvalue()


@pytest.mark.parametrize("kind", ["pm", "sft", "lora"])
def test_plain_transformers_reads_the_runs_policy(rlhf: Rlhf, made: dict[str, Path], tmp_path: Path, kind: str) -> None:
    folder = exported(rlhf, made[kind], tmp_path / "out")
    assert is_adapter(made[kind] / "model") == (kind == "lora")
    assert not is_adapter(folder)
    ours = load_policy(made[kind] / "model").eval()
    ours.name_or_path = str(made[kind] / "model")
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(logits(theirs).log_softmax(-1), logits(ours).log_softmax(-1), atol=1e-5, rtol=0)
    if kind == "lora":
        sft = load_policy(read_json(made[kind] / "model/adapter_config.json")["base_model_name_or_path"]).eval()
        assert float((logits(sft) - logits(theirs)).abs().max()) > 1e-4, "the adapter is in it"


@pytest.mark.parametrize("kind", ["rm", "lora-rm"])
def test_the_cards_code_gives_the_reward(rlhf: Rlhf, made: dict[str, Path], tmp_path: Path, kind: str) -> None:
    folder = exported(rlhf, made[kind], tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(made[kind] / "model")
    reward = ModelReward(made[kind] / "model", tokenizer.pad_token_id, "cpu")
    ours = reward([encode_prompt(tokenizer, PROMPT)], [encode_response(tokenizer, ANSWER)])
    assert float(printed_by(folder, code_of(folder))) == pytest.approx(float(ours), abs=1e-5)
    assert load_centre(folder) == load_centre(made[kind] / "model")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.num_labels == 1


def test_the_cards_code_samples_from_the_policy(rlhf: Rlhf, made: dict[str, Path], tmp_path: Path) -> None:
    folder = exported(rlhf, made["pm"], tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(PROMPT)["input_ids"] == encode_prompt(tokenizer, PROMPT), "beginning-of-sequence included"
    assert encode_prompt(tokenizer, PROMPT) == encode_prompt(
        AutoTokenizer.from_pretrained(made["pm"] / "model"), PROMPT
    )
    answers = {printed_by(folder, f"import torch\ntorch.manual_seed({seed})\n{code_of(folder)}") for seed in range(4)}
    assert len(answers) > 1, "it samples"
    assert "<s>" not in "".join(answers)
    how = GenerationConfig.from_pretrained(folder)
    assert (how.do_sample, how.temperature, how.top_k, how.top_p, how.max_new_tokens) == (True, 1.0, 0, 1.0, 12)


def test_nothing_of_the_machine_is_in_an_export(rlhf: Rlhf, made: dict[str, Path], workshop: Path) -> None:
    for kind, run in made.items():
        assert rlhf("export", str(run)).exit_code == 0
        texts = {path: path.read_bytes() for path in (run / "export").iterdir()}
        assert [path.name for path, text in texts.items() if str(workshop).encode() in text] == [], kind
        card = texts[run / "export/README.md"].decode()
        assert f"rlhf {read_json(run / 'overrides.json')['command']} " in card
        assert card.startswith("---\nlibrary_name: transformers\n")


def test_the_card_has_the_runs_numbers(rlhf: Rlhf, made: dict[str, Path], tmp_path: Path) -> None:
    card = (exported(rlhf, made["pm"], tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    metrics = read_json(made["pm"] / "metrics.json")
    for key in ("reward/mean", "win_rate/rm"):
        interval = f"{metrics[f'{key}/lo']:.3f} to {metrics[f'{key}/hi']:.3f}"
        assert f"| `{key}` | {metrics[key]:.3f} | {interval} |" in card
    assert "| pairs for alignment | 512 |" in card
    assert "| held-out pairs | 64 |" in card
    assert "alignment (`pm`)" in card
    assert "null" not in card.split("## Metrics")[1]


def test_the_best_checkpoint_and_another_number_format(rlhf: Rlhf, made: dict[str, Path], tmp_path: Path) -> None:
    best = exported(rlhf, made["pm"], tmp_path / "best", "--checkpoint", "best")
    assert all(torch.equal(tensor, weights(best)[name]) for name, tensor in weights(made["pm"] / "best").items())
    assert "checkpoint with the least distance" in (best / "README.md").read_text(encoding="utf-8")
    half = exported(rlhf, made["lora"], tmp_path / "half", "--dtype", "bfloat16")
    assert {tensor.dtype for tensor in weights(half).values()} == {torch.bfloat16}
    assert read_json(half / "config.json")["dtype"] == "bfloat16"
    assert "Weights are bfloat16" in (half / "README.md").read_text(encoding="utf-8")


def test_an_adapter_alone_goes_on_the_exported_sft_policy(rlhf: Rlhf, made: dict[str, Path], tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    sft = Path(read_json(made["lora"] / "stages.json")["reference policy"]) / "model"
    base = tmp_path / "base"
    shutil.copytree(sft, base)
    folder = exported(rlhf, made["lora"], tmp_path / "out", "--adapter", str(base))
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files(folder)
    assert not list(folder.glob("model*.safetensors"))
    both = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    both.name_or_path = str(folder)
    merged = AutoModelForCausalLM.from_pretrained(exported(rlhf, made["lora"], tmp_path / "merged")).eval()
    torch.testing.assert_close(logits(both), logits(merged), atol=1e-5, rtol=0)
    other = refused(rlhf("export", str(made["lora"]), str(tmp_path / "x"), "--adapter", str(made["pm"] / "model")))
    assert "are not those that the adapter was trained on" in other
    assert str(sft) in other
    line = refused(rlhf("export", str(made["pm"]), str(tmp_path / "x"), "--adapter", "me/sft"))
    assert "holds whole weights, not an adapter" in line
    assert "names no model" in refused(rlhf("export", str(made["lora"]), str(tmp_path / "x"), "--adapter", "nothing"))
    assert not (tmp_path / "x").exists()


def test_an_edited_card_is_kept_and_a_foreign_folder_is_left_alone(
    rlhf: Rlhf, made: dict[str, Path], tmp_path: Path
) -> None:
    out = exported(rlhf, made["pm"], tmp_path / "out")
    before = (out / "README.md").read_text(encoding="utf-8")
    (out / "README.md").write_text(f"{before}\nMine.\n", encoding="utf-8")
    for _ in range(2):
        exported(rlhf, made["pm"], out)
        assert (out / "README.md").read_text(encoding="utf-8").endswith("\nMine.\n")
    line = refused(rlhf("export", str(made["pm"]), str(out), "--checkpoint", "best"))
    assert "was edited, and belongs to another model" in line
    (out / "README.md").write_text(before, encoding="utf-8")
    exported(rlhf, made["pm"], out, "--checkpoint", "best")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/thesis.tex").touch()
    assert "it holds files and is no export" in refused(rlhf("export", str(made["pm"]), str(tmp_path / "own")))
    assert files(tmp_path / "own") == {"thesis.tex"}


def test_the_folder_one_stands_in_is_not_replaced(
    rlhf: Rlhf, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", str(tmp_path / "here")):
        assert "is the folder you are in" in refused(rlhf("export", str(made["pm"]), out))
    assert Path.cwd().is_dir()


def test_whoever_reads_the_card_may_read_the_weights(rlhf: Rlhf, made: dict[str, Path], tmp_path: Path) -> None:
    for kind, options in (("pm", []), ("lora", ["--adapter", "me/sft"])):
        folder = exported(rlhf, made[kind], tmp_path / kind, *options)
        (tmp_path / "other").touch()
        modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
        assert set(modes.values()) == {(tmp_path / "other").stat().st_mode}, modes


def test_an_export_is_whole_or_not_there(
    rlhf: Rlhf, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = exported(rlhf, made["pm"], tmp_path / "out")
    there = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*_: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "model_card", fail)
    for name in ("out", "new"):
        line = refused(rlhf("export", str(made["rm"]), str(tmp_path / name)))
        assert f"{name} cannot be written. No space left on device. make room" in line
    assert {path.name: path.read_bytes() for path in out.iterdir()} == there
    assert files(tmp_path) == {"out"}


def unfinished(run: Path) -> None:
    (run / "status.json").write_text(json.dumps({"state": "interrupted"}))


def evaluation(run: Path) -> None:
    (run / "overrides.json").write_text(json.dumps({"command": "evaluate", "overrides": []}))


def damaged(run: Path) -> None:
    (run / "model/model.safetensors").write_bytes(b"nothing")


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (unfinished, [], r"has not finished: its state is interrupted. run its command again"),
        (evaluation, [], r"holds no model. rlhf evaluate trains none"),
        (damaged, [], r"no policy could be opened in .*model"),
        (lambda run: shutil.rmtree(run / "best"), ["--checkpoint", "best"], r"has no best checkpoint"),
        (lambda run: shutil.rmtree(run / "model"), [], r"has no model"),
        (lambda run: (run / "manifest.json").unlink(), [], r"is not whole"),
        (lambda run: (run / "config.yaml").unlink(), [], r"is not a run folder"),
        (lambda run: None, ["--push", "a b"], r"--push a b is no name of a repository"),
        (lambda run: None, ["--private"], r"--push is not given"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    rlhf: Rlhf, made: dict[str, Path], tmp_path: Path, spoil: Callable[[Path], None], options: list[str], message: str
) -> None:
    shutil.copytree(made["pm"], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "export", "wandb"))
    spoil(tmp_path / "run")
    assert re.search(message, refused(rlhf("export", "run", "out", *options)))
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_its_base_is_refused(rlhf: Rlhf, made: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(made["lora"], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "export"))
    settings = tmp_path / "run/model/adapter_config.json"
    settings.write_text(json.dumps({**read_json(settings), "base_model_name_or_path": str(tmp_path / "gone")}))
    assert "needs its base" in refused(rlhf("export", "run", "out"))
