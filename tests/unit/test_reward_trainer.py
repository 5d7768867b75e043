"""The loss of a batch of judgements: pairs, rankings, labels, margins and bounds, read at the end or token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import BOS, EOS, PAD, TOKENIZER, VOCAB, tiny_reward_model
from torch import Tensor

from rlhf_cli import rewards
from rlhf_cli.config.schema import StageTraining
from rlhf_cli.models import reward as reward_models
from rlhf_cli.models.tokens import TokenBatch
from rlhf_cli.trainers.common import Computing
from rlhf_cli.trainers.reward import JudgementCollator, LossRewardTrainer, reward_trainer

Make = Callable[..., LossRewardTrainer]
A, B, C, D = 4, 5, 6, 7
FREE = math.inf
OPTIONS = {"label_smoothing": 0.0, "centering": 0.0, "token_wise": False}
WORTH = torch.zeros(VOCAB)  # the score of a token, where a test sets scores by hand
WORTH[[A, B, C, D, EOS]] = torch.tensor([1.0, 0.5, 2.0, -1.0, 0.3])


def row(*responses: list[int], prompt: tuple[int, ...] = (BOS, 8), **columns: float) -> dict[str, Any]:
    """Return a judgement, best response first."""
    about = {"label": 1.0, "margin": 0.0, "bound": FREE, **columns}
    return {"prompt_ids": list(prompt), "response_ids": list(responses), **about}


# Two pairs, one bounded; a ranking of three; a soft label with a margin. Prompts and responses of unequal length.
MIXED = [
    row([A, B, C, EOS], [A, D], bound=2.0),
    row([B, EOS], [C, D, EOS], [A, EOS], prompt=(BOS, 8, 9, 10)),
    row([C, EOS], [D, D, EOS], prompt=(BOS,), label=0.75, margin=0.5),
    row([A, C, EOS], [A, EOS], prompt=(BOS, 9)),
]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a function that makes a trainer: make(rows, loss="bt", micro_batch_size=None, **options of the loss)."""

    def trainer(
        rows: list[dict[str, Any]], loss: str = "bt", micro_batch_size: int | None = None, **options: Any
    ) -> LossRewardTrainer:
        block = StageTraining(
            max_steps=1, epochs=None, batch_size=len(rows), micro_batch_size=micro_batch_size, learning_rate=1e-3,
            lr_scheduler="constant", warmup_fraction=0.0, adam_beta2=0.99, weight_decay=0.0, max_grad_norm=1.0,
            log_every_steps=1, save_every_steps=1,
        )  # fmt: skip
        settings: Any = SimpleNamespace(**{**OPTIONS, **options})
        places = {"folder": tmp_path / f"checkpoints-{micro_batch_size}", "seed": 0, "computing": Computing("cpu")}
        model = tiny_reward_model(tmp_path / "policy").train()
        return reward_trainer(model, TOKENIZER, rows, rewards.get(loss), settings, block, **places)

    return trainer


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The score at a position is the worth of its token."""
    monkeypatch.setattr(reward_models, "_values", lambda model, batch: WORTH[batch.input_ids])


def loss_of(trainer: LossRewardTrainer, rows: list[dict[str, Any]]) -> float:
    return float(trainer.compute_loss(trainer.model, JudgementCollator(PAD)(rows)))


def logged(trainer: LossRewardTrainer) -> dict[str, float]:
    """Return the metrics of the last batch."""
    return {key: values[-1] for key, values in trainer._metrics["train"].items()}


def minus_log_sigmoid(x: float) -> float:
    return math.log1p(math.exp(-x))


# -- the batch ---------------------------------------------------------------------------------------------------------


def test_the_collator_stacks_responses_best_first_and_keeps_the_columns() -> None:
    batch = JudgementCollator(PAD)(MIXED)
    assert batch["counts"].tolist() == [2, 3, 2, 2]
    assert batch["bound"].tolist() == [2.0, FREE, FREE, FREE]
    assert batch["label"].tolist() == [1.0, 1.0, 0.75, 1.0]
    assert batch["margin"].tolist() == [0.0, 0.0, 0.5, 0.0]
    found = [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert found == [judged["prompt_ids"] + ids for judged in MIXED for ids in judged["response_ids"]]
    responses = [ids[mask].tolist() for ids, mask in zip(batch["response_ids"], batch["response_mask"], strict=True)]
    assert responses == [ids for judged in MIXED for ids in judged["response_ids"]]


@pytest.mark.usefixtures("by_hand")
def test_scores_are_those_of_the_last_token(make: Make) -> None:
    # EOS .3 against D -1 where the response is cut: d = 1.3
    assert loss_of(make(MIXED), [MIXED[0]]) == pytest.approx(minus_log_sigmoid(1.3))


# -- pairs and rankings ------------------------------------------------------------------------------------------------

PAIR = [row([A], [B]), row([D], [C])]  # d = .5 and -3
RANKING = row([A], [C], [D])  # 1, 2, -1


@pytest.mark.usefixtures("by_hand")
def test_pairs_and_a_ranking_of_three_share_a_batch(make: Make) -> None:
    # -log(e^1 / (e^1 + e^2 + e^-1)) - log(e^2 / (e^2 + e^-1)) = 1.349012 + .048587
    ranking = math.log(math.e + math.e**2 + 1 / math.e) - 1 + minus_log_sigmoid(3)
    assert ranking == pytest.approx(1.349012 + 0.048587, abs=1e-6)
    pairs = minus_log_sigmoid(0.5) + minus_log_sigmoid(-3)
    for rows in ([*PAIR, RANKING], [RANKING, *PAIR], [PAIR[0], RANKING, PAIR[1]]):
        trainer = make(rows)
        assert loss_of(trainer, rows) == pytest.approx((pairs + ranking) / 3, abs=1e-6)
        # margins .5, -3, -1: the best response against the second
        assert logged(trainer)["margin"] == pytest.approx(-3.5 / 3)
        assert logged(trainer)["accuracy"] == pytest.approx(1 / 3)
    assert loss_of(make([RANKING]), [RANKING]) == pytest.approx(ranking, abs=1e-6)
    # Centering takes a ranking's mean reward twice, as it takes a pair's sum: 2 (1 + 2 - 1) / 3, 1 + .5 and -1 + 2.
    centred = loss_of(make([*PAIR, RANKING], centering=0.5), [*PAIR, RANKING])
    assert centred == pytest.approx((pairs + ranking + 0.5 * (1.5**2 + 1 + (4 / 3) ** 2)) / 3, abs=1e-6)


@pytest.mark.usefixtures("by_hand")
def test_label_and_margin_reach_the_loss(make: Make) -> None:
    rows = [row([A], [B], label=0.75, margin=0.25), row([A], [D])]  # d = .5 and 2
    expected = 0.75 * minus_log_sigmoid(0.25) + 0.25 * minus_log_sigmoid(-0.75) + minus_log_sigmoid(2)
    assert loss_of(make(rows), rows) == pytest.approx(expected / 2)
    smoothed = make(rows, label_smoothing=0.1, centering=0.5)
    # p = .8 * .75 + .1 = .7 and .9; plus .5 (1 + .5)^2 and .5 (1 - 1)^2
    expected = 0.7 * minus_log_sigmoid(0.25) + 0.3 * minus_log_sigmoid(-0.75) + 0.5 * 1.5**2
    expected += 0.9 * minus_log_sigmoid(2) + 0.1 * minus_log_sigmoid(-2)
    assert loss_of(smoothed, rows) == pytest.approx(expected / 2)


@pytest.mark.usefixtures("by_hand")
def test_a_bound_reaches_the_loss_and_the_log(make: Make) -> None:
    rows = [row([A], [D], bound=1.5), row([A], [B], bound=1.5), row([C], [D])]  # d = 2, .5, 3
    expected = sum(map(minus_log_sigmoid, (2, -0.5, 0.5, 1.0, 3)))
    trainer = make(rows, loss="pcrm_fixed")
    assert loss_of(trainer, rows) == pytest.approx(expected / 3)
    found = logged(trainer)
    assert (found["bound"], found["bound_half"]) == (1.5, 0.75)
    assert found["bounded_margin"] == pytest.approx(1.25), "of the pairs that have a bound"
    assert found["beyond_bound"] == 0.5
    assert found["margin"] == pytest.approx(5.5 / 3)
    assert loss_of(make(rows), rows) == pytest.approx(sum(map(minus_log_sigmoid, (2, 0.5, 3))) / 3), "bt has no bound"


@pytest.mark.usefixtures("by_hand")
def test_without_bounds_none_is_logged(make: Make) -> None:
    trainer = make(PAIR, loss="pcrm_fixed")
    loss_of(trainer, PAIR)
    assert logged(trainer).keys() == {"accuracy", "margin", "score/mean", "score/std"}


# -- token by token ----------------------------------------------------------------------------------------------------

TOKEN_WISE = [
    row([A, B, C, EOS], [A, D], bound=2.0),  # the rejected one is cut and keeps its last reward
    row([B, EOS], [C, D, B, A, EOS], prompt=(BOS, 8, 9)),
    row([A, B, EOS], [A, B, C, EOS], prompt=(BOS,), label=0.75),
]
DIFFERENCES = [
    [0.5 + 1, 2 + 1, 0.3 + 1],  # from the second token on: B C EOS against D D D
    [0.5 - 2, 0.3 + 1, 0.3 - 0.5, 0.3 - 1, 0.0],  # from the first: B EOS EOS EOS EOS against C D B A EOS
    [0.3 - 2, 0.0],  # from the third: EOS EOS against C EOS
]


@pytest.mark.usefixtures("by_hand")
def test_the_token_wise_loss_by_hand(make: Make) -> None:
    each = [[minus_log_sigmoid(d) for d in pair] for pair in DIFFERENCES]
    each[2] = [0.75 * minus_log_sigmoid(d) + 0.25 * minus_log_sigmoid(-d) for d in DIFFERENCES[2]]
    expected = sum(sum(pair) / len(pair) for pair in each) / 3
    trainer = make(TOKEN_WISE, token_wise=True)
    assert loss_of(trainer, TOKEN_WISE) == pytest.approx(expected, abs=1e-6)  # B = 3, T = 5
    for number, pair in enumerate(each):
        assert loss_of(trainer, [TOKEN_WISE[number]]) == pytest.approx(sum(pair) / len(pair), abs=1e-6)
    bounded = make(TOKEN_WISE, loss="pcrm_length", token_wise=True)
    more = sum(minus_log_sigmoid(2 - d) for d in DIFFERENCES[0]) / 3
    assert loss_of(bounded, TOKEN_WISE) == pytest.approx(expected + more / 3, abs=1e-6)


@pytest.mark.usefixtures("by_hand")
def test_token_wise_margins_are_logged_at_the_last_token(make: Make) -> None:
    trainer = make(TOKEN_WISE, token_wise=True)
    loss_of(trainer, TOKEN_WISE)
    assert logged(trainer)["margin"] == pytest.approx((1.3 + 0 + 0) / 3)


def test_tokens_before_the_first_difference_have_no_gradient(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def values(model: Any, batch: TokenBatch) -> Tensor:
        seen.append(WORTH[batch.input_ids].clone().requires_grad_())
        return seen[-1]

    monkeypatch.setattr(reward_models, "_values", values)
    trainer = make(TOKEN_WISE, token_wise=True)
    trainer.compute_loss(trainer.model, JudgementCollator(PAD)(TOKEN_WISE)).backward()
    gradient = seen[0].grad
    assert gradient is not None
    kept = (gradient != 0).int().tolist()
    # Columns: three of prompts, five of responses.
    assert kept == [
        [0, 0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1, 0],
    ]  # fmt: skip


# -- invariance --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("token_wise", [False, True])
@pytest.mark.parametrize("loss", ["bt", "pcrm_length"])
def test_neither_padding_nor_the_rest_of_the_batch_changes_a_loss(make: Make, loss: str, token_wise: bool) -> None:
    rows = [MIXED[0], *MIXED[2:], *TOKEN_WISE] if token_wise or loss != "bt" else MIXED
    trainer = make(rows, loss, token_wise=token_wise)
    alone = [loss_of(trainer, [judged]) for judged in rows]
    assert max(alone) - min(alone) > 0.05, "losses that tell judgements apart"
    assert loss_of(trainer, rows) == pytest.approx(sum(alone) / len(alone), abs=1e-5)
    longest = row([A, B] * 4, [B, A] * 4, prompt=(BOS, *[9] * 7))
    wider = loss_of(trainer, [*rows, longest]) * (len(rows) + 1) - loss_of(trainer, [longest])
    assert wider == pytest.approx(sum(alone), abs=1e-4)


@pytest.mark.parametrize("token_wise", [False, True])
def test_micro_batches_do_not_change_a_step(make: Make, token_wise: bool) -> None:
    rows = [MIXED[0], MIXED[2], MIXED[3], TOKEN_WISE[1]] if token_wise else MIXED  # one micro-batch has the ranking
    steps = []
    for micro in (None, 2, 1):
        trainer = make(rows, "bt", micro, token_wise=token_wise)
        trainer.train()
        steps.append(trainer.state.log_history[0])
    for other in steps[1:]:
        for key in ("loss", "grad_norm", "margin", "accuracy", "score/mean"):
            if key != "score/mean" or token_wise:  # a mean over responses, of which the ranking has three
                assert other[key] == pytest.approx(steps[0][key], rel=1e-4, abs=1e-5), key
    assert steps[0]["grad_norm"] > 0.1
