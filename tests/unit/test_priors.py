"""What is known of a pair before training: its bound under each prior, and what determines an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cli.config.compose import load as load_config
from rlhf_cli.data.encode import PairTokens
from rlhf_cli.errors import DataError
from rlhf_cli.stages import priors

EOS = 2
SFT = Path("sft")


def pair(chosen: list[int], rejected: list[int]) -> PairTokens:
    return PairTokens(prompt_ids=[1], chosen_ids=chosen, rejected_ids=rejected, label=1.0, margin=0.0)


# The first two tokens are shared: 2 against 4 tokens are left, end-of-sequence included; then 1 against 1.
ROWS = [pair([5, 6, 7, EOS], [5, 6, 8, 9, 9, EOS]), pair([5, EOS], [6, EOS])]


def bounds(*overrides: str, rows: list[PairTokens] = ROWS) -> Any:
    cfg = load_config("train-rm", list(overrides))
    return priors.bounds(cfg.reward, [], rows, cfg=cfg, sft=SFT)  # type: ignore[attr-defined]


def test_the_fixed_control_bounds_every_pair_alike() -> None:
    assert bounds("reward=pcrm_fixed", "reward.delta=4.5").tolist() == [4.5, 4.5]


def test_the_random_control_is_drawn_once_for_each_pair_of_a_seed() -> None:
    many = [ROWS[0]] * 400
    first = bounds("reward=pcrm_random", rows=many)
    assert first.min() >= 4
    assert first.max() <= 5
    assert first.std() == pytest.approx(1 / 12**0.5, abs=0.03)  # of U[4, 5]
    assert (bounds("reward=pcrm_random", rows=many) == first).all()
    assert (bounds("reward=pcrm_random", "seed=1", rows=many) != first).any()


def test_the_length_prior_counts_tokens_after_the_first_difference() -> None:
    # 10 / (2/4 + 0.001) - 5 and, of [5, EOS] and [6, EOS], 10 / (2/2 + 0.001) - 5
    np.testing.assert_allclose(bounds("reward=pcrm_length"), [10 / 0.501 - 5, 10 / 1.001 - 5])


def test_a_plain_loss_has_no_bound() -> None:
    assert bounds("reward=bt") is None
    assert bounds("reward=warm") is None


def test_equal_responses_are_refused_in_one_line() -> None:
    with pytest.raises(DataError, match="a length prior cannot be computed. 1 pairs have no token after .* remove"):
        bounds("reward=pcrm_length", rows=[pair([5, EOS], [5, EOS])])


def test_an_encoder_is_known_by_its_files_and_sft_is_never_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert priors.encoder_identity("bert-base-uncased") == "bert-base-uncased"
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "config.json").write_text("{}")
    assert priors.encoder_identity("sft") == "sft"
    (tmp_path / "enc").mkdir()
    (tmp_path / "enc" / "config.json").write_text("{}")
    before = priors.encoder_identity("enc")
    assert before != "enc"
    assert priors.encoder_identity("enc") == before
    (tmp_path / "enc" / "config.json").write_text('{"hidden_size": 8}')
    assert priors.encoder_identity("enc") != before


def test_only_encoders_that_may_change_are_part_of_a_run_s_identity() -> None:
    assert priors.encoders(load_config("align", ["reward=pcrm_cosine"])) == {}
    cfg = load_config("align", ["reward=pcrm_cosine", "reward.encoder=enc", "algo=dpo", "algo/constraint=cosine"])
    assert priors.encoders(cfg) == {"reward.encoder": "enc"}
