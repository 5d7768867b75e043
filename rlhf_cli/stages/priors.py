"""What is known of a pair before training: how alike its responses are, and the bound on its margin (PCRM)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_cli.config.schema import CommandConfig, CosinePrior, FixedPrior, LengthPrior, RandomPrior
from rlhf_cli.data.encode import PairTokens, shared_tokens
from rlhf_cli.data.lazy import LazyRows
from rlhf_cli.data.rows import Pair
from rlhf_cli.errors import DataError
from rlhf_cli.models.encoder import Encoder, check_encoder, pair_cosines
from rlhf_cli.rewards.pcrm import angle, length_ratio, margin_bound
from rlhf_cli.store import Store, read_json
from rlhf_cli.trainers.common import resolve_device

SFT = "sft"  # the encoder that is the SFT policy
ENCODER_FILES = (".safetensors", ".bin", ".json", ".txt", ".model")
AT_ONCE = 10_000  # pairs on disk that are embedded at a time
RANDOM_STREAM = 31  # of the random control's draws, beside the other streams of a seed


def check(cfg: CommandConfig) -> None:
    """Refuse an encoder that cannot be loaded, before anything is trained.

    Raises:
        RunError: it does not exist.
    """
    blocks = {"reward": getattr(cfg, "reward", None)}
    blocks["algo.constraint"] = getattr(getattr(cfg, "algo", None), "constraint", None)
    for key, prior in blocks.items():
        if isinstance(prior, CosinePrior) and prior.encoder != SFT:
            check_encoder(prior.encoder, f"{key}.encoder")


def encoders(cfg: CommandConfig) -> dict[str, Any]:
    """Return what determines the encoders that `cfg` names, by config key; nothing for the SFT policy."""
    blocks = {"reward": getattr(cfg, "reward", None)}
    blocks["algo.constraint"] = getattr(getattr(cfg, "algo", None), "constraint", None)
    named = {key: prior.encoder for key, prior in blocks.items() if isinstance(prior, CosinePrior)}
    return {f"{key}.encoder": encoder_identity(name) for key, name in named.items() if name != SFT}


def bounds(
    prior: Any, pairs: Sequence[Pair], rows: Sequence[PairTokens], *, cfg: CommandConfig, sft: Path
) -> np.ndarray | None:
    """Return delta* of each pair, nats, (N,); None where the prior bounds nothing.

    Args:
        prior: a `Prior`; anything else bounds nothing.
        pairs, rows: the same pairs as text and as token ids.
        cfg: of the command; its seed draws the random control.
        sft: folder of the SFT policy in the store, the default encoder.

    Raises:
        DataError: the responses of a pair are equal as tokens.
        RunError: the encoder cannot be loaded.
    """
    if isinstance(prior, FixedPrior):
        return np.full(len(rows), prior.delta)
    if isinstance(prior, RandomPrior):
        return np.random.default_rng([cfg.seed, RANDOM_STREAM]).uniform(prior.low, prior.high, len(rows))
    if isinstance(prior, LengthPrior):
        similarity = length_ratios(rows)
    elif isinstance(prior, CosinePrior):
        similarity = similarities(prior, pairs, cfg=cfg, sft=sft)
    else:
        return None
    return margin_bound(torch.from_numpy(similarity), beta1=prior.beta1, beta2=prior.beta2, beta3=prior.beta3).numpy()


def length_ratios(rows: Sequence[PairTokens]) -> np.ndarray:
    """Return the ratio of the lengths after the first differing token, in [0, 1], (N,).

    Raises:
        DataError: the responses of a pair are equal.
    """
    shared = [shared_tokens(row["chosen_ids"], row["rejected_ids"]) for row in rows]
    lengths = [
        torch.tensor([len(row[side]) - same for row, same in zip(rows, shared, strict=True)], dtype=torch.float64)
        for side in ("chosen_ids", "rejected_ids")
    ]
    try:
        return length_ratio(*lengths).numpy()
    except ValueError as error:
        raise DataError("a length prior cannot be computed", str(error), "remove these pairs from the data") from None


def similarities(prior: CosinePrior, pairs: Sequence[Pair], *, cfg: CommandConfig, sft: Path) -> np.ndarray:
    """Return the similarity of the responses' embeddings, in [0, 1], (N,): computed once per data set, then stored."""
    texts = None if isinstance(pairs, LazyRows) else _texts(pairs)
    distinct = list(dict.fromkeys(texts or []))
    what = {
        "encoder": read_json(sft / "identity.json") if prior.encoder == SFT else encoder_identity(prior.encoder),
        "pooling": prior.pooling,
        "embed_prompt": prior.embed_prompt,
        "texts": pairs.source
        if isinstance(pairs, LazyRows)
        else hashlib.sha256(json.dumps(distinct).encode()).hexdigest(),
    }
    with Store(Path(cfg.store_dir)).building("similarity", what) as building:
        file = building.path / "cosine.npy"
        if not building.ready:
            source = sft / "model" if prior.encoder == SFT else prior.encoder
            encoder = Encoder(source, pooling=prior.pooling, device=resolve_device(cfg.device))
            parts = map(_texts, pairs.batches(AT_ONCE)) if isinstance(pairs, LazyRows) else [distinct]
            np.save(file, torch.cat([pair_cosines(encoder, part, embed_prompt=prior.embed_prompt) for part in parts]))
            file = building.publish() / "cosine.npy"
        cosine = np.load(file)
    if texts is not None:
        place = {text: number for number, text in enumerate(distinct)}
        cosine = cosine[[place[text] for text in texts]]
    found = torch.from_numpy(cosine).clamp(0, 1)
    return (angle(found) if prior.similarity == "angle" else found).numpy()


def _texts(pairs: Sequence[Pair]) -> list[tuple[str, str, str]]:
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]


def encoder_identity(encoder: str) -> Any:
    """Return what determines an encoder: its name, and the files of a folder, by name, size and time."""
    folder = Path(encoder).expanduser()
    if encoder == SFT or not folder.is_dir():
        return encoder
    files = sorted(file for file in folder.iterdir() if file.suffix in ENCODER_FILES)
    return [encoder, *(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)]
