"""Keeping TRL from making a reference of its own out of a policy's adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft import PeftModel

from rlhf_cli.models.adapters import OWN

TRL_REFERENCE = "ref"  # name of the adapter that TRL adds


@contextmanager
def no_copy(model: Any) -> Iterator[None]:
    """Within it, TRL finds the adapter itself in place of the copy that it makes as reference.

    Ours is the base without any, and of an adapter that is split over ranks there is no such copy.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    find, instance = model.get_parameter, cast(Any, model)
    instance.add_adapter = lambda *_: None
    instance.get_parameter = lambda name: find(name.replace(f".{TRL_REFERENCE}.", f".{OWN}."))
    try:
        yield
    finally:
        del instance.add_adapter, instance.get_parameter
