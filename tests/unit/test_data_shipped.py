"""Every shipped dataset, read by its Hub id from a cache, in the layout and the columns it has there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_configs import COMMIT, Row, cached, dataset, judged

from rlhf_cli.data import check, content, load
from rlhf_cli.errors import DataError, RunError

COUNT = 12


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, under a hidden folder as it is at home, and no network."""
    folder = tmp_path / ".cache" / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


def dialogues(start: int, count: int = COUNT) -> list[Row]:
    begin = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Question"
    return [
        {side: f"{begin} {i}?\n\nAssistant: {side} {i}" for side in ("chosen", "rejected")}
        for i in range(start, start + count)
    ]


def hh_files() -> dict[str, list[Row]]:
    folders = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
    files = {f"{folder}/train.jsonl.gz": dialogues(100 * i) for i, folder in enumerate(folders)}
    files |= {f"{folder}/test.jsonl.gz": dialogues(1000 + 100 * i, 4) for i, folder in enumerate(folders)}
    red_team: Row = {"min_harmlessness_score_transcript": 0.5, "transcript": "\n\nHuman: x", "tags": None}
    return files | {"red-team-attempts/red_team_attempts.jsonl.gz": [red_team]}


def questions(data: Any) -> set[int]:
    return {int(prompt.split("Question ")[1].split("?")[0]) for prompt in judged(data)}


def test_hh_rlhf_is_its_four_folders_without_red_teaming(cache: Path) -> None:
    cached(cache, "Anthropic/hh-rlhf", hh_files(), readme="---\nlicense: mit\n---\n# HH\n")
    data = load(dataset("hh_rlhf"))
    assert questions(data) == {100 * folder + i for folder in range(4) for i in range(COUNT)}
    prompt = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Question 3?\n\nAssistant:"
    assert judged(data)[prompt][0] == "chosen 3"
    assert data.dropped == {}


def test_a_folder_of_a_hub_dataset_is_a_subset(cache: Path) -> None:
    cached(cache, "Anthropic/hh-rlhf", hh_files())
    assert questions(load(dataset("hh_rlhf", "subset=helpful-base"))) == set(range(100, 100 + COUNT))
    assert questions(load(dataset("hh_rlhf", "subset=helpful-online", "split=test"))) == {1200, 1201, 1202, 1203}
    wrong = dataset("hh_rlhf", "subset=helpful")
    with pytest.raises(
        DataError, match=r"hh-rlhf has no subset helpful\. it has: harmless-base, helpful-base.*subset="
    ):
        load(wrong)
    with pytest.raises(DataError, match=r"hh-rlhf is a folder without a split dev\. it has: train, test\. .*split="):
        load(dataset("hh_rlhf", "split=dev"))


def test_transcripts_of_red_teaming_are_no_preferences(cache: Path) -> None:
    red_team = [{"transcript": "\n\nHuman: x"}]
    cached(cache, "Anthropic/hh-rlhf", {**hh_files(), "red-team-attempts/train.jsonl.gz": red_team})
    assert len(questions(load(dataset("hh_rlhf")))) == 4 * COUNT
    with pytest.raises(DataError, match=r"hh-rlhf has no preferences in its split train"):
        load(dataset("hh_rlhf", "subset=red-team-attempts"))


def test_subsets_that_the_readme_lists(cache: Path) -> None:
    listed = "---\nconfigs:\n- config_name: both\n  default: true\n  data_files:\n  - split: train\n    path:\n"
    listed += "    - 'harmless-base/train*'\n    - 'helpful-base/train*'\n"
    listed += "- config_name: kind\n  data_dir: helpful-base\n---\n# HH\n"
    cached(cache, "Anthropic/hh-rlhf", hh_files(), readme=listed)
    assert len(questions(load(dataset("hh_rlhf")))) == 2 * COUNT
    assert questions(load(dataset("hh_rlhf", "subset=kind"))) == set(range(100, 100 + COUNT))
    with pytest.raises(DataError, match=r"has no subset mine\. it has: both, kind, harmless-base"):
        load(dataset("hh_rlhf", "subset=mine"))


def test_full_hh_rlhf(cache: Path) -> None:
    rows = [
        {"prompt": f"\n\nHuman: Q{i}\n\nAssistant:", "response": f" a{i}", "chosen": f" a{i}", "rejected": f" b{i}"}
        for i in range(COUNT)
    ]
    cached(cache, "Dahoas/full-hh-rlhf", {"data/train-00000-of-00001-8349d0765e6718df.parquet": rows})
    data = load(dataset("full_hh_rlhf"))
    assert len(judged(data)) == COUNT
    pair = data.reward_pairs[0]
    number = pair.prompt.removeprefix("\n\nHuman: Q").removesuffix("\n\nAssistant:")
    assert (pair.chosen, pair.rejected) == (f"a{number}", f"b{number}")


def test_tldr_is_the_converted_copy_with_nested_columns(cache: Path) -> None:
    post = {"subreddit": "tifu", "site": None, "article": None}
    rows = [
        {
            "info": {"id": f"t3_{i}", "post": f"Post {i}.", "title": f"Title {i}", **post},
            "summaries": [{"text": f" {nth} {i}", "policy": "sup4", "note": "ok"} for nth in ("first", "second")],
            "choice": i % 2,
            "worker": "w",
            "batch": "batch3",
            "split": "train",
            "extra": {"confidence": None},
        }
        for i in range(COUNT)
    ]
    news = {"id": "x", "post": None, "title": "News", "subreddit": None, "site": "cnn", "article": "Today."}
    rows.append({**rows[0], "info": news, "batch": "cnndm0"})
    files: dict[str, list[Row]] = {"comparisons/train/0000.parquet": rows, "axis/test/0000.parquet": [{"summary": "x"}]}
    cached(cache, "openai/summarize_from_feedback", files, revision="refs/convert/parquet")
    data = load(dataset("tldr"))
    assert len(judged(data)) == COUNT
    assert data.dropped == {"empty_prompt": 1}, "news articles are no posts"
    for pair in data.reward_pairs:
        number = int(pair.prompt.split("POST: Post ")[1].split(".")[0])
        assert pair.prompt == f"SUBREDDIT: r/tifu\n\nTITLE: Title {number}\n\nPOST: Post {number}.\n\nTL;DR:"
        expected = [f"first {number}", f"second {number}"]
        assert [pair.chosen, pair.rejected] == (expected[::-1] if number % 2 else expected)


def test_ultrafeedback_is_a_prompt_and_two_conversations(cache: Path) -> None:
    rows = [
        {
            "prompt": f"Ask {i}",
            "prompt_id": str(i),
            "messages": [{"content": f"Ask {i}", "role": "user"}, {"content": f"good {i}", "role": "assistant"}],
            **{
                side: [{"content": f"Ask {i}", "role": "user"}, {"content": f"{word} {i}", "role": "assistant"}]
                for side, word in (("chosen", "good"), ("rejected", "bad"))
            },
            "score_chosen": 8.0,
            "score_rejected": 2.0,
        }
        for i in range(COUNT)
    ]
    listed = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    listed += "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in ("train_prefs", "train_sft"))
    files = {f"data/{split}-00000-of-00001.parquet": rows for split in ("train_prefs", "train_sft")}
    cached(cache, "HuggingFaceH4/ultrafeedback_binarized", files, readme=f"{listed}---\n")
    data = load(dataset("ultrafeedback"))
    assert len(judged(data)) == COUNT
    pair = data.reward_pairs[0]
    number = pair.prompt.removeprefix("\n\nHuman: Ask ").removesuffix("\n\nAssistant:")
    assert (pair.chosen, pair.rejected) == (f"good {number}", f"bad {number}")


def test_alpaca_farm_uses_the_short_prompt_without_an_input(cache: Path) -> None:
    rows = [
        {"instruction": f"Do {i}", "input": "" if i % 2 else f"with {i}", "output_1": "a", "output_2": "b"}
        | {"preference": 1 if i < 6 else 2, "raw_preference": i}
        for i in range(COUNT)
    ]
    files: dict[str, list[Row]] = {
        "alpaca_human_preference/preference/0000.parquet": rows,
        "alpaca_instructions/sft/0000.parquet": [{"x": 1}],
    }
    cached(cache, "tatsu-lab/alpaca_farm", files, revision="refs/convert/parquet")
    found = judged(load(dataset("alpaca_farm")))
    assert len(found) == COUNT
    for prompt, (better, _) in found.items():
        number = int(prompt.split("### Instruction:\nDo ")[1].split("\n")[0])
        assert better == ("a" if number < 6 else "b")
        assert prompt.endswith(f"Do {number}\n\n### Response:" if number % 2 else f"with {number}\n\n### Response:")
        assert prompt.startswith("Below is an instruction that describes a task. " if number % 2 else "Below is an")


def test_dpo_mix_keeps_system_text_and_earlier_turns(cache: Path) -> None:
    start = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    start += [{"role": "assistant", "content": "Hello."}]
    rows = [
        {
            "dataset": "argilla/distilabel-capybara-dpo-7k-binarized",
            **{
                side: [*start, {"role": "user", "content": f"Ask {i}"}, {"role": "assistant", "content": f"{side} {i}"}]
                for side in ("chosen", "rejected")
            },
            "chosen_rating": 5.0,
            "rejected_rating": 3.0,
        }
        for i in range(COUNT)
    ]
    cached(cache, "argilla/dpo-mix-7k", {"data/train-00000-of-00001.parquet": rows})
    found = judged(load(dataset("dpo_mix")))
    assert len(found) == COUNT
    prompt = "Be brief.\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Ask 7\n\nAssistant:"
    assert found[prompt][0] == "chosen 7"


def shp_rows(domain: str) -> list[Row]:
    return [
        {"post_id": f"p{i}", "domain": f"{domain}_train", "upvote_ratio": 0.98, "history": f"{domain} {i}?"}
        | {
            "c_root_id_A": "a",
            "c_root_id_B": "b",
            "created_at_utc_A": 1636,
            "created_at_utc_B": 1637,
            "score_A": 3,
            "score_B": 9,
            "human_ref_A": "A!",
            "human_ref_B": "B!",
        }
        | {"labels": i % 2, "seconds_difference": 9.0, "score_ratio": 3.0}
        for i in range(COUNT)
    ]


def put_shp(cache: Path) -> None:
    files = {f"{domain}/train.json": shp_rows(domain) for domain in ("askbaking", "legaladvice")}
    cached(cache, "stanfordnlp/SHP", files | {"askbaking/validation.json": shp_rows("other")})


def test_shp(cache: Path) -> None:
    put_shp(cache)
    found = judged(load(dataset("shp")))
    assert len(found) == 2 * COUNT
    assert {prompt: better for prompt, (better, _) in found.items()} == {
        f"{domain} {i}?": "A!" if i % 2 else "B!" for domain in ("askbaking", "legaladvice") for i in range(COUNT)
    }
    assert set(judged(load(dataset("shp", "subset=legaladvice")))) == {f"legaladvice {i}?" for i in range(COUNT)}


def test_the_shipped_mixture(cache: Path) -> None:
    cached(cache, "Anthropic/hh-rlhf", hh_files())
    put_shp(cache)
    data = load(dataset("mixture"))
    assert data.parts == {"hh_rlhf": 24, "shp": 24}
    assert sum("Human:" in prompt for prompt in judged(data)) == 24


def test_a_hub_dataset_is_known_by_its_commit(cache: Path) -> None:
    cached(cache, "Anthropic/hh-rlhf", hh_files())
    assert content(dataset("hh_rlhf")) == f"Anthropic/hh-rlhf@{COMMIT}"


def test_a_hub_dataset_out_of_reach_is_refused_at_once(cache: Path) -> None:
    with pytest.raises(RunError, match=r"Anthropic/hh-rlhf is not in the cache.*dataset\.path=FOLDER.*hf download"):
        check(dataset("hh_rlhf"))
    cached(cache, "Anthropic/hh-rlhf", hh_files())
    with pytest.raises(
        RunError, match=r"part shp of the mixture: .*SHP is not in the cache.*path=FOLDER in the yaml of"
    ):
        check(dataset("mixture"))
    with pytest.raises(RunError, match=r"part org/rows of the mixture: .*set FOLDER in dataset\.parts, or run"):
        check(dataset("mixture", "parts=[org/rows]", "weights=[1]"))
