"""Triton's interpreter stands in for a GPU where there is none; the choice must precede the first
import of Triton.
"""

import os

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
    import treg.ops.pair_op
    import treg.ops.pairs

    def opened(op):
        class Opened(torch.autograd.Function):
            forward = staticmethod(op._init_fn)
            setup_context = staticmethod(op._setup_context_fn)
            backward = staticmethod(op._backward_fn)

        # a gradient's operator has no gradient, and saves nothing
        return Opened.apply if op._setup_context_fn else op._init_fn

    for module in (treg.ops.logprobs, treg.ops.pairs, treg.ops.pair_op):
        for name, op in list(vars(module).items()):
            if isinstance(op, torch.library.CustomOpDef):
                monkeypatch.setattr(module, name, opened(op))


def pytest_collection_modifyitems(items):
    for item in items:
        if not GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
