"""The gradient of entropies against float64 autograd through dense logits."""

import bisect
import math

import pytest
import torch
from batches import batch_of_tiles, call_of
from helpers import DTYPES, EPS, IMPLS, assert_within_budget, device_of, error
from looks import patch_looks
from memory import PeakMemory
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import treg.ops.entropy
from treg.operators import scalars
from treg.ops import linear_logprobs
from treg.ops.entropy import differentiable_entropy
from treg.ops.head import Head, make_tiles

N, D, V = 17, 12, 50
HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scale, softcap, bias": {"logit_scale": -0.6, "softcap": 3.0, "temperature": 1.3},
    "bias": {},
}
EXACT = 1e-12  # relative, float64
pytestmark = pytest.mark.usefixtures("poisoned")


def operands(dtype=torch.float64, bias=False, n=N, scale=1.0):
    """hidden, weight and bias, or None; leaves."""
    hidden = (scale * torch.randn(n, D)).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype).requires_grad_()
    return hidden, weight, torch.randn(V).to(dtype).requires_grad_() if bias else None


def targets(n=N):
    return torch.randint(V, (n,))


def dense(hidden, weight, bias, logit_scale=1.0, softcap=None, temperature=1.0):
    """Entropies [N] from logits [N, V]: 16-bit logits are rounded once, as trainers do."""
    z = hidden @ weight.T
    z = z if z.dtype == torch.float64 else z.float()
    if bias is not None:
        z = z + bias
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logp = (z / temperature).log_softmax(-1)
    return torch.special.entr(logp.exp()).sum(-1)


def entropies(hidden, weight, bias, target=None, memory_budget=None, **numbers):
    """The same by the op, on entropies that `linear_logprobs` has made."""
    target = torch.zeros(hidden.shape[0], dtype=torch.int64) if target is None else target
    known = linear_logprobs(
        hidden, weight, target, bias=bias, outputs=("entropy",), logits_dtype=None, **numbers
    ).entropy
    head = Head(weight, bias, **numbers)
    return differentiable_entropy(known, hidden, target, head, memory_budget=memory_budget)


def gradients(entropy, upstream, leaves):
    leaves = [x for x in leaves if x is not None]
    return torch.autograd.grad((upstream * entropy).sum(), leaves)


def bytes_of_rows(n, dtype):
    """A budget for tiles of n rows."""
    head = Head(torch.empty(V, D, dtype=dtype))
    hidden, target = torch.empty(1, D, dtype=dtype), torch.zeros(1, dtype=torch.int64)

    tiles = make_tiles("torch", head, None)

    def rows(budget):
        return treg.ops.entropy._tile_rows(batch_of_tiles(tiles, hidden, target, budget=budget))

    return 1 + bisect.bisect_left(range(1, 1 << 30), n, key=rows)


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("name", HEADS)
def test_it_is_the_gradient_of_dense_entropies(name, rows):
    leaves = operands(bias="bias" in name)
    upstream = torch.randn(N, dtype=torch.float64)
    found = entropies(*leaves, memory_budget=bytes_of_rows(rows, torch.float64), **HEADS[name])
    expected = dense(*leaves, **HEADS[name])
    assert error(found, expected) <= EXACT
    grads = gradients(found, upstream, leaves)
    for a, b in zip(grads, gradients(expected, upstream, leaves), strict=True):
        assert error(a, b) <= EXACT


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_errs_as_little_as_plain_pytorch(dtype, name):
    leaves = operands(dtype, bias="bias" in name)
    wide = [None if x is None else x.detach().double().requires_grad_() for x in leaves]
    upstream = torch.randn(N)
    exact = gradients(dense(*wide, **HEADS[name]), upstream.double(), wide)
    plain = gradients(dense(*leaves, **HEADS[name]), upstream, leaves)
    for rows in (5, 100):
        found = entropies(*leaves, memory_budget=bytes_of_rows(rows, dtype), **HEADS[name])
        grads = gradients(found, upstream, leaves)
        for leaf, a, b, c in zip(("hidden", "weight", "bias"), grads, exact, plain, strict=False):
            assert a.dtype == dtype
            assert_within_budget(f"d{leaf}", a, b, error(c, b), dtype)


def test_logits_with_a_common_offset():
    """An offset of all logits of a row changes no entropy, and no gradient but by its rounding."""
    hidden, weight, _ = operands(torch.float32)
    with torch.no_grad():
        hidden[:, 0] = 20.0
        weight[:, 0] = 50.0
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    upstream = torch.randn(N)
    exact = gradients(dense(*wide, None), upstream.double(), wide)
    plain = gradients(dense(hidden, weight, None), upstream, (hidden, weight))
    found = gradients(entropies(hidden, weight, None), upstream, (hidden, weight))
    for name, a, b, c in zip(("dhidden", "dweight"), found, exact, plain, strict=True):
        assert_within_budget(name, a, b, error(c, b), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e4])
@pytest.mark.parametrize("why", ["target ignored", "gradient 0"])
@pytest.mark.parametrize("capturing", [False, True], ids=["", "while a CUDA graph is captured"])
def test_rows_that_have_no_part_may_hold_anything(capturing, why, value, dtype, monkeypatch):
    """1e4: logits of which an exponential overflows."""
    if capturing:
        patch_looks(monkeypatch, lambda x: False)
    hidden, weight, bias = operands(dtype, bias=True)
    used = torch.ones(N, dtype=torch.bool)
    used[[0, 4, 5, N - 1]] = False
    target, upstream = targets(), torch.randn(N).to(torch.promote_types(dtype, torch.float32))
    if why == "gradient 0":
        upstream[~used] = 0.0
    else:
        target[~used] = -7
        upstream[0] = float("nan")  # of a loss that divides by something at such a row
    with torch.no_grad():
        hidden[~used] = value
    head = Head(weight, bias, softcap=20.0, temperature=0.5, ignore_index=-7)
    known = torch.zeros(N, dtype=upstream.dtype)
    logits = 20.0 * torch.tanh((hidden.double() @ weight.double().T + bias.double()) / 20.0) / 0.5
    lse = logits.detach().logsumexp(-1).to(known.dtype)
    for given in (None, lse):
        found = differentiable_entropy(
            known, hidden, target, head, lse=given, memory_budget=bytes_of_rows(3, dtype)
        )
        dhidden, *others = gradients(found, upstream, operands_of(head, hidden))
        kept = hidden.detach()[used].requires_grad_()
        alone = differentiable_entropy(
            known[used], kept, target[used], head, lse=None if given is None else lse[used]
        )
        expected, *others_expected = gradients(alone, upstream[used], operands_of(head, kept))
        assert not dhidden[~used].any()
        tolerance = EXACT if dtype == torch.float64 else 8 * EPS[dtype]
        assert error(dhidden[used], expected) <= tolerance
        for a, b in zip(others, others_expected, strict=True):
            assert error(a, b) <= tolerance


def operands_of(head, hidden):
    return hidden, head.weight, head.bias


def test_an_upstream_gradient_at_an_ignored_row_may_be_anything():
    hidden, weight, _ = operands()
    target = targets()
    target[2] = -100
    upstream = torch.ones(N, dtype=torch.float64)
    expected = gradients(entropies(hidden, weight, None, target), upstream, (hidden, weight))
    upstream[2] = float("nan")
    found = gradients(entropies(hidden, weight, None, target), upstream, (hidden, weight))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert not found[0][2].any()


def test_a_row_with_a_gradient_that_holds_nan_is_not_hidden():
    """It has a part: its NaN must be seen in the weight's gradient."""
    hidden, weight, _ = operands()
    with torch.no_grad():
        hidden[3] = float("nan")
    found = entropies(hidden, weight, None)
    dhidden, dweight = torch.autograd.grad(found.sum(), (hidden, weight))
    assert dhidden[3].isnan().all() and dhidden[[0, 1, 2, 4]].isfinite().all()
    assert dweight.isnan().all()


@pytest.mark.parametrize("offset", [1e4, 1e30])
@pytest.mark.parametrize("impl", IMPLS)
def test_entropies_of_huge_logits_that_tie(impl, offset):
    """Log 3 of three words that are equally likely, in two tiles, however large their logits."""
    device = device_of(impl)
    hidden, weight = torch.zeros(5, D, device=device), torch.randn(300, D, device=device)
    bias = torch.randn(300, device=device)
    bias[[3, 7, 290]] = offset
    found = linear_logprobs(
        hidden,
        weight,
        torch.tensor([3, 7, 290, 3, -100], device=device),
        bias=bias,
        outputs=("entropy", "log_sum_sq_probs"),
        impl=impl,
    )
    scored = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0], device=device)
    for x, sign in ((found.entropy, 1.0), (found.log_sum_sq_probs, -1.0), (found.logprobs, -1.0)):
        torch.testing.assert_close(x, sign * math.log(3.0) * scored, rtol=1e-6, atol=0.0)


IGNORED_HIDDEN = (1e30, float("inf"), float("nan"))
FORBIDDEN = {
    "a few": [0, 5, 128, 299],
    "whole tiles": [*range(128), *range(256, 300)],
    "all but two": [x for x in range(300) if x not in (130, 200)],
    "all but one": [x for x in range(300) if x != 130],
}


@pytest.mark.parametrize("forbidden", FORBIDDEN)
@pytest.mark.parametrize("value", [-float("inf"), -1e30, -3e38])
@pytest.mark.parametrize("head", [{}, {"temperature": 0.7}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.pairwise
def test_ignored_rows_hold_anything_while_words_are_forbidden(impl, dtype, head, value, forbidden):
    """Entropies and their gradients are those of the scored rows alone, in float64."""
    device, bias = device_of(impl), torch.randn(300)
    bias[FORBIDDEN[forbidden]] = value
    hidden, weight = torch.randn(12, D).to(dtype), (0.3 * torch.randn(300, D)).to(dtype)
    target = torch.full((12,), 130)
    ignored = [0, 3, 11]
    target[ignored] = -100
    scored = target != -100
    hidden[ignored] = torch.tensor(IGNORED_HIDDEN, dtype=dtype).unsqueeze(1)
    leaves = [x.to(device).requires_grad_() for x in (hidden, weight, bias)]
    target = target.to(device)
    known = linear_logprobs(
        *leaves[:2], target, bias=leaves[2], outputs=("entropy",), impl=impl, **head
    ).entropy
    entropy = differentiable_entropy(known, leaves[0], target, Head(*leaves[1:], **head))
    upstream = torch.randn(12)
    found = gradients(entropy, upstream.to(device), leaves)
    wide = [x.double().requires_grad_() for x in (hidden[scored], weight, bias)]
    exact = entropy_of(transformed(wide[0] @ wide[1].T + wide[2], **head))
    expected = gradients(exact, upstream[scored].double(), wide)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    near = {"rtol": tolerance, "atol": tolerance}
    assert not entropy[~scored].any() and not found[0][~scored].any()
    torch.testing.assert_close(entropy[scored].detach().cpu().double(), exact.detach(), **near)
    for a, b in zip((found[0][scored], *found[1:]), expected, strict=True):
        assert a.isfinite().all()
        assert (a.cpu().double() - b).norm() <= tolerance * (b.norm() + 1.0)


def transformed(z, softcap=None, temperature=1.0):
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


def entropy_of(z):
    """sum_v -p log p of logits, -inf among them, whose probability of 0 has no part."""
    logp = z.log_softmax(-1)
    return -(logp.exp() * logp.masked_fill(logp.isinf(), 0.0)).sum(-1)


def test_words_that_a_bias_forbids():
    """A logit of -inf has probability 0 and no part in the entropy."""
    hidden, weight, bias = operands(bias=True)
    allowed = torch.ones(V, dtype=torch.bool)
    allowed[[0, 7, V - 1]] = False
    with torch.no_grad():
        bias[~allowed] = -float("inf")
    upstream = torch.randn(N, dtype=torch.float64)
    expected = gradients(
        dense(hidden, weight[allowed], bias[allowed]), upstream, (hidden, weight, bias)
    )
    found = gradients(entropies(hidden, weight, bias), upstream, (hidden, weight, bias))
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) <= EXACT


@pytest.mark.parametrize("loss", ["0 times the entropy", "no entropy"])
def test_an_entropy_that_is_only_logged_costs_nothing(loss, monkeypatch):
    def no_products(*args):
        raise AssertionError("logits were made again")

    monkeypatch.setattr(treg.ops.entropy, "logits_into", no_products)
    hidden, weight, _ = operands()
    entropy = entropies(hidden, weight, None)
    total = hidden.sum() + weight.sum()
    if loss == "0 times the entropy":
        total = total - 0.0 * entropy.mean()
    for grad in torch.autograd.grad(total, (hidden, weight)):
        assert torch.equal(grad, torch.ones_like(grad))


def test_without_gradients_nothing_is_recorded():
    hidden, weight, _ = operands()
    known = torch.rand(N, dtype=torch.float64)
    with torch.no_grad():
        assert differentiable_entropy(known, hidden, targets(), Head(weight)) is known
    frozen = Head(weight.detach())
    assert differentiable_entropy(known, hidden.detach(), targets(), frozen) is known


@pytest.mark.parametrize("needed", ["hidden", "weight", "bias"])
def test_a_gradient_of_one_operand_alone(needed):
    leaves = dict(zip(("hidden", "weight", "bias"), operands(bias=True), strict=True))
    upstream = torch.randn(N, dtype=torch.float64)
    expected = gradients(dense(*leaves.values()), upstream, [leaves[needed]])
    given = {name: x if name == needed else x.detach() for name, x in leaves.items()}
    found = gradients(entropies(*given.values()), upstream, [leaves[needed]])
    assert error(found[0], expected[0]) <= EXACT


@pytest.mark.parametrize("name", HEADS)
def test_parts_of_the_vocabulary(name):
    """Entropy and logsumexp are those of the whole: dhidden is a sum, the others are rows."""
    hidden, weight, bias = operands(bias="bias" in name)
    numbers, target = HEADS[name], targets()
    target[1] = -100
    upstream = torch.randn(N, dtype=torch.float64)
    scored = target != -100
    whole = dense(hidden, weight, bias, **numbers)
    expected = gradients(whole[scored], upstream[scored], (hidden, weight, bias))
    known = linear_logprobs(
        hidden, weight, target, bias=bias, outputs=("lse", "entropy"), **numbers
    )
    dhidden, rows = torch.zeros_like(hidden), []
    for part in (slice(0, 21), slice(21, V)):
        w = weight.detach()[part].requires_grad_()
        b = None if bias is None else bias.detach()[part].requires_grad_()
        head = Head(w, b, **numbers)
        found = differentiable_entropy(known.entropy, hidden, target, head, lse=known.lse)
        share, *own = gradients(found, upstream, (hidden, w, b))
        dhidden += share
        rows.append(own)
    assert error(dhidden, expected[0]) <= EXACT
    for parts, b in zip(zip(*rows, strict=True), expected[1:], strict=True):
        assert error(torch.cat(parts), b) <= EXACT


def test_a_part_of_forbidden_words():
    """Each of its logits is -inf, and an ignored row holds NaN: it adds nothing to any gradient."""
    hidden, weight, bias = operands(bias=True)
    target, upstream = targets(), torch.randn(N, dtype=torch.float64)
    target[1] = -100
    scored = target != -100
    with torch.no_grad():
        bias[:21] = -float("inf")
        hidden[1] = float("nan")
    z = hidden[scored] @ weight.T + bias
    expected = gradients(entropy_of(z), upstream[scored], (hidden, weight, bias))
    known, lse = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    known[scored], lse[scored] = entropy_of(z).detach(), z.detach().logsumexp(-1)
    dhidden = torch.zeros_like(hidden)
    for part in (slice(0, 21), slice(21, V)):
        w, b = (x.detach()[part].requires_grad_() for x in (weight, bias))
        found = differentiable_entropy(known, hidden, target, Head(w, b), lse=lse)
        share, *own = gradients(found, upstream, (hidden, w, b))
        dhidden += share
        for a, whole in zip(own, expected[1:], strict=True):
            assert error(a, whole[part]) <= EXACT
    assert error(dhidden, expected[0]) <= EXACT


def test_under_autocast():
    """The products are those of operands in its dtype, and float32 gradients are not rounded."""
    hidden, weight, bias = operands(torch.float32, bias=True)
    rounded = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight, bias)]
    upstream, head = torch.randn(N), Head(weight, bias)
    known = dense(*rounded).detach()
    low = differentiable_entropy(known, rounded[0], targets(), Head(*rounded[1:]))
    expected = gradients(low, upstream, rounded)
    with torch.autocast("cpu", torch.bfloat16):
        budget = bytes_of_rows(5, torch.bfloat16)
        found = differentiable_entropy(known, hidden, targets(), head, memory_budget=budget)
    grads = gradients(found, upstream, (hidden, weight, bias))
    wide = [x.detach().double().requires_grad_() for x in rounded]
    exact = gradients(dense(*wide), upstream.double(), wide)
    for a, b, c in zip(grads, expected, exact, strict=True):
        assert a.dtype == torch.float32
        assert error(a, c) <= error(b, c) + 2 * EPS[torch.bfloat16]
    # the weight's sum is taken in float32, and stays so
    assert not torch.equal(grads[1], grads[1].bfloat16().float())


def test_small_gradients_in_float16():
    """The factor of a loss scaler reaches the 16-bit products."""
    hidden, weight, _ = operands(torch.float16)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    upstream = torch.full((N,), 1e-5)
    exact = gradients(dense(*wide, None), upstream.double(), wide)
    scaled = gradients(entropies(hidden, weight, None), upstream * 2.0**15, (hidden, weight))
    for a, b in zip(scaled, exact, strict=True):
        assert error(a.double() / 2.0**15, b) <= 8 * EPS[torch.float16]


def test_memory():
    hidden, weight, _ = operands(torch.float32, n=4096)
    known, budget = torch.rand(4096), 1 << 20
    with PeakMemory() as mode:
        found = torch.ops.treg.linear_entropy_grad(
            torch.ones(4096),
            known,
            None,
            hidden.detach(),
            weight.detach(),
            None,
            torch.zeros(4096, dtype=torch.int64),
            scalars(1.0, 0.0, 1.0),
            call_of(needs=(True, True, False), budget=budget).text(),
        )
    rows = 4096 * 16  # of which are used, by number
    assert 0 < mode.peak <= budget + sum(x.nbytes for x in found) + rows
    assert 3 * budget < 4 * 4096 * V * 4  # all rows at once would not have fitted


def compiled_case(temperature):
    hidden, weight, bias = operands(bias=True)
    known = dense(hidden, weight, bias, softcap=3.0, temperature=temperature)
    return known, hidden, weight, bias, targets()


def test_compiled_with_a_temperature_that_changes():
    """One graph, and the second value of the temperature makes the last one."""
    counter = CompileCounterWithBackend("aot_eager")

    def fn(known, hidden, weight, bias, target, temperature):
        head = Head(weight, bias, softcap=3.0, temperature=temperature)
        return differentiable_entropy(known.detach(), hidden, target, head)

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend=counter)
    upstream = torch.randn(N, dtype=torch.float64)
    for temperature in (1.3, 0.9, 1.7, 2.5, 0.4):
        case = compiled_case(temperature)
        expected = gradients(case[0], upstream, case[1:4])
        found = gradients(compiled(*case, temperature), upstream, case[1:4])
        for a, b in zip(found, expected, strict=True):
            assert error(a, b) <= EXACT
    assert counter.frame_count <= 2


def test_the_operators_schemas():
    known, hidden, weight, bias, target = compiled_case(1.0)
    known, lse = known.detach(), torch.zeros(N, dtype=torch.float64)
    call = call_of(dtype=torch.float64, needs=(True, False, True)).text()
    for given in (None, lse):
        arguments = (known, given, hidden, weight, bias, target, scalars(1.0, 3.0, 1.0), call)
        opcheck(torch.ops.treg.linear_entropy.default, arguments)
        plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        opcheck(torch.ops.treg.linear_entropy_grad.default, (known, *plain))


def test_second_derivatives_are_refused():
    hidden, weight, _ = operands()
    (grad,) = torch.autograd.grad(
        entropies(hidden, weight, None).square().sum(), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()
