"""A thin trainer over transformers' own loop. The names are loaded when they are asked for."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from treg.trainer.config import TRegConfig
    from treg.trainer.trainer import TRegTrainer

__all__ = ["TRegConfig", "TRegTrainer"]

_LOADED_LATER = {"TRegConfig": "config", "TRegTrainer": "trainer"}


def __getattr__(name: str) -> Any:
    if name not in _LOADED_LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LOADED_LATER[name]}"), name)
