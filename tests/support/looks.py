"""Whether the ops may look at values, as in a CUDA graph's capture they may not."""

import sys


def patch_looks(monkeypatch, sees) -> None:
    """sees(x) answers for `treg.ops.head.selection.sees_values`, wherever that is used."""
    for name, module in list(sys.modules.items()):
        if name.startswith("treg.ops") and hasattr(module, "sees_values"):
            monkeypatch.setattr(module, "sees_values", sees)
