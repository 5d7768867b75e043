"""What the objective itself asks for at each alpha: where conditional PM's closed-form optimum lies.

    python benchmarks/alpha.py [store folder]        # default runs/store; trains SFT policy and reward model if missing

Nothing is aligned: the optimum on the answer set is exact, its mass off the set is estimated (optimum/offset_bound).
Writes benchmarks/results/alpha.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rlhf_cli.config import compose
from rlhf_cli.measure.offset import offset_bound
from rlhf_cli.metrics.preference import total_variation
from rlhf_cli.stages import provide
from rlhf_cli.stages.workspace import prepare

ALPHAS = [0.0003, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0]
RESULT = Path(__file__).parent / "results" / "alpha.md"


def row(cfg: Any, sft: Path, rm: Path) -> str:
    """Return the markdown row of one alpha."""
    work = prepare(cfg, sft, rm)
    exact = work.exact
    assert exact is not None
    assert exact.optimum is not None
    gaps = total_variation(exact.target, exact.optimum, exact.enumeration.mask)[exact.trained]
    bound = offset_bound(exact, work.sampled)
    off, low, high = (bound[f"optimum/offset_bound{end}"] for end in ("", "/lo", "/hi"))
    return f"| {cfg.algo.alpha:g} | {gaps.mean():.3f} | {gaps.max():.3f} | {off:.3f} ({low:.3f} to {high:.3f}) |"


def main() -> None:
    """Read the optimum at every alpha, print and write the table."""
    store = sys.argv[1] if len(sys.argv) > 1 else "runs/store"
    common = [f"store_dir={store}", "tracker=none", "algo=pm"]
    configs: list[Any] = [compose.load("align", [*common, f"algo.alpha={alpha}"], None) for alpha in ALPHAS]
    sft, rm = provide.sft_policy(configs[0]), provide.reward_model(configs[0])
    lines = ["| α | TV(π*, q) | worst question | mass of π* off the set (95 % interval) |", "|---|---|---|---|"]
    lines += [row(cfg, sft, rm) for cfg in configs]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
