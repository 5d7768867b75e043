"""The GPU benchmark at the least size on the CPU, its arithmetic by hand and by PyTorch's counter; growth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import growth
import growth_plan as plan
import pytest
import torch
from gpu import SMALL, VARIANTS, Size, arithmetic, estimated, prepared, read
from gpu_arithmetic import (
    ADAM_TRAFFIC,
    GENERATE,
    LOGPS,
    PHASES,
    SCORE,
    UPDATE,
    Body,
    Limits,
    Update,
    cache_traffic,
    flops,
    tokens,
    traffic,
)  # fmt: skip
from gpu_job import Phases, measure
from gpu_page import Measured, Row, bound, page
from torch.utils.flop_counter import FlopCounterMode
from transformers import OPTConfig, OPTForCausalLM

from rlhf_cli.models.shapes import Adapters, ModelShape

ROOT = Path(__file__).resolve().parents[2]
TINY = {**SMALL, "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64, "num_attention_heads": 4}
TINY |= {"word_embed_proj_dim": 32, "max_position_embeddings": 64}
SIZE = Size(TINY, prompt=24, response=8, rollouts=4, micro_batch=2, updates=1)
CONFIG = OPTConfig(**TINY, dropout=0.0)
# Weights by hand: a layer has four matrices of 32 x 32 and two of 32 x 64; what they read and write is 8 x 32 + 2 x 96.
BODY = Body(linear=2 * (4 * 32**2 + 2 * 32 * 64), head=400 * 32, layers=2, width=32, cache_width=32,
            passing=2 * (8 * 32 + 2 * 96), vocab_size=400)  # fmt: skip


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_a_body_is_what_its_layers_say() -> None:
    assert Body.of(ModelShape.of(CONFIG)) == BODY
    with_adapters = Body.of(ModelShape.of(CONFIG), Adapters(4, ("q_proj", "v_proj")))
    assert with_adapters.adapter == 2 * 2 * 4 * (32 + 32)
    assert with_adapters.linear == BODY.linear


def test_flops_are_those_that_pytorch_counts() -> None:
    model, length = OPTForCausalLM._from_config(CONFIG, attn_implementation="eager"), 11
    ids = torch.arange(length).unsqueeze(0) + 4
    # PyTorch counts attention over all pairs of tokens, also those that a causal model does not look at.
    whole, causal = 4 * 2 * 32 * length**2, BODY.attention(length)
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids).logits.sum()
    assert counter.get_total_flops() == BODY.forward(length, read=length) - causal + whole
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    backward = BODY.trained(length, read=length) - BODY.forward(length, read=length)
    assert counter.get_total_flops() == backward - 2 * causal + 2 * whole


def test_flops_of_an_update_by_hand() -> None:
    # N = 10 weights, head 6, one layer of width 1: a token costs 20, a logit 12, attention over n tokens 2 n (n + 1).
    body = Body(linear=10, head=6, layers=1, width=1, cache_width=1, passing=0, vocab_size=3)
    update = Update([(2, 3)], micro_batch=1, epochs=2, steps=2, number_bytes=4, casts=False)
    found = flops(body, body, update)
    assert found[GENERATE] == 20 * 4 + 12 * 3 + 2 * 4 * 5
    assert found[SCORE] == 20 * 5 + 2 * 5 * 6
    assert found[LOGPS] == 2 * (100 + 12 * 4 + 60) + 160  # policy and reference; critic
    assert found[UPDATE] == 2 * 3 * (100 + 48 + 60 + 160)
    assert tokens(update) == {GENERATE: 3, SCORE: 5, LOGPS: 5, UPDATE: 10}
    # Of two tokens sampled after the first, one sees 3 and one 4 in the cache, its own included; 2 x 4 bytes each.
    assert cache_traffic(body, update) == 8 * (3 + 4)


def test_weights_that_are_cast_are_cast_once_for_all_tokens_and_once_for_each_micro_batch() -> None:
    # 16 weights of the policy, 10 of the values' body; two rollouts of two prompt and three response tokens, apart.
    body = Body(linear=10, head=6, layers=1, width=1, cache_width=1, passing=0, vocab_size=0)
    update = Update([(2, 3), (2, 3)], micro_batch=1, epochs=1, steps=1, number_bytes=2, casts=True)
    cache = 2 * 2 * 2 * (3 + 4)  # keys and values of 2 bytes, two rollouts
    found = traffic(body, body, update)
    assert found[GENERATE] == 16 * (6 + 3 * 2) + cache
    assert found[LOGPS] == 26 * 6 + 2 * 2 * (16 + 16 + 10)
    assert found[UPDATE] == 2 * 26 * (6 + 2 + 2 + 8) + ADAM_TRAFFIC * 26
    paged = replace(update, engine="continuous")
    assert traffic(body, body, paged)[GENERATE] == 16 * 3 * 4 + 2 * cache
    assert traffic(body, body, replace(update, engine="vllm"))[GENERATE] == 16 * 3 * 2 + cache
    adapted = replace(body, adapter=1)
    frozen = traffic(adapted, adapted, replace(update, casts=False))
    assert frozen[UPDATE] == 2 * 26 * (2 + 2) + ADAM_TRAFFIC * 2


def test_frozen_weights_have_no_gradient_of_their_own() -> None:
    body = Body(linear=10, head=6, layers=1, width=1, cache_width=1, passing=0, vocab_size=3, adapter=1)
    assert body.forward(5, read=4) == 2 * 11 * 5 + 2 * 6 * 4 + 60
    assert body.trained(5, read=4) == 3 * (2 * 1 * 5 + 60) + 2 * (2 * 10 * 5 + 2 * 6 * 4)


def test_the_nearer_limit_bounds_a_phase() -> None:
    limits = Limits("device", peak=100.0, bandwidth=10.0, source="measured", matmul=90.0, copy=9.0)
    row = Row(GENERATE, seconds=4.0, tokens=1, flops=100.0, bytes=20.0, peak=1.0, estimated=None)
    assert limits.ridge == 10
    assert bound(row, limits) == ("memory", 0.5)  # 2 s of 4
    assert bound(Row(UPDATE, 4.0, 1, 300.0, 20.0, 1.0, None), limits) == ("arithmetic", 0.75)


# -- the dry run -------------------------------------------------------------------------------------------------------


def test_what_lies_within_a_phase_does_not_count_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("gpu_job.time.perf_counter", lambda: float(next(clock)))  # a second between looks
    phases = Phases("cpu", before=0.0)
    outer = phases.watched(UPDATE, phases.watched(GENERATE, lambda: 7))
    assert outer() == 7
    assert {name: part["seconds"] for name, part in phases.updates[0].items()} == {UPDATE: 2.0, GENERATE: 1.0}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gpu")
    overrides = [*prepared(SIZE, folder), *VARIANTS["full"], "device=cpu", "model.dtype=float32"]
    found: dict[str, Any] = json.loads(json.dumps(measure(SIZE.updates + 1, overrides, folder / "trainer")))
    return found


def test_the_dry_run_measures_every_phase(report: dict[str, Any]) -> None:
    found = read("full", "default", report)
    assert isinstance(found, Measured)
    assert [row.phase for row in found.rows] == list(PHASES)
    assert found.prompts == SIZE.rollouts
    assert len(report["updates"]) == len(report["rows"]) == SIZE.updates
    (rows,) = report["rows"]
    assert all(10 <= prompt <= 24 and 1 <= response <= 8 for prompt, response in rows)
    assert 0.5 * found.seconds < sum(row.seconds for row in found.rows) < found.seconds
    assert all(0 < row.seconds < found.seconds for row in found.rows)
    work = arithmetic({**report, "engine": "default"}, rows)
    assert [row.flops for row in found.rows] == [int(work["flops"][phase]) for phase in PHASES]
    assert found.rows[0].tokens == sum(response for _, response in rows)
    assert found.rows[3].estimated is not None
    assert found.rows[3].estimated > 2 * 16 * BODY.linear  # weights, gradients and AdamW of policy and critic
    assert found.rows[1].estimated is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_is_near_the_tensors_of_an_update(tmp_path: Path, dtype: str) -> None:
    overrides = [*prepared(SIZE, tmp_path), "device=cpu", f"model.dtype={dtype}"]
    report = measure(2, overrides, tmp_path / "trainer", memory=True)
    rows = {
        phase: (report["updates"][0][phase]["tensors"], estimated(phase, report)) for phase in (GENERATE, LOGPS, UPDATE)
    }
    assert all(told == pytest.approx(took, rel=0.2) for took, told in rows.values()), rows


def test_the_page_says_what_it_is(report: dict[str, Any]) -> None:
    measured = read("full", "default", report)
    refused = read("full", "vllm", {"refused": "generation=vllm needs vLLM, which is not installed."})
    assert isinstance(measured, Measured)
    assert isinstance(refused, str)
    measured = replace(measured, rows=[replace(row, peak=2.0e9, tensors=1.0e9) for row in measured.rows])
    text = page([measured, ("vllm", refused)], SIZE, dry=True)
    assert text.startswith("No CUDA GPU was at hand")
    assert "- `generation=vllm`: generation=vllm needs vLLM" in text
    lines = [line for line in text.splitlines() if line.startswith("| full |")]
    assert len(lines) == 1 + len(PHASES) + 3  # the whole, each phase, each with an estimate
    rate = measured.rows[3].flops / measured.rows[3].seconds / 1e12
    assert (
        f"| update | {measured.rows[3].seconds:.3g} | {measured.rows[3].tokens / measured.rows[3].seconds:,.0f}" in text
    )
    assert f" | {rate:.3g} | " in lines[4]
    told = measured.rows[3].estimated or 0.0
    assert lines[-1].endswith(f"| {told / 1e9:.2f} | 1.00 | {told / 1e9 - 1:+.0%} | 2.00 | {told / 2e9 - 1:+.0%} |")
    assert all(f"- **{phase}**: " in text for phase in PHASES)
    assert not page([measured], SIZE, dry=False).startswith("No CUDA GPU")


# -- growth ------------------------------------------------------------------------------------------------------------


def test_the_page_of_growth_has_the_numbers_as_computed() -> None:
    text = (ROOT / "docs" / "growth.md").read_text(encoding="utf-8")
    assert plan.tables() in text
    assert growth.planned(text) == text
    with pytest.raises(ValueError, match="no place for the tables"):
        growth.planned("# growth\n")


def test_memory_and_traffic_by_hand() -> None:
    # A layer of width 2, its heads sharing keys of width 1: 2 x 2 x (2 + 1) + 3 x 2 x 5 = 42; embedding and head 7 x 2.
    model = plan.Model("toy", layers=1, width=2, cache_width=1, inner=5, matrices=3, words=7)
    assert (model.layer, model.weights, model.cache) == (42, 70, 4)
    one = plan.Scenario(model, full=True, gpus=2, servers=0, rollouts=8, micro_batch=2)
    found = plan.memory(one)
    states = [found[name] for name in ("frozen", "weights", "gradients", "AdamW")]
    assert states == [2 * 70 * 2 / 2, 2 * 70 * 4 / 2, 2 * 70 * 4 / 2, 2 * 70 * 8 / 2]  # 36 bytes a weight, halved
    tokens = 2 * (256 + 256)
    assert found["activations"] == 2 * tokens * 2 * 2 + tokens * (10 * 2 + 3 * 5) * 2
    assert found["loading"] == (2 * 70 * 2 + 2 * 70 * 4) / 2 + 42 * 4, "parts, and a layer on its way"
    assert found["host"] == 70 * 4
    lora = [plan.Scenario(model, full=False, gpus=gpus, servers=0, rollouts=8, micro_batch=2) for gpus in (1, 2)]
    assert [plan.memory(one)["frozen"] for one in lora] == [70 * 2, 3 * 70 * 2 / 2], "what is split has no shared base"
    moved = plan.link_bytes(one)  # two micro-batches on each of two GPUs; half of the weights come from the other
    half = 70 * 2 / 2
    assert moved == {"read": 8 * half, "train": 8 * half, "gradients": 4 * half, "sample": 256 * half, "to vLLM": 0.0}


def test_seven_and_seventy_billion_are_what_they_are_called() -> None:
    assert plan.OPT.weights == pytest.approx(1.3158e9, rel=0.005)  # as transformers counts, positions and biases too
    assert plan.LLAMA_7B.weights == pytest.approx(6.7384e9, rel=0.001)
    assert plan.LLAMA_70B.weights == pytest.approx(70.554e9, rel=0.001)


def test_only_whole_lines_of_a_log_are_read(tmp_path: Path) -> None:
    log = tmp_path / "training_log.jsonl"
    assert growth.logged(log) == []
    log.write_text('{"step": 1, "loss": 0.5}\n{"step": 2}\n{"ste', encoding="utf-8")
    assert growth.logged(log) == [1, 2]


def test_memory_is_that_of_the_processes_below_too() -> None:
    ready = "print(flush=True); input()"  # only then it is Python, and no copy of this process
    with subprocess.Popen([sys.executable, "-c", ready], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert child.pid in growth.family(os.getpid())
        assert growth.peak(child.pid) > 1e5
        child.communicate(b"\n")
    assert growth.peak(child.pid) == 0.0
