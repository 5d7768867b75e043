"""One module per reward-model loss: its config schema, its pure mathematics, its record.

`get(name)` imports rlhf_cli.rewards.<name>, or that of the name's first word (the pcrm_* share one module); a user's
own directory joins the search path (config/compose.py), so a new loss is one yaml and one module.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import cast

from rlhf_cli.rewards.base import RewardLoss


def get(name: str) -> RewardLoss:
    """Return the record of the reward-model loss called `name`.

    Raises:
        ModuleNotFoundError: no module of that name, nor of its first word.
    """
    own = find_spec(f"{__name__}.{name}") is not None
    return cast(RewardLoss, import_module(f"{__name__}.{name if own else name.partition('_')[0]}").LOSS)
