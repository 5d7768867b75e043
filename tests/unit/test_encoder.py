"""Embeddings of a frozen encoder: pooling by hand, nothing but the text matters, each text once, one line an error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from tiny_models import TOKENIZER, tiny_policy
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cosine_similarity
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from rlhf_cli.errors import RunError
from rlhf_cli.models import encoder as module
from rlhf_cli.models.encoder import Encoder, check_encoder, pair_cosines

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d", "e", "f", "g", "h", "##e"]
CLS, SEP, A, B, C, E = 2, 3, 5, 6, 7, 13
POSITIONS = 16
PAIRS = [("a b", "c", "d e f"), ("h", "d e f", "g h a b"), ("a b", "c d", "g"), ("h", "c", "g"), ("g", "a", "a")]


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a causal language model and a tokenizer that adds no special tokens."""
    folder = tmp_path_factory.mktemp("opt")
    tiny_policy().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a masked language model (so without the pooler) and a WordPiece vocabulary."""
    folder = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(PIECES), max_position_embeddings=POSITIONS, initializer_range=0.5, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForMaskedLM(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # HF_HUB_OFFLINE=1 is read at import


def encoder(folder: Path, pooling: str = "mean") -> Encoder:
    return Encoder(folder, pooling=pooling, device="cpu")


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


# -- embeddings -------------------------------------------------------------------------------------------------------


def test_pooling_by_hand_with_special_tokens(bert: Path) -> None:
    """[CLS] a b ce [SEP]: the mean is over all six tokens, cls is the first."""
    model = BertModel.from_pretrained(bert).eval()
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([[CLS, A, B, C, E, SEP]])).last_hidden_state[0]
    torch.testing.assert_close(encoder(bert).embed(["a b ce"]), hidden.mean(0, keepdim=True))
    torch.testing.assert_close(encoder(bert, "cls").embed(["a b ce"]), hidden[:1])


def test_pooling_by_hand_of_a_causal_model(opt: Path) -> None:
    """The body of the language model, over the words alone: its tokenizer adds no special tokens."""
    with torch.no_grad():
        hidden = tiny_policy().model(input_ids=torch.tensor([[4, 5, 6]])).last_hidden_state[0]
    torch.testing.assert_close(encoder(opt).embed(["a b c"]), hidden.mean(0, keepdim=True))
    assert encoder(opt).embed(["a b c"]).dtype == torch.float32


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("name", ["opt", "bert"])
def test_padding_and_order_change_nothing(name: str, pooling: str, request: pytest.FixtureRequest) -> None:
    made = encoder(request.getfixturevalue(name), pooling)
    texts = ["a", "b c d e f g h a b", "c d"]
    together, alone = made.embed(texts), torch.cat([made.embed([text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.embed(texts[::-1]), together.flip(0), atol=1e-5, rtol=1e-5)
    assert together.shape == (3, 16)


def test_the_encoder_is_frozen(bert: Path) -> None:
    made = encoder(bert)
    assert not made.model.training
    assert not any(parameter.requires_grad for parameter in made.model.parameters())
    assert not made.embed(["a"]).requires_grad


def test_a_tokenizer_without_padding(opt: Path, tmp_path: Path) -> None:
    folder = copy(opt, tmp_path / "nopad")
    edit(folder / "tokenizer_config.json", pad_token=None)
    made = encoder(folder)
    assert made.tokenizer.pad_token is None
    assert made.pad_id == TOKENIZER.eos_token_id
    torch.testing.assert_close(made.embed(["a b c", "d"]), encoder(opt).embed(["a b c", "d"]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["opt", "bert"])
def test_an_empty_text_has_an_embedding(name: str, request: pytest.FixtureRequest) -> None:
    assert bool(encoder(request.getfixturevalue(name)).embed(["", "a b"]).isfinite().all())


def test_texts_are_cut_at_what_the_model_reads(opt: Path, bert: Path, tmp_path: Path) -> None:
    for made, words in ((encoder(opt), POSITIONS), (encoder(bert), POSITIONS - 2)):  # [CLS] and [SEP] take two
        assert made.max_tokens == POSITIONS
        long, full = " ".join(["a b"] * 20), " ".join(["a b"] * (words // 2))
        torch.testing.assert_close(made.embed([long]), made.embed([full]))
    folder = copy(opt, tmp_path / "short")
    edit(folder / "tokenizer_config.json", model_max_length=3)
    torch.testing.assert_close(encoder(folder).embed(["a b c d e"]), encoder(opt).embed(["a b c"]))


def test_positions_that_begin_after_padding_are_not_counted(tmp_path: Path) -> None:
    """RoBERTa with 10 positions and padding id 1 reads 8 tokens; a ninth is an index error."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    RobertaModel(RobertaConfig(vocab_size=12, max_position_embeddings=10, **sizes)).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    made = encoder(tmp_path)
    assert made.max_tokens == 8
    assert bool(made.embed(["a b c d e f g h a b c d"]).isfinite().all())


def test_only_the_encoder_of_an_encoder_decoder_is_used(tmp_path: Path) -> None:
    config = T5Config(vocab_size=12, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    made = encoder(tmp_path)
    assert made.max_tokens is None
    assert made.embed(["a b", "c " * 600]).shape == (2, 16)


def test_wrong_calls(opt: Path) -> None:
    with pytest.raises(ValueError, match="there are no texts"):
        encoder(opt).embed([])
    with pytest.raises(ValueError, match="there are no pairs"):
        pair_cosines(encoder(opt), [], embed_prompt=False)
    with pytest.raises(ValueError, match="pooling is max"):
        encoder(opt, "max")


def test_embeddings_that_are_not_finite(opt: Path) -> None:
    made = encoder(opt)
    with torch.no_grad():
        made.model.get_input_embeddings().weight[TOKENIZER("h")["input_ids"]] = float("nan")
    assert bool(made.embed(["a"]).isfinite().all())
    with pytest.raises(RunError, match=r"gives 1 of 3 embeddings that are not finite"):
        made.embed(["a", "b h", "c"])


# -- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_cosines_of_responses_alone(bert: Path, pooling: str) -> None:
    made = encoder(bert, pooling)
    expected = [cosine_similarity(made.embed([y]), made.embed([z])).clamp(0, 1).item() for _, y, z in PAIRS]
    found = pair_cosines(made, PAIRS, embed_prompt=False)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert (found.dtype, found.device.type, found.shape) == (torch.float64, "cpu", (5,))
    assert found[-1].item() == pytest.approx(1.0)  # equal responses
    assert len({round(value, 4) for value in found.tolist()}) == 5


@pytest.mark.parametrize("name", ["opt", "bert"])
def test_embed_prompt_reads_prompt_and_response(name: str, request: pytest.FixtureRequest) -> None:
    made = encoder(request.getfixturevalue(name))
    found = pair_cosines(made, PAIRS, embed_prompt=True)
    joined = [("", f"{x} {y}", f"{x} {z}") for x, y, z in PAIRS]
    torch.testing.assert_close(found, pair_cosines(made, joined, embed_prompt=False))
    assert (found - pair_cosines(made, PAIRS, embed_prompt=False)).abs().max() > 1e-2


@pytest.mark.parametrize("embed_prompt", [False, True])
@pytest.mark.parametrize("name", ["opt", "bert"])
def test_batch_size_and_order_change_nothing(name: str, embed_prompt: bool, request: pytest.FixtureRequest) -> None:
    made = encoder(request.getfixturevalue(name))
    whole = pair_cosines(made, PAIRS, embed_prompt=embed_prompt)
    for batch_size in (1, 3):
        found = pair_cosines(made, PAIRS, embed_prompt=embed_prompt, batch_size=batch_size)
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)
    backwards = pair_cosines(made, PAIRS[::-1], embed_prompt=embed_prompt)
    torch.testing.assert_close(backwards.flip(0), whole, atol=1e-5, rtol=0)


def test_cosines_are_computed_piece_by_piece(opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = encoder(opt)
    whole = pair_cosines(made, PAIRS, embed_prompt=False)
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", 2)
    assert torch.equal(pair_cosines(made, PAIRS, embed_prompt=False), whole)


@pytest.mark.parametrize(("embed_prompt", "count"), [(False, 6), (True, 9)])
def test_each_text_is_embedded_once_and_the_longest_first(
    opt: Path, monkeypatch: pytest.MonkeyPatch, embed_prompt: bool, count: int
) -> None:
    made, seen = encoder(opt), []
    embed = made.embed
    monkeypatch.setattr(made, "embed", lambda texts: seen.append(texts) or embed(texts))
    pair_cosines(made, PAIRS, embed_prompt=embed_prompt, batch_size=4)
    texts = [text for batch in seen for text in batch]
    assert len(texts) == len(set(texts)) == count
    assert [len(text) for text in texts] == sorted((len(text) for text in texts), reverse=True)
    assert max(len(batch) for batch in seen) == 4


def test_the_progress_bar_is_shown_for_many_texts_only(
    opt: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = encoder(opt)
    capsys.readouterr()
    pair_cosines(made, PAIRS, embed_prompt=False, title="similarity")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "PROGRESS_FROM", 5)
    pair_cosines(made, PAIRS, embed_prompt=False, title="similarity")
    shown = capsys.readouterr().err
    assert "similarity: 100%" in shown
    assert "6/6" in shown
    assert "text/s" in shown


# -- what cannot be loaded --------------------------------------------------------------------------------------------


def refused(name: str | Path) -> str:
    """Return the one line by which `check_encoder` refuses `name`."""
    with pytest.raises(RunError, match=r"^reward\.encoder=.* cannot be loaded\. .*reward\.encoder=sft\.$") as error:
        check_encoder(str(name), "reward.encoder")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_can_be_loaded_passes(opt: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_encoder(str(opt), "reward.encoder")
    monkeypatch.chdir(bert.parent)
    check_encoder(bert.name, "reward.encoder")
    monkeypatch.setenv("HOME", str(opt.parent))
    check_encoder(f"~/{opt.name}", "reward.encoder")
    assert encoder(Path(f"~/{opt.name}")).max_tokens == POSITIONS


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert f"there is no {tmp_path / 'nowhere'}" in refused(tmp_path / "nowhere")
    assert "there is no runs/x/model" in refused("runs/x/model")
    assert "has no config.json" in refused(tmp_path)


def test_a_folder_that_lacks_something(opt: Path, bert: Path, tmp_path: Path) -> None:
    folder = copy(bert, tmp_path / "no_tokenizer")
    (folder / "vocab.txt").unlink()
    assert "it has no tokenizer" in refused(folder)
    with pytest.raises(RunError, match="it has no tokenizer"):
        encoder(folder)
    folder = copy(opt, tmp_path / "no_weights")
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refused(folder)
    with pytest.raises(RunError, match=r"no_weights cannot be loaded\. .*no file named model\.safetensors"):
        encoder(folder)
    folder = copy(opt, tmp_path / "broken")
    (folder / "config.json").write_text("{", encoding="utf-8")
    assert "not a valid JSON file" in refused(folder)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    assert "Unrecognized model" in refused(folder)


def test_weights_that_would_be_drawn_at_random(opt: Path, tmp_path: Path) -> None:
    """A checkpoint with one layer for a config of three loads in transformers, with a random rest."""
    folder = copy(opt, tmp_path / "deeper")
    edit(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(RunError, match=r"deeper cannot be loaded\. its checkpoint lacks \d+ of its weights, such as"):
        encoder(folder)


@pytest.mark.usefixtures("offline")
def test_a_name_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("nobody/no-such-encoder", "no-such-encoder"):
        message = refused(name)
        assert "couldn't connect" in message
        assert "installation" not in message  # the lines that follow in transformers' message
    assert "alphanumeric" in refused("not a name")
    with pytest.raises(RunError, match="the encoder nobody/no-such-encoder cannot be loaded"):
        Encoder("nobody/no-such-encoder", pooling="mean", device="cpu")


def test_a_repository_s_own_code_is_not_run(opt: Path, tmp_path: Path) -> None:
    folder = copy(opt, tmp_path / "custom")
    edit(folder / "config.json", model_type="own", auto_map={"AutoConfig": "code.Own", "AutoModel": "code.Model"})
    (folder / "code.py").write_text("raise SystemExit('run')", encoding="utf-8")
    assert "custom code" in refused(folder)


def test_a_tokenizer_that_has_no_ids_for_padding_or_end(tmp_path: Path) -> None:
    tiny_policy().save_pretrained(tmp_path)
    core = Tokenizer(models.WordLevel({"<unk>": 3, "a": 4, "b": 5}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(tmp_path)
    made = encoder(tmp_path)
    assert made.pad_id == 0
    torch.testing.assert_close(made.embed(["a", "a b"])[:1], made.embed(["a"]), atol=1e-5, rtol=1e-5)
