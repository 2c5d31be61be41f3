"""Models of a TRL trainer, read by `treg.heads`."""

import contextlib
from collections.abc import Iterator
from typing import Any

import trl.trainer.utils
from torch import nn

from treg.heads import HeadSpec, check_sequences, install_head
from treg.heads.checks import evaluated


def head_of(accelerator: Any, model: Any) -> HeadSpec:
    """The head of a model, which may be wrapped; read and checked at the first time."""
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    new = not hasattr(getattr(bare, "get_base_model", lambda: bare)(), "_treg_head")
    spec = install_head(bare)
    if new:
        check_sequences(spec)
    return spec


@contextlib.contextmanager
def as_reference(accelerator: Any, policy: Any, ref_model: Any) -> Iterator[nn.Module]:
    """The reference model, in eval mode: ref_model, or where that is None the policy without its
    adapter, or with the one that is named "ref".
    """
    model, adapter = ref_model, contextlib.nullcontext()
    if model is None:
        model = accelerator.unwrap_model(policy)
        if hasattr(model, "peft_config"):
            adapter = trl.trainer.utils.use_adapter(
                model, "ref" if "ref" in model.peft_config else None
            )
    with adapter, evaluated(model):
        yield model
