"""`trainer.sft.max_steps=0`: a model that is an SFT policy already is taken as it is, and the rest starts from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_jobs import SMALL, gap, read_json, weights, write_lines

from rlhf_cli import jobs

PLAIN = [item for item in SMALL if not item.startswith(("model.", "trainer.sft."))]
AS_IT_IS = ["trainer=text", "trainer.sft.max_steps=0", "trainer.sft.epochs=null"]


@pytest.mark.usefixtures("no_figures")
def test_a_model_that_is_an_sft_policy_is_taken_as_it_is(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i} + 1?", "chosen": f"It is {i + 1}.", "rejected": "No idea."} for i in range(60)]
    data = ["dataset=preferences", f"dataset.path='{write_lines(tmp_path / 'rows.jsonl', rows)}'"]
    data += ["dataset.max_prompt_tokens=40", "dataset.max_completion_tokens=12"]
    data += ["dataset.eval_prompts=4", "dataset.eval_samples=2", "trainer.sft.batch_size=8"]
    first = [*SMALL, *data, f"run_dir='{tmp_path / 'first'}'", f"store_dir='{tmp_path / 'one'}'"]
    given = jobs.run_one("train-sft", first, None) / "model"

    store = tmp_path / "two"
    places = [f"run_dir='{tmp_path / 'dpo'}'", f"store_dir='{store}'", f"model.path='{given}'"]
    small = ["trainer.rm.batch_size=8", "trainer.pairwise.batch_size=8"]
    asked = ["model=pretrained", *data, *AS_IT_IS, *PLAIN, *small, *places, "algo=dpo", "tracker=none"]
    run = jobs.run_one("align", asked, None)

    (sft,) = (folder for folder in (store / "sft").iterdir() if (folder / "model").is_dir())
    assert gap(weights(sft / "model"), weights(given)) == 0
    assert "sft/loss" not in read_json(sft / "metrics.json")
    assert gap(weights(run / "model"), weights(given)) > 0
