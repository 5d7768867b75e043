"""Rewards of a policy's token ids, read by models with its tokenizer or their own, centred on chosen responses."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import CONFIG, EOS, TOKENIZER, tiny_reward_model
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    PreTrainedTokenizerBase,
)

from rlhf_cli.data.encode import encode_prompt, encode_response
from rlhf_cli.data.rows import Pair, PreferenceData, Question
from rlhf_cli.data.tokenizer import bpe_tokenizer
from rlhf_cli.errors import RunError
from rlhf_cli.models.calibration import CALIBRATION_FILE, LengthCalibration
from rlhf_cli.models.policy import load_tokenizer, make_policy
from rlhf_cli.models.reward import ModelReward, RetokenizedReward, new_reward_model, save_centre
from rlhf_cli.stages.reward_reading import gold_reward, mean_reward, model_reward, read_reward

OWN = bpe_tokenizer(["a b c d e f g h", "ab cd", "the other tokenizer"], 300)  # bytes: none of the policy's ids
PAIRS = [
    Pair("a b", "c d e", "f"),
    Pair("b", "g", "h h h"),
    Pair("c c c", "a b a b a b a b", "d"),
    Pair("a b", "h e", "g"),
]
DATA = PreferenceData(demonstrations=[], reward_pairs=PAIRS, policy_pairs=[], prompts=[], heldout_pairs=PAIRS[:1])
TEXTS = [("a b", "c d e"), ("h", "a"), ("c c c", "f f f f"), ("a", "")]
PROMPTS = [encode_prompt(TOKENIZER, prompt) for prompt, _ in TEXTS]
RESPONSES = [encode_response(TOKENIZER, response) for _, response in TEXTS]


def config(max_completion_tokens: int = 8, calibration: str = "none") -> Any:
    dataset = SimpleNamespace(max_prompt_tokens=8, max_completion_tokens=max_completion_tokens)
    model = SimpleNamespace(dtype="float32", attention="auto")
    return SimpleNamespace(reward=SimpleNamespace(calibration=calibration), dataset=dataset, model=model)


def foreign(folder: Path, tokenizer: PreTrainedTokenizerBase = OWN, positions: int = 64) -> Path:
    """Save a reward model with another tokenizer than the policy's, without a centre."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        make_policy(CONFIG, tokenizer, max_positions=positions).save_pretrained(folder)
        new_reward_model(folder, init_std=0.5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def own(folder: Path, *, tokenizer: bool = True) -> Path:
    """Save a reward model with the policy's tokenizer, without a centre."""
    tiny_reward_model(folder.parent / f"{folder.name}-body").save_pretrained(folder)
    if tokenizer:
        TOKENIZER.save_pretrained(folder)
    return folder


def read(folder: Path, cfg: Any = None) -> Any:
    return model_reward(cfg or config(), DATA, TOKENIZER, folder, "cpu")


def directly(folder: Path, texts: list[tuple[str, str]], *, ended: bool = True) -> Tensor:
    """Return the raw scores of texts in the model's own tokens, as if nothing else had ever read them."""
    prompts = [encode_prompt(OWN, prompt) for prompt, _ in texts]
    responses = [encode_response(OWN, response) for _, response in texts]
    return ModelReward(folder, OWN.pad_token_id, "cpu")(prompts, [ids if ended else ids[:-1] for ids in responses])


# -- the tokenizer -----------------------------------------------------------------------------------------------------


def test_a_model_with_another_tokenizer_reads_the_text(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "rm")
    save_centre(folder, 0.25)
    reward = read(folder)
    assert isinstance(reward, RetokenizedReward)
    found = reward(PROMPTS, RESPONSES)
    assert torch.allclose(found, directly(folder, TEXTS), atol=1e-6)
    assert found.std() > 0.1, "the texts differ in their scores"
    alone = torch.cat([reward([prompt], [ids]) for prompt, ids in zip(PROMPTS, RESPONSES, strict=True)])
    assert torch.allclose(found, alone, atol=1e-5), "padding changes nothing"


def test_a_response_that_was_cut_is_read_without_its_end(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "rm")
    save_centre(folder, 0.0)
    cut = [ids[:-1] for ids in RESPONSES[:3]]
    found = read(folder)(PROMPTS[:3], cut)
    assert torch.allclose(found, directly(folder, TEXTS[:3], ended=False), atol=1e-6)
    assert not torch.allclose(found, directly(folder, TEXTS[:3]), atol=1e-2)


def test_what_follows_the_end_is_not_read(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "rm")
    longer = [[*ids, 4, 5, EOS] for ids in RESPONSES]
    reward = read(folder)
    assert torch.equal(reward(PROMPTS, longer), reward(PROMPTS, RESPONSES))


def test_ids_are_read_as_they_are_where_the_tokenizers_are_alike(tmp_path: Path) -> None:
    folder = own(tmp_path / "rm")
    save_centre(folder, 0.25)
    reward = read(folder)
    assert isinstance(reward, ModelReward)
    unknown = [[3, 3, EOS], [4, 3, EOS]]  # two words that text could not tell apart
    expected = ModelReward(folder, TOKENIZER.pad_token_id, "cpu")(PROMPTS[:2], unknown)
    assert torch.equal(reward(PROMPTS[:2], unknown), expected)


def test_without_a_tokenizer_the_policy_s_is_meant(tmp_path: Path) -> None:
    with_one, without = own(tmp_path / "a"), own(tmp_path / "b", tokenizer=False)
    assert torch.equal(read(without)(PROMPTS, RESPONSES), read(with_one)(PROMPTS, RESPONSES))


@pytest.mark.parametrize("pad", ["</s>", None])
def test_a_tokenizer_without_padding_of_its_own_is_good_enough_to_read(tmp_path: Path, pad: str | None) -> None:
    """Padding is masked; many models on the Hub have none, or their end-of-sequence."""
    plain = foreign(tmp_path / "plain")
    odd = shutil.copytree(plain, tmp_path / "odd")
    tokenizer = deepcopy(OWN)
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(odd)
    assert load_tokenizer(odd).pad_token_id not in (None, OWN.eos_token_id), "training needs one of its own"
    assert torch.allclose(read(odd)(PROMPTS, RESPONSES), read(plain)(PROMPTS, RESPONSES), atol=1e-6)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    folder, tokenizer = foreign(tmp_path / "rm"), deepcopy(OWN)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(RunError, match="rm has no end-of-sequence token. every response ends with it"):
        read(folder)


def test_a_model_that_is_too_small_for_the_policy_s_ids_is_refused(tmp_path: Path) -> None:
    small = foreign(tmp_path / "rm")
    for path in small.glob("*token*"):
        path.unlink()
    with pytest.raises(RunError, match=r"knows \d+ tokens. the policy's tokenizer has 400"):
        model_reward(config(), DATA, bpe_tokenizer([" ".join(map(str, range(900)))], 400), small, "cpu")


# -- the centre --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [OWN, TOKENIZER], ids=["its-own", "the-policy-s"])
def test_without_a_centre_chosen_training_responses_have_mean_zero(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = foreign(tmp_path / "rm", tokenizer)
    prompts = [encode_prompt(TOKENIZER, pair.prompt) for pair in PAIRS]
    chosen = [encode_response(TOKENIZER, pair.chosen, 8) for pair in PAIRS]
    found = read(folder)(prompts, chosen)
    assert found.mean().item() == pytest.approx(0, abs=1e-6)
    assert found.abs().max() > 0.1


def test_the_centre_is_of_responses_as_they_are_cut_for_training(tmp_path: Path) -> None:
    """The third chosen response has 9 tokens, and the model reads 8 after the longest prompt."""
    folder = foreign(tmp_path / "rm", TOKENIZER, positions=12)
    cut = [encode_response(TOKENIZER, pair.chosen, 5) for pair in PAIRS]
    prompts = [encode_prompt(TOKENIZER, pair.prompt) for pair in PAIRS]
    assert len(prompts[2]) + len(encode_response(TOKENIZER, PAIRS[2].chosen)) > 12
    assert read(folder, config(5))(prompts, cut).mean().item() == pytest.approx(0, abs=1e-6)


def test_a_centre_of_its_own_stays(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "rm")
    save_centre(folder, 0.0)
    raw = read(folder)(PROMPTS, RESPONSES)
    save_centre(folder, 1.5)
    assert torch.allclose(read(folder)(PROMPTS, RESPONSES), raw - 1.5, atol=1e-6)


def test_held_out_pairs_centre_a_model_where_there_are_none_to_train_on(tmp_path: Path) -> None:
    data = PreferenceData([], [], [], [], heldout_pairs=PAIRS[:1])
    reward = model_reward(config(), data, TOKENIZER, foreign(tmp_path / "rm"), "cpu")
    alone = reward([encode_prompt(TOKENIZER, "a b")], [encode_response(TOKENIZER, "c d e")])
    assert alone.item() == pytest.approx(0, abs=1e-6)


def test_length_calibration_is_in_the_model_s_own_tokens(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "rm")
    LengthCalibration((0.0, 100.0), (0.0, 50.0)).save(folder / CALIBRATION_FILE)  # half a nat a token
    save_centre(folder, 0.0)
    lengths = torch.tensor([float(len(encode_response(OWN, response))) for _, response in TEXTS])
    assert lengths.tolist() != [len(ids) for ids in RESPONSES]
    found = read(folder, config(calibration="length"))(PROMPTS, RESPONSES)
    assert torch.allclose(found, directly(folder, TEXTS) - lengths / 2, atol=1e-5)


def test_a_model_without_the_calibration_that_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no length calibration"):
        read(foreign(tmp_path / "rm"), config(calibration="length"))


# -- several, and none -------------------------------------------------------------------------------------------------


def test_several_models_are_their_mean_each_centred_alone(tmp_path: Path) -> None:
    folders = [foreign(tmp_path / "a"), own(tmp_path / "b")]
    found = read_reward(config(), DATA, TOKENIZER, folders, "cpu")(PROMPTS, RESPONSES)
    each = [read(folder)(PROMPTS, RESPONSES) for folder in folders]
    assert torch.allclose(found, (each[0] + each[1]) / 2, atol=1e-6)
    one = read(folders[0])
    assert mean_reward([one]) is one


def test_no_model_is_the_gold_reward(tmp_path: Path) -> None:
    values = {"c": 1.0, "d": -0.5}
    questions = [Question("a b", ("c", "d"))]
    pairs = [Pair("a b", "c", "d"), Pair("a b", "c", "d"), Pair("a b", "d", "c")]
    data = PreferenceData([], pairs, [], [], [], questions, gold=lambda prompt, answer: values.get(answer, -5.0))
    prompt, said = encode_prompt(TOKENIZER, "a b"), [encode_response(TOKENIZER, answer) for answer in ("c", "d", "e")]
    said.append(said[0][:-1])
    # The centre is (1 + 1 - 1/2) / 3 = 1/2; "e" and "c" without its end are no answers.
    for reward in (gold_reward(data, TOKENIZER, "cpu"), read_reward(config(), data, TOKENIZER, [], "cpu")):
        assert reward([prompt] * 4, said).tolist() == pytest.approx([0.5, -1.0, -5.5, -5.5])


# -- what cannot be read -----------------------------------------------------------------------------------------------


def test_a_text_that_is_too_long_in_the_model_s_own_tokens(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "rm", positions=16)
    save_centre(folder, 0.0)
    reward = read(folder)
    words = [*range(4, 12)]
    text_tokens = len(encode_prompt(OWN, "a b c d e f g h")) + len(encode_response(OWN, "a b c d e f g h"))
    assert text_tokens > 16 >= 3 + len(words)
    with pytest.raises(RunError, match=f"rm reads 16 tokens at most. a prompt with its response has {text_tokens} of"):
        reward([[0, *words]], [[*words, EOS]])


def damage(folder: Path, kind: str) -> None:
    if kind == "labels":
        OPTForSequenceClassification(OPTConfig.from_pretrained(folder, num_labels=3)).save_pretrained(folder)
    elif kind == "bert":
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        BertForSequenceClassification(BertConfig(vocab_size=len(OWN), num_labels=1, **sizes)).save_pretrained(folder)
    elif kind == "weights":
        (folder / "model.safetensors").write_bytes(b"xx")
    elif kind == "no weights":
        (folder / "model.safetensors").unlink()
    elif kind == "centre":
        (folder / "reward.json").write_text("{}")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("labels", r"no reward model could be opened in \S+rm\. its head has more than one output"),
        ("bert", r"the reward model in \S+rm is a BertForSequenceClassification. rewards are read at the last token"),
        ("weights", r"no reward model could be opened in \S+rm\. "),
        ("no weights", r"no reward model could be opened in \S+rm\. "),
        ("centre", r'rm/reward\.json is damaged\. it should hold {"chosen_mean_score": NUMBER}\. delete it'),
    ],
)
def test_a_folder_that_is_no_reward_model_is_one_line(tmp_path: Path, kind: str, message: str) -> None:
    folder = foreign(tmp_path / "rm")
    damage(folder, kind)
    with pytest.raises(RunError, match=message) as raised:
        read(folder)
    assert "\n" not in str(raised.value)
