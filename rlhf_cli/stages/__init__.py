"""One file per command, each a short story; stages meet only in the store (provide.py)."""

from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from types import ModuleType


def imported(name: str) -> ModuleType:
    """Return a module of this package, without what libraries print as they are imported: output is for answers."""
    with redirect_stdout(StringIO()):
        return import_module(f"{__name__}.{name}")
