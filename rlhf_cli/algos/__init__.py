"""One module per algorithm: its config schema, its pure mathematics, its record.

`get(name)` imports rlhf_cli.algos.<name>; a user's own directory joins the search path (config/compose.py), so a new
algorithm is one yaml and one module.
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

from rlhf_cli.algos.base import Algorithm


def get(name: str) -> Algorithm:
    """Return the record of the algorithm called `name`.

    Raises:
        ModuleNotFoundError: no module of that name.
    """
    return cast(Algorithm, import_module(f"{__name__}.{name}").ALGORITHM)
