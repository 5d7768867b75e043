from __future__ import annotations

import copy
import importlib.machinery
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_engines import drawn, engine, engine_trainer, read
from tiny_models import BOS, EOS, PAD, TOKENIZER, tiny_policy
from tiny_roles import adapted_policy, disturb, trained_roles
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from trl import RLOOConfig

from rlhf_cli.errors import RunError
from rlhf_cli.models.adapters import adapter_layers
from rlhf_cli.models.sampling import row_streams, sample
from rlhf_cli.models.tokens import pad_left
from rlhf_cli.trainers import engines

PROMPTS = [[BOS, 4, 5, 6, 7], [BOS, 8], [BOS, 9, 4, 4], [BOS, 10, 5]]
EXACT = 1e-5  # nats: engines that compute in float32, as training does (docs/generation.md)
ROUNDED = 0.1  # nats: training by bfloat16 autocast, the engine with other roundings
here = pytest.mark.parametrize("name", ["default", "generate", "continuous"])


def trainer_of(name: str, folder: Path, *, seed: int = 0, policy: Any = None, **changes: Any) -> Any:
    computing = {key: changes.pop(key) for key in ("bf16", "steps") if key in changes}
    return engine_trainer(
        policy or tiny_policy(), TOKENIZER, PROMPTS, engine(name, **changes), folder,
        max_completion_tokens=6, seed=seed, **computing,
    )  # fmt: skip


def furthest(one: list[torch.Tensor], other: list[list[float]]) -> float:
    return max(float((a - torch.tensor(b)).abs().max()) for a, b in zip(one, other, strict=True))


# -- log-probs: those of the policy that samples, at its temperature ---------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_continuous_batching_samples_with_the_log_probs_of_training(temperature: float, tmp_path: Path) -> None:
    trainer = trainer_of("continuous", tmp_path, temperature=temperature)
    prompts = PROMPTS * 8
    responses = drawn(trainer, prompts)
    assert furthest(read(trainer, prompts, responses, temperature), trainer.engine_logps) < EXACT
    assert furthest(read(trainer, prompts, responses, 1.6 - temperature), trainer.engine_logps) > 0.1


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_generate_samples_with_the_log_probs_of_training(temperature: float, tmp_path: Path) -> None:
    """TRL keeps no scores, so `generate` is asked for them here, with the very settings and seed of the trainer."""
    trainer = trainer_of("generate", tmp_path, temperature=temperature)
    prompts = PROMPTS * 8
    responses = drawn(trainer, prompts)
    assert trainer.engine_logps is None
    ids, mask = pad_left(prompts, PAD)
    how = copy.deepcopy(trainer.generation_config)
    how.update(output_scores=True, return_dict_in_generate=True)
    with torch.random.fork_rng():
        torch.manual_seed(row_streams(0, 0, rows=[0])[0])
        output = tiny_policy().generate(input_ids=ids, attention_mask=mask.long(), generation_config=how)
    again = output.sequences[:, ids.shape[1] :].tolist()
    assert [row[: len(given)] for row, given in zip(again, responses, strict=True)] == responses
    scores = torch.stack(output.scores, 1).log_softmax(-1)
    theirs = [
        [scores[row, place, token].item() for place, token in enumerate(given)] for row, given in enumerate(responses)
    ]
    assert furthest(read(trainer, prompts, responses, temperature), theirs) < EXACT
    assert furthest(read(trainer, prompts, responses, 1.6 - temperature), theirs) > 0.1


def test_vllm_samples_with_the_log_probs_of_training(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    if not torch.cuda.is_available():
        pytest.skip("vLLM needs a CUDA GPU")
    adapted_policy(tmp_path / "base")  # writes a model folder, from which vLLM starts
    trainer = trainer_of("vllm", tmp_path / "run", temperature=0.6)
    responses = drawn(trainer, PROMPTS * 8)
    assert furthest(read(trainer, PROMPTS * 8, responses, 0.6), trainer.engine_logps) < ROUNDED


# -- what all engines do alike -----------------------------------------------------------------------------------------


@here
def test_responses_end_with_end_of_sequence_or_are_cut(name: str, tmp_path: Path) -> None:
    found = drawn(trainer_of(name, tmp_path), PROMPTS * 40)
    assert all(EOS not in ids[:-1] and 1 <= len(ids) <= 6 for ids in found)
    assert all(ids[-1] == EOS or len(ids) == 6 for ids in found)
    assert any(ids[-1] == EOS for ids in found)
    assert any(ids[-1] != EOS for ids in found)


@here
def test_any_of_the_policy_s_end_tokens_ends_a_response(name: str, tmp_path: Path) -> None:
    policy = tiny_policy()
    policy.generation_config.eos_token_id = [EOS, 7]
    found = drawn(trainer_of(name, tmp_path, policy=policy), PROMPTS * 40)
    assert all(not {EOS, 7} & set(ids[:-1]) for ids in found)
    assert {ids[-1] for ids in found if len(ids) < 6} == {EOS, 7}


@here
def test_cold_responses_are_the_same_whatever_the_engine(name: str, tmp_path: Path) -> None:
    likeliest = sample(
        tiny_policy(), PROMPTS, streams=[0, 1, 2, 3], max_new_tokens=6, temperature=1e-4, top_p=1.0, eos_ids=[EOS],
        pad_id=PAD,
    )  # fmt: skip
    assert drawn(trainer_of(name, tmp_path, temperature=1e-4), PROMPTS) == likeliest


@here
def test_every_engine_cuts_at_the_same_nucleus(name: str, tmp_path: Path) -> None:
    cut = {} if name != "continuous" else {"correction_cap": "null"}
    found = drawn(trainer_of(name, tmp_path, top_p=0.5, **cut), [PROMPTS[1]] * 600)
    first = {ids[0] for ids in found}
    assert first == {ids[0] for ids in drawn(trainer_of("default", tmp_path, top_p=0.5), [PROMPTS[1]] * 600)}
    assert first < {ids[0] for ids in drawn(trainer_of("default", tmp_path), [PROMPTS[1]] * 600)}


@here
def test_draws_depend_on_seed_and_step_and_not_on_what_was_drawn_before(name: str, tmp_path: Path) -> None:
    prompts = PROMPTS * 4
    trainer = trainer_of(name, tmp_path)
    first, second = drawn(trainer, prompts), drawn(trainer, prompts)
    assert first != second
    resumed = trainer_of(name, tmp_path)
    resumed.state.global_step = 1
    torch.rand(7)
    assert drawn(resumed, prompts) == second
    assert drawn(trainer_of(name, tmp_path, seed=1), prompts) != first


def test_processes_draw_the_rows_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = PROMPTS * 4
    whole = drawn(trainer_of("default", tmp_path), prompts)
    found = []
    for place in (0, 1):
        trainer = trainer_of("default", tmp_path)
        monkeypatch.setattr(type(trainer.accelerator), "process_index", place)
        found += drawn(trainer, prompts[8 * place : 8 * place + 8])
    assert found == whole


@pytest.mark.parametrize("shared", [False, True])
def test_continuous_batching_samples_the_policy_s_own_adapter(shared: bool, tmp_path: Path) -> None:
    trained = trained_roles(tmp_path, tmp_path / "run", shared=shared, generation=engine("continuous"))
    disturb(trained.policy, seed=1)
    trainer = trained.trainer
    prompts = [[BOS, 4], [BOS, 5, 6]] * 8
    responses = drawn(trainer, prompts)
    assert furthest(read(trainer, prompts, responses, 1.0), trainer.engine_logps) < EXACT


def test_failures_of_continuous_batching_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of("continuous", tmp_path)

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(trainer.model.model.decoder.layers[1], "forward", fails)
    with pytest.raises(RunError, match="continuous batching failed. no such kernel. use generation=default"):
        drawn(trainer, PROMPTS)


# -- the correction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_notes_how_far_the_engine_is_from_training(bf16: bool, tmp_path: Path) -> None:
    trainer = trainer_of("continuous", tmp_path, bf16=bf16, temperature=0.7)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "engine/ratio" in line]
    assert len(lines) == 2
    for line in lines:
        assert line["engine/ratio"] == pytest.approx(1, abs=0.02 if bf16 else EXACT)
        assert line["engine/max_difference"] < (ROUNDED if bf16 else EXACT)
        assert line["engine/capped"] == 0
    weights = [weight.dtype for weight in trainer.model.parameters()]
    assert set(weights) == {torch.float32}, "trained weights stay in float32"


def test_training_weighs_what_the_engine_drew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Advantages are those of the default, times min(pi/mu, cap) with the log-probs that the engine tells."""
    advantages = {}
    draw = engines._continuous

    def off(trainer: Any, prompts: Any) -> engines.Drawn:
        found = draw(trainer, prompts)
        # to the engine the first token was a third as probable, the others 1.25 times
        wrong = [[row[0] - 1.0986123, *(x + 0.2231436 for x in row[1:])] for row in found.logps or []]
        return found._replace(logps=wrong)

    def whole(cap: str) -> Any:
        trainer = trainer_of("continuous", tmp_path, correction_cap=cap)
        trainer.model.train()
        rows = [trainer.train_dataset[i // 4] for i in range(8)]
        return trainer, trainer._generate_and_score_completions(rows)

    advantages["exact"] = whole("2.0")[1]
    monkeypatch.setattr(engines, "_continuous", off)
    trainer, advantages["capped"] = whole("2.0")
    advantages["none"] = whole("null")[1]
    mask, plain = advantages["exact"]["response_mask"], advantages["exact"]["advantages"]
    torch.testing.assert_close(advantages["none"]["advantages"], plain)
    expected = torch.full_like(plain, 0.8)
    expected[:, 0] = 2.0  # 3, cut
    torch.testing.assert_close(advantages["capped"]["advantages"][mask], (plain * expected)[mask], rtol=1e-4, atol=1e-5)
    assert plain[mask].abs().max() > 0.1
    rest = int(mask.sum()) - 8
    noted = {key: values[-1] for key, values in trainer._metrics["train"].items() if key.startswith("engine/")}
    assert noted["engine/capped"] == pytest.approx(8 / (8 + rest))
    assert noted["engine/ratio"] == pytest.approx((8 * 3 + 0.8 * rest) / (8 + rest), rel=1e-4)
    assert noted["engine/max_difference"] == pytest.approx(1.0986, abs=1e-3)


def test_numbers_far_from_training_s_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of("continuous", tmp_path)
    mask = torch.tensor([[True, True], [True, False]])
    ours = torch.zeros(2, 2)
    engines.weigh(trainer, [[0.01, 0.0], [0.0]], ours, mask)
    assert not caplog.records
    weights = engines.weigh(trainer, [[-0.5, -0.5], [-0.5]], ours, mask)
    assert weights[mask].tolist() == pytest.approx([1.6487] * 3, abs=1e-3)
    assert "far from training's: their mean ratio is 1.649, not 1" in caplog.text


# -- vLLM, as far as it goes without a GPU -----------------------------------------------------------------------------


def test_the_settings_of_vllm_reach_trl(tmp_path: Path) -> None:
    given = engine("vllm", mode="server", server_url="http://box:8000", gpu_memory_utilization=0.4, tensor_parallel=2)
    settings = engines.arguments(given, longest=768, device="cuda")
    args = RLOOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)
    assert (args.use_vllm, args.vllm_mode, args.vllm_server_base_url) == (True, "server", "http://box:8000")
    assert (args.vllm_gpu_memory_utilization, args.vllm_tensor_parallel_size) == (0.4, 2)
    assert args.vllm_max_model_length == 768


def test_the_settings_of_continuous_batching_reach_trl(tmp_path: Path) -> None:
    trainer = trainer_of("continuous", tmp_path, temperature=0.6)
    assert trainer.args.use_transformers_continuous_batching
    settings = trainer.args.transformers_continuous_batching_config
    assert ContinuousBatchingConfig(**settings).return_logprobs
    assert settings["page_size"] == 11, "on a CPU a page holds the longest prompt and response"
    how: GenerationConfig = trainer.generation_config
    assert (how.temperature, how.top_p, how.top_k, how.max_new_tokens) == (0.6, 1.0, 0, 6)
    on_a_gpu = engines.arguments(engine("continuous"), longest=11, device="cuda")
    assert on_a_gpu["transformers_continuous_batching_config"].keys() == {"return_logprobs", "max_memory_percent"}


class Server:
    """Stands where TRL's VLLMGeneration does; it answers with one token and remembers what it was asked."""

    def __init__(self) -> None:
        self.generation_kwargs: dict[str, Any] = {}
        self.logprobs: int | None = None
        self.synced = 0

    def sync_weights(self) -> None:
        self.synced += 1

    def generate(self, prompts: Any, images: Any, num_generations: int) -> Any:
        assert (images, num_generations, self.generation_kwargs) == (None, 4, {"stop_token_ids": [EOS]})
        told = None if self.logprobs is None else [[[-0.5]] for _ in prompts]
        return prompts, [[EOS] for _ in prompts], told, None


def test_vllm_gets_the_weights_once_an_update_and_tells_its_log_probs(tmp_path: Path) -> None:
    trainer = trainer_of("default", tmp_path)
    trainer.parts = SimpleNamespace(generation=engine("vllm"), tree=None)
    trainer.vllm_generation, trainer._last_loaded_step = Server(), -1
    for step in (0, 0, 3):
        trainer.state.global_step = step
        assert trainer._generate_single_turn(PROMPTS, None, {}) == [[EOS]] * 4
        assert trainer.engine_logps == [[-0.5]] * 4
    assert trainer.vllm_generation.synced == 2
    trainer.parts = SimpleNamespace(generation=engine("vllm", top_p=0.9, correction_cap="null"), tree=None)
    trainer._generate_single_turn(PROMPTS, None, {})
    assert trainer.engine_logps is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sending_weights_leaves_the_base_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    policy = adapted_policy(tmp_path / "base")
    disturb(policy, seed=1)
    for layer in adapter_layers(policy):
        layer.get_base_layer().weight.data = layer.get_base_layer().weight.data.to(dtype)
    before = {name: weight.clone() for name, weight in policy.named_parameters()}

    def moved() -> float:
        return max(float((weight - before[name]).detach().abs().max()) for name, weight in policy.named_parameters())

    with engines.unmoved(policy):
        policy.merge_adapter()
        assert moved() > 0.01, "the adapter is in the base that is sent"
        policy.unmerge_adapter()
    assert moved() == 0
    policy.merge_adapter()
    policy.unmerge_adapter()
    assert moved() > 0, "without it the base drifts"


def test_vllm_that_cannot_work_here_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engines.require(engine("continuous"), "cpu")
    found = importlib.util.find_spec
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == "vllm" else found(name))
    with pytest.raises(RunError, match=r"needs vLLM, which is not installed.*pip install 'rlhf-cli\[vllm\]'"):
        engines.require(engine("vllm"), "cuda")
    monkeypatch.setattr(engines, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    with pytest.raises(RunError, match="generation=vllm needs a CUDA GPU. this run computes on the cpu"):
        engines.require(engine("vllm"), "cpu")
    engines.require(engine("vllm"), "cuda")
    with pytest.raises(RunError, match=r"generation.tensor_parallel=2 does not divide 1 processes"):
        engines.require(engine("vllm", tensor_parallel=2), "cuda")
