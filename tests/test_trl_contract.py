"""What rlhf_cli/trainers relies on in TRL and transformers beyond their public promises, named once.

A failure here after an upgrade says which of our methods has lost its footing, before a training run does so silently.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import OPTConfig, OPTForCausalLM, OPTForSequenceClassification, PreTrainedTokenizerFast, Trainer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from rlhf_cli.data.tokenizer import word_tokenizer

# (class, method, parameters after self, what our code needs it for)
HOOKS = [
    (RLOOTrainer, "_tokenize_prompts", ["prompts"], "OnlineTrainer hands over prompt ids made once by data/encode.py"),
    (RLOOTrainer, "_generate_single_turn", ["prompt_ids", "images", "multimodal_fields"], "the engine that samples"),
    (RLOOTrainer, "_generate", ["prompts"], "_generate_and_score_completions calls it for ids and text"),
    (
        RLOOTrainer,
        "_calculate_rewards",
        ["inputs", "prompts", "completions", "completion_ids_list"],
        "rewards are scored on token ids, end-of-sequence included",
    ),
    (RLOOTrainer, "_generate_and_score_completions", ["inputs"], "per-token rewards, critic and GAE replace TRL's"),
    (RLOOTrainer, "_prepare_inputs", ["generation_batch"], "minibatches are dealt out of the rollouts of all ranks"),
    (RLOOTrainer, "_compute_loss", ["model", "inputs"], "clipped per-token ratio and value loss"),
    (DPOTrainer, "_prepare_dataset", ["dataset", "processing_class", "args", "dataset_name"], "rows are ids already"),
    (DPOTrainer, "_compute_loss", ["model", "inputs", "return_outputs"], "Algorithm.pair_loss replaces TRL's"),
    (
        RewardTrainer,
        "compute_loss",
        ["model", "inputs", "return_outputs", "num_items_in_batch"],
        "LossRewardTrainer: RewardLoss, the seam of rlhf_cli/rewards, replaces TRL's",
    ),
    (RewardTrainer, "_prepare_dataset", ["dataset", "processing_class", "args", "dataset_name"], "rows are token ids"),
    (Trainer, "_save_checkpoint", ["model", "trial"], "WholeCheckpoints adds the critic and marks a checkpoint whole"),
    (Trainer, "_load_from_checkpoint", ["resume_from_checkpoint", "model"], "fit takes the weights of a finished one"),
    (Trainer, "_load_optimizer_and_scheduler", ["checkpoint"], "OnlineTrainer loads critic and cost weight with it"),
    (Trainer, "_load_from_checkpoint", ["resume_from_checkpoint", "model"], "fit adopts a checkpoint of the last step"),
    (Trainer, "_get_train_sampler", ["train_dataset"], "WholeBatches fills the last batch of a pass"),
    (Trainer, "_get_num_items_in_batch", ["batch_samples", "device"], "PairwiseTrainer counts the tokens of a step"),
    (
        Trainer,
        "_prepare_for_training",
        ["max_steps", "train_dataloader", "resume_from_checkpoint"],
        "OnlineTrainer keeps a critic in the policy's module out of DDP",
    ),
    (Trainer, "log", ["logs", "start_time"], "AllRanks averages what was noted over ranks"),
    (Trainer, "create_optimizer", ["model"], "OnlineTrainer steps the critic from a hook on the policy's optimizer"),
]
BASE: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [], "disable_tqdm": True,
    "remove_unused_columns": False, "per_device_train_batch_size": 2, "max_steps": 1, "save_strategy": "no",
    "dataloader_pin_memory": False,
}  # fmt: skip
SHAPE: dict[str, Any] = {
    "vocab_size": 16, "hidden_size": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
    "word_embed_proj_dim": 8, "max_position_embeddings": 16, "dropout": 0.0,
}  # fmt: skip
EOS = 2


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(["a b c d e f g h i j"])


def _policy() -> OPTForCausalLM:
    return OPTForCausalLM(OPTConfig(**SHAPE))


@pytest.mark.parametrize(
    ("owner", "name", "expected", "purpose"), HOOKS, ids=[f"{hook[0].__name__}.{hook[1]}" for hook in HOOKS]
)
def test_hook_has_the_signature_we_override(owner: type, name: str, expected: list[str], purpose: str) -> None:
    method = getattr(owner, name, None)
    assert method is not None, f"{owner.__name__}.{name} is gone; we need it for: {purpose}"
    found = list(inspect.signature(method).parameters)[1:]
    assert found == expected, f"{owner.__name__}.{name} takes {found}, not {expected}; we need it for: {purpose}"


@pytest.mark.parametrize("owner", [RLOOTrainer, DPOTrainer, RewardTrainer, SFTTrainer])
def test_trl_saves_a_checkpoint_as_transformers_does_but_for_the_model_card(
    owner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WholeCheckpoints calls Trainer._save_checkpoint directly: whatever else TRL did here would be lost."""
    done: list[str] = []
    trainer = owner.__new__(owner)
    trainer.args = SimpleNamespace(hub_model_id=None, output_dir="x")
    monkeypatch.setattr(trainer, "create_model_card", lambda **_: done.append("card"), raising=False)
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda *_: done.append("save"))
    trainer._save_checkpoint(None, None)
    assert done == ["card", "save"], f"{owner.__name__}._save_checkpoint does more now; call it from WholeCheckpoints"


def test_one_generation_is_refused_by_the_config_alone(tmp_path: Path) -> None:
    """online_trainer sets num_generations after the check, because PPO with a critic needs no second response."""
    with pytest.raises(ValueError, match="at least 2 generations"):
        RLOOConfig(**BASE, output_dir=str(tmp_path), num_generations=1)


def _no_reward(**_: Any) -> list[float | None]:
    return [0.0]


class OnlineProbe(RLOOTrainer):
    """Overrides what OnlineTrainer overrides and writes down what TRL asks of it."""

    _buffered_inputs: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(reward_funcs=_no_reward, **kwargs)
        self.asked: list[tuple[str, Any]] = []

    def _tokenize_prompts(self, prompts: list) -> tuple[list, None, dict]:
        return [[4, 5]] * len(prompts), None, {}

    def _generate_single_turn(self, prompt_ids: Any, images: Any, multimodal_fields: Any) -> list:
        self.asked.append(("generate", (prompt_ids, images, multimodal_fields)))
        return [[6, EOS]] * len(prompt_ids)

    def _generate_and_score_completions(self, inputs: Any) -> dict:
        self.asked.append(("rollout", [row["prompt_ids"] for row in inputs]))
        self.generated = self._generate([row["prompt"] for row in inputs])
        ids = [prompt + completion for prompt, completion in zip(*self.generated[:2], strict=True)]
        return {"input_ids": torch.tensor(ids)}

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if self._step % 4 == 0 or self._buffered_inputs is None:
            whole = self._generate_and_score_completions(generation_batch)["input_ids"]
            self._buffered_inputs = [{"input_ids": part} for part in whole.split(2)]
        if self._step == 2:  # a later pass over the same rollouts has another order, or other rows
            self._buffered_inputs = [{name: part[name] + 1 for name in part} for part in self._buffered_inputs]
        return self._buffered_inputs[self._step % 2]

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        self.asked.append(("loss", inputs["input_ids"]))
        assert inputs is self._buffered_inputs[self._step % 2], "_prepare_inputs finds the micro-batch by _step"
        logits = model(input_ids=inputs["input_ids"]).logits
        assert logits.shape == (2, 4, SHAPE["vocab_size"]), "models/logps.py reads full logits from the wrapped model"
        self._metrics["train"]["probe"].append(1.0)
        return logits.square().mean()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.register_step_post_hook(lambda *_: self.asked.append(("step", None)))
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self.asked.append(("load", checkpoint))


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, OnlineProbe]:
    """Return two trainers: 8 steps with 2 minibatches x 2 passes, and its resumption at step 4."""
    folder = tmp_path_factory.mktemp("online")
    settings = BASE | {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "output_dir": str(folder)}
    args = RLOOConfig(
        **settings, beta=0.0, num_generations=2, generation_batch_size=None, steps_per_generation=2, num_iterations=2,
        max_completion_length=2, shuffle_dataset=False, logging_steps=1,
    )  # fmt: skip
    args.num_generations = 1
    rows = Dataset.from_list([{"prompt": word, "prompt_ids": [number]} for number, word in enumerate("abcdefgh")])
    parts = {"args": args, "train_dataset": rows, "processing_class": tokenizer}
    first, second = OnlineProbe(model=_policy(), **parts), OnlineProbe(model=_policy(), **parts)
    first.train()
    second.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    return {"first": first, "second": second}


def test_online_attributes(online: dict[str, OnlineProbe]) -> None:
    trainer = online["first"]
    assert set(trainer.eos_token_ids) == {EOS}, "the sampler stops at eos_token_ids"
    assert trainer._tokenizer.pad_token_id == 1, "rollouts are padded with _tokenizer.pad_token_id"
    assert trainer.num_iterations == 2, "_prepare_inputs tells passes apart by num_iterations"
    assert trainer.max_completion_length == 2, "the sampler stops at max_completion_length"
    assert trainer.num_generations == 1, "num_generations is read from the arguments, after the config's own check"
    assert not trainer.use_vllm, "use_vllm chooses TRL's own generation"
    assert not trainer.use_transformers_continuous_batching, "so does use_transformers_continuous_batching"
    assert trainer.ref_model is None, "with beta=0 TRL must not load a reference of its own"


def test_online_rollouts_come_once_per_pass_over_minibatches(online: dict[str, OnlineProbe]) -> None:
    """_step counts micro-steps; a rollout batch serves minibatches x passes of them."""
    order = [name for name, _ in online["first"].asked if name in ("rollout", "loss")]
    assert order == (["rollout"] + ["loss"] * 4) * 2


def test_online_rows_keep_our_columns_in_dataset_order(online: dict[str, OnlineProbe]) -> None:
    rollouts = [rows for name, rows in online["first"].asked if name == "rollout"]
    assert [sorted(rows) for rows in rollouts] == [[[0], [1], [2], [3]], [[4], [5], [6], [7]]]


def test_online_generations_of_a_prompt_are_neighbours(
    online: dict[str, OnlineProbe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ppo.leave_one_out takes consecutive rows for one group."""
    monkeypatch.setattr(online["first"], "num_generations", 2)
    assert list(online["first"]._get_train_sampler())[:4] == [0, 0, 1, 1]


def test_online_generation_passes_our_prompt_ids_and_returns_ids_and_text(online: dict[str, OnlineProbe]) -> None:
    asked = [value for name, value in online["first"].asked if name == "generate"]
    assert asked[0] == ([[4, 5]] * 4, None, {})
    prompt_ids, completion_ids, completions = online["first"].generated
    assert (prompt_ids, completion_ids) == ([[4, 5]] * 4, [[6, EOS]] * 4)
    assert completions == ["c"] * 4


def test_online_buffer_can_be_replaced_before_a_later_pass(online: dict[str, OnlineProbe]) -> None:
    losses = [rows.tolist() for name, rows in online["first"].asked if name == "loss"]
    assert losses[:4] == [[[4, 5, 6, EOS]] * 2] * 2 + [[[5, 6, 7, EOS + 1]] * 2] * 2


def test_online_optimizer_hook_runs_after_each_step(online: dict[str, OnlineProbe]) -> None:
    assert [name for name, _ in online["first"].asked].count("step") == 8


def test_online_micro_batches_are_averaged_with_equal_weight(tmp_path: Path, tokenizer: Any) -> None:
    """The share in trainers/rollouts.py turns this into a mean over all tokens of the optimizer step."""
    gradients: list[float] = []
    policy: Any = _policy()
    bias = policy.model.decoder.final_layer_norm.bias

    class Probe(OnlineProbe):
        def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
            return (1.0, 3.0)[self._step % 2] * bias.sum()

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            optimizer = super().create_optimizer(*args, **kwargs)
            optimizer.register_step_pre_hook(lambda *_: gradients.append(float(bias.grad[0])))
            return optimizer

    settings = BASE | {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "output_dir": str(tmp_path)}
    args = RLOOConfig(**settings, beta=0.0, num_generations=2, steps_per_generation=2, generation_batch_size=None)
    rows = Dataset.from_list([{"prompt": word, "prompt_ids": [4]} for word in "ab"])
    Probe(model=policy, args=args, train_dataset=rows, processing_class=tokenizer).train()
    assert gradients == [2.0]


def test_online_metrics_reach_the_log(online: dict[str, OnlineProbe]) -> None:
    assert [entry["probe"] for entry in online["first"].state.log_history if "probe" in entry] == [1.0] * 8


def test_online_resume_loads_before_the_first_rollout(online: dict[str, OnlineProbe]) -> None:
    asked = online["second"].asked
    assert asked[0][0] == "load"
    assert str(asked[0][1]).endswith("checkpoint-4")
    assert [(name, sorted(rows)) for name, rows in asked if name == "rollout"] == [("rollout", [[4], [5], [6], [7]])]


def test_pairwise_trainer_gives_our_loss_our_batch_and_reference(tmp_path: Path, tokenizer: Any) -> None:
    class Probe(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> torch.Tensor:
            assert set(inputs) == {"ids"}, "PairCollator's fields reach _compute_loss as they are"
            assert self.ref_model is reference, "the reference passed second is kept as ref_model"
            assert self.ref_model(input_ids=inputs["ids"]).logits.shape == (4, 2, SHAPE["vocab_size"])
            self._metrics["train"]["probe"].append(1.0)
            return model(input_ids=inputs["ids"]).logits.square().mean()

    reference = _policy()
    rows = Dataset.from_list([{"prompt_ids": [4], "chosen_ids": [5], "rejected_ids": [6]}] * 2)
    args = DPOConfig(**BASE, output_dir=str(tmp_path), max_length=None, logging_steps=1)

    def collate(rows: list[dict]) -> dict:
        return {"ids": torch.tensor([r["prompt_ids"] + r[s] for s in ("chosen_ids", "rejected_ids") for r in rows])}

    trainer = Probe(_policy(), reference, args, data_collator=collate, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["probe"] == 1.0


def test_reward_trainer_gives_our_loss_our_batch_and_logs_our_metrics(tmp_path: Path, tokenizer: Any) -> None:
    class Probe(RewardTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> torch.Tensor:
            assert set(inputs) == {"ids", "bound"}, "JudgementCollator's fields reach compute_loss as they are"
            assert inputs["bound"].tolist() == [float("inf"), 2.0]
            assert model.base_model_prefix == "model", "token_values reads the body and the head by name"
            self._metrics["train"]["probe"].append(1.0)
            return model(input_ids=inputs["ids"]).logits.square().mean()

    def collate(rows: list[dict]) -> dict:
        rows = sorted(rows, key=lambda row: len(row["response_ids"]))
        ids = [row["prompt_ids"] + response for row in rows for response in row["response_ids"]]
        return {"ids": torch.tensor(ids), "bound": torch.tensor([row["bound"] for row in rows])}

    rows = Dataset.from_list(
        [
            {"prompt_ids": [4], "response_ids": [[5, EOS], [6, EOS]], "bound": float("inf")},
            {"prompt_ids": [4], "response_ids": [[5, EOS], [6, EOS], [7, EOS]], "bound": 2.0},
        ]
    )
    args = RewardConfig(**BASE, output_dir=str(tmp_path), max_length=None, logging_steps=1)
    model = OPTForSequenceClassification(OPTConfig(**SHAPE | {"num_labels": 1, "pad_token_id": 1}))
    trainer = Probe(model, args, data_collator=collate, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["probe"] == 1.0


def test_sft_trainer_takes_labels_as_they_are(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_list([{"input_ids": [4, 5, 6, EOS], "labels": [-100, -100, 6, EOS]}] * 2)
    skip = {"skip_prepare_dataset": True}
    args = SFTConfig(**BASE, output_dir=str(tmp_path), max_length=None, dataset_kwargs=skip)
    trainer = SFTTrainer(_policy(), args, train_dataset=rows, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].tolist() == [[4, 5, 6, EOS]] * 2
    assert batch["labels"].tolist() == [[-100, -100, 6, EOS]] * 2
