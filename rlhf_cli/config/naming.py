"""Names of jobs: the folder of a job, and the name and group under which a tracker shows it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from rlhf_cli.config import compose

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

LONGEST_NAME = 120  # W&B takes 128 characters
# Where a job runs and what it tells whom; two sweeps that differ in these alone are one.
PLACES = {"run_dir", "store_dir", "device", "tracker", "launch"}


def swept(job: Sequence[str], overrides: Sequence[str], named: Collection[str]) -> list[Override]:
    """Return the overrides by which a job differs from its siblings, one a key."""
    given = compose.parse(list(overrides))
    common = {item.key_or_group for item in given} - {item.key_or_group for item in given if item.is_sweep_override()}
    common -= set(named)
    kept = [item for item in compose.parse(list(job)) if item.key_or_group not in common]
    return list({item.key_or_group: item for item in kept}.values())


def job_name(job: Sequence[str], overrides: Sequence[str], named: Collection[str] = ()) -> str:
    """Return what tells a job from its siblings, as a folder name: its swept overrides, e.g. `algo=pm,seed=0`.

    Args:
        job: the overrides of this job.
        overrides: those of its whole grid; what stands there with one value is common to all jobs.
        named: keys that are in the name though they have one value in this grid.
    """
    text = ",".join(compose.plain(item) for item in swept(job, overrides, named))
    text = text.replace("algo/constraint=", "algo.constraint=")
    safe = re.sub(r"[^\w.=,+-]", "_", text)
    if safe == text and len(text) <= LONGEST_NAME:
        return text
    return f"{safe[:LONGEST_NAME]}-{sha256(text.encode()).hexdigest()[:8]}"


def run_name(command: str, cfg: Any, shown: Sequence[Override]) -> str:
    """Return a run's name in a tracker, e.g. `pm alpha=0.1 beta=0.5 seed=0 survey tiny`.

    Args:
        command: the stage; it comes first where its runs are not those of an algorithm.
        cfg: the run's config.
        shown: the overrides that tell it from other runs.
    """
    of = {"align": "algo", "evaluate": "algo", "train-rm": "reward"}.get(command)
    first = [] if command == "align" else [command]
    first += [getattr(cfg, of).name] if of else []
    own = {of, "seed", "dataset", "model", compose.SWEEP}
    changed = [item for item in shown if not _is_beside(item.key_or_group, own)]
    changed.sort(key=lambda item: re.split(r"[./]", item.key_or_group)[0] != of)  # its own keys come first
    leaves = [re.split(r"[./]", item.key_or_group)[-1] for item in changed]
    pairs = [
        f"{leaf if leaves.count(leaf) == 1 else item.key_or_group}={_short(item)}"
        for leaf, item in zip(leaves, changed, strict=True)
    ]
    last = [f"seed={cfg.seed}", cfg.dataset.name, cfg.model.name]
    room = LONGEST_NAME - sum(len(part) + 1 for part in (*first, *last))
    while sum(len(part) + 1 for part in pairs) > room:
        pairs.pop()
    return " ".join([*first, *pairs, *last])


def _is_beside(key: str, own: Collection[str | None]) -> bool:
    return key in own or compose.is_hydra(key) or is_place(key)


def _short(item: Override) -> str:
    value = item.value()
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(item.get_value_element_as_str()).strip("'\"").rstrip("/").rpartition("/")[2]


def group_name(command: str, parsed: Sequence[Override]) -> str | None:
    """Return a name for the jobs of a plain multirun: command, what is swept, and a hash of what is common."""
    swept = [item.key_or_group for item in parsed if item.is_sweep_override()]
    if not swept:
        return None
    kept = [item for item in parsed if not (compose.is_hydra(item.key_or_group) or is_place(item.key_or_group))]
    digest = sha256("\n".join(sorted(compose.plain(item) for item in kept)).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.]+", "-", f"{command}-{'-x-'.join(dict.fromkeys(swept))}", flags=re.ASCII)
    return f"{name[: LONGEST_NAME - 9]}-{digest}"


def is_place(key: str) -> bool:
    """Return whether a key says where a run is kept or shown, not what it is."""
    return re.split(r"[./]", key)[0] in PLACES
