"""A frozen text encoder: how alike the responses of a pair are, before anything is trained (PCRM's cosine prior)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer

from rlhf_cli.errors import RunError
from rlhf_cli.models.policy import freeze
from rlhf_cli.models.tokens import pad_right
from rlhf_cli.rewards.pcrm import cosine_similarity

PROGRESS_FROM = 2_000  # texts; below, embedding takes seconds
PAIRS_AT_ONCE = 4_096  # cosines per step, so that memory grows with the distinct texts, not with the pairs
WEIGHT_FILES = ("*.safetensors", "*.bin")


def check_encoder(name: str, key: str) -> None:
    """Refuse an encoder that cannot be loaded; reads its config and its tokenizer, not its weights.

    Args:
        name: a folder in Hugging Face layout, or a Hugging Face name.
        key: the config key that holds `name`, for the message.

    Raises:
        RunError: the folder lacks a config, a tokenizer or weights, or the name is wrong or cannot be reached.
    """
    what = f"{key}={name} cannot be loaded"
    todo = f"give a folder in Hugging Face layout, a Hugging Face name when online, or {key}=sft"
    folder = Path(name).expanduser()
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        if not (folder / "config.json").is_file():
            raise RunError(what, f"{folder} has no config.json" if folder.exists() else f"there is no {folder}", todo)
        if not any(file for pattern in WEIGHT_FILES for file in folder.glob(pattern)):
            raise RunError(what, f"{folder} has no weights ({' or '.join(WEIGHT_FILES)})", todo)
    try:
        AutoConfig.from_pretrained(_place(name), trust_remote_code=False)
        _tokenizer(name)
    except Exception as error:  # a hub client, file formats and tokenizer libraries raise their own kinds
        raise RunError(what, _reason(error), todo) from error


class Encoder:
    """Embeddings of texts: the last hidden state of a frozen model in float32, pooled over the tokens of a text.

    Texts are read as the tokenizer reads them: the special tokens it adds ([CLS], [SEP]) are part of the text and of
    its mean. Longer than the model reads, a text is cut as its tokenizer cuts, by default at its end.

    Args:
        source: folder in Hugging Face layout, or Hugging Face name; of a causal language model the body is used.
        pooling: mean over the tokens, or cls, the first one. A causal model's first token has not seen the others.
        device: cpu or cuda.

    Raises:
        RunError: the model or its tokenizer cannot be loaded, or the checkpoint lacks some of its weights.
        ValueError: pooling is something else.
    """

    def __init__(self, source: str | Path, *, pooling: str, device: str) -> None:
        if pooling not in ("mean", "cls"):
            raise ValueError(f"pooling is {pooling}: it must be mean or cls.")
        self.source, self.pooling, self.device = source, pooling, device
        try:
            self.tokenizer = _tokenizer(source)
            model = _body(source)
        except Exception as error:  # as in check_encoder
            raise RunError(f"the encoder {source} cannot be loaded", _reason(error), "choose another one") from error
        self.model = freeze(model).to(device)
        self.max_tokens = _max_tokens(self.tokenizer, self.model)
        special = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)  # padding is masked: any id will do
        self.pad_id = next(token for token in special if token is not None)

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Tensor:
        """Return the embeddings of one batch of texts, without gradient, (B, H).

        A text without tokens (empty, and the tokenizer adds none) is read as one padding token.

        Raises:
            ValueError: there are no texts.
            RunError: an embedding is not finite.
        """
        if not texts:
            raise ValueError("there are no texts to embed.")
        cut = self.max_tokens is not None
        encoded = self.tokenizer(texts, truncation=cut, max_length=self.max_tokens, return_attention_mask=False)
        ids, mask = pad_right([row or [self.pad_id] for row in encoded["input_ids"]], self.pad_id)
        ids, mask = ids.to(self.device), mask.to(self.device)
        hidden = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        if self.pooling == "cls":
            embedded = hidden[:, 0]
        else:
            embedded = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        if not bool(embedded.isfinite().all()):
            count = int((~embedded.isfinite().all(-1)).sum())
            raise RunError(
                f"the encoder {self.source} gives {count} of {len(texts)} embeddings that are not finite",
                "a similarity cannot be computed from them",
                "choose another encoder, or train the SFT policy again with a lower learning rate",
            )
        return embedded


def pair_cosines(
    encoder: Encoder,
    pairs: Sequence[tuple[str, str, str]],
    *,
    embed_prompt: bool,
    batch_size: int = 64,
    title: str = "embedding",
) -> Tensor:
    """Return the cosine of the embeddings of chosen and rejected, in [0, 1] (clamped), float64 on the CPU, (N,).

    Each distinct text is embedded once.

    Args:
        encoder: its pooled last hidden state.
        pairs: (prompt, chosen, rejected).
        embed_prompt: embed the prompt, a space and the response (official PCRM code), or the response alone.
        batch_size: texts per forward pass, >= 1; the result does not depend on it.
        title: of the progress bar.

    Raises:
        ValueError: there are no pairs, or an embedding is zero.
        RunError: an embedding is not finite.
    """
    if not pairs:
        raise ValueError("there are no pairs to embed.")
    sides = [tuple(f"{x} {y}" if embed_prompt else y for y in responses) for x, *responses in pairs]
    # The longest first: little padding, and memory runs out at once or not at all.
    texts = sorted(dict.fromkeys(text for pair in sides for text in pair), key=len, reverse=True)
    embedded = []
    quiet = len(texts) <= PROGRESS_FROM
    with tqdm(total=len(texts), desc=title, unit="text", mininterval=1, disable=quiet) as bar:
        for start in range(0, len(texts), batch_size):
            embedded.append(encoder.embed(texts[start : start + batch_size]).cpu())
            bar.update(len(embedded[-1]))
    embeddings = torch.cat(embedded)
    place = {text: number for number, text in enumerate(texts)}
    rows = torch.tensor([[place[text] for text in pair] for pair in sides])
    pieces = rows.split(PAIRS_AT_ONCE)
    return torch.cat([cosine_similarity(*embeddings[piece].double().unbind(1)) for piece in pieces])


def _place(source: str | Path) -> str:
    folder = Path(source).expanduser()
    return str(folder if folder.exists() else source)


def _tokenizer(source: str | Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(_place(source), trust_remote_code=False)
    # Without its files, transformers makes a tokenizer of the special tokens alone.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError("it has no tokenizer")
    return tokenizer


def _body(source: str | Path) -> Any:
    loaded = AutoModel.from_pretrained(
        _place(source), dtype="float32", output_loading_info=True, trust_remote_code=False
    )
    model, info = cast(Any, loaded)
    # A missing weight is drawn at random. Poolers come after the last hidden state and are often not stored.
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    if missing:
        raise ValueError(f"its checkpoint lacks {len(missing)} of its weights, such as {missing[0]}")
    model.config.use_cache = False
    return model.get_encoder() if model.config.is_encoder_decoder else model


def _max_tokens(tokenizer: Any, model: Any) -> int | None:
    """Return the most tokens a text may have, special ones included; None where nothing limits it."""
    limits = [int(tokenizer.model_max_length)]
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and positions > 0:
        # RoBERTa-like models number positions from after the padding id, and count that in their maximum.
        skipped = [
            layer.padding_idx + 1
            for name, layer in model.named_modules()
            if name.endswith("position_embeddings") and getattr(layer, "padding_idx", None) is not None
        ]
        limits.append(positions - max(skipped, default=0))
    limit = min(limits)
    return limit if limit < 10**9 else None  # an unset tokenizer.model_max_length is 10^30


def _reason(error: Exception) -> str:
    """Return the first line of the message; transformers' have several."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
