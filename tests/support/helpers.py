"""Inputs and the error budget shared by the tests."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

# each implementation where it is tested: Triton on a real GPU, else in its interpreter, with the
# same budgets
IMPLS = [
    pytest.param("torch", id="torch"),
    pytest.param(
        "triton",
        id="triton-gpu" if GPU else "triton-interpreter",
        marks=pytest.mark.gpu if GPU else pytest.mark.interp,
    ),
]
# the same where minutes in the interpreter would say little: there it is left out
QUICK_IMPLS = [x for x in IMPLS if GPU or x.values[0] == "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


def device_of(impl: str) -> str:
    """The torch implementation is tested where users without a GPU run it."""
    return DEVICE if impl == "triton" else "cpu"


def error(actual: Tensor, exact: Tensor) -> float:
    """Relative error in the 2-norm, against float64."""
    assert actual.shape == exact.shape, f"shape {list(actual.shape)}, expected {list(exact.shape)}"
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    assert torch.isfinite(actual).all(), "not finite"
    if exact.numel() == 0:
        return 0.0
    return ((actual - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def assert_within_budget(
    name: str, actual: Tensor, exact: Tensor, plain: float, dtype: torch.dtype
) -> None:
    """|actual - exact| <= 2 * (plain PyTorch's own error at this dtype + one rounding of the
    dtype).

    plain: `error` of the same computation in plain PyTorch, at best over several runs
    (`plain_error`).
    """
    found, allowed = error(actual, exact), 2 * (plain + EPS[dtype])
    assert found <= allowed, (
        f"{name}: relative error {found:.2e} > {allowed:.2e} = 2 * ({plain:.2e} + {EPS[dtype]:.2e})"
    )


@dataclasses.dataclass
class Case:
    """One call: tensors by name, those that take a gradient first."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    rest: dict  # everything else, passed as it is

    def at(self, dtype: torch.dtype, device: str = "cpu", order: Tensor | None = None) -> "Case":
        """The same numbers in another dtype, as leaves; order permutes the vocabulary (targets
        follow).
        """

        def leaf(x):
            if x is None:
                return None
            x = x if order is None or x is self.hidden else x[order]
            return x.detach().to(device=device, dtype=dtype).clone().requires_grad_()

        rest = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.rest.items()}
        if order is not None and "target" in rest:
            target = rest["target"]
            inverse = order.argsort().to(target.device)
            rest["target"] = torch.where(target < 0, target, inverse[target.clamp(min=0)])
        return Case(leaf(self.hidden), leaf(self.weight), leaf(self.bias), rest)

    def run(self, fn: Callable, upstream: Callable, **more) -> dict[str, Tensor]:
        """fn's outputs and the gradients of upstream(output), by name."""
        kwargs = {**self.rest, **more}
        if self.bias is not None:
            kwargs["bias"] = self.bias
        out = fn(self.hidden, self.weight, **kwargs)
        found = {k: v.detach() for k, v in out._asdict().items() if v is not None}
        leaves = {"dhidden": self.hidden, "dweight": self.weight, "dbias": self.bias}
        leaves = {k: v for k, v in leaves.items() if v is not None and v.requires_grad}
        grads = torch.autograd.grad(upstream(out), list(leaves.values()), allow_unused=True)
        found.update(
            {
                k: torch.zeros_like(leaves[k]) if g is None else g
                for k, g in zip(leaves, grads, strict=True)
            }
        )
        return found


def check_against_reference(
    case: Case,
    fn: Callable,
    reference: Callable,
    upstream: Callable,
    dtype: torch.dtype,
    device: str,
    plain_runs: int = 3,
    **options,
) -> dict[str, Tensor]:
    """Every output and gradient of fn within twice plain PyTorch's error, worst of several
    vocabulary orders.

    The reference in dtype is run on permuted vocabularies, which changes nothing but the order of
    its roundings: one run's error can be small by luck, in a scalar above all. And what a float32
    rounding of hidden and weight does to the exact result counts as rounding: it is what an
    ill-conditioned output (a difference of sigmoids) amplifies.
    """
    case = case.at(dtype)  # the numbers as this dtype holds them
    exact = case.at(torch.float64).run(reference, upstream)
    plain = dict.fromkeys(exact, 0.0)
    V = case.weight.shape[0]
    for i in range(plain_runs):
        order = torch.arange(V) if i == 0 else torch.randperm(V)
        found = case.at(dtype, order=order).run(reference, upstream)
        for name in ("dweight", "dbias"):
            if name in found:
                found[name] = found[name][order.argsort()]
        for name, x in found.items():
            if x.dtype != torch.bool:
                plain[name] = max(plain[name], error(x, exact[name]))
    for _ in range(2):
        rounded = case.at(torch.float64)
        for leaf in (rounded.hidden, rounded.weight):
            leaf.data *= 1 + EPS[torch.float32] * (torch.rand_like(leaf) - 0.5)
        for name, x in rounded.run(reference, upstream).items():
            if x.dtype != torch.bool:
                plain[name] = max(plain[name], error(x, exact[name]))
    actual = case.at(dtype, device).run(fn, upstream, **options)
    assert actual.keys() == exact.keys()
    for name, x in actual.items():
        if x.dtype == torch.bool:
            assert torch.equal(x.cpu(), exact[name]), name
        else:
            kind = dtype if name.startswith("d") else torch.float32
            assert_within_budget(name, x, exact[name], plain[name], kind)
    return actual
