"""PyTorch operators of this project: one call in eager mode, one node in a graph of torch.compile.

`torch.library.custom_op` would do, but its first eager call imports torch._dynamo and sympy, which
takes 140 MiB and seconds. Here an operator is defined by its schema, and a first call costs what it
computes.

An operator takes tensors and one string. The string holds all that is fixed in a run. Numbers that
a schedule may change come as one float64 tensor on the CPU (see `scalars`).
"""

from collections.abc import Callable
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
        name = schema.partition("(")[0]
        self.qualified_name = f"{NAMESPACE}::{name}"
        LIBRARY.define(schema, tags=READS_VALUES)
        LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(self.qualified_name, fake, lib=LIBRARY)
        self._call = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *args: Any) -> list[Tensor]:
        return self._call(*args)

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

    def first_derivatives_only(self) -> None:
        """Of an operator that is itself a gradient: its own derivative raises."""
        self.differentiable(None, _refuse_second_derivative)


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
