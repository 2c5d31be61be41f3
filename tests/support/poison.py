"""Memory that nobody has written yet holds what no result may hold."""

import pytest
import torch
from torch._dynamo import trace_rules

MAKERS = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
MAKERS += [(torch.Tensor, name) for name in ("new_empty", "new_empty_strided")]


def fill(x: torch.Tensor) -> torch.Tensor:
    """Fill with NaN, the largest integer, or True."""
    if x.dtype.is_floating_point or x.dtype.is_complex:
        x.detach().fill_(float("nan"))
    elif x.dtype == torch.bool:
        x.fill_(True)
    else:
        x.fill_(torch.iinfo(x.dtype).max)
    return x


def install(monkeypatch: pytest.MonkeyPatch):
    """Poison all new memory, until `monkeypatch` is undone."""
    # torch.compile knows PyTorch's functions by a table that it fills once: with the real ones
    trace_rules.get_torch_obj_rule_map()

    def poisoning(make):
        def made(*args, **kwargs):
            return fill(make(*args, **kwargs))

        return made

    for owner, name in MAKERS:
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))
