"""Every reward model: trained once, judged, kept apart in the store, and read the same wherever it is read."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from small_jobs import SMALL, SURVEY, files, gap, job, read_json, read_lines, weights

from rlhf_cli.config.compose import load
from rlhf_cli.data.encode import encode_prompt, encode_response
from rlhf_cli.metrics.glossary import known
from rlhf_cli.models import reward as reward_models
from rlhf_cli.models.calibration import CALIBRATION_FILE, LengthCalibration
from rlhf_cli.models.policy import load_tokenizer
from rlhf_cli.models.reward import ModelReward, last_values, load_centre, load_reward_model, token_values
from rlhf_cli.models.tokens import TokenBatch
from rlhf_cli.rewards import bt
from rlhf_cli.stages import trust
from rlhf_cli.stages.judgements import Judgements
from rlhf_cli.trainers import reward as reward_trainers
from rlhf_cli.trainers.reward import COLUMNS, JudgementCollator

Small = Callable[..., Path]
Judged = Callable[[str], Path]
PRIORS = ["pcrm_length", "pcrm_cosine", "pcrm_fixed", "pcrm_random"]
REWARDS = {name: [f"reward={name}"] for name in ["bt", *PRIORS]} | {"warm": ["reward=warm", "reward.members=2"]}
REPORTED = {
    "rm/accuracy", "rm/accuracy/lo", "rm/accuracy/hi", "rm/log_loss", "rm/brier", "rm/ece", "rm/margin/q50",
    "rm/length_correlation", "rm/length_correlation_raw", "rm/length_correlation_calibrated", "rm/gold_spearman",
    "rm/gold_kendall", "rm/gold_tv", "rm/score_dataset/mean", "rm/score_policy/mean", "rm/score_policy_beyond",
    "rm/negative_accuracy",
}  # fmt: skip
BOUNDED = {"rm/bound", "rm/bound_half", "rm/beyond_bound", "rm/bounded_margin"}

every_reward = pytest.mark.parametrize("name", REWARDS)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of this module's own: what is in it was asked for here."""
    return tmp_path_factory.mktemp("rewards") / "store"


@pytest.fixture(scope="module")
def judged(store: Path) -> Judged:
    """Return a function that gives the train-rm run of an entry of REWARDS, trained on first use."""

    def run(name: str) -> Path:
        # The run folder is left alone by a second run: the same command again trains nothing.
        return job("train-rm", *REWARDS[name], run_dir=store.parent / name, store=store)

    return run


def tokens_of(folder: Path) -> Any:
    return load_tokenizer(folder / "model")


def rm_folders(store: Path) -> list[Path]:
    return sorted((store / "rm").iterdir())


# -- training and judging ----------------------------------------------------------------------------------------------


@every_reward
def test_a_reward_model_is_trained_and_judged(name: str, judged: Judged) -> None:
    run_dir = judged(name)
    assert files(run_dir) == {
        ".lock", "config.yaml", "manifest.json", "metrics.json", "model", "overrides.json", "status.json",
        "training_log.jsonl", "trust.json", "trust.png",
    }  # fmt: skip
    metrics, log = read_json(run_dir / "metrics.json"), read_lines(run_dir / "training_log.jsonl")
    for line in (metrics, *log):
        assert [key for key in line if not known(key)] == []
        assert [key for key, value in line.items() if not math.isfinite(value)] == []
    assert metrics.keys() >= REPORTED
    assert metrics["rm/accuracy/lo"] <= metrics["rm/accuracy"] <= metrics["rm/accuracy/hi"]
    report = read_json(run_dir / "trust.json")
    assert {key: metrics[key] for key in report["metrics"]} == report["metrics"]
    assert sum(one["count"] for one in report["panels"]["reliability"]["bins"]) == 32, "half of the held-out pairs"
    assert (run_dir / "trust.png").read_bytes().startswith(b"\x89PNG")
    assert [line["step"] for line in log] == [2, 4, 6]
    assert all({"rm/loss", "margin", "score/mean", "score/std", "train/rm/accuracy"} <= line.keys() for line in log)


@every_reward
def test_bounds_are_logged_where_there_are_bounds(name: str, judged: Judged) -> None:
    log = read_lines(judged(name) / "training_log.jsonl")
    metrics = read_json(judged(name) / "metrics.json")
    half = {key for key in metrics if key.startswith(("rm/bound", "rm/beyond"))}
    assert half == (
        {"rm/bound/mean", "rm/bound/half", "rm/beyond_bound", "rm/beyond_half"} if name in PRIORS else set()
    )
    # The smallest and largest delta* of each: 10 / 1.001 - 5, 20 / 1.001 - 15 and 20 / .501 - 15 (an angle of 1/2).
    low, high = {"pcrm_length": (4.99, 115), "pcrm_cosine": (4.98, 24.93), "pcrm_fixed": (5, 5)}.get(name, (4, 5))
    for line in log:
        assert (line.keys() & BOUNDED) == (BOUNDED if name in PRIORS else set())
        if name in PRIORS:
            assert low <= line["rm/bound"] <= high
            assert line["rm/bound_half"] == pytest.approx(line["rm/bound"] / 2)
            assert line["rm/beyond_bound"] == 0
    if name in PRIORS:
        assert low <= metrics["rm/bound/mean"] <= high


@pytest.mark.usefixtures("no_figures")
def test_the_store_keeps_them_apart(judged: Judged, store: Path, trained: list[str], tmp_path: Path) -> None:
    runs = {name: judged(name) for name in REWARDS}
    kept = [read_json(folder / "identity.json")["reward"]["name"] for folder in rm_folders(store)]
    assert sorted(kept) == sorted([*REWARDS, "bt"]), "the second member of WARM is a bt model too"
    assert len(files(store / "sft")) == 1
    models = {name: weights(run / "model") for name, run in runs.items()}
    for one, other in combinations(REWARDS, 2):
        assert gap(models[one], models[other]) > 1e-6, (one, other)
    trained.clear()
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    for name, overrides in REWARDS.items():
        again = job("train-rm", *overrides, run_dir=tmp_path / name, store=store)
        assert read_json(again / "metrics.json") == read_json(runs[name] / "metrics.json")
        assert read_lines(again / "training_log.jsonl") == read_lines(runs[name] / "training_log.jsonl")
        assert judged(name) == runs[name]
    assert trained == []
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()} == before


# -- re-loading --------------------------------------------------------------------------------------------------------

IN_A_NEW_PROCESS = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForSequenceClassification
from rlhf_cli.models.reward import ModelReward, load_centre

folder, rows = Path(sys.argv[1]), json.loads(sys.argv[2])
prompts, responses = zip(*rows)
ours = {how: ModelReward(folder, 1, "cpu", how)(prompts, responses).tolist() for how in ("none", "length")}
plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
with torch.no_grad():
    raw = [float(plain(input_ids=torch.tensor([p + r])).logits) for p, r in rows]
print(json.dumps({**ours, "transformers": raw, "centre": load_centre(folder)}))
"""


def heldout_rows(store: Path, judged: Judged) -> tuple[list[list[int]], list[list[int]]]:
    """Return prompts and responses of held-out pairs, as token ids."""
    data = Judgements(load("train-rm", [*SMALL, *SURVEY, f"store_dir='{store}'"]), judged("bt"))
    rows = data.encode(data.measuring)
    return [row["prompt_ids"] for row in rows] * 2, [row[side] for side in trust.SIDES for row in rows]


def test_a_saved_model_scores_the_same_in_a_new_process_and_in_transformers(judged: Judged, store: Path) -> None:
    folder = judged("pcrm_length") / "model"
    prompts, responses = (rows[:24] for rows in heldout_rows(store, judged))
    asked = [
        sys.executable,
        "-c",
        IN_A_NEW_PROCESS,
        str(folder),
        json.dumps(list(zip(prompts, responses, strict=True))),
    ]
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    here = {how: ModelReward(folder, 1, "cpu", how)(prompts, responses) for how in ("none", "length")}
    for how, rewards in here.items():
        assert found[how] == pytest.approx(rewards.tolist(), abs=1e-6, rel=0)
    assert found["transformers"] == pytest.approx([r + found["centre"] for r in found["none"]], abs=1e-6, rel=0)
    assert (here["none"] - here["length"]).abs().max() > 1e-3, "a calibration that matters"
    assert here["none"].std() > 1e-2, "scores that tell responses apart"


# -- the same tokens in training and in alignment ----------------------------------------------------------------------


def sequences(batch: TokenBatch) -> list[tuple[int, ...]]:
    return [tuple(ids[mask].tolist()) for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]


def test_training_reads_the_tokens_that_alignment_scores(
    small: Small, judged: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """End to end: what the trainer's model saw of chosen responses is among what the aligned run's reward scored."""
    seen: dict[str, list[TokenBatch]] = {"training": [], "alignment": []}

    def at_training(values: Any, batch: TokenBatch) -> Any:
        if type(batch.input_ids) is torch.Tensor:
            seen["training"].append(batch)
        return last_values(values, batch)

    def at_alignment(model: Any, batch: TokenBatch) -> Any:
        if type(batch.input_ids) is torch.Tensor:  # the memory estimate reads tensors without numbers
            seen["alignment"].append(batch)
        return token_values(model, batch)

    monkeypatch.setattr(reward_trainers, "last_values", at_training)
    monkeypatch.setattr(reward_models, "token_values", at_alignment)
    small("train-rm", "reward.centering=0.25", name="rm")
    seen["alignment"].clear()  # its own report
    run_dir = small("align", "algo=kl_ppo", "reward.centering=0.25")
    chosen = {ids for batch in seen["training"] for ids in sequences(batch)[0::2]}
    scored = {ids for batch in seen["alignment"] for ids in sequences(batch)}
    assert len(chosen) >= 4
    assert chosen <= scored
    eos = tokens_of(run_dir).eos_token_id
    assert all(ids[-1] == eos for ids in chosen)
    assert not any(ids[:-1] in scored for ids in chosen)


def test_both_paths_give_the_same_scores(judged: Judged, store: Path) -> None:
    run_dir = judged("bt")
    folder, tokenizer = run_dir / "model", tokens_of(run_dir)
    data = Judgements(load("train-rm", [*SMALL, *SURVEY, f"store_dir='{store}'"]), run_dir)
    rows, pairs = list(data.training_rows(bt.LOSS, run_dir))[:16], data.data.reward_pairs[:16]
    fields = JudgementCollator(tokenizer.pad_token_id)(rows)
    batch = TokenBatch(**{key: value for key, value in fields.items() if key not in {"counts", *COLUMNS}})
    model = load_reward_model(folder).eval()
    trained = last_values(token_values(model, batch), batch).detach()

    texts = [(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    prompts = [encode_prompt(tokenizer, prompt) for prompt, _ in texts]
    responses = [encode_response(tokenizer, text) for _, text in texts]
    assert sequences(batch) == [tuple(p + r) for p, r in zip(prompts, responses, strict=True)]
    reward = ModelReward(folder, tokenizer.pad_token_id, "cpu", micro_batch=5)
    aligned = reward(prompts, responses) + load_centre(folder)
    torch.testing.assert_close(aligned, trained, atol=1e-6, rtol=0)
    unended = reward(prompts, [ids[:-1] for ids in responses]) + load_centre(folder)
    assert (unended - trained).abs().min() > 1e-5, "end-of-sequence counts"
    centred = reward([row["prompt_ids"] for row in data.pairs], [row["chosen_ids"] for row in data.pairs])
    assert float(centred.mean()) == pytest.approx(0, abs=1e-5), "rewards are centred on the chosen training responses"


# -- length calibration ------------------------------------------------------------------------------------------------


def test_calibration_reads_the_same_model_less_its_offset(
    small: Small, judged: Judged, store: Path, trained: list[str]
) -> None:
    rm = judged("bt")
    kept = rm_folders(store)
    trained.clear()
    runs = {how: small("align", "algo=dpo", f"reward.calibration={how}", name=how) for how in ("none", "length")}
    assert trained == ["PairwiseTrainer"] * 2
    assert rm_folders(store) == kept
    assert len({read_json(run / "stages.json")["reward model"] for run in runs.values()}) == 1

    prompts, responses = heldout_rows(store, judged)
    raw, calibrated = (ModelReward(rm / "model", 1, "cpu", how)(prompts, responses) for how in ("none", "length"))
    stored = LengthCalibration.load(rm / "model" / CALIBRATION_FILE)
    lengths = torch.tensor([len(ids) for ids in responses])
    torch.testing.assert_close(calibrated, raw - stored.offset(lengths), atol=1e-7, rtol=0)
    assert len(set(stored.offset(lengths).tolist())) >= 2

    tokenizer, targets = tokens_of(rm), {}
    for how, run in runs.items():
        rows = read_json(run / "distributions.json")
        for row in rows:
            ids = [encode_response(tokenizer, answer) for answer in row["answers"]]
            rewards = ModelReward(rm / "model", 1, "cpu", how)(
                [encode_prompt(tokenizer, row["prompt"])] * len(ids), ids
            )
            assert row["reward_model"] == pytest.approx(rewards.clamp(-5, 5).softmax(-1).tolist(), abs=1e-4)
        targets[how] = [share for row in rows for share in row["reward_model"]]
    assert max(abs(a - b) for a, b in zip(*targets.values(), strict=True)) > 1e-3
    metrics = {how: read_json(run / "metrics.json") for how, run in runs.items()}
    for key in ("pm/kl_rm_policy", "pm/pair_tv", "reward/mean", "reference/pm/kl_rm_policy"):
        assert metrics["none"][key] != metrics["length"][key], key
    assert gap(weights(runs["none"] / "model"), weights(runs["length"] / "model")) == 0, "dpo itself reads no reward"


def test_a_calibrated_reward_model_is_judged_as_it_is_read(small: Small, judged: Judged, trained: list[str]) -> None:
    before = read_json(judged("bt") / "metrics.json")
    trained.clear()
    run_dir = small("train-rm", "reward.calibration=length", name="length")
    plain = read_json(small("train-rm", name="plain") / "metrics.json")
    assert trained == []
    assert plain == before
    metrics = read_json(run_dir / "metrics.json")
    assert metrics["rm/length_correlation"] == metrics["rm/length_correlation_calibrated"]
    assert metrics["rm/length_correlation"] != metrics["rm/length_correlation_raw"]
    assert plain["rm/length_correlation"] == plain["rm/length_correlation_raw"]
    for key in ("rm/length_correlation_raw", "rm/length_correlation_calibrated"):
        assert metrics[key] == plain[key]
    for key in ("rm/margin/mean", "rm/log_loss", "rm/score_policy/mean", "rm/gold_tv"):
        assert metrics[key] != plain[key], key
