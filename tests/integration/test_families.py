"""Three kinds of pretrained models through the commands; `make models-test` takes every family through every stage."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_checks import Family

CASES = {
    "opt-350m": [("full", "SFT"), ("full", "RM"), ("full", "PM rloo")],
    "llama-2": [("lora", "SFT"), ("lora", "DPO")],
    "qwen2.5-instruct": [("lora", "SFT"), ("lora", "RM"), ("shared", "PM gae"), ("shared", "evaluate")],
}


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("name", CASES)
def test_a_family_is_trained_saved_and_read_as_it_should(name: str, tmp_path: Path) -> None:
    family = Family(name, tmp_path / name)
    for mode, stage in CASES[name]:
        found = family.run(mode, stage)
        assert found.failures == [], f"{mode}, {stage}"
