"""A new algorithm is one yaml and one module in a directory of the user's own; nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small_jobs import SMALL, SURVEY, gap, read_json, read_lines, weights
from typer.testing import Result

from rlhf_cli.config.catalog import conf_dir

Rlhf = Callable[..., Result]

SOFT_MODULE = '''
"""pm whose likely tokens shade into the others: e_t = log pi_ref * sigmoid(width (log alpha - log pi_ref))."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf_cli.algos.base import Algorithm
from rlhf_cli.config.schema import OnlineAlgoConfig, setting


@dataclass
class Config(OnlineAlgoConfig):
    alpha: float = setting(gt=0, le=1)
    width: float = setting(gt=0)


def _reference(ref_token_logps, cfg):
    return ref_token_logps * (cfg.width * (math.log(cfg.alpha) - ref_token_logps)).sigmoid()


ALGORITHM = Algorithm(name="pm_soft", family="online", effective_reference=_reference)
'''
HINGE_MODULE = '''
"""A pairwise algorithm with a loss of its own (a hinge on the log-ratio difference)."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_cli.algos.base import Algorithm, masked_sum
from rlhf_cli.config.schema import AlgoConfig


@dataclass
class Config(AlgoConfig):
    pass


def _loss(batch, cfg):
    chosen = masked_sum(batch.chosen - batch.ref_chosen, batch.chosen_mask)
    rejected = masked_sum(batch.rejected - batch.ref_rejected, batch.rejected_mask)
    loss = (1 - cfg.beta * (chosen - rejected)).clamp(min=0).mean()
    return {"loss": loss, "margin": (chosen - rejected).mean()}


ALGORITHM = Algorithm(
    name="hinge", family="pairwise", effective_reference=lambda logps, cfg: logps, pair_loss=_loss, has_optimum=False
)
'''


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The user's directory: algo/pm_soft.yaml + algos/pm_soft.py, and the same for hinge."""
    folder = tmp_path / "mine"
    (folder / "algo").mkdir(parents=True)
    (folder / "algos").mkdir()
    soft = (conf_dir() / "algo" / "pm.yaml").read_text().replace("name: pm", "name: pm_soft") + "width: 4.0\n"
    (folder / "algo" / "pm_soft.yaml").write_text(soft)
    (folder / "algos" / "pm_soft.py").write_text(SOFT_MODULE)
    (folder / "algo" / "hinge.yaml").write_text("name: hinge\nbeta: 0.5\n")
    (folder / "algos" / "hinge.py").write_text(HINGE_MODULE)
    return folder


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("name", ["pm_soft", "hinge"])
def test_an_algorithm_of_the_users_own_runs(rlhf: Rlhf, own: Path, store: Path, name: str) -> None:
    common = ["--config-dir", str(own), *SMALL, *SURVEY, f"store_dir={store}"]
    result = rlhf("align", *common, f"algo={name}", "run_dir=run")
    assert result.exit_code == 0, result.output
    metrics = read_json(Path("run/metrics.json"))
    assert 0 <= metrics["pm/tv"] <= 1
    assert ("optimum/tv" in metrics) == (name == "pm_soft")
    assert [line["step"] for line in read_lines(Path("run/training_log.jsonl")) if "loss" in line] == [2, 4]
    assert read_json(Path("run/overrides.json"))["config_dir"] == str(own)
    again = rlhf("evaluate", "policy=run", "run_dir=again")
    assert again.exit_code == 0, again.output
    assert read_json(Path("again/metrics.json"))["pm/tv"] == pytest.approx(metrics["pm/tv"], abs=1e-5)


@pytest.mark.usefixtures("no_figures")
def test_its_settings_count(rlhf: Rlhf, own: Path, store: Path) -> None:
    common = ["align", "--config-dir", str(own), *SMALL, *SURVEY, f"store_dir={store}", "algo=pm_soft"]
    for name, width in (("flat", "0.01"), ("steep", "100")):
        result = rlhf(*common, f"algo.width={width}", f"run_dir={name}")
        assert result.exit_code == 0, result.output
    assert gap(weights(Path("flat/model")), weights(Path("steep/model"))) > 1e-5
    wrong = rlhf(*common, "algo.width=0", "run_dir=wrong")
    assert wrong.exit_code == 2
    assert "algo.width=0.0 (set on the command line) is out of range. It must be > 0" in wrong.stderr


def test_help_and_multirun_know_it(rlhf: Rlhf, own: Path) -> None:
    assert "pm_soft" in rlhf("align", "--config-dir", str(own), "--help").output
    result = rlhf("align", "-m", "--config-dir", str(own), "--cfg", "job", "algo=pm,pm_soft")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("name: pm_soft") == 1
