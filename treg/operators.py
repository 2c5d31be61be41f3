"""PyTorch operators of this project: one call in eager mode, one node in a graph of torch.compile.

`torch.library.custom_op` would do, but its first eager call imports torch._dynamo and sympy, which
takes 140 MiB and seconds. Here an operator is defined by its schema, and a first call costs what it
computes.

An operator takes tensors and one string. The string holds all that is fixed in a run. Numbers that
a schedule may change come as one float64 tensor on the CPU (see `scalars`).

A call has two ways. What traces, counts or transforms operators (torch.compile, modes, subclasses
of tensors, torch.func, profilers) gets the operator, through PyTorch's dispatcher. Otherwise the
same implementation runs in an ordinary autograd function: the dispatcher's way there takes as long
as all kernels of a small batch. Then a tuple of numbers stands for their tensor, and an object with
a method `text` for its string.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "treg"
# It must live as long as the operators.
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

# Operators read values on the host: their numbers, and which rows are scored. Inductor leaves an
# operator with this tag out of the CUDA graphs that it captures, which would replay old values.
READS_VALUES = (torch.Tag.cudagraph_unsafe,)


class Operator:
    """An operator of the namespace `treg`, called like the function that implements it.

    Args:
        schema: name, arguments and results as `torch.library.Library.define` takes them. Results
            are a list of tensors, `Tensor[]`, whose names the caller knows.
        implementation: the function itself; eager, on any device.
        fake: the same results from shapes alone, not filled; for torch.compile.
    """

    def __init__(
        self,
        schema: str,
        implementation: Callable[..., list[Tensor]],
        fake: Callable[..., list[Tensor]],
    ):
        self.implementation = implementation
        self.save: Callable[..., None] | None = None
        self.backward: Callable[..., Any] | None = None
        self._apply: Callable[..., tuple[Tensor, ...]] | None = None
        name = schema.partition("(")[0]
        self.qualified_name = f"{NAMESPACE}::{name}"
        LIBRARY.define(schema, tags=READS_VALUES)
        LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(self.qualified_name, fake, lib=LIBRARY)
        self._call = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *args: Any) -> list[Tensor]:
        if not _plain(args):
            return self._call(*(_packed(x) for x in args))
        if torch.is_grad_enabled():
            if self.save is None:  # a second derivative, which the operator refuses
                return self._call(*(_packed(x) for x in args))
            if any(type(x) in PLAIN and x.requires_grad for x in args):
                assert self._apply is not None
                return list(self._apply(*args))
        # as the dispatcher does it: results are no views, and nothing is recorded
        with torch._C._AutoDispatchBelowAutograd():
            return self.implementation(*args)

    def differentiable(
        self, save: Callable[..., None] | None, backward: Callable[..., Any]
    ) -> None:
        """Register save(ctx, inputs, output), run after the forward, and backward(ctx, grads).

        grads: one entry a result, None for a result without a gradient.
        """
        self.save, self.backward = save, backward
        torch.library.register_autograd(
            self.qualified_name, backward, setup_context=save, lib=LIBRARY
        )
        if save is not None:
            name = self.qualified_name.partition("::")[2]
            function = _function_of(name, self.implementation, save, backward)
            # What Function.apply does beside is for transforms, under which `_plain` is False, and
            # costs as much as two operations of PyTorch.
            plain: Any = super(torch.autograd.Function, function)
            self._apply = plain.apply

    def first_derivatives_only(self) -> None:
        """Of an operator that is itself a gradient: its own derivative raises."""
        self.differentiable(None, _refuse_second_derivative)


def _function_of(
    name: str, implementation: Callable, save: Callable, backward: Callable
) -> type[torch.autograd.Function]:
    """The autograd function of an operator, whose backward is called `name`Backward.

    It saves what the operator saves: a forward that is computed again, for a checkpoint, may go the
    other way.
    """

    def run(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            found = implementation(*args)
        save(ctx, [_tensor_of(x) if isinstance(x, tuple) else x for x in args], found)
        return tuple(found)

    def differentiate(ctx: Any, *grads: Tensor | None) -> Any:
        return backward(ctx, grads)

    methods = {"forward": staticmethod(run), "backward": staticmethod(differentiate)}
    return type(name, (torch.autograd.Function,), methods)


PLAIN = (Tensor, torch.nn.Parameter)


def _plain(args: Iterable[Any]) -> bool:
    """Whether nothing asks for the operator itself."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or torch.autograd.profiler._is_profiler_enabled
    ):
        return False
    return _plain_tensors(args)


def _plain_tensors(args: Iterable[Any]) -> bool:
    """Whether the tensors among these, and in their lists, are of no subclass, and their memory
    holds their numbers.
    """
    for x in args:
        if type(x) in PLAIN:
            if x.is_neg():
                return False
        elif isinstance(x, Tensor) or (isinstance(x, list) and not _plain_tensors(x)):
            return False
    return True


def _packed(x: Any) -> Any:
    """An argument as the schema has it."""
    if isinstance(x, tuple):
        return scalars(*x)
    return x.text() if hasattr(x, "text") else x


def values_of(numbers: Tensor | Sequence[float]) -> tuple[float, ...]:
    """Numbers as an implementation gets them, a tuple or their tensor."""
    return tuple(map(float, numbers.tolist() if isinstance(numbers, Tensor) else numbers))


@functools.lru_cache(maxsize=64)
def _tensor_of(values: tuple[float, ...]) -> Tensor:
    """`scalars` of numbers that a run seldom changes, for a backward, which only reads them."""
    with torch.inference_mode(False):  # what is made in that mode could never be saved
        return scalars(*values)


def scalars(*values: float) -> Tensor:
    """Numbers as one float64 tensor on the CPU, [K].

    Under torch.compile a number that changes from step to step would be a constant of the graph,
    and every new value would compile the graph again. A product with a tensor keeps it an input.
    """
    if not torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * value for value in values])


def _refuse_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "expected first derivatives only: second derivatives, the gradient of a loss's gradient, "
        "are not implemented"
    )
