from __future__ import annotations

import torch
from tiny_models import BOS, EOS, PAD

from rlhf_cli.models.prefix_tree import FREE, ROOT, PrefixTree

VOCAB = 8
# prompt [BOS, 4]: 5, 5 6, 7 | prompt [BOS, 5]: 4 4
VALID = [([BOS, 4], [5, EOS]), ([BOS, 4], [5, 6, EOS]), ([BOS, 4], [7, EOS]), ([BOS, 5], [4, 4, EOS])]
TREE = PrefixTree(VALID, VOCAB, PAD)
EVERYTHING = set(range(VOCAB))


def allowed(*ids: int, tree: PrefixTree = TREE) -> set[int]:
    """Tokens that may follow `ids`."""
    state = tree.states(torch.tensor([ids]))[0, -1]
    return set(tree.allowed[state].nonzero().flatten().tolist())


def test_inside_a_response_only_valid_continuations_are_allowed() -> None:
    assert allowed(BOS, 4) == {5, 7}
    assert allowed(BOS, 4, 5) == {6, EOS}
    assert allowed(BOS, 4, 5, 6) == {EOS}
    assert allowed(BOS, 5) == {4}
    assert allowed(BOS, 5, 4) == {4}


def test_the_prompt_is_not_restricted() -> None:
    assert allowed(BOS) == EVERYTHING
    assert TREE.allowed[ROOT].all()


def test_after_the_end_and_off_the_tree_everything_is_free() -> None:
    for _, response in VALID[:3]:
        assert allowed(BOS, 4, *response) == EVERYTHING
        assert allowed(BOS, 4, *response, PAD, PAD) == EVERYTHING
        assert allowed(BOS, 4, *response, 5) == EVERYTHING
    assert allowed(BOS, 6) == EVERYTHING
    assert allowed(BOS, 4, 4, 5) == EVERYTHING
    states = TREE.states(torch.tensor([[BOS, 4, 5, EOS, PAD, 4]]))[0]
    assert states[-2:].tolist() == [FREE, FREE]
    assert (TREE.next[FREE] == FREE).all()


def test_every_state_can_be_left() -> None:
    assert TREE.allowed.any(-1).all()


def test_left_padding_changes_nothing() -> None:
    plain = TREE.states(torch.tensor([[BOS, 4, 5, 6, EOS]]))
    padded = TREE.states(torch.tensor([[PAD, PAD, BOS, 4, 5, 6, EOS]]))
    assert padded[:, 2:].tolist() == plain.tolist()
    assert padded[0, :3].tolist() == [ROOT, ROOT, ROOT]


def test_states_are_those_of_reading_token_by_token() -> None:
    ids = torch.tensor([[PAD, BOS, 4, 5, 6], [BOS, 5, 4, 4, EOS]])
    states = TREE.states(ids)
    assert states.shape == (2, 6)
    for position in range(5):
        assert torch.equal(TREE.advance(states[:, position], ids[:, position]), states[:, position + 1])


def test_restricted_logits_give_exactly_0_to_everything_else() -> None:
    logits = torch.randn(2, 6, VOCAB)
    ids = torch.tensor([[PAD, BOS, 4, 5, 6], [BOS, 5, 4, 4, EOS]])
    states = TREE.states(ids)
    found = TREE.restrict(logits, states)
    probabilities = found.softmax(-1)
    assert bool((probabilities[~TREE.allowed[states]] == 0).all())
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 6))
    assert torch.equal(found[TREE.allowed[states]], logits[TREE.allowed[states]])
    assert bool(found.log_softmax(-1).isfinite().all())


def test_a_longer_prompt_does_not_widen_the_answers_to_a_shorter_one() -> None:
    tree = PrefixTree([([BOS, 4], [5, EOS]), ([BOS, 4, 6], [7, EOS])], VOCAB, PAD)
    assert allowed(BOS, 4, tree=tree) == {5}
    assert allowed(BOS, 4, 6, tree=tree) == {7}


def test_moving_keeps_the_tables() -> None:
    tree = PrefixTree(VALID, VOCAB, PAD)
    assert tree.to("cpu") is tree
    assert torch.equal(tree.allowed, TREE.allowed)
    assert torch.equal(tree.next, TREE.next)
