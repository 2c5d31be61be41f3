"""The operators under torch.compile and torch.library.opcheck: the same numbers, one graph."""

import pytest
import torch
from helpers import IMPLS, device_of
from torch.library import opcheck

import treg.ops.head
import treg.ops.pairs
import treg.ops.rows
from treg.losses import LossOptions
from treg.ops import fused_treg_loss, linear_logprobs
from treg.ops.head import Head
from treg.ops.logprobs import _gradients, _logprobs, make_tiles
from treg.ops.pairs import _gradients as _pair_gradients
from treg.ops.pairs import _pair_loss

B, T, D, V = 2, 7, 16, 60


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def batch(impl: str, dtype=torch.float32, ignored=2) -> dict[str, torch.Tensor]:
    device = device_of(impl)
    target = torch.randint(0, V, (2 * B, T), device=device)
    target[:, :ignored] = -100
    return {
        "hidden": torch.randn(2 * B, T, D, device=device, dtype=dtype, requires_grad=True),
        "weight": torch.randn(V, D, device=device, dtype=dtype, requires_grad=True),
        "target": target,
        "token_rewards": torch.rand(2 * B, T, device=device) - 0.5,
        "ref_logps": torch.randn(2 * B, device=device) - 20,
    }


def one_pair(impl: str, outputs=()) -> int:
    """A budget for the stash of one of the two pairs."""
    tiles = make_tiles(impl, Head(torch.empty(V, D, device=device_of(impl))), None)
    return tiles.fixed_bytes + 2 * T * tiles.row_bytes(stash=True, outputs=outputs)


def logprobs(hidden, weight, target, **options):
    out = linear_logprobs(hidden, weight, target, outputs=("lse", "entropy", "is_top1"), **options)
    return (
        out.logprobs
        * torch.linspace(-1, 2, target.numel(), device=target.device).view(target.shape)
    ).sum(), out


def treg_loss(hidden, weight, target, token_rewards, ref_logps, **options):
    out = fused_treg_loss(
        hidden, weight, target, token_rewards, ref_logps, outputs=("lse",), **options
    )
    return 1.7 * (out.loss.sum() if out.loss.ndim else out.loss), out


CALLS = {
    "log-probs": (logprobs, {}),
    "log-probs, softcap and bias": (logprobs, {"softcap": 5.0, "bias": torch.randn(V)}),
    "loss": (treg_loss, {}),
    "loss, in groups": (treg_loss, {"memory_budget": "one pair"}),
    "loss, filtered": (treg_loss, {"filter_eps": 0.0}),
    "loss, least memory": (treg_loss, {"memory_budget": "least"}),
    "loss, packed": (treg_loss, {"cu_seqlens": torch.arange(0, 2 * B * T + 1, T)}),
    "loss, of each pair": (treg_loss, {"reduction": "none", "loss_type": "nca_pair", "alpha": 0.5}),
}


def run(fn, inputs, frozen=False):
    leaves = [inputs["hidden"]] if frozen else [inputs["hidden"], inputs["weight"]]
    loss, out = fn(**inputs)
    grads = torch.autograd.grad(loss, leaves)
    return [loss.detach(), *(x.detach() for x in out if x is not None), *grads]


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_in_one_graph(impl, call, frozen):
    """fullgraph=True: no break, and the bits of eager; again with other values."""
    fn, options = CALLS[call]
    options = {
        k: x.to(device_of(impl)) if isinstance(x, torch.Tensor) and k != "cu_seqlens" else x
        for k, x in options.items()
    }
    if options.get("memory_budget") == "one pair":
        options["memory_budget"] = one_pair(impl, ("lse",))
    compiled = torch.compile(
        lambda **kw: fn(**kw, impl=impl, **options), fullgraph=True, backend="aot_eager"
    )
    for _ in range(2):
        inputs = batch(impl)
        inputs["weight"].requires_grad_(not frozen)
        if fn is logprobs:
            inputs = {k: inputs[k] for k in ("hidden", "weight", "target")}
        if "cu_seqlens" in options:
            inputs = {
                k: x
                if k in ("weight", "ref_logps")
                else x.detach().flatten(0, 1).requires_grad_(x.requires_grad)
                for k, x in inputs.items()
            }
        eager = run(lambda **kw: fn(**kw, impl=impl, **options), inputs, frozen)
        for a, b in zip(eager, run(compiled, inputs, frozen), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_other_lengths_need_no_third_graph(impl):
    """Each batch has another length: one graph of fixed shapes, one of dynamic ones."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def total(h, w, y):
        return linear_logprobs(h, w, y, impl=impl).logprobs.sum()

    compiled = torch.compile(total, fullgraph=True, backend=backend)
    weight = batch(impl)["weight"]
    for length in (20, 33, 47, 61):
        hidden = torch.randn(length, D, device=weight.device)
        target = torch.randint(0, V, (length,), device=weight.device)
        assert torch.equal(compiled(hidden, weight, target), total(hidden, weight, target))
    assert len(graphs) == 2


@pytest.mark.parametrize(
    ("eps", "by_columns"), [(None, False), (2.0**-10, False), (None, True)], ids=str
)
@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, False, False)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck_logprobs(impl, dtype, needs, eps, by_columns):
    """Schema, autograd registration, shapes of the fake kernel, tracing; the gradient's operator
    too.
    """
    b = batch(impl, dtype, ignored=0)  # the stash of rows that are left out is not written
    h, w, y = b["hidden"].detach().flatten(0, 1), b["weight"].detach(), b["target"].flatten()
    bias = torch.randn(V, device=h.device)
    inputs = [x.clone().requires_grad_(need) for x, need in zip((h, w, bias), needs, strict=True)]
    logits_dtype = torch.float32 if impl == "torch" else None
    options = (
        1.5,
        4.0,
        0.7,
        -100,
        impl,
        logits_dtype,
        384 << 20,
        *needs,
        "lse,is_top1",
        eps,
        by_columns,
    )
    opcheck(_logprobs, (*inputs, y, *options))
    if any(needs):
        saved = _logprobs(*(x.detach() for x in inputs), y, *options)[-4:]
        coef = torch.randn(y.shape, device=h.device)
        opcheck(
            _gradients,
            (coef, h, w, bias, y, *saved, *options),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck_pairs(impl, packed, grouped):
    b = {k: x.detach() for k, x in batch(impl, ignored=0).items()}
    hidden, weight = b["hidden"].flatten(0, 1).requires_grad_(), b["weight"].requires_grad_()
    target = b["target"].flatten()
    starts = torch.arange(0, 2 * B * T + 1, T, device=hidden.device) if packed else None
    o, needs, logits_dtype = (
        LossOptions(),
        (True, True, False),
        torch.float32 if impl == "torch" else None,
    )
    args = (
        hidden,
        weight,
        None,
        target,
        b["token_rewards"].flatten(),
        b["ref_logps"],
        None,
        starts,
        2 * B,
        o.loss_type,
        o.beta,
        o.alpha,
        o.gamma,
        o.label_smoothing,
        o.weighting,
        1.0,
        None,
        1.0,
        -100,
        impl,
        logits_dtype,
        one_pair(impl, ("entropy",)) if grouped else 384 << 20,
        *needs,
        "entropy",
    )
    opcheck(_pair_loss, args)
    kept = [x.detach() for x in _pair_loss(*args)[-8:]]
    assert (kept[-3].numel() == 0) == grouped
    inputs = (hidden.detach(), weight.detach(), None, target, -100, impl, logits_dtype, *needs)
    opcheck(
        _pair_gradients,
        (torch.tensor(1.5, device=hidden.device), *kept, *inputs),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("grouped", [False, True])
def test_second_derivatives_raise(grouped):
    b = batch("torch")
    loss = fused_treg_loss(**b, memory_budget=one_pair("torch") if grouped else None).loss
    (grad,) = torch.autograd.grad(loss, b["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives only|second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("captured", ["forward", "backward"])
@pytest.mark.parametrize("fn", [logprobs, treg_loss])
def test_capture_of_one_half_is_refused(fn, captured, monkeypatch):
    """Ignored rows are left out outside a capture alone: a backward that finds other rows gives no
    number.
    """
    b = batch("torch")
    inputs = b if fn is treg_loss else {k: b[k] for k in ("hidden", "weight", "target")}

    def look(half):
        for module in (treg.ops.head, treg.ops.rows, treg.ops.pairs):
            monkeypatch.setattr(module, "sees_values", lambda x: half != captured)

    look("forward")
    loss, _ = fn(**inputs)
    look("backward")
    with pytest.raises(RuntimeError, match="both inside the capture of a CUDA graph"):
        loss.backward()
