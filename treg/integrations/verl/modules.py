"""verl's modules, imported when they are patched or asked for."""

import importlib
import sys
from typing import Any


def imported(name: str) -> Any:
    """A module of verl.

    Raises:
        ImportError: verl is not installed, or has no such module.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"verl: expected verl >= 0.9 with {name}: {error}") from error


def version() -> str:
    """verl's version, for errors."""
    return getattr(sys.modules.get("verl"), "__version__", "unknown")


def replaced_everywhere(name: str, original: Any, new: Any) -> None:
    """Put `new` in the place of `original`, in every module of verl that has it as `name`."""
    for key, found in list(sys.modules.items()):
        if key.startswith("verl.") and vars(found).get(name) is original:
            vars(found)[name] = new
