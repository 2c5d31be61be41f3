"""treg: the loss head of token-level preference optimization.

Importing this package imports nothing else: torch comes with the first public name that is used,
and Triton with the first call that needs it.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from treg.checks import is_debug, set_debug
    from treg.ops import fused_treg_loss, linear_logprobs

__all__ = ["fused_treg_loss", "is_debug", "linear_logprobs", "set_debug"]
__version__ = "0.1.0"

# modules that have moved are found under their old names for one release
__path__ = [*__path__, f"{__path__[0]}/old_names"]

# public name -> its module
_HOMES = {
    "fused_treg_loss": "treg.ops",
    "linear_logprobs": "treg.ops",
    "is_debug": "treg.checks",
    "set_debug": "treg.checks",
}
# `import treg` alone is enough for treg.ops.linear_logprobs and the like
_MODULES = ("checks", "losses", "operators", "ops", "results")


def __getattr__(name: str) -> object:
    """A public name or a module, imported when it is first asked for."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
