"""Triton's interpreter stands in for a GPU where there is none; the choice must precede the first
import of Triton.
"""

import gc
import os
from pathlib import Path

import torch

# tensors of a few thousand elements: more threads cost more than they give
torch.set_num_threads(1)
GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import pairs  # noqa: E402
import poison  # noqa: E402
import pytest  # noqa: E402
import slow  # noqa: E402

if not GPU:
    import interpreter_bf16

    interpreter_bf16.install()


@pytest.fixture(scope="module", autouse=True)
def _long_lived():
    """What modules and libraries hold is not looked at again by the collector of garbage: it would
    take half a second each time, at the end of every training and of many other tests.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody has written yet is poisoned, so that a result which was never written, or
    was read too early, is seen.
    """
    poison.install(monkeypatch)


# Tests of code that allocates its own results.
POISONED = tuple(Path(__file__).parent / name for name in ("ops", "losses", "kernels"))


@pytest.fixture(autouse=True)
def _poisoned_by_default(request):
    """In these folders every test runs with poisoned memory, unless it is marked `unpoisoned`."""
    inside = any(request.path.is_relative_to(folder) for folder in POISONED)
    if inside and request.node.get_closest_marker("unpoisoned") is None:
        request.getfixturevalue("poisoned")


@pytest.fixture
def open_operators(monkeypatch):
    """The project's operators as plain autograd functions: dispatch modes, which count, see what
    happens inside.
    """
    from treg.operators import Operator, scalars

    def opened(op, *args):
        if op.save is None:  # a gradient's operator has no gradient, and saves nothing
            return op.implementation(*args)

        class Opened(torch.autograd.Function):
            @staticmethod
            def forward(*inputs):
                return tuple(op.implementation(*inputs))

            @staticmethod
            def setup_context(ctx, inputs, output):
                saved = [scalars(*x) if isinstance(x, tuple) else x for x in inputs]
                op.save(ctx, saved, list(output))

            @staticmethod
            def backward(ctx, *grads):
                return op.backward(ctx, list(grads))

        return list(Opened.apply(*args))

    monkeypatch.setattr(Operator, "__call__", opened)


def pytest_ignore_collect(collection_path, config):
    """What `-m "not slow"` leaves out as a whole need not be imported."""
    if "not slow" in config.option.markexpr and slow.is_slow_file(collection_path):
        return True
    return None


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config, items):
    if not GPU:
        left_out = set(pairs.left_out(items))
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        if slow.is_slow(item):
            item.add_marker(pytest.mark.slow)
        if not GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
