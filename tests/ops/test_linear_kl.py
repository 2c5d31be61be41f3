"""`linear_kl`, both implementations, against the dense reference in float64."""

import gc
import math
from importlib import import_module
from unittest import mock

import pytest
import torch
from helpers import DTYPES, EPS, IMPLS, Case, assert_within_budget, device_of, error
from helpers import check_against_reference as check
from looks import patch_looks
from memory import PeakMemory
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import treg.ops.head.kl_tiles
import treg.ops.head.kl_torch
from treg.operators import scalars
from treg.ops import linear_kl, reference
from treg.ops.call import Call
from treg.ops.head import Head
from treg.ops.head import memory as budgets
from treg.ops.head.gradients import Needs
from treg.ops.head.kl_tiles import KlTiles

DIRECTIONS = ("forward", "reverse")
HEADS = {
    "plain": {},
    "bias": {"biases": True},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.3, "temperature": 0.7, "ref_logit_scale": -0.4},
    "all": {
        "biases": True,
        "softcap": 3.0,
        "logit_scale": 1.7,
        "temperature": 1.3,
        "ref_softcap": None,
    },
}
N, D, REF_D, V = 7, 12, 5, 133
MODULE = import_module("treg.ops.linear_kl")
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of rows in PyTorch, several of words in Triton; the last of each is short."""
    monkeypatch.setattr(treg.ops.head.kl_torch, "BLOCK", {"cpu": 2 * V})
    try:
        import treg_kernels.kl
    except ImportError:
        return
    monkeypatch.setattr(treg_kernels.kl, "BLOCK", 128)


@pytest.fixture
def cheap_passes(monkeypatch):
    """Few rows are worth keeping already, and no tile has more than 2."""
    monkeypatch.setattr(budgets, "PASS_ROWS", {"cpu": 2})
    monkeypatch.setattr(budgets, "PASS_ROWS_GPU", 2)
    monkeypatch.setattr(treg.ops.head.kl_tiles, "MAX_ROWS", {"cpu": 2})
    monkeypatch.setattr(treg.ops.head.kl_tiles, "MAX_ROWS_GPU", 2)


def make_case(
    dtype=torch.float64,
    n=N,
    *,
    words=V,
    scored=True,
    biases=False,
    ignored=2,
    spread=0.5,
    **options,
) -> Case:
    """Two heads of logits of standard deviation spread * sqrt(D), in numbers that dtype holds."""
    rest = {"ref_hidden": torch.randn(n, REF_D), "ref_weight": torch.randn(words, REF_D) * spread}
    if biases:
        rest["ref_bias"] = torch.randn(words)
    rest = {name: x.to(dtype).double() for name, x in rest.items()}
    if scored:
        rest["target"] = torch.randint(0, words, (n,))
        rest["target"][torch.randperm(n)[:ignored]] = -100
    bias = torch.randn(words) if biases else None
    return Case(torch.randn(n, D), torch.randn(words, D) * spread, bias, rest | options)


def in_dtype(fn):
    """fn with the reference's tensors in the policy's dtype."""

    def run(hidden, weight, **given):
        for name in ("ref_hidden", "ref_weight", "ref_bias"):
            if given.get(name) is not None:
                given[name] = given[name].to(hidden.dtype)
        return fn(hidden, weight, given.pop("ref_hidden"), given.pop("ref_weight"), **given)

    return run


def weighted(out):
    """A different upstream gradient for every row of kl, and another for every log-prob."""
    g = torch.linspace(-1.0, 2.0, out.kl.numel(), device=out.kl.device, dtype=out.kl.dtype)
    total = (out.kl.flatten() * g).sum()
    if out.logprobs is not None:
        total = total + (out.logprobs.flatten() * (g.flip(0) + 0.3)).sum()
    return total


def run(case, dtype, impl="torch", upstream=weighted, **options):
    """What the op gives, and the gradients."""
    at = case.at(dtype, device_of(impl))
    return at.run(in_dtype(linear_kl), upstream, impl=impl, **options)


def against_reference(case, dtype, impl, fns=(linear_kl, reference.linear_kl), **options):
    """The vocabulary's order stays: the reference head has it too."""
    ours, dense = map(in_dtype, fns)
    device = device_of(impl)
    return check(case, ours, dense, weighted, dtype, device, plain_runs=1, impl=impl, **options)


def budget_for(dtype, impl, kept, *, words=V, scored=True, biases=False) -> int:
    """The least bytes that keep so many rows beside a tile of others."""

    def empty(columns):
        return torch.empty(words, columns, dtype=dtype, device=device_of(impl))

    bias = torch.empty(words, device=device_of(impl)) if biases else None
    heads = Head(empty(D), bias), Head(empty(REF_D), bias)
    tiles = KlTiles(impl, *heads, reverse=False, scored=scored)
    low, high = 1, 1 << 40
    while low < high:
        middle = (low + high) // 2
        try:
            enough = tiles.plan(middle, gradient=True)[0] >= kept
        except ValueError:
            enough = False
        low, high = (low, middle) if enough else (middle + 1, high)
    return low


# -- values and gradients


def implementations(chosen: dict) -> list:
    """Parameters (impl, dtype, head), fewer of Triton: in its interpreter a case takes a second."""
    found = []
    for impl in IMPLS:
        for dtype in DTYPES:
            heads = chosen[dtype] if impl.values[0] == "triton" else HEADS
            for head in heads:
                case = (impl.values[0], dtype, head)
                found.append(pytest.param(*case, marks=impl.marks, id=f"{impl.id}-{dtype}-{head}"))
    return found


FEWER = {torch.float32: ("plain", "all"), torch.bfloat16: ("all",), torch.float16: ("all",)}


@pytest.mark.parametrize("scored", [True, False], ids=["targets", "no targets"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("impl", "dtype", "head"), implementations(FEWER))
def test_values_and_gradients(impl, dtype, direction, head, scored):
    case = make_case(dtype, scored=scored, direction=direction, **HEADS[head])
    found = against_reference(case, dtype, impl)
    assert ("logprobs" in found) == ("ref_logprobs" in found) == scored


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_float64(direction, head):
    """No number is held in float32 on the way."""
    case = make_case(direction=direction, **HEADS[head]).at(torch.float64)
    exact = case.run(in_dtype(reference.linear_kl), weighted)
    for name, x in case.run(in_dtype(linear_kl), weighted).items():
        assert x.dtype == torch.float64 and error(x, exact[name]) < 1e-13, name


@pytest.mark.pairwise
@pytest.mark.parametrize("kept", [0, 3, 100], ids=["no row kept", "some kept", "all kept"])
@pytest.mark.parametrize("scored", [True, False], ids=["targets", "no targets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_budgets(impl, dtype, scored, kept, cheap_passes, monkeypatch):
    """Rows whose stashes are kept, and rows whose logits are computed again: one gradient."""
    direction = "forward" if kept == 0 else "reverse"
    seen = []
    plan = KlTiles.plan
    monkeypatch.setattr(KlTiles, "plan", lambda *a, **k: seen.append(plan(*a, **k)) or seen[-1])
    case = make_case(dtype, scored=scored, direction=direction, biases=True, softcap=4.0)
    budget = budget_for(dtype, impl, kept, scored=scored, biases=True)
    seen.clear()
    against_reference(case, dtype, impl, memory_budget=budget)
    found = seen[0][0]
    assert found == 0 if kept == 0 else kept <= found <= kept + 1


NEEDS = ["hidden weight bias", "weight bias", "hidden", "weight", "bias"]


def only(fn, needs: str):
    """fn where no other of hidden, weight and bias takes a gradient."""

    def given(hidden, weight, ref_hidden, ref_weight, bias, **rest):
        policy = {"hidden": hidden, "weight": weight, "bias": bias}
        policy = {k: x if k in needs.split() else x.detach() for k, x in policy.items()}
        return fn(ref_hidden=ref_hidden, ref_weight=ref_weight, **policy, **rest)

    return given


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [3, 100], ids=["some kept", "all kept"])
def test_frozen_parts(kept, dtype, needs, cheap_passes):
    case = make_case(dtype, biases=True, direction="reverse")
    fns = only(linear_kl, needs), only(reference.linear_kl, needs)
    budget = budget_for(dtype, "torch", kept, biases=True)
    found = against_reference(case, dtype, "torch", fns, memory_budget=budget)
    for name in ("hidden", "weight", "bias"):
        assert bool(found[f"d{name}"].any()) == (name in needs.split())


@pytest.mark.parametrize("upstream", ["kl", "logprobs"])
@pytest.mark.parametrize("kept", [3, 100], ids=["some kept", "all kept"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_gradient_of_one_output_alone(impl, kept, upstream, cheap_passes):
    case = make_case(torch.float32)
    budget = budget_for(torch.float32, impl, kept)

    def loss(out):
        g = torch.linspace(-1.0, 2.0, N, device=out.kl.device, dtype=out.kl.dtype)
        return (getattr(out, upstream) * g).sum()

    found = run(case, torch.float32, impl, loss, memory_budget=budget)
    exact = case.at(torch.float64).run(in_dtype(reference.linear_kl), loss)
    plain = case.at(torch.float32).run(in_dtype(reference.linear_kl), loss)
    for name in ("dhidden", "dweight"):
        allowed = error(plain[name], exact[name])
        assert_within_budget(name, found[name], exact[name], allowed, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [(0,), (1,), (2, 3), (2, 1, 4)], ids=str)
def test_any_leading_shape_and_strides(impl, rows):
    count, device = math.prod(rows), device_of(impl)
    case = make_case(torch.float32, count, ignored=0).at(torch.float32, device)
    r = {k: x.float() if x.is_floating_point() else x for k, x in case.rest.items()}
    flat = linear_kl(case.hidden, case.weight, **r, impl=impl)
    hidden = case.hidden.T.contiguous().T.reshape(*rows, D)
    given = r | {
        "ref_hidden": r["ref_hidden"].repeat_interleave(2, 1)[:, ::2].reshape(*rows, REF_D),
        "ref_weight": r["ref_weight"].T.contiguous().T,
        "target": r["target"].reshape(rows),
    }
    shaped = linear_kl(hidden, case.weight.T.contiguous().T, **given, impl=impl)
    for a, b in zip(flat, shaped, strict=True):
        assert b.shape == rows
        assert error(b.flatten(), a) < 1e-6
    shaped.kl.sum().backward()
    assert case.hidden.grad.shape == (count, D)


@pytest.mark.parametrize("V", [1, 2, 65])
@pytest.mark.parametrize("impl", IMPLS)
def test_small_vocabularies(impl, V):
    hidden, ref = torch.randn(4, D), torch.randn(4, REF_D)
    weights = torch.randn(V, D), torch.randn(V, REF_D)
    given = [x.to(device_of(impl)) for x in (hidden, weights[0], ref, weights[1])]
    found = linear_kl(*given, impl=impl).kl
    exact = reference.linear_kl(*(x.double() for x in given)).kl
    assert error(found, exact) < 1e-6 if V > 1 else not found.any()


# -- numerics


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_equal_heads(impl, dtype, direction):
    """Exactly 0, and no gradient at all."""
    case = make_case(dtype).at(dtype, device_of(impl))
    out = linear_kl(
        case.hidden, case.weight, case.hidden, case.weight, direction=direction, impl=impl
    )
    assert not out.kl.any()
    for gradient in torch.autograd.grad(weighted(out), (case.hidden, case.weight)):
        assert not gradient.any()


def check_digits(impl, direction):
    """Divergences of some 1e-7: each to a thousandth, where float32 logs of probabilities give no
    digit; and a gradient that has all digits.
    """
    device = device_of(impl)
    hidden = torch.randint(-8, 9, (N, D)).float()  # products that float32 holds exactly
    weight = torch.randint(-64, 65, (V, D)) / 256
    ref_weight = weight + torch.randint(-1, 2, (V, D)) * 2.0**-14

    def gradients(fn, *tensors):
        h, w, other = tensors
        h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
        out = fn(h, w, h.detach(), other, direction=direction)
        return out.kl.detach(), *torch.autograd.grad(out.kl.sum(), (h, w))

    exact = gradients(reference.linear_kl, *(x.double() for x in (hidden, weight, ref_weight)))
    plain = gradients(reference.linear_kl, hidden, weight, ref_weight)
    found = gradients(
        lambda *a, **k: linear_kl(*a, **k, impl=impl),
        *(x.to(device) for x in (hidden, weight, ref_weight)),
    )
    assert exact[0].min() > 1e-9 and exact[0].max() < 2e-6
    assert ((plain[0] - exact[0]) / exact[0]).abs().max() > 0.1
    assert ((found[0].cpu() - exact[0]) / exact[0]).abs().max() < 1e-3
    assert (found[0] > 0).all()
    for a, b in zip(found[1:], exact[1:], strict=True):
        assert error(a, b) < 1e-6


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_nearly_equal_heads_keep_their_digits(impl, direction):
    check_digits(impl, direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_form_for_any_heads_keeps_their_digits(direction, monkeypatch):
    monkeypatch.setattr(treg.ops.head.kl_torch, "NEAR", 0.0)
    check_digits("torch", direction)


@pytest.mark.parametrize("scored", [False, True], ids=["kl alone", "with targets"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_both_forms_at_the_border(direction, scored, monkeypatch):
    """Ratios of probabilities up to e^39 times others: the form for near heads, the one for any."""
    case = make_case(torch.float32, direction=direction, scored=scored)
    hidden, ref_hidden = case.hidden.double(), case.rest["ref_hidden"]
    logits = hidden @ case.weight.double().T - ref_hidden @ case.rest["ref_weight"].T
    stretch = 39 / (logits.amax(1) - logits.amin(1)).max()
    case.hidden = (stretch * hidden).float()
    case.rest["ref_hidden"] = (stretch * ref_hidden).float().double()
    near = mock.Mock(wraps=treg.ops.head.kl_torch._near)
    monkeypatch.setattr(treg.ops.head.kl_torch, "_near", near)
    against_reference(case, torch.float32, "torch")
    assert near.called
    near.reset_mock()
    monkeypatch.setattr(treg.ops.head.kl_torch, "NEAR", 0.0)
    against_reference(case, torch.float32, "torch")
    assert not near.called


@pytest.mark.pairwise
@pytest.mark.parametrize("first", [-95.0, -41.0, -39.0, -0.6, 0.4, 39.0, 41.0, 95.0])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_heads_that_differ_in_the_first_word(impl, direction, first):
    """By up to 95 nats, and elsewhere by little: one of the two may be sure of that word."""
    case = make_case(torch.float32, direction=direction, biases=True, spread=0.1)
    case.rest["ref_hidden"] = case.hidden.double()
    case.rest["ref_weight"] = (case.weight + torch.randn(V, D) / 256).double()
    case.rest["ref_bias"] = case.bias.double()
    case.bias[0] += first
    against_reference(case, torch.float32, impl)


@pytest.mark.parametrize("sure", ["policy", "reference"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_far_heads_of_a_large_vocabulary(direction, sure):
    """Whose probabilities, as computed, have a sum that is not quite 1."""
    case = make_case(
        torch.float32, 4, words=100_000, ignored=0, direction=direction, biases=True, scored=False
    )
    if sure == "policy":
        case.bias[0] += 100.0
    else:
        case.rest["ref_bias"][0] += 100.0
    against_reference(case, torch.float32, "torch")


@pytest.mark.parametrize("impl", IMPLS)
def test_no_finite_gradient_of_an_infinite_divergence(impl):
    case = make_case(torch.float32, 3, scored=False, biases=True, direction="reverse")
    case.rest["ref_bias"][5] = -INF
    found = run(case, torch.float32, impl, lambda out: out.kl.sum())
    assert (found["kl"] == INF).all() and not found["dbias"].isfinite().any()


@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize("head", ["policy", "reference"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_without_a_value_has_no_gradient_either(impl, direction, head, value, biases):
    """NaN, and not 0, which would pass for the gradient of equal heads; other rows stay whole."""
    case = make_case(torch.float32, 4, words=33, scored=False, biases=biases, direction=direction)
    (case.hidden if head == "policy" else case.rest["ref_hidden"])[1] = value
    found = run(case, torch.float32, impl, lambda out: out.kl.sum())
    assert found["kl"][1].isnan() and found["dhidden"][1].isnan().all()
    others = [0, 2, 3]
    assert found["kl"][others].isfinite().all() and found["dhidden"][others].isfinite().all()


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rows_near_and_far_in_one_block(direction, order, monkeypatch):
    """Any row of a block decides for all of it."""
    monkeypatch.setattr(treg.ops.head.kl_torch, "BLOCK", {"cpu": 3 * V})
    case = make_case(torch.float32, n=3, ignored=0, spread=0.1, direction=direction)
    peaks = torch.tensor([0.0, 35.0, 300.0]).roll(order)
    h, r = case.hidden, case.rest["ref_hidden"]
    case.weight[:3] += peaks[:, None] * h / h.square().sum(1, keepdim=True)
    case.rest["ref_weight"][3:6] += peaks[:, None] * r / r.square().sum(1, keepdim=True)
    case.rest = {k: x.float().double() if "ref" in k else x for k, x in case.rest.items()}
    against_reference(case, torch.float32, "torch")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_log_probs_are_never_above_0(impl, direction):
    """Of targets that one model is sure of and the other is not; nor has their gradient a wrong
    sign.
    """
    n, sure, unsure = 64, 26 * torch.eye(64), 2 * torch.randn(64, 64)
    logits, ref_logits = (sure, unsure) if direction == "forward" else (unsure, sure)
    device, words = device_of(impl), torch.eye(64, device=device_of(impl))
    hidden = logits.to(device).requires_grad_()
    ref_hidden, target = ref_logits.to(device), torch.arange(n, device=device)
    out = linear_kl(hidden, words, ref_hidden, words, target=target, direction=direction, impl=impl)
    assert (out.logprobs <= 0).all() and (out.ref_logprobs <= 0).all()
    (out.kl.sum() * 0 + out.logprobs.sum()).backward()
    assert (hidden.grad.diagonal() >= 0).all()
    off = hidden.grad.masked_fill(torch.eye(n, dtype=torch.bool, device=device), 0.0)
    assert (off <= 0).all()


@pytest.mark.parametrize("scored", [False, True], ids=["one stash", "two stashes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kept_rows_take_the_fewest_tiles(dtype, scored, monkeypatch):
    monkeypatch.setattr(budgets, "PASS_ROWS", {"cpu": 2})
    seen, forward, n = [], KlTiles.forward, 50
    monkeypatch.setattr(KlTiles, "forward", lambda *a: seen.append(a[1].shape[0]) or forward(*a))
    case = make_case(dtype, n, scored=scored, ignored=0).at(dtype)
    given = {k: x.to(dtype) if x.is_floating_point() else x for k, x in case.rest.items()}
    hidden = case.hidden.requires_grad_()
    tiles, budget = [], budget_for(dtype, "torch", n, scored=scored)
    for more in (0, 8, 1000):
        seen.clear()
        row = 2 * 4 * V + 4 * 4 * (D + REF_D) + 4 * V  # of any row that is worked on, at least
        linear_kl(hidden, case.weight, **given, memory_budget=budget + more * row)
        assert sum(seen) == n and max(seen) - min(seen) < len(seen)
        tiles.append(len(seen))
    assert tiles[0] > tiles[1] > tiles[2] == 1 and tiles[1] <= -(-n // 8)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_logits_with_a_common_offset(impl, direction):
    """1e4 and more on all logits of a row changes nothing but by the rounding of the logits."""
    case = make_case(torch.float32, direction=direction)
    case.hidden[:, 0] = torch.linspace(-20.0, 20.0, N)
    case.weight[:, 0] = 1000.0
    case.rest["ref_hidden"][:, 0] = torch.linspace(20.0, -20.0, N).double()
    case.rest["ref_weight"][:, 0] = 500.0
    against_reference(case, torch.float32, impl)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_probabilities_that_underflow(impl, direction):
    """Words hundreds of nats below the top, in either distribution or in both."""
    case = make_case(torch.float32, spread=0.1, direction=direction)
    h, r = case.hidden, case.rest["ref_hidden"]
    peaks = torch.linspace(50.0, 300.0, N)
    case.weight[:N] += peaks[:, None] * h / h.square().sum(1, keepdim=True)
    case.rest["ref_weight"][3 : 3 + N] += (
        peaks.flip(0)[:, None] * r / r.square().sum(1, keepdim=True)
    ).double()
    case.rest = {k: x.float().double() if "ref" in k else x for k, x in case.rest.items()}
    exact = case.at(torch.float64).run(in_dtype(reference.linear_kl), weighted)
    assert exact["kl"].max() > 100
    against_reference(case, torch.float32, impl)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_words_that_both_heads_forbid(impl, direction):
    """They count for nothing: the divergence of the others."""
    case = make_case(torch.float32, biases=True, ignored=0, direction=direction)
    words = torch.tensor([0, 7, *range(60, 70), V - 1])
    case.bias[words] = -INF
    case.rest["ref_bias"][words] = -INF
    case.rest["target"] = torch.randint(10, 60, (N,))
    against_reference(case, torch.float32, impl)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_words_that_one_head_forbids(impl, direction):
    """Finite where the first distribution has nothing there, infinite where the other one has."""
    for forbidding in ("bias", "ref_bias"):
        case = make_case(torch.float32, biases=True, ignored=0, direction=direction)
        where = case.bias if forbidding == "bias" else case.rest["ref_bias"]
        where[torch.tensor([3, 64])] = -INF
        case.rest["target"] = torch.randint(10, 60, (N,))
        finite = (forbidding == "bias") == (direction == "reverse")
        if finite:
            against_reference(case, torch.float32, impl)
            continue
        found = run(case, torch.float32, impl)
        assert (found["kl"] == INF).all()
        assert found["logprobs"].isfinite().all() and found["ref_logprobs"].isfinite().all()
        if direction == "forward":  # p - q is finite all the same
            exact = case.at(torch.float64).run(in_dtype(reference.linear_kl), weighted)
            assert error(found["dweight"][:3], exact["dweight"][:3]) < 1e-5


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_in_a_row_is_seen(impl):
    case = make_case(torch.float32, scored=False)
    case.hidden[4] = NAN
    found = run(case, torch.float32, impl)["kl"].cpu()
    assert found[4].isnan() and found[[3, 5]].isfinite().all()
    case = make_case(torch.float32, scored=False, biases=True)
    case.rest["ref_hidden"][2] = NAN
    found = run(case, torch.float32, impl)["kl"].cpu()
    assert found[2].isnan() and found[[1, 3]].isfinite().all()


def test_small_gradients_in_float16():
    """The factor of a loss scaler reaches the 16-bit products."""
    case = make_case(torch.float16)

    def loss(factor):
        return lambda out: factor * weighted(out)

    exact = case.at(torch.float16).at(torch.float64)
    exact = exact.run(in_dtype(reference.linear_kl), loss(1e-6))
    found = run(case, torch.float16, upstream=loss(1e-6 * 2.0**15))
    for name in ("dhidden", "dweight"):
        assert error(found[name].double() / 2.0**15, exact[name]) <= 8 * EPS[torch.float16]


# -- which rows count


@pytest.mark.pairwise
@pytest.mark.parametrize("capturing", [False, True], ids=["", "while a CUDA graph is captured"])
@pytest.mark.parametrize("kept", [3, 100], ids=["some kept", "all kept"])
@pytest.mark.parametrize("upstream", ["both", "kl"])
@pytest.mark.parametrize("impl", IMPLS)
def test_ignored_rows_may_hold_anything(impl, upstream, kept, capturing, cheap_passes, monkeypatch):
    """NaN in hidden states and upstream gradients there: 0, and no part in any gradient."""
    if capturing:
        patch_looks(monkeypatch, lambda x: False)
    case = make_case(torch.float32, biases=True, ignored=3)
    ignored = case.rest["target"] == -100
    budget = budget_for(torch.float32, impl, kept, biases=True)

    def loss(fill):
        def of(out):
            total = (out.kl * torch.where(ignored.to(out.kl.device), fill, 1.5)).sum()
            return total if upstream == "kl" else total + weighted(out)

        return of

    clean = run(case, torch.float32, impl, loss(0.0), memory_budget=budget)
    case.hidden[ignored] = NAN
    case.rest["ref_hidden"][ignored] = INF
    dirty = run(case, torch.float32, impl, loss(NAN), memory_budget=budget)
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name
    for name in ("kl", "logprobs", "ref_logprobs", "dhidden"):
        assert not dirty[name][ignored.to(dirty[name].device)].any(), name


@pytest.mark.parametrize("impl", IMPLS)
def test_all_ignored(impl):
    found = run(make_case(torch.float32, 6, ignored=6), torch.float32, impl)
    for name, x in found.items():
        assert not x.any(), name


def test_capture_of_one_half_is_refused(monkeypatch):
    case = make_case(torch.float32).at(torch.float32)
    out = in_dtype(linear_kl)(case.hidden, case.weight, **case.rest)
    patch_looks(monkeypatch, lambda x: False)
    with pytest.raises(RuntimeError, match="both inside the capture of a CUDA graph"):
        weighted(out).backward()


# -- derivatives


@pytest.mark.parametrize("kept", [2, 100], ids=["some kept", "all kept"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(direction, kept, cheap_passes):
    case = make_case(n=5, biases=True, ignored=1, softcap=2.0, logit_scale=0.7, temperature=1.2)
    case = case.at(torch.float64)
    budget = budget_for(torch.float64, "torch", kept, biases=True)

    def fn(hidden, weight, bias):
        given = {**case.rest, "direction": direction, "memory_budget": budget}
        out = linear_kl(hidden, weight[:, :D], bias=bias, **given)
        return out.kl, out.logprobs

    assert torch.autograd.gradcheck(fn, (case.hidden, case.weight, case.bias), fast_mode=True)


def test_the_reference_is_a_constant():
    case = make_case(torch.float32).at(torch.float32)
    rest = {k: x.float() if x.is_floating_point() else x for k, x in case.rest.items()}
    for name in ("ref_hidden", "ref_weight"):
        rest[name].requires_grad_()
    out = linear_kl(case.hidden, case.weight, **rest)
    assert not out.ref_logprobs.requires_grad
    weighted(out).backward()
    assert rest["ref_hidden"].grad is None and rest["ref_weight"].grad is None
    with torch.no_grad():
        assert torch.equal(linear_kl(case.hidden, case.weight, **rest).kl, out.kl)
    alone = linear_kl(case.hidden.detach(), case.weight.detach(), **rest)
    assert not alone.kl.requires_grad


@pytest.mark.parametrize("kept", [3, 100], ids=["some kept", "all kept"])
@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice_and_the_same_bits(impl, kept, cheap_passes):
    case = make_case(torch.bfloat16, biases=True)
    budget = budget_for(torch.bfloat16, impl, kept, biases=True)
    at = case.at(torch.bfloat16, device_of(impl))
    out = in_dtype(linear_kl)(
        at.hidden, at.weight, bias=at.bias, impl=impl, memory_budget=budget, **at.rest
    )
    leaves = (at.hidden, at.weight, at.bias)
    first = torch.autograd.grad(weighted(out), leaves, retain_graph=True)
    second = torch.autograd.grad(weighted(out), leaves)
    again = run(case, torch.bfloat16, impl, memory_budget=budget)
    for name, a, b in zip(("dhidden", "dweight", "dbias"), first, second, strict=True):
        assert a.any() and torch.equal(a, b) and torch.equal(a, again[name]), name


def test_second_derivatives_are_refused():
    case = make_case(torch.float32).at(torch.float32)
    out = in_dtype(linear_kl)(case.hidden, case.weight, **case.rest)
    (gradient,) = torch.autograd.grad(out.kl.square().sum(), case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()


def test_under_autocast(cheap_passes):
    """The products are those of operands in its dtype, and float32 sums are not rounded."""
    case = make_case(torch.bfloat16, biases=True)
    budget = budget_for(torch.bfloat16, "torch", 3, biases=True)
    case = case.at(torch.bfloat16).at(torch.float32)
    rest = {k: x.float() if x.is_floating_point() else x for k, x in case.rest.items()}
    exact = case.at(torch.float64).run(in_dtype(reference.linear_kl), weighted)
    low = case.at(torch.bfloat16).run(in_dtype(linear_kl), weighted)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_kl(case.hidden, case.weight, bias=case.bias, **rest, memory_budget=budget)
    found = torch.autograd.grad(weighted(out), (case.hidden, case.weight, case.bias))
    assert out.kl.dtype == torch.float32 and error(out.kl, exact["kl"]) < 1e-5
    for name, x in zip(("dhidden", "dweight", "dbias"), found, strict=True):
        assert x.dtype == torch.float32
        assert error(x, exact[name]) <= error(low[name], exact[name]) + 2 * EPS[torch.bfloat16]
    assert not torch.equal(found[1], found[1].bfloat16().float())
    half = {**rest, "ref_weight": rest["ref_weight"].bfloat16()}  # as a frozen reference may be
    with torch.autocast("cpu", torch.bfloat16):
        again = linear_kl(case.hidden, case.weight, bias=case.bias, **half, memory_budget=budget)
    assert torch.equal(again.kl, out.kl)


# -- products and memory


@pytest.mark.usefixtures("open_operators")
def test_matrix_products(cheap_passes):
    """One product for the logits of either head, again where they are not kept, and one for each
    of dhidden and dweight.
    """
    n = 40

    def products(needs, kept=n, scored=True):
        """Over the policy's and the reference's hidden size."""
        case = make_case(torch.float32, n, ignored=0, scored=scored)
        at, budget = case.at(torch.float32), budget_for(torch.float32, "torch", kept, scored=scored)
        given = {"hidden": at.hidden, "weight": at.weight}
        given = {k: x if k in needs.split() else x.detach() for k, x in given.items()}
        with FlopCounterMode(display=False) as counter:
            out = in_dtype(linear_kl)(**given, **at.rest, memory_budget=budget)
            if needs:
                weighted(out).backward()
        return counter.get_total_flops() / (2 * n * V)

    for scored in (True, False):
        assert products("", scored=scored) == D + REF_D
        assert products("hidden weight", scored=scored) == 3 * D + REF_D
        assert products("hidden", scored=scored) == 2 * D + REF_D
        assert products("weight", scored=scored) == 2 * D + REF_D
        assert products("hidden weight", kept=0, scored=scored) == 4 * D + 2 * REF_D
        half = products("hidden weight", kept=n // 2, scored=scored)
        assert half == pytest.approx(3.5 * D + 1.5 * REF_D, rel=0.02)


@pytest.mark.pairwise
@pytest.mark.parametrize("scored", [True, False], ids=["targets", "no targets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("open_operators")
def test_memory_stays_within_the_budget(impl, dtype, scored, monkeypatch):
    """Bytes alive at once, beyond inputs: the budget, a float32 dweight, dhidden, and [N]-sized
    rows; none after.
    """
    words = 4000 if impl == "torch" else 600
    monkeypatch.setattr(treg.ops.head.kl_torch, "BLOCK", {"cpu": 4 * words})
    monkeypatch.setattr(treg.ops.head.kl_tiles, "MAX_ROWS", {"cpu": 100})
    monkeypatch.setattr(budgets, "PASS_ROWS", {"cpu": 2})
    kept = 90 if impl == "torch" else 6
    for n in (kept - 2, 600 if impl == "torch" else 9):
        case = make_case(dtype, n, words=words, scored=scored)
        budget = budget_for(dtype, impl, kept, words=words, scored=scored)
        at = case.at(dtype, device_of(impl))
        rest = {k: x.to(dtype) if x.is_floating_point() else x for k, x in at.rest.items()}
        with PeakMemory(collect=impl == "triton") as memory:
            out = linear_kl(at.hidden, at.weight, **rest, impl=impl, memory_budget=budget)
            forward = memory.peak
            weighted(out).backward()
            gc.collect()
            left = sum(size for ref, size in memory._alive.values() if not ref.expired())
        gradients, rows = at.hidden.nbytes + 4 * at.weight.numel(), 20 * 8 * n
        assert forward <= budget + rows, f"{forward} bytes in the forward at n={n}"
        assert memory.peak <= budget + 2 * gradients + rows, f"{memory.peak} bytes at n={n}"
        assert left <= gradients + rows, f"{left} bytes after the backward at n={n}"
    if impl == "torch":  # what dense logits and their gradients take
        assert 3 * 4 * n * words > budget + 2 * gradients + rows


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_least_memory_budget_that_is_named_is_enough(dtype, gradient):
    case = make_case(dtype).at(dtype)
    case.hidden.requires_grad_(gradient)
    case.weight.requires_grad_(gradient)
    given = {k: x.to(dtype) if x.is_floating_point() else x for k, x in case.rest.items()}
    with pytest.raises(ValueError, match=r"^memory_budget: expected at least") as caught:
        linear_kl(case.hidden, case.weight, **given, memory_budget=1)
    least = int(str(caught.value).split()[4])
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        linear_kl(case.hidden, case.weight, **given, memory_budget=least - 1)
    out = linear_kl(case.hidden, case.weight, **given, memory_budget=least)
    exact = reference.linear_kl(
        case.hidden.detach().double(),
        case.weight.detach().double(),
        **{k: x.double() if x.is_floating_point() else x for k, x in given.items()},
    )
    assert error(out.kl, exact.kl) < 1e-5
    if gradient:
        weighted(out).backward()
        assert case.weight.grad.isfinite().all()


# -- under torch.compile


def compiled_case(impl="torch", n=N, **options):
    case = make_case(torch.float32, n, **options).at(torch.float32, device_of(impl))
    rest = {
        k: x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for k, x in case.rest.items()
    }
    return {"hidden": case.hidden, "weight": case.weight, "bias": case.bias, **rest}


@pytest.mark.parametrize("scored", [True, False], ids=["targets", "no targets"])
@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_in_one_graph(impl, scored):
    """fullgraph=True: no break, and the bits of eager; again with other values."""
    torch._dynamo.reset()
    direction = "reverse" if scored else "forward"

    def fn(given):
        out = linear_kl(**given, direction=direction, softcap=4.0, impl=impl)
        return weighted(out), out

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        given = compiled_case(impl, scored=scored, biases=True)
        leaves = [given[k] for k in ("hidden", "weight", "bias")]
        results = []
        for f in (fn, compiled):
            loss, out = f(given)
            results.append([*filter(lambda x: x is not None, out)])
            results[-1] += torch.autograd.grad(loss, leaves)
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


def test_a_schedule_of_the_temperature_needs_no_third_graph():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def fn(given, temperature):
        return linear_kl(**given, temperature=temperature).kl.sum()

    compiled = torch.compile(fn, fullgraph=True, backend=counter)
    given = compiled_case()
    for temperature in (1.3, 0.9, 1.7, 2.5):
        found = torch.autograd.grad(compiled(given, temperature), given["weight"])
        assert torch.equal(
            found[0], torch.autograd.grad(fn(given, temperature), given["weight"])[0]
        )
    assert counter.frame_count <= 2


def test_other_lengths_need_no_third_graph():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda given: linear_kl(**given).kl, fullgraph=True, backend=counter)
    for n in (20, 33, 47, 61):
        given = compiled_case(n=n)
        assert torch.equal(compiled(given), linear_kl(**given).kl)
    assert counter.frame_count == 2


def test_bad_numbers_are_refused_when_the_graph_runs():
    torch._dynamo.reset()

    def fn(given, x):
        return linear_kl(**given, ref_logit_scale=x).kl

    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    given = compiled_case()
    assert torch.equal(compiled(given, 0.5), fn(given, 0.5))
    with pytest.raises(ValueError, match=r"^ref_logit_scale: expected a finite number"):
        compiled(given, NAN)


@pytest.mark.parametrize("scored", [True, False], ids=["targets", "no targets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.unpoisoned("opcheck compares two runs: what neither writes would differ")
def test_the_operators_schemas(dtype, scored):
    case = make_case(dtype, scored=scored, ignored=0, biases=True).at(dtype)
    rest = {k: x.to(dtype) if x.is_floating_point() else x for k, x in case.rest.items()}
    call = Call("torch", dtype, None, -100, (), Needs(True, True, False), 384 << 20)
    text = MODULE.KlCall(call, reverse=True, ref_softcapped=True).text()
    reference_head = rest["ref_hidden"], rest["ref_weight"], rest["ref_bias"]
    numbers = scalars(1.5, 0.0, 0.7, 1.2, 4.0, 0.7)
    given = (*reference_head, rest.get("target"), numbers, text)
    bias = case.bias.detach()
    opcheck(MODULE._forward._call, (case.hidden, case.weight, bias, *given))
    plain = (case.hidden.detach(), case.weight.detach(), bias, *given)
    scores = 3 if scored else 1
    note, *stashes = MODULE._forward(*plain)[scores:]
    assert len(stashes) == scores // 2 + 1
    upstream = torch.randn(N)
    opcheck(
        MODULE._gradient._call,
        (upstream, upstream if scored else None, note, stashes, *plain),
        test_utils=("test_schema", "test_faketensor"),
    )


# -- bad input


def good():
    return {
        "hidden": torch.randn(4, 3, D),
        "weight": torch.randn(V, D),
        "ref_hidden": torch.randn(4, 3, REF_D),
        "ref_weight": torch.randn(V, REF_D),
        "target": torch.randint(0, V, (4, 3)),
        "bias": torch.randn(V),
        "ref_bias": torch.randn(V),
    }


BAD = [
    ({"hidden": None}, "hidden", r"expected a torch\.Tensor, got NoneType"),
    ({"weight": [1.0]}, "weight", r"expected a torch\.Tensor, got list"),
    ({"ref_hidden": 1.0}, "ref_hidden", r"expected a torch\.Tensor, got float"),
    ({"ref_weight": None}, "ref_weight", r"expected a torch\.Tensor, got NoneType"),
    ({"ref_bias": 0.0}, "ref_bias", r"expected a torch\.Tensor or None, got float"),
    ({"bias": 0.0}, "bias", r"expected a torch\.Tensor or None, got float"),
    ({"target": [1]}, "target", r"expected a torch\.Tensor or None, got list"),
    ({"hidden": torch.zeros(4, 3, 0)}, "hidden", r"D >= 1, got \[4, 3, 0\]"),
    ({"hidden": torch.zeros(4, 3, D, dtype=torch.int64)}, "hidden", "got torch.int64"),
    ({"weight": torch.zeros(D, V)}, "weight", r"got \[133, 12\]|is it transposed"),
    ({"weight": torch.zeros(V, D).double()}, "weight", r"torch\.float32 .* got torch\.float64"),
    ({"ref_hidden": torch.zeros(4, 2, REF_D)}, "ref_hidden", r"\[4, 3, 'D'\].* got \[4, 2, 5\]"),
    ({"ref_hidden": torch.zeros(4, 3, D)}, "ref_weight", r"\[V, 12\] \(D of ref_hidden\)"),
    ({"ref_hidden": torch.zeros(4, 3, REF_D).bfloat16()}, "ref_hidden", "got torch.bfloat16"),
    ({"ref_weight": torch.zeros(V, REF_D).double()}, "ref_weight", "got torch.float64"),
    ({"ref_weight": torch.zeros(V)}, "ref_weight", r"expected shape \[V, D\]"),
    ({"ref_weight": torch.zeros(V - 1, REF_D), "ref_bias": None}, "ref_weight", r"\[133, D\]"),
    ({"ref_weight": torch.zeros(V, REF_D).to_sparse()}, "ref_weight", "dense"),
    ({"ref_hidden": torch.zeros(4, 3, REF_D, device="meta")}, "ref_hidden", "meta"),
    ({"ref_bias": torch.zeros(V - 1)}, "ref_bias", r"expected shape \[133\]"),
    ({"ref_bias": torch.zeros(V, dtype=torch.int64)}, "ref_bias", "floating"),
    ({"bias": torch.zeros(V + 1)}, "bias", r"expected shape \[133\]"),
    ({"target": torch.zeros(4, 3)}, "target", r"expected torch\.int64, got torch\.float32"),
    ({"target": torch.zeros(12, dtype=torch.int64)}, "target", r"expected shape \[4, 3\]"),
    ({"target": torch.full((4, 3), V)}, "target", rf"in \[0, {V}\) .* got {V} at index \[0\]"),
    ({"direction": "backward"}, "direction", "'forward' or 'reverse', got 'backward'"),
    ({"direction": None}, "direction", "'forward' or 'reverse', got None"),
    ({"logit_scale": NAN}, "logit_scale", "a finite number, got nan"),
    ({"softcap": 0.0}, "softcap", "a finite number > 0 or None, got 0.0"),
    ({"temperature": 0.0}, "temperature", "a finite number > 0, got 0.0"),
    ({"temperature": 1e-40}, "temperature", r"< 1e30, got 1\.0 / 1e-40"),
    ({"ref_logit_scale": INF}, "ref_logit_scale", "a finite number, got inf"),
    ({"ref_logit_scale": "same"}, "ref_logit_scale", "a finite number, got 'same'"),
    ({"ref_logit_scale": 1e35}, "temperature", r"ref_logit_scale / temperature"),
    ({"ref_softcap": -1.0}, "ref_softcap", "a finite number > 0 or None, got -1.0"),
    ({"ref_softcap": "other"}, "ref_softcap", "a number > 0, 'same' or None, got 'other'"),
    ({"ignore_index": 0.5}, "ignore_index", "an int of 64 bits, got 0.5"),
    ({"impl": "cuda"}, "impl", "None, 'torch' or 'triton', got 'cuda'"),
    ({"memory_budget": 0}, "memory_budget", "bytes > 0"),
    ({"memory_budget": "most"}, "memory_budget", "'least' or None, got 'most'"),
]


@pytest.mark.parametrize(
    ("changed", "argument", "message"), BAD, ids=[f"{i}-{row[1]}" for i, row in enumerate(BAD)]
)
def test_refused_by_name(changed, argument, message):
    kind = TypeError if "Tensor" in message else ValueError
    with pytest.raises(
        (TypeError, ValueError), match=rf"^(?={argument}: expected).*({message})"
    ) as e:
        linear_kl(**good() | {"impl": "torch"} | changed)
    assert type(e.value) is kind


def test_without_the_change_it_is_accepted():
    for more in ({}, {"memory_budget": "least"}, {"ref_softcap": 2.0}, {"target": None}):
        assert (linear_kl(**good() | more).kl > 0).all()


def test_transforms_are_refused():
    given = good()
    with pytest.raises(RuntimeError, match=r"^ref_hidden: expected a plain tensor"):
        torch.func.vmap(lambda x: linear_kl(**given | {"ref_hidden": x}).kl)(
            given["ref_hidden"].unsqueeze(0)
        )


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_an_impossible_target_gives_nan_not_a_number(impl):
    """Where values are not checked (a GPU), a target outside the vocabulary shows as NaN."""
    from treg_kernels.kl import kl_rows
    from treg_kernels.tiles import Scalars

    device = device_of(impl)
    a, ref_a = torch.randn(5, V, device=device), torch.randn(5, V, device=device)
    target = torch.tensor([1, V, -3, 2**40, -100], device=device)
    plain = Scalars.of(1.0, None, 1.0)
    found = kl_rows(a, ref_a, None, None, plain, plain, target, -100, reverse=False, stashes=[])
    for name in ("logprobs", "ref_logprobs"):
        got = found[name].cpu()
        assert got[1:4].isnan().all() and got[0].isfinite() and got[4] == 0
