from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_cli.config.schema import DatasetConfig
from rlhf_cli.data.encode import (
    PairTokens,
    decode_response,
    encode_demonstrations,
    encode_pairs,
    encode_prompt,
    encode_rankings,
    encode_response,
    fit_to_context,
    shared_tokens,
)
from rlhf_cli.data.negatives import damaged, negative_pairs
from rlhf_cli.data.rows import Demonstration, Pair, PreferenceData, Question, Ranking
from rlhf_cli.data.tokenizer import bpe_tokenizer, word_tokenizer
from rlhf_cli.errors import DataError

BOS, EOS = 0, 2
WORDS = word_tokenizer(["a b c d e f g h ?"])  # a..h are 5..12, ? is 4
BPE = bpe_tokenizer(["Assistant: yes, I do"], 300)
CONFIG = DatasetConfig(source="preferences", max_prompt_tokens=4, max_completion_tokens=3)


def preference_data(**changes: Any) -> PreferenceData:
    pairs = [Pair("a ?", "b", "c")]
    data = PreferenceData([Demonstration("a ?", "b")], pairs, pairs, ["a ?"], [Pair("d ?", "b", "c")])
    return replace(data, **changes)


def test_prompts_begin_with_bos_and_responses_end_with_eos() -> None:
    assert encode_prompt(WORDS, "a b ?") == [BOS, 5, 6, 4]
    assert encode_response(WORDS, "a b") == [5, 6, EOS]


def test_without_a_bos_token_a_prompt_begins_with_its_text() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=WORDS.backend_tokenizer, eos_token="</s>")
    assert encode_prompt(bare, "a b ?") == [5, 6, 4]


@pytest.mark.parametrize("response", ["yes", " yes", "yes \n"])
def test_a_response_is_encoded_with_one_space_before_it(response: str) -> None:
    whole = BPE("Assistant: yes")["input_ids"]
    assert encode_prompt(BPE, "Assistant:") + encode_response(BPE, response) == [BOS, *whole, EOS]


def test_a_truncated_response_has_no_eos() -> None:
    assert encode_response(WORDS, "a b c", max_tokens=4) == [5, 6, 7, EOS]
    assert encode_response(WORDS, "a b c", max_tokens=3) == [5, 6, 7]
    assert encode_response(WORDS, "a b c", max_tokens=2) == [5, 6]


def test_decoding_ends_at_eos_and_hides_nothing_before_it() -> None:
    assert decode_response(BPE, encode_response(BPE, "yes, I do 🙂")) == "yes, I do 🙂"
    assert decode_response(WORDS, [5, EOS, 6, 1]) == "a"
    assert decode_response(WORDS, [5, 3, EOS]) == "a <unk>"


def test_pairs_and_demonstrations_become_ids_in_their_order() -> None:
    pairs = [Pair("a ?", "b", "c d e"), Pair("b", "c", "d", 0.75, 0.5), Pair("a ?", "b", "c")]
    certain = {"label": 1.0, "margin": 0.0}
    assert encode_pairs(pairs, WORDS, CONFIG) == [
        {"prompt_ids": [BOS, 5, 4], "chosen_ids": [6, EOS], "rejected_ids": [7, 8, 9], **certain},
        {"prompt_ids": [BOS, 6], "chosen_ids": [7, EOS], "rejected_ids": [8, EOS], "label": 0.75, "margin": 0.5},
        {"prompt_ids": [BOS, 5, 4], "chosen_ids": [6, EOS], "rejected_ids": [7, EOS], **certain},
    ]
    assert encode_demonstrations([Demonstration("a ?", "b c")], WORDS, CONFIG) == [
        {"prompt_ids": [BOS, 5, 4], "completion_ids": [6, 7, EOS]}
    ]
    assert encode_pairs([], WORDS, CONFIG) == []


def test_rankings_become_ids_best_first_with_the_ids_of_their_pairs() -> None:
    ranking = Ranking("a ?", ("c d e", "b", "d"))
    assert encode_rankings([ranking], WORDS, CONFIG) == [
        {"prompt_ids": [BOS, 5, 4], "response_ids": [[7, 8, 9], [6, EOS], [8, EOS]]}
    ]
    best, second, _ = encode_rankings([ranking], WORDS, CONFIG)[0]["response_ids"]
    pair = encode_pairs(ranking.pairs()[:1], WORDS, CONFIG)[0]
    assert (pair["chosen_ids"], pair["rejected_ids"]) == (best, second)
    assert encode_rankings([], WORDS, CONFIG) == []


def test_a_ranking_implies_a_pair_for_every_two_of_its_responses() -> None:
    assert Ranking("p", ("a", "b", "c")).pairs() == [Pair("p", "a", "b"), Pair("p", "a", "c"), Pair("p", "b", "c")]
    assert len(Ranking("p", tuple("abcdef")).pairs()) == 6 * 5 / 2


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ([5, 6, EOS], [5, 7, EOS], 1),
        ([5, EOS], [5, 6, EOS], 1),  # the shorter one's EOS already differs
        ([5, 6], [5, 6, EOS], 2),  # cut: a prefix of the other
        ([6, 5, EOS], [7, 5, EOS], 0),  # what is alike after the first difference does not count
        ([5, 6, EOS], [5, 6, EOS], 3),
        ([], [5], 0),
    ],
)
def test_shared_tokens_end_at_the_first_difference(first: list[int], second: list[int], shared: int) -> None:
    assert shared_tokens(first, second) == shared_tokens(second, first) == shared


def test_each_text_is_tokenised_once() -> None:
    rows = encode_pairs([Pair("a ?", "b", "c")] * 3, WORDS, CONFIG)
    assert rows[0]["prompt_ids"] is rows[2]["prompt_ids"]


def test_prompts_too_long_are_dropped_and_counted_never_cut() -> None:
    long = "a b c ?"  # with BOS 5 tokens, one more than fit
    pairs = [Pair("a ?", "b", "c"), Pair(long, "b", "c")]
    data = preference_data(
        demonstrations=[Demonstration("a b ?", "b"), Demonstration(long, "b")],
        reward_pairs=pairs,
        policy_pairs=pairs,
        prompts=["a ?", long],
        dropped={"empty_response": 7},
    )
    fitted = fit_to_context(data, WORDS, CONFIG)
    assert [row.prompt for row in fitted.demonstrations] == ["a b ?"]
    assert fitted.reward_pairs == fitted.policy_pairs == pairs[:1]
    assert fitted.prompts == ["a ?"]
    # one demonstration and one pair: the list that serves two uses counts once
    assert fitted.dropped == {"empty_response": 7, "prompt_too_long": 2}
    assert data.dropped == {"empty_response": 7}


def test_long_responses_are_kept_and_counted() -> None:
    pairs = [Pair("a ?", "b c d e", "c"), Pair("a ?", "b c", "c d e")]
    fitted = fit_to_context(preference_data(reward_pairs=pairs), WORDS, CONFIG)
    assert fitted.reward_pairs == pairs
    assert fitted.dropped == {"response_truncated": 2}


def test_pairs_that_truncation_makes_equal_are_dropped_and_counted() -> None:
    pairs = [Pair("a ?", "b c d e", "b c d f"), Pair("a ?", "b", "c")]
    fitted = fit_to_context(preference_data(reward_pairs=pairs), WORDS, CONFIG)
    assert fitted.reward_pairs == pairs[1:]
    assert fitted.dropped["equal_after_truncation"] == 1


def ranked_data(rankings: list[Ranking]) -> PreferenceData:
    pairs = [pair for ranking in rankings for pair in ranking.pairs()]
    return preference_data(reward_rankings=rankings, reward_pairs=pairs, policy_pairs=pairs)


def test_rankings_are_fitted_and_count_as_the_pairs_they_imply() -> None:
    long = Ranking("a b c ?", ("b", "c"))  # 1 pair
    # cut to 3 tokens the first and the last are equal: [b d] is left, 1 of 3 pairs
    repeated = Ranking("a ?", ("b c d e", "d", "b c d f"))
    equal = Ranking("a ?", ("b c d e", "b c d f"))  # 1 pair, none left
    whole = Ranking("a ?", ("b", "c", "d"))
    fitted = fit_to_context(ranked_data([long, repeated, equal, whole]), WORDS, CONFIG)
    assert fitted.reward_rankings == [Ranking("a ?", ("b c d e", "d")), whole]
    assert fitted.reward_pairs == [Pair("a ?", "b c d e", "d"), *whole.pairs()]
    assert fitted.policy_pairs is fitted.reward_pairs
    # the cut responses stand in 2 + 2 pairs of `repeated` and in both places of `equal`
    assert fitted.dropped == {"prompt_too_long": 1, "equal_after_truncation": 2 + 1, "response_truncated": 6}


def test_rankings_that_fit_are_left_as_they_are() -> None:
    data = ranked_data([Ranking("a ?", ("b", "c", "d")), Ranking("b ?", ("c", "a"))])
    assert fit_to_context(data, WORDS, CONFIG) == data


def test_no_fitting_ranking_is_refused() -> None:
    with pytest.raises(DataError, match="none of the 3 reward pairs fits.*max_prompt_tokens=4"):
        fit_to_context(ranked_data([Ranking("a b c ?", ("b", "c", "d"))]), WORDS, CONFIG)


def test_a_split_without_a_fitting_row_is_refused() -> None:
    data = preference_data(heldout_pairs=[Pair("a b c d ?", "b", "c")])
    with pytest.raises(DataError, match="none of the 1 heldout pairs fits.*max_prompt_tokens=4"):
        fit_to_context(data, WORDS, CONFIG)


def test_an_enumerable_answer_that_cannot_be_sampled_is_refused() -> None:
    fits = Question("a ?", ("b", "c d"))
    assert fit_to_context(preference_data(questions=[fits]), WORDS, CONFIG).questions == [fits]
    data = preference_data(questions=[Question("a ?", ("b", "c d e"))])
    with pytest.raises(DataError, match="answer 'c d e' has 4 tokens.*max_completion_tokens=4 or more"):
        fit_to_context(data, WORDS, CONFIG)


VOCAB = range(3, 60)
PAIRS = [
    PairTokens(prompt_ids=[BOS, 50 + i % 3], chosen_ids=[10, 11 + i % 3, 14, 15, EOS], rejected_ids=[20 + i % 4, EOS])
    for i in range(60)
]


def single_token_off(real: Sequence[int], bad: Sequence[int]) -> bool:
    """Whether one token differs; EOS may be replaced by a token that is followed by EOS."""
    late = [*real[:-1], bad[-2] if len(bad) > 1 else EOS, EOS]
    changed = sum(a != b for a, b in zip(real, bad, strict=False))
    return (len(bad) == len(real) and changed == 1) or (list(bad) == late and len(bad) == len(real) + 1)


def negatives(share: float, seed: int = 0, **settings: Any) -> list[PairTokens]:
    return negative_pairs(PAIRS * 20, share, rng=np.random.default_rng(seed), vocab_ids=VOCAB, eos_id=EOS, **settings)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.25, 400), (0.5, 1200)])
def test_negatives_make_up_their_share(share: float, count: int) -> None:
    assert len(negatives(share)) == count


def test_negatives_are_certain_and_name_no_margin() -> None:
    assert {(row["label"], row["margin"]) for row in negatives(0.25)} == {(1.0, 0.0)}


def test_negatives_are_the_same_for_the_same_seed() -> None:
    assert negatives(0.3, seed=1) == negatives(0.3, seed=1)
    assert negatives(0.3, seed=1) != negatives(0.3, seed=2)


def test_a_negative_prefers_a_real_response_to_one_that_is_not() -> None:
    real = {(tuple(p["prompt_ids"]), tuple(ids)) for p in PAIRS for ids in (p["chosen_ids"], p["rejected_ids"])}
    rows = negatives(0.5)
    from_chosen = sum(len(row["chosen_ids"]) == 5 for row in rows) / len(rows)
    assert from_chosen == pytest.approx(0.5, abs=0.06)
    for row in rows:
        assert (tuple(row["prompt_ids"]), tuple(row["chosen_ids"])) in real
        assert (tuple(row["prompt_ids"]), tuple(row["rejected_ids"])) not in real
        assert 1 <= len(row["rejected_ids"]) <= 5  # the longest real response
        assert EOS not in row["rejected_ids"][:-1]
        assert set(row["rejected_ids"]) <= {BOS, EOS, *VOCAB}


def test_valid_responses_are_never_negatives() -> None:
    single = {(token, EOS) for token in VOCAB}
    assert any(tuple(row["rejected_ids"]) in single for row in negatives(0.5))
    valid = {tuple(pair["prompt_ids"]): single for pair in PAIRS}
    assert not any(tuple(row["rejected_ids"]) in single for row in negatives(0.5, valid_by_prompt=valid))


def test_one_wrong_token_is_the_commonest_damage_and_every_place_is_hit() -> None:
    rows = [row for row in negatives(0.7, max_tokens=12) if len(row["chosen_ids"]) == 5]
    single = [row for row in rows if single_token_off(row["chosen_ids"], row["rejected_ids"])]
    assert 0.38 < len(single) / len(rows) < 0.58  # 0.4 by intent; other kinds can come to the same
    replaced = [(row["chosen_ids"], row["rejected_ids"]) for row in single if len(row["rejected_ids"]) == 5]
    places = {i for real, bad in replaced for i in range(5) if real[i] != bad[i]}
    assert places == {0, 1, 2, 3, 4}


def test_damage_is_various() -> None:
    response, other, prompt = [10, 11, 12, 13, EOS], [30, 31, EOS], [BOS, 50, 51]
    rng = np.random.default_rng(0)
    found = {tuple(damaged(rng, prompt, response, other, VOCAB)) for _ in range(4000)}
    assert tuple(response) not in found
    expected = {
        "stopped early": (10, 11, EOS),
        "nothing said": (EOS,),
        "never ended": (10, 11, 12, 13),
        "a token missing": (10, 12, 13, EOS),
        "off topic": tuple(other),
        "spliced": (10, 11, 31, EOS),
        "run on": (10, 11, 12, 13, 30, 31, EOS),
        "repeated": (10, 11, 10, 11, 12, 13, EOS),
        "echo": (50, 51, EOS),
    }
    assert {name for name, ids in expected.items() if ids not in found} == set()
    assert any(sorted(ids) == sorted(response) for ids in found)  # shuffled
    assert any(len(ids) == 6 and ids[0] == 10 and ids[2:] == (11, 12, 13, EOS) for ids in found)  # inserted
    assert any(not {*response[:-1], *other[:-1], *prompt} & set(ids) and len(ids) > 1 for ids in found)  # random


def test_a_truncated_response_is_damaged_with_the_real_eos() -> None:
    rng = np.random.default_rng(0)
    found = [damaged(rng, [BOS, 50], [10, 11, 12], [30, EOS], VOCAB, eos_id=EOS, max_tokens=6) for _ in range(500)]
    assert all(EOS not in ids[:-1] and len(ids) <= 6 for ids in found)
    assert [10, 11, EOS] in found
    # the most frequent last token is taken for EOS where it is not given
    pairs = [PairTokens(prompt_ids=[BOS, 5], chosen_ids=[6, EOS], rejected_ids=[7, 8 + i]) for i in range(9)]
    rows = negative_pairs(pairs, 0.5, rng=rng, vocab_ids=VOCAB)
    assert all(EOS not in row["rejected_ids"][:-1] for row in rows)
    assert any(row["rejected_ids"][-1] == EOS for row in rows)


def test_damage_that_cannot_be_done_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\), got 1"):
        negative_pairs(PAIRS, 1.0, rng=rng, vocab_ids=VOCAB)
    with pytest.raises(ValueError, match="no token besides EOS"):
        damaged(rng, [BOS], [5, EOS], [], [EOS])
    with pytest.raises(ValueError, match="response_ids is empty"):
        damaged(rng, [BOS], [], [], VOCAB)
    with pytest.raises(ValueError, match=r"no damaged form of the response \[5\] found in 200 tries"):
        damaged(rng, [], [5, EOS], [], [5], valid={(5,), (EOS,)}, max_tokens=1)
