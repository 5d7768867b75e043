"""Which of several ranks' failures is told: the one that began it, once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.errors import RankError, UserError
from rlhf_cli.launch import failures

USER = {"failure": "user", "said": ["no data", "", ""], "notes": ["run folder: runs/a"]}
BUG = {"failure": "bug", "reason": "KeyError: 1", "text": "Traceback\nKeyError: 1", "notes": []}
LOST = {
    "failure": "bug",
    "reason": "RuntimeError: [gloo]",
    "text": "RuntimeError: Connection closed by peer",
    "notes": [],
}


def settle(
    folder: Path, outcomes: dict[int, Any], exits: dict[int, tuple[int, float]], told: str, machines: int = 1
) -> None:
    """Leave the outcomes of ranks and see what is told."""
    for rank, outcome in outcomes.items():
        (folder / f"rank-{rank}.json").write_text(json.dumps({"time": float(rank), **outcome}))
    found = {rank: failures.Exit(*exit) for rank, exit in exits.items()}
    with pytest.raises((UserError, RankError), match=told):
        failures.settle(folder, found, machines=machines)


def test_the_cause_is_told_and_not_what_follows_from_it(tmp_path: Path) -> None:
    settle(tmp_path, {0: LOST, 1: USER}, {0: (1, 0), 1: (2, 0)}, r"^no data\.\nrun folder: runs/a$")


def test_a_bug_is_told_before_a_connection_that_it_cut(tmp_path: Path) -> None:
    settle(tmp_path, {0: LOST, 1: BUG}, {0: (1, 0), 1: (1, 5)}, "KeyError")


def test_a_killed_rank_is_told_before_those_that_lost_it(tmp_path: Path) -> None:
    settle(tmp_path, {0: LOST}, {0: (1, 0), 1: (-9, 0)}, "rank 1 was killed by SIGKILL")


def test_ranks_that_the_agent_ended_are_not_the_cause(tmp_path: Path) -> None:
    exits = {0: (-9, 31.0), 1: (1, 0.0), 2: (143, 0.0), 3: (-15, 0.0), 4: (-6, 0.0)}
    settle(tmp_path, {1: BUG}, exits, "KeyError")


def test_a_segmentation_fault_is_named(tmp_path: Path) -> None:
    settle(tmp_path, {}, {2: (-11, 0), 0: (-6, 1)}, r"^error: rank 2 was killed by SIGSEGV\. All ranks")


def test_a_failure_on_another_machine_is_told_there(tmp_path: Path) -> None:
    settle(tmp_path, {0: LOST}, {0: (1, 0)}, "on another machine, which tells why", machines=2)


@pytest.mark.parametrize("rank", [0, 8])  # 8: the first of another machine
def test_an_outcome_without_failure_is_the_run_folder(tmp_path: Path, rank: int) -> None:
    (tmp_path / f"rank-{rank}.json").write_text(json.dumps({"time": 0.0, "failure": None, "run_dir": "runs/a"}))
    assert failures.settle(tmp_path, {}, machines=2) == "runs/a"
