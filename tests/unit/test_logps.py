"""Policies and the reading of their log-probs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import BOS, CONFIG, EOS, PAD, TOKENIZER, VOCAB, tiny_policy
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from rlhf_cli.errors import RunError
from rlhf_cli.models import logps
from rlhf_cli.models.policy import freeze, load_policy, load_tokenizer, make_policy
from rlhf_cli.models.prefix_tree import DISALLOWED, PrefixTree
from rlhf_cli.models.tokens import TokenBatch, collate

PROMPTS = [[BOS, 4, 5, 6, 7], [BOS, 8], [BOS, 9, 4, 4]]
RESPONSES = [[5, EOS], [6, 7, 8, 9, 10, EOS], [11, 4, 4]]  # the last one is cut
BATCH = collate(PROMPTS, RESPONSES, PAD)
POLICY = tiny_policy()
SIZES = {"n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.3}
GPT2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **SIZES)).eval()  # does not skip left padding by itself
READING: logps.Reading = {"temperature": 1.0, "tree": None}


@torch.no_grad()
def by_hand(model: Any, prompt: list[int], response: list[int], temperature: float = 1.0) -> list[float]:
    """log pi of each response token from one unpadded forward."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0] / temperature
    start = len(prompt) - 1
    return [logits[start + t].log_softmax(-1)[token].item() for t, token in enumerate(response)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("model", [POLICY, GPT2], ids=["opt", "gpt2"])
@torch.no_grad()
def test_padding_changes_nothing(model: Any, temperature: float) -> None:
    found = logps.token_logps(model, BATCH, temperature=temperature, tree=None)
    assert found.shape == (3, 6)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        expected = by_hand(model, prompt, response, temperature)
        assert found[row, : len(response)].tolist() == pytest.approx(expected, abs=1e-5)
    wider = collate([*PROMPTS, [BOS, *[4] * 8]], [*RESPONSES, [5] * 7], PAD)
    again = logps.frozen_token_logps(model, wider, temperature=temperature, tree=None)[:3, :6]
    torch.testing.assert_close(again, found.masked_fill(~BATCH.response_mask, 0.0), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_vocabulary_is_normalised_and_holds_the_token() -> None:
    whole = logps.vocabulary_logps(POLICY, BATCH, **READING)
    assert whole.shape == (3, 6, VOCAB)
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones(3, 6))
    assert torch.equal(logps.gather_logps(whole, BATCH.response_ids), logps.token_logps(POLICY, BATCH, **READING))


def test_temperature_flattens() -> None:
    sharp, flat = (logps.vocabulary_logps(POLICY, BATCH, temperature=t, tree=None) for t in (0.5, 5.0))
    assert bool((logps.entropy(sharp) < logps.entropy(flat)).all())


@pytest.mark.parametrize("micro_batch", [None, 1, 2, 3, 512])
def test_frozen_log_probs_do_not_depend_on_the_micro_batch(micro_batch: int | None) -> None:
    found = logps.frozen_token_logps(POLICY, BATCH, **READING, micro_batch=micro_batch)
    with torch.no_grad():
        expected = logps.token_logps(POLICY, BATCH, **READING).masked_fill(~BATCH.response_mask, 0.0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not found.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_frozen_log_probs_are_read_without_dropout_and_leave_the_mode_alone(training: bool) -> None:
    model = noisy_opt().train(training)
    first, second = (logps.frozen_token_logps(model, BATCH, **READING) for _ in range(2))
    assert torch.equal(first, second)
    assert model.training is training


def test_the_gradient_of_a_batch_is_that_of_its_sequences() -> None:
    def gradient(batches: list[TokenBatch]) -> Tensor:
        model = tiny_policy().double()
        for batch in batches:
            (logps.token_logps(model, batch, **READING) * batch.response_mask).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    alone = [collate([p], [r], PAD) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    torch.testing.assert_close(gradient([BATCH]), gradient(alone), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_closed_vocabulary_probabilities_sum_to_1_over_the_valid_answers() -> None:
    answers = [[5, EOS], [5, 6, EOS], [7, 7, 7, EOS], [8, EOS]]
    prompts = [[BOS, 4], [BOS, 10, 9, 4]]
    valid = [(prompt, answer) for prompt in prompts for answer in answers]
    tree = PrefixTree(valid, VOCAB, PAD)
    batch = collate([prompt for prompt, _ in valid], [answer for _, answer in valid], PAD)
    for temperature in (1.0, 0.3):
        found = logps.frozen_token_logps(POLICY, batch, temperature=temperature, tree=tree)
        totals = found.sum(-1).exp().view(2, 4).sum(-1)
        assert totals.tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
        open_logps = logps.frozen_token_logps(POLICY, batch, temperature=temperature, tree=None)
        assert bool((open_logps.sum(-1) < found.sum(-1)).all())
    invalid = collate([[BOS, 4]], [[6, EOS]], PAD)
    assert logps.frozen_token_logps(POLICY, invalid, temperature=1.0, tree=tree)[0, 0] < DISALLOWED / 2


@torch.no_grad()
def test_entropy_and_kl_are_exact_and_finite_under_a_closed_vocabulary() -> None:
    uniform, skewed = torch.tensor([[[0.25] * 4, [0.5, 0.5, 0.0, 0.0]], [[0.7, 0.1, 0.1, 0.1], [0.5, 0.25, 0.25, 0.0]]])
    with_zeros = [p.log().masked_fill(p == 0, DISALLOWED) for p in (uniform, skewed)]
    # entropies: log 4, log 2; kl: 0.25 log(.25/.7) + .75 log(2.5), .5 log(.5/.25)
    assert logps.entropy(with_zeros[0]).tolist() == pytest.approx([math.log(4), math.log(2)])
    expected = [0.25 * math.log(0.25 / 0.7) + 0.75 * math.log(2.5), 0.5 * math.log(2)]
    assert logps.kl(*with_zeros).tolist() == pytest.approx(expected)
    tree = PrefixTree([([BOS, 4], [5, EOS]), ([BOS, 4], [6, EOS])], VOCAB, PAD)
    batch = collate([[BOS, 4]], [[5, EOS]], PAD)
    ours, theirs = (logps.vocabulary_logps(m, batch, temperature=1.0, tree=tree) for m in (POLICY, tiny_policy(1)))
    assert 0 < logps.entropy(ours)[0, 0] < math.log(2)
    assert logps.kl(ours, theirs)[0, 0] > 0
    assert logps.kl(ours, theirs)[0, 1].item() == pytest.approx(0.0, abs=1e-6)  # only end-of-sequence is left


# -- batches -----------------------------------------------------------------------------------------------------------


def test_collate_pads_prompts_left_and_responses_right() -> None:
    batch = collate([[BOS, 4], [BOS]], [[5, EOS], [6, 7, EOS]], PAD)
    assert batch.input_ids.tolist() == [[BOS, 4, 5, EOS, PAD], [PAD, BOS, 6, 7, EOS]]
    assert batch.attention_mask.tolist() == [[True, True, True, True, False], [False, True, True, True, True]]
    assert batch.response_ids.tolist() == [[5, EOS, PAD], [6, 7, EOS]]
    assert batch.response_mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 3], [0, 0, 1, 2, 3]]


def test_a_padding_token_inside_a_sequence_is_kept() -> None:
    batch = collate([[BOS, PAD]], [[PAD, EOS]], PAD)
    assert bool(batch.attention_mask.all())


@pytest.mark.parametrize(("size", "expected"), [(None, [3]), (1, [1, 1, 1]), (2, [2, 1]), (9, [3])])
def test_pieces_by_length_hold_every_sequence_without_needless_padding(size: int | None, expected: list[int]) -> None:
    pieces = BATCH.pieces(size)
    assert [len(piece.input_ids) for _, piece in pieces] == expected
    lengths = [int(length) for _, piece in pieces for length in piece.attention_mask.sum(-1)]
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(torch.cat([rows for rows, _ in pieces]).tolist()) == [0, 1, 2]
    for rows, piece in pieces:
        assert bool(piece.response_mask[:, -1].any())
        assert bool(piece.attention_mask[:, 0].any())
        for row, ids, mask in zip(rows, piece.input_ids, piece.attention_mask, strict=True):
            assert ids[mask].tolist() == BATCH.input_ids[row][BATCH.attention_mask[row]].tolist()
        for row, ids, mask in zip(rows, piece.response_ids, piece.response_mask, strict=True):
            assert ids[mask].tolist() == BATCH.response_ids[row][BATCH.response_mask[row]].tolist()


@pytest.mark.parametrize("size", [None, 1, 2])
def test_what_is_read_by_length_comes_back_in_the_order_of_the_batch(size: int | None) -> None:
    expected = BATCH.response_ids.masked_fill(~BATCH.response_mask, 0)
    found = BATCH.read(lambda piece: piece.response_ids.masked_fill(~piece.response_mask, 0), size)
    assert torch.equal(found, expected)
    assert torch.equal(BATCH.read(lambda piece: piece.attention_mask.sum(-1), size), BATCH.attention_mask.sum(-1))


@pytest.mark.parametrize(("prompts", "responses"), [([[BOS]], []), ([], [])])
def test_collate_refuses_unequal_and_empty_lists(prompts: list[list[int]], responses: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=rf"{len(prompts)} prompts and 0 responses: they must be equal in number"):
        collate(prompts, responses, PAD)


# -- policies ----------------------------------------------------------------------------------------------------------


def noisy_opt() -> Any:
    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=16, word_embed_proj_dim=16, ffn_dim=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, dropout=0.5, attention_dropout=0.5, layerdrop=0.5,
    )  # fmt: skip
    return OPTForCausalLM(config)


@torch.no_grad()
def same_in_training(model: Any) -> bool:
    ids = BATCH.input_ids
    return torch.equal(model.train()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_a_made_policy_has_the_given_sizes_and_no_dropout() -> None:
    model = make_policy(CONFIG, TOKENIZER, max_positions=16)
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.vocab_size) == (16, 2, VOCAB)
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (PAD, BOS, EOS)
    assert same_in_training(model)
    sequence = torch.full((1, 16), 4)
    assert model(input_ids=sequence).logits.shape == (1, 16, VOCAB)  # max_positions tokens fit


def test_a_loaded_policy_has_no_dropout(tmp_path: Path) -> None:
    noisy_opt().save_pretrained(tmp_path / "opt")
    assert not same_in_training(noisy_opt())
    loaded = load_policy(tmp_path / "opt")
    assert same_in_training(loaded)
    assert loaded.config.dropout == 0.0  # and none after saving it again
    GPT2.save_pretrained(tmp_path / "gpt2")
    assert same_in_training(load_policy(tmp_path / "gpt2"))


def test_a_saved_policy_loads_with_the_same_log_probs_in_float32(tmp_path: Path) -> None:
    POLICY.save_pretrained(tmp_path / "whole")
    before, after = (logps.frozen_token_logps(m, BATCH, **READING) for m in (POLICY, load_policy(tmp_path / "whole")))
    assert torch.equal(before, after)
    tiny_policy().half().save_pretrained(tmp_path / "half")
    assert load_policy(tmp_path / "half").dtype == torch.float32


def test_a_frozen_model_cannot_learn() -> None:
    model = freeze(tiny_policy().train())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_folder_without_a_model_or_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no policy could be opened in .*nowhere"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"no tokenizer could be opened in .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
