"""What a step costs the host: operators by two ways that give the same, one wait for the device at
most, so many launches and operations.
"""

import contextlib
import copy
import re
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from treg import checks, operators
from treg.losses import LossOptions
from treg.ops import fused_treg_loss, linear_kl, linear_logprobs
from treg.ops.call import Call
from treg.ops.entropy import differentiable_entropy
from treg.ops.head import Head, gemm, kl_torch, make_tiles, selection
from treg.ops.head.gradients import GradientSums, Needs

B, T, D, V = 2, 6, 16, 40


def batch(ignored=2, length=T, dtype=torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    target = torch.randint(0, V, (2 * B, length))
    target[:, :ignored] = -100
    return {
        "hidden": torch.randn(2 * B, length, D, dtype=dtype).requires_grad_(),
        "weight": torch.randn(V, D, dtype=dtype).requires_grad_(),
        "bias": torch.randn(V, dtype=dtype).requires_grad_(),
        "target": target,
        "token_rewards": torch.rand(2 * B, length),
        "ref_logps": torch.randn(2 * B) - 20,
    }


def logprobs(hidden, weight, target, bias, **rest):
    found = linear_logprobs(hidden, weight, target, bias=bias, outputs=("lse", "is_top1"))
    return found.logprobs, found


def loss(**given):
    found = fused_treg_loss(**given, outputs=("entropy",))
    return found.loss, found


def loss_of_each(**given):
    found = fused_treg_loss(**given, reduction="none", loss_type="nca_pair", alpha=0)
    return found.loss, found


def loss_of_learned_weights(**given):
    """The objective is an operator of its own."""
    weights = torch.ones_like(given["token_rewards"]).requires_grad_()
    given["ref_logps"] = given["token_rewards"] - 2
    found = fused_treg_loss(**given, token_weights=weights)
    return found.loss, found


def divergence(hidden, weight, target, bias, **rest):
    other = torch.ones(V, D, dtype=weight.dtype) / D
    found = linear_kl(hidden, weight, hidden.detach() + 1, other, target=target, bias=bias)
    assert found.logprobs is not None
    return found.kl + 0.5 * found.logprobs, found


def entropy(hidden, weight, target, bias, **rest):
    rows, flat = hidden.reshape(-1, D), target.reshape(-1)
    found = linear_logprobs(rows, weight, flat, bias=bias, outputs=("entropy",)).entropy
    assert found is not None
    return differentiable_entropy(found, rows, flat, Head(weight, bias)), (found,)


CALLS = {f.__name__: f for f in (logprobs, loss, loss_of_each, loss_of_learned_weights)}
CALLS |= {f.__name__: f for f in (divergence, entropy)}


def by_dispatcher(monkeypatch):
    monkeypatch.setattr(operators, "_plain", lambda args: False)


def both_ways(monkeypatch, run):
    """What `run` gives as an autograd function and through the dispatcher; errors are results
    too.
    """
    found = []
    for way in ("function", "dispatcher"):
        with monkeypatch.context() as patch:
            if way == "dispatcher":
                by_dispatcher(patch)
            try:
                found.append(run())
            except (RuntimeError, ValueError, TypeError) as error:
                # a node has the name of its way
                found.append((type(error), re.sub(r"utput (\d) of \w+", r"utput \1", str(error))))
    return found


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return (
            (a.dtype, a.shape, a.requires_grad, a.is_leaf, a._is_view())
            == (b.dtype, b.shape, b.requires_grad, b.is_leaf, b._is_view())
            and (a.is_inference() or a._version == b._version)
            and torch.equal(a, b)
        )
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def gradients(out, given, **options):
    leaves = [x for x in given.values() if x.requires_grad]
    return torch.autograd.grad(out.sum(), leaves, allow_unused=True, **options)


def plainly(call, given):
    out, found = call(**given)
    return out, tuple(found), gradients(out, given)


def of_a_subset(call, given, needed):
    for name in ("hidden", "weight", "bias"):
        given[name].requires_grad_(name in needed)
    out, found = call(**given)
    return out, tuple(found), gradients(out, given) if needed else ()


def without_gradients(call, given):
    with torch.no_grad():
        return tuple(call(**given)[1])


def in_inference_mode(call, given):
    with torch.inference_mode():
        return tuple(x if x is None else x.clone() for x in call(**given)[1])


def after_a_call_in_inference_mode(call, given):
    """One that asks for gradients cannot save what it needs, and must leave nothing behind."""
    with torch.inference_mode(), torch.enable_grad():
        made = {name: x.clone().requires_grad_(x.requires_grad) for name, x in given.items()}
        with contextlib.suppress(RuntimeError):
            call(**made)
    return plainly(call, given)


def under_autocast(call, given):
    with torch.autocast("cpu", torch.bfloat16):
        out, found = call(**given)
    return out, tuple(found), gradients(out, given)


def twice(call, given):
    out, _ = call(**given)
    kept = gradients(out, given, retain_graph=True)
    return kept, gradients(out, given)


def once_too_often(call, given):
    out, _ = call(**given)
    gradients(out, given)
    return gradients(out, given)


def of_second_order(call, given):
    out, _ = call(**given)
    grads = gradients(out * out, given, create_graph=True)
    return torch.autograd.grad(torch.cat([x.flatten() for x in grads]).sum(), given["hidden"])


def with_changed_inputs(call, given):
    out, _ = call(**given)
    with torch.no_grad():
        given["hidden"].add_(1.0)
    return gradients(out, given)


def with_changed_results(call, given):
    _, found = call(**given)
    for x in found:
        if x is not None and x.dtype != torch.bool:
            x.mul_(2)
    return found[0], gradients(found[0], given)


def through_hooks(call, given):
    """Saved tensors are moved, as offloading does."""
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        out, _ = call(**given)
    return gradients(out, given)


def recomputed(call, given):
    names = tuple(given)
    out = checkpoint(
        lambda *x: call(**dict(zip(names, x, strict=True)))[0],
        *given.values(),
        use_reentrant=False,
    )
    return gradients(out, given)


def with_an_impossible_target(call, given):
    given["target"][1, 3] = V
    return call(**given)


def with_a_row_of_nan(call, given):
    with torch.no_grad():
        given["hidden"][:, 0] = float("nan")  # ignored
    return gradients(call(**given)[0], given)


WAYS = {
    "plainly": plainly,
    "hidden alone": lambda call, given: of_a_subset(call, given, ("hidden",)),
    "the head alone": lambda call, given: of_a_subset(call, given, ("weight", "bias")),
    "nothing": lambda call, given: of_a_subset(call, given, ()),
    "no_grad": without_gradients,
    "inference mode": in_inference_mode,
    "after inference mode": after_a_call_in_inference_mode,
    "autocast": under_autocast,
    "twice": twice,
    "hooks": through_hooks,
    "checkpoint": recomputed,
    "NaN": with_a_row_of_nan,
    "changed results": with_changed_results,
    "once too often": once_too_often,
    "second order": of_second_order,
    "changed inputs": with_changed_inputs,
    "impossible target": with_an_impossible_target,
}
REFUSED = {"once too often", "second order", "changed inputs"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", CALLS)
def test_both_ways_give_the_same(call, way, monkeypatch):
    """Bits, versions, which results carry a gradient, and errors."""
    seen = []

    def run():
        found = WAYS[way](CALLS[call], batch())
        seen.append(found)
        return found

    function, dispatcher = both_ways(monkeypatch, run)
    assert same(function, dispatcher)
    # entropies of rows are copied, whatever their targets are; changed ones are refused by both
    if way in REFUSED:
        assert not seen
    elif way not in ("NaN", "changed results", "impossible target"):
        assert len(seen) == 2


@pytest.mark.parametrize("forward", ["function", "dispatcher"])
@pytest.mark.parametrize("call", [name for name in CALLS if name != "loss_of_learned_weights"])
def test_a_checkpoint_may_compute_the_forward_again_the_other_way(call, forward, monkeypatch):
    """As under a profiler that begins or ends between forward and backward."""
    given = batch()
    leaves = [given[name] for name in ("hidden", "weight", "bias")]
    expected = torch.autograd.grad(CALLS[call](**given)[0].sum(), leaves)

    def run(*operands):
        names = ("hidden", "weight", "bias")
        return CALLS[call](**given | dict(zip(names, operands, strict=True)))[0].sum()

    with monkeypatch.context() as patch:
        if forward == "dispatcher":
            by_dispatcher(patch)
        out = checkpoint(run, *leaves, use_reentrant=False)
    with monkeypatch.context() as patch:
        if forward == "function":
            by_dispatcher(patch)
        found = torch.autograd.grad(out, leaves)
    assert all(map(torch.equal, found, expected))


def test_numbers_that_memory_holds_with_the_other_sign():
    weight = torch.randn(V, D, dtype=torch.complex64).conj().imag
    assert weight.is_neg()
    given = batch() | {"weight": weight}
    got, want = logprobs(**given)[0], logprobs(**given | {"weight": weight.resolve_neg()})[0]
    assert torch.equal(got, want)
    assert "logprobs" in got.grad_fn.name()


def test_a_group_in_which_nothing_is_scored(monkeypatch):
    """Its sums have no rows: the product of none is asked of nobody."""

    def refused(tile, weight, out):
        raise AssertionError("a product of no rows")

    given = batch()
    tiles = make_tiles("torch", Head(given["weight"].detach()), None)
    hidden = given["hidden"].detach().reshape(-1, D)
    sums = GradientSums(hidden, tiles, Needs(True, True, False), complete=False)
    monkeypatch.setattr("treg.ops.head.gradients.times_weight", refused)
    sums.add(hidden.new_empty(0, V), selection.RowSelection(len(hidden), (slice(0, 0),)), None)
    sums.finish()
    assert not sums.dhidden.any() and not sums.dweight.any()


@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 3), (2, 2, 3)], ids=str)
def test_gradients_have_the_shapes_of_what_they_belong_to(shape):
    """Those of the operator itself: autograd would sum a wrong one into place."""
    x = {
        "hidden": torch.randn(*shape, D, requires_grad=True),
        "weight": torch.randn(V, D, requires_grad=True),
        "target": torch.randint(0, V, shape),
    }
    with Gradients() as mode:
        linear_logprobs(**x).logprobs.sum().backward()
    assert mode.shapes == [[*shape, D], [V, D]]


class Gradients(TorchDispatchMode):
    """The shapes of what `linear_logprobs_grad` gives."""

    shapes: ClassVar[list[list[int]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if "linear_logprobs_grad" in str(func):
            self.shapes = [list(x.shape) for x in found]
        return found


class Names(TorchDispatchMode):
    """The operators that are called, by name."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def gradient_step(call, given) -> None:
    gradients(call(**given)[0], given)


def test_whoever_asks_for_operators_gets_them():
    given = batch()
    with Names() as modes:
        gradient_step(loss, given)
    assert {"treg.treg_loss.default", "treg.treg_loss_grad.default"} <= set(modes.found)
    with torch.profiler.profile() as profile:
        gradient_step(logprobs, given)
    names = {event.name for event in profile.events() or ()}
    assert {"treg::linear_logprobs", "treg::linear_logprobs_grad"} <= names

    class Mine(torch.Tensor):
        seen: ClassVar[list[str]] = []

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs)

    given["hidden"] = given["hidden"].detach().as_subclass(Mine)
    logprobs(**given)
    assert "treg.linear_logprobs.default" in Mine.seen


def test_a_call_is_copied_with_its_loss():
    options = LossOptions(beta=0.3)
    call = call_of(options)
    again = copy.deepcopy(call)
    assert again == call == Call.of(call.text())
    assert (again.loss_options, Call.of(call.text()).loss_options) == (options, None)
    # a number of another kind becomes a float where the operator runs
    assert call_of(LossOptions(beta=1)).loss_options is None


def call_of(loss: LossOptions) -> Call:
    from treg.ops.options import HeadOptions

    given = batch()
    options = HeadOptions(1.0, None, 1.0, -100, (), "torch", None, None, None, None)
    operands = given["hidden"], given["weight"], given["target"], None
    return options.call(*operands, loss, summed=True)


# -- waits


@pytest.fixture
def waits(monkeypatch):
    """Counts what would make a GPU be waited for: tensors say that they are on one, unless they are
    made for the CPU.
    """
    hosts, found = set(), []

    def on_host(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            if kwargs.get("device") == "cpu":
                hosts.add(x.data_ptr())
                keep.append(x)
            return x

        return made

    operators._tensor_of.cache_clear()  # of numbers that are on the host too
    keep: list[torch.Tensor] = []  # so that no address is used again
    for name in ("tensor", "scalar_tensor"):
        monkeypatch.setattr(torch, name, on_host(getattr(torch, name)))
    for name in ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "nonzero"):
        read = getattr(torch.Tensor, name)

        def counted(self, *args, read=read, name=name):
            if self.data_ptr() not in hosts:
                found.append(name)
            return read(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True), raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(checks, "values_visible", lambda x: False)
    monkeypatch.setattr(gemm, "vocabulary_parts", lambda tile, weight: 1)
    # which of two formulas is more exact: the kernel decides it for itself
    monkeypatch.setattr(kl_torch, "_is_near", lambda d: False)
    return found


STEPS = {name: CALLS[name] for name in ("logprobs", "loss", "loss_of_each", "divergence")}
FEW = selection.FEW_ROWS // (2 * B)


@pytest.mark.parametrize("dispatched", [False, True], ids=["function", "dispatcher"])
@pytest.mark.parametrize("ignored", [0, 3])
@pytest.mark.parametrize("length, count", [(T, 0), (FEW, 0), (FEW + 1, 1)])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_waits_once_at_most(step, length, count, ignored, dispatched, waits, monkeypatch):
    """A wait for which rows are scored, in the forward of more than a few rows; the numbers are
    those of a CPU, which looks at all values.
    """
    if dispatched:
        by_dispatcher(monkeypatch)
    monkeypatch.setattr(checks, "resolve_impl", lambda impl, hidden: "torch")
    given = batch(ignored, length, torch.float64)
    with torch.no_grad():
        given["hidden"][:, :ignored] = float("nan")
    out, _ = STEPS[step](**given)
    found = gradients(out, given)
    looked = len(waits)
    monkeypatch.undo()
    assert looked == count
    exact, _ = STEPS[step](**given)
    assert torch.allclose(out, exact, rtol=1e-12)
    for a, b in zip(found, gradients(exact, given), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_rows_are_found_again_without_a_look():
    target = torch.tensor([-100, 3, -100, 1, 0, -100])
    rows = selection.scored_rows(target, -100)
    assert rows.note == 3 and rows.numbers.tolist() == [1, 3, 4]
    assert selection.same_rows(target, -100, 3).numbers.tolist() == [1, 3, 4]
    full = selection.scored_rows(target[3:5], -100)
    assert full.complete and selection.same_rows(target[3:5], -100, full.note) == full


# -- operations and launches

# Of a forward and backward of a batch at once, in the Triton implementation.
MOST_OPERATIONS = {"loss": 46, "logprobs": 38}
MOST_LAUNCHES = {"loss": 5, "logprobs": 4}  # offsets, tiles, their sums; objective; scaled rows


@pytest.mark.interp
@pytest.mark.unpoisoned("no kernel runs, and so nothing is written")
@pytest.mark.parametrize("call", MOST_OPERATIONS)
def test_operations_and_launches_of_a_step(call, monkeypatch):
    """Kernels are counted, not run."""
    from triton.runtime.interpreter import GridExecutor

    launches = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *a, **k: launches.append(self.fn))
    monkeypatch.setattr(operators, "_plain", lambda args: True)
    monkeypatch.setattr(checks, "values_visible", lambda x: False)
    plain = {
        "loss": lambda **x: fused_treg_loss(**x, impl="triton").loss,
        "logprobs": lambda hidden, weight, target, **_: (
            linear_logprobs(hidden, weight, target, impl="triton").logprobs
        ),
    }[call]
    given = {name: x for name, x in batch(0).items() if name != "bias"}
    with Names() as mode:
        torch.autograd.grad(plain(**given).sum(), [given["hidden"], given["weight"]])
    assert len(launches) == MOST_LAUNCHES[call]
    assert len(mode.found) <= MOST_OPERATIONS[call], mode.found
