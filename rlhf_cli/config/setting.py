"""A field of a structured config: its range, and whether it can change a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any

from omegaconf import MISSING


def setting(
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    choices: Sequence[str] | None = None,
    identity: bool = True,
    reading: bool = False,
) -> Any:
    """Return a dataclass field without a value, with the range its value must lie in.

    Args:
        gt, ge, lt, le: bounds (exclusive, inclusive, exclusive, inclusive); null is never compared.
        choices: the allowed strings.
        identity: False keeps the key out of the content hash by which finished stages are re-used
            (logging, places, hardware: what cannot change the result).
        reading: True says that the key changes how a trained model is read, not how it is trained.
    """
    bounds = {"gt": gt, "ge": ge, "lt": lt, "le": le}
    metadata: dict[str, Any] = {name: bound for name, bound in bounds.items() if bound is not None}
    if choices is not None:
        metadata["choices"] = tuple(choices)
    if not identity:
        metadata["identity"] = False
    if reading:
        metadata["reading"] = True
    return field(default=MISSING, metadata=metadata)
