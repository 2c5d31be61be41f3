"""Triton's interpreter stands in for a GPU where there is none; the choice must precede the first
import of Triton.
"""

import os
import sys

import torch

torch.set_num_threads(
    1
)  # tensors of a few thousand elements: more threads cost more than they give
GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402

if not GPU:
    import interpreter_bf16

    interpreter_bf16.install()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory is NaN (a huge number in integer tensors), so that an unwritten output
    is seen.
    """

    def poison(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            if x.dtype.is_floating_point:
                x.fill_(float("nan"))
            elif x.dtype == torch.bool:
                x.fill_(True)
            return x

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def open_operators(monkeypatch):
    """The project's operators as plain autograd functions: dispatch modes, which count, see what
    happens inside.
    """
    import treg.ops.logprobs
    import treg.ops.pairs
    from treg.operators import Operator

    def opened(implementation, save, backward):
        if save is None:  # a gradient's operator has no gradient, and saves nothing
            return implementation

        class Opened(torch.autograd.Function):
            forward = staticmethod(implementation)
            setup_context = staticmethod(save)

        Opened.backward = staticmethod(backward)
        return Opened.apply

    def opened_operator(op):
        """Its results are a list, which a Function has to take for a tuple."""
        return opened(
            lambda *args: tuple(op.implementation(*args)),
            op.save,
            lambda ctx, *grads: op.backward(ctx, list(grads)),
        )

    # the name treg.losses.treg_loss is that of the function
    pair_loss = sys.modules["treg.losses.treg_loss"]
    for module in (treg.ops.logprobs, treg.ops.pairs, pair_loss):
        for name, op in list(vars(module).items()):
            if isinstance(op, torch.library.CustomOpDef):
                functions = (op._init_fn, op._setup_context_fn, op._backward_fn)
                monkeypatch.setattr(module, name, opened(*functions))
            elif isinstance(op, Operator):
                monkeypatch.setattr(module, name, opened_operator(op))


def pytest_collection_modifyitems(items):
    for item in items:
        if not GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
