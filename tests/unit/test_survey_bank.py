from __future__ import annotations

import re
from collections import Counter
from importlib.resources import files
from itertools import pairwise, permutations
from typing import Any

import pytest
import yaml

BANK: dict[str, Any] = yaml.safe_load((files("rlhf_cli.data") / "survey_bank.yaml").read_text(encoding="utf-8"))
TEMPLATES: list[str] = BANK["templates"]
TOPICS: list[dict[str, Any]] = BANK["topics"]

each_topic = pytest.mark.parametrize("entry", TOPICS, ids=[entry["topic"] for entry in TOPICS])


def vocabulary(entries: list[dict[str, Any]]) -> set[str]:
    """Every word of the templates, and of the topic and answers of each entry, in lower case."""
    text = [template.replace("{topic}", "") for template in TEMPLATES]
    for entry in entries:
        text += [entry["topic"], *entry["answers"]]
    return {word for line in text for word in re.findall("[a-z]+", line.lower())}


def test_layout() -> None:
    assert set(BANK) == {"templates", "topics"}
    assert all(set(entry) == {"topic", "answers"} for entry in TOPICS)
    assert len(TOPICS) == 48


def test_templates_hold_one_topic_and_make_distinct_sentences() -> None:
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 5
    for template in TEMPLATES:
        assert template.count("{topic}") == 1
        assert re.fullmatch(r"[A-Z][a-z, ]+[.?]", template.format(topic="pet")), template


def test_topics_are_short_distinct_noun_phrases() -> None:
    names = [entry["topic"] for entry in TOPICS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+( [a-z]+){0,2}", name) for name in names), names


def test_no_answer_appears_twice_in_the_bank() -> None:
    counts = Counter(answer for entry in TOPICS for answer in entry["answers"])
    assert [answer for answer, count in counts.items() if count > 1] == []


@pytest.mark.parametrize(("topics", "limit"), [(16, 330), (48, 900)])
def test_the_vocabulary_is_compact(topics: int, limit: int) -> None:
    assert 100 < len(vocabulary(TOPICS[:topics])) <= limit


@each_topic
def test_answers_are_eight_plain_lower_case_phrases(entry: dict[str, Any]) -> None:
    assert len(entry["answers"]) == 8
    for answer in entry["answers"]:
        assert re.fullmatch(r"[a-z]+( [a-z]+){1,7}", answer), answer
        assert all(left != right for left, right in pairwise(answer.split())), answer


@each_topic
def test_answers_are_of_clearly_unequal_length(entry: dict[str, Any]) -> None:
    lengths = {len(answer.split()) for answer in entry["answers"]}
    assert len(lengths) >= 4
    assert min(lengths) == 2
    assert max(lengths) >= 6


@each_topic
def test_no_answer_is_a_prefix_of_another(entry: dict[str, Any]) -> None:
    assert [pair for pair in permutations(entry["answers"], 2) if pair[1].startswith(pair[0])] == []


@each_topic
def test_answers_mostly_start_with_different_words(entry: dict[str, Any]) -> None:
    first_words = Counter(answer.split()[0] for answer in entry["answers"])
    assert max(first_words.values()) <= 3
    assert len(first_words) >= 5
