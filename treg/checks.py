"""What the public functions accept. Every message names the argument, what was expected and what
came.

Values are checked on CPU tensors always, on a GPU under `treg.set_debug(True)`; shapes, dtypes and
devices always. What torch.compile traces has no values: there the operators check when the graph
runs.
"""

import math
from collections.abc import Collection
from itertools import pairwise
from numbers import Real

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

_debug = False  # one switch for the process

HEAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOATS = (*HEAD_DTYPES, torch.float64)
OUTPUTS = ("lse", "entropy", "mean_logit", "is_top1", "log_sum_sq_probs")


def set_debug(enabled: bool) -> None:
    """Turn value checks of GPU tensors on or off (off at start).

    Checks of values (a target outside the vocabulary, NaN in token_rewards, a sequence without a
    scored token, ...) are always made on CPU tensors. On a GPU each one waits for the device, so
    they are made only after `set_debug(True)`. Checks of shapes, dtypes and devices are always
    made.
    """
    global _debug
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled: expected a bool, got {type(enabled).__name__}")
    _debug = enabled


def is_debug() -> bool:
    """Whether value checks of GPU tensors are on."""
    return _debug


def check_tensor(name: str, x, *, optional: bool = False) -> None:
    """A dense tensor with values."""
    if optional and x is None:
        return
    if not isinstance(x, Tensor):
        or_none = " or None" if optional else ""
        raise TypeError(f"{name}: expected a torch.Tensor{or_none}, got {type(x).__name__}")
    if hasattr(x, "full_tensor"):
        raise ValueError(
            f"{name}: expected a plain tensor, got a DTensor; pass {name}.full_tensor()"
        )
    if x.layout != torch.strided or x.is_nested:
        nested = " (nested)" if x.is_nested else ""
        raise ValueError(f"{name}: expected a dense tensor, got layout {x.layout}{nested}")
    if x.is_meta:
        raise ValueError(f"{name}: expected a tensor with values, got one on the meta device")


def check_transforms(**tensors: Tensor | None) -> None:
    """Operators know first derivatives by backward alone: anything else would be silently wrong.

    Under torch.compile nothing is checked: a graph that holds an operator refuses by itself.
    """
    if torch.compiler.is_compiling():
        return
    for name, x in tensors.items():
        if x is None:
            continue
        if is_functorch_wrapped_tensor(x):
            raise RuntimeError(
                f"{name}: expected a plain tensor, got one inside a transform of torch.func (grad, "
                "vmap, jvp, ...), which is not implemented; use torch.autograd.grad or "
                "loss.backward()"
            )
        if forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                f"{name}: expected a tensor without a tangent, got a dual tensor of forward-mode "
                "differentiation, which is not implemented; use torch.autograd.grad or "
                "loss.backward()"
            )


def check_number(name: str, x, *, positive: bool = False, optional: bool = False) -> None:
    """A finite real number. Not for one that may be an input of a graph that is being traced."""
    if optional and x is None:
        return
    if type(x) is float and math.isfinite(x) and (x > 0 or not positive):  # the others take longer
        return
    try:
        good = (
            isinstance(x, Real)
            and not isinstance(x, bool)
            and math.isfinite(float(x))
            and not (positive and x <= 0)
        )
    except OverflowError:
        good = False
    if not good:
        kind = "a finite number > 0" if positive else "a finite number"
        raise ValueError(
            f"{name}: expected {kind}{' or None' if optional else ''}, got {repr(x)[:60]}"
        )


def check_not_negative(name: str, x, *, optional: bool = False) -> None:
    """A finite real number >= 0."""
    check_number(name, x, optional=optional)
    if x is not None and x < 0:
        raise ValueError(f"{name}: expected a number >= 0, got {x!r}")


def check_fraction(name: str, x) -> None:
    """A finite real number in [0, 1]."""
    check_number(name, x)
    if not 0 <= x <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {x!r}")


def check_count(name: str, x) -> None:
    """A whole number >= 1."""
    if isinstance(x, bool) or not isinstance(x, int) or x < 1:
        raise ValueError(f"{name}: expected a whole number >= 1, got {x!r}")


def check_shape(name: str, x: Tensor, shape, why: str) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {list(shape)} ({why}), got {list(x.shape)}")


def check_device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(
            f"{name}: expected a tensor on {like.device}, as the others are, got one on {x.device}"
        )


def check_mask(mask: Tensor, like: Tensor) -> None:
    """One bool a token."""
    check_shape("mask", mask, like.shape, "one per token")
    check_device("mask", mask, like)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: expected torch.bool, got {mask.dtype}")


def check_floating(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise ValueError(
            f"{name}: expected a floating-point tensor of 16, 32 or 64 bits, got {x.dtype}"
        )


def values_visible(x: Tensor) -> bool:
    """Whether the values of a tensor may be looked at here: free on a CPU, and impossible where a
    graph is traced.
    """
    return (x.device.type == "cpu" or is_debug()) and not torch.compiler.is_compiling()


def check_finite(name: str, x: Tensor, scored: Tensor | None = None) -> None:
    if not values_visible(x):
        return
    bad = ~torch.isfinite(x)
    if scored is not None:
        bad &= scored
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        got = f"{x[tuple(at)].item()} at index {at} ({int(bad.sum())} in all)"
        raise ValueError(f"{name}: expected finite values, got {got}")


def check_memory_budget(memory_budget) -> None:
    """A number of bytes, "least" or None."""
    if memory_budget is None or memory_budget == "least":
        return
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int) or memory_budget <= 0:
        raise ValueError(
            "memory_budget: expected a number of bytes > 0 (int), 'least' or None, got "
            f"{memory_budget!r}"
        )


def check_outputs(outputs) -> tuple[str, ...]:
    if isinstance(outputs, tuple) and not outputs:
        return ()
    if (
        isinstance(outputs, str)
        or not isinstance(outputs, Collection)
        or any(n not in OUTPUTS for n in outputs)
    ):
        raise ValueError(
            f"outputs: expected a tuple of names among {list(OUTPUTS)}, got {outputs!r}"
        )
    return tuple(n for n in OUTPUTS if n in outputs)


def resolve_impl(impl, hidden) -> str:
    """'triton' or 'torch'; None chooses by hidden's device, a name never falls back."""
    if impl not in (None, "torch", "triton"):
        raise ValueError(f"impl: expected None, 'torch' or 'triton', got {impl!r}")
    check_tensor("hidden", hidden)
    if impl is None:
        return "triton" if hidden.is_cuda else "torch"
    if impl == "triton" and not hidden.is_cuda:
        try:
            from treg_kernels.configs import INTERPRET
        except ImportError as error:
            raise ValueError(
                "impl: expected 'torch' where Triton is not installed, got 'triton'"
            ) from error
        if not INTERPRET:
            raise ValueError(
                f"impl: expected 'torch' for tensors on {hidden.device} ('triton' needs a GPU, or "
                "its interpreter), got 'triton'"
            )
    return impl


def check_sequences(name: str, x: Tensor, ndim: int, cu_seqlens) -> int:
    """Layout of sequences in x: ndim dimensions [2B, T, ...], or one less, [N, ...], with
    cu_seqlens. Returns 2B.
    """
    check_tensor("cu_seqlens", cu_seqlens, optional=True)
    tail = ", D" if ndim == 3 else ""
    if cu_seqlens is None:
        if x.ndim != ndim:
            raise ValueError(
                f"{name}: expected [2B, T{tail}], or [N{tail}] with cu_seqlens, got "
                f"{list(x.shape)} without"
            )
        count = x.shape[0]
    else:
        if x.ndim != ndim - 1:
            raise ValueError(f"{name}: expected [N{tail}] beside cu_seqlens, got {list(x.shape)}")
        if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1:
            raise ValueError(
                f"cu_seqlens: expected [2B+1] int32, got {list(cu_seqlens.shape)} "
                f"{cu_seqlens.dtype}"
            )
        if cu_seqlens.device.type != "cpu":
            check_device("cu_seqlens", cu_seqlens, x)
        count = cu_seqlens.shape[0] - 1
        if values_visible(cu_seqlens) and count >= 0:
            check_ends(cu_seqlens.tolist(), name, x.shape[0])
    if count < 2 or count % 2:
        argument = name if cu_seqlens is None else "cu_seqlens"
        raise ValueError(
            f"{argument}: expected an even number >= 2 of sequences (chosen, then rejected), got "
            f"{max(count, 0)}"
        )
    return count


def check_ends(ends: list[int], name: str, N: int) -> None:
    """Values of cu_seqlens for the N rows of an argument."""
    if ends[0] != 0:
        raise ValueError(f"cu_seqlens: expected to start at 0, got {ends[0]}")
    if any(a > b for a, b in pairwise(ends)):
        raise ValueError(f"cu_seqlens: expected not to decrease, got {ends}")
    if ends[-1] != N:
        raise ValueError(f"cu_seqlens: expected to end at N={N} (rows of {name}), got {ends[-1]}")


def check_pair_inputs(
    like: Tensor,
    scored: Tensor | None,
    token_rewards,
    ref_logps,
    token_weights,
    count: int,
    alpha: float,
    kl=None,
    kl_weights=None,
) -> None:
    """Per-token inputs have like's shape, ref_logps may be [2B]; values matter where scored (None:
    everywhere).
    """
    check_tensor("token_rewards", token_rewards, optional=alpha == 0)
    per_token = (
        ("token_rewards", token_rewards),
        ("token_weights", token_weights),
        ("kl", kl),
        ("kl_weights", kl_weights),
    )
    for name, x in per_token:
        if x is not None:
            check_tensor(name, x)
            check_shape(name, x, like.shape, "one per token")
            check_floating(name, x)
            check_device(name, x, like)
            check_finite(name, x, scored)
    for name, x in (("token_weights", token_weights), ("kl_weights", kl_weights)):
        if x is None or not values_visible(x):
            continue
        bad = x < 0 if scored is None else (x < 0) & scored
        if bool(bad.any()):
            raise ValueError(f"{name}: expected values >= 0, got {x[bad].min().item()}")
    check_tensor("ref_logps", ref_logps, optional=True)
    if ref_logps is not None:
        if tuple(ref_logps.shape) not in ((count,), tuple(like.shape)):
            raise ValueError(
                f"ref_logps: expected [{count}] sums, or {list(like.shape)} per token, got "
                f"{list(ref_logps.shape)}"
            )
        check_floating("ref_logps", ref_logps)
        check_device("ref_logps", ref_logps, like)
        check_finite("ref_logps", ref_logps, scored if ref_logps.shape == like.shape else None)


def check_lengths(name: str, lengths: list[int]) -> None:
    """Every sequence has a scored token; lengths in scored tokens."""
    for s, length in enumerate(lengths):
        if length == 0:
            raise ValueError(
                f"{name}: expected a scored token in every sequence, got none in sequence {s} of "
                f"{len(lengths)}"
            )
