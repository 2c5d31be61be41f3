"""Sources of token rewards, one file each. A source gives every token of a response a number.

The names are loaded when they are asked for: the sources need torch and transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from treg.rewards.names import DEFAULT_SOURCE, nearest

if TYPE_CHECKING:
    from treg.rewards.base import Context, NoReference, TokenRewardSource
    from treg.rewards.contrastive import (
        ContrastiveOptions,
        ContrastivePrompts,
        ContrastiveSource,
        contrastive_rewards,
    )
    from treg.rewards.registry import (
        SOURCES,
        columns_read,
        load_source,
        make_options,
        options_say,
        source_class,
        streams_given,
    )
    from treg.rewards.response import Response

__all__ = [
    "DEFAULT_SOURCE",
    "SOURCES",
    "Context",
    "ContrastiveOptions",
    "ContrastivePrompts",
    "ContrastiveSource",
    "NoReference",
    "Response",
    "TokenRewardSource",
    "columns_read",
    "contrastive_rewards",
    "load_source",
    "make_options",
    "nearest",
    "options_say",
    "source_class",
    "streams_given",
]

_LOADED_LATER = {
    "base": ("Context", "NoReference", "TokenRewardSource"),
    "response": ("Response",),
    "contrastive": (
        "ContrastiveOptions",
        "ContrastivePrompts",
        "ContrastiveSource",
        "contrastive_rewards",
    ),
    "registry": (
        "SOURCES",
        "columns_read",
        "load_source",
        "make_options",
        "options_say",
        "source_class",
        "streams_given",
    ),
}


def __getattr__(name: str) -> Any:
    for module, names in _LOADED_LATER.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
