"""The operators under torch.compile and torch.library.opcheck: the same numbers, one graph."""

from importlib import import_module

import pytest
import torch
from helpers import IMPLS, device_of
from looks import patch_looks
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from treg.losses import LossOptions
from treg.operators import scalars
from treg.ops import fused_treg_loss, linear_logprobs
from treg.ops.call import Call
from treg.ops.head import Head, make_tiles
from treg.ops.head.gradients import Needs

B, T, D, V = 2, 7, 16, 60
LOGPROBS, PAIRS = [
    (module._forward, module._gradient)
    for module in map(import_module, ("treg.ops.linear_logprobs", "treg.ops.treg_loss"))
]


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


@pytest.mark.pairwise
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


def make_call(impl: str, dtype: torch.dtype, needs, **options) -> Call:
    given = {"budget": 384 << 20, "outputs": ("lse", "is_top1")} | options
    return Call(
        impl=impl,
        dtype=dtype,
        logits_dtype=torch.float32 if impl == "torch" else None,
        ignore_index=-100,
        needs=Needs(*needs),
        **given,
    )


@pytest.mark.pairwise
@pytest.mark.parametrize(
    "options", [{}, {"filter_eps": 2.0**-10}, {"least": True}], ids=["", "filtered", "least"]
)
@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, False, False)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.unpoisoned("opcheck compares two runs: what neither writes would differ")
def test_opcheck_logprobs(impl, dtype, needs, options):
    """Schema, autograd registration, shapes of the fake kernel, tracing; the gradient's operator
    too.
    """
    b = batch(impl, dtype, ignored=0)  # the stash of rows that are left out is not written
    h, w, y = b["hidden"].detach().flatten(0, 1), b["weight"].detach(), b["target"].flatten()
    bias = torch.randn(V, device=h.device)
    inputs = [x.clone().requires_grad_(need) for x, need in zip((h, w, bias), needs, strict=True)]
    text = make_call(impl, dtype, needs, **options).text()
    numbers = scalars(1.5, 4.0, 0.7)
    forward, gradient = LOGPROBS
    opcheck(forward._call, (*inputs, y, numbers, text))
    if any(needs):
        saved = forward(*(x.detach() for x in inputs), y, numbers, text)[3:]
        coef = torch.randn(y.shape, device=h.device)
        opcheck(
            gradient._call,
            (coef, saved, h, w, bias, y, numbers, text),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.pairwise
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.unpoisoned("opcheck compares two runs: what neither writes would differ")
def test_opcheck_pairs(impl, packed, grouped):
    b = {k: x.detach() for k, x in batch(impl, ignored=0).items()}
    hidden, weight = b["hidden"].flatten(0, 1).requires_grad_(), b["weight"].requires_grad_()
    target, rewards = b["target"], b["token_rewards"]
    starts = None
    if packed:
        target, rewards = target.flatten(), rewards.flatten()
        starts = torch.arange(0, 2 * B * T + 1, T, device=hidden.device)
    options = LossOptions()
    call = make_call(
        impl,
        torch.float32,
        (True, True, False),
        budget=one_pair(impl, ("entropy",)) if grouped else 384 << 20,
        outputs=("entropy",),
        loss=options.text(),
        summed=True,
    )
    numbers = scalars(1.0, 0.0, 1.0, *options.numbers())
    forward, gradient = PAIRS
    given = (target, rewards, b["ref_logps"], None, None, starts, numbers, call.text())
    opcheck(forward._call, (hidden, weight, None, *given))
    saved = [x.detach() for x in forward(hidden, weight, None, *given)[4:]]
    assert (len(saved) == 7) == grouped  # coef, five of the plan, the flag; else three of the plan
    upstream = torch.full((B,), 1.5, device=hidden.device)
    inputs = (hidden.detach(), weight.detach(), None, target, starts, numbers, call.text())
    opcheck(
        gradient._call,
        (upstream, saved, *inputs),
        test_utils=("test_schema", "test_faketensor"),
    )


ONE_PAIR = one_pair("torch")
SCHEDULED = {
    "loss": lambda b, x: fused_treg_loss(**b, beta=x, alpha=x + 0.1, temperature=x + 0.7).loss,
    "groups": lambda b, x: fused_treg_loss(**b, beta=x, memory_budget=ONE_PAIR).loss,
    "gamma": lambda b, x: (
        fused_treg_loss(**b | {"ref_logps": None}, loss_type="simpo", beta=2.0, gamma=x).loss
    ),
    "smoothing": lambda b, x: fused_treg_loss(**b, label_smoothing=x).loss,
    "computed in the graph": lambda b, x: fused_treg_loss(**b, label_smoothing=x / 2).loss,
    "log-probs": lambda b, x: linear_logprobs(
        b["hidden"], b["weight"], b["target"], temperature=x
    ).logprobs.mean(),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("call", SCHEDULED)
def test_a_schedule_neither_recompiles_nor_breaks_the_graph(call, dynamic):
    """At most one graph of a constant and one of an input, whatever number of values; with
    dynamic=True no compilation after the first call.
    """
    if call == "computed in the graph" and torch.__version__ < (2, 13):
        pytest.skip("torch 2.11 takes a number that only arithmetic uses for a constant")
    counter = CompileCounterWithBackend("aot_eager")
    fn = SCHEDULED[call]
    compiled = torch.compile(fn, backend=counter, fullgraph=True, dynamic=dynamic)
    inputs, after = batch("torch"), []
    leaves = [inputs["hidden"], inputs["weight"]]
    for x in (0.1, 0.2, 0.3, 0.4, 0.45):
        loss, exact = compiled(inputs, x), fn(inputs, x)
        assert torch.equal(loss, exact)
        found, right = torch.autograd.grad(loss, leaves), torch.autograd.grad(exact, leaves)
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
        after.append(counter.frame_count)
    assert after[-1] == after[0 if dynamic else 1]


def test_bad_numbers_under_compile_are_refused_when_the_graph_runs():
    compiled = torch.compile(SCHEDULED["loss"], backend="aot_eager", fullgraph=True, dynamic=True)
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match=r"^(beta|temperature|alpha): expected"):
            compiled(batch("torch"), bad)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_softcap_of_0_under_compile_is_no_missing_softcap(impl):
    def fn(b, cap):
        out = linear_logprobs(b["hidden"], b["weight"], b["target"], softcap=cap, impl=impl)
        return out.logprobs

    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True, dynamic=True)
    inputs = batch(impl)
    assert torch.equal(compiled(inputs, 5.0), fn(inputs, 5.0))
    for bad in (0.0, float("nan")):
        with pytest.raises(ValueError, match=r"^softcap: expected a finite number > 0"):
            compiled(inputs, bad)


def test_operators_are_left_out_of_captured_graphs():
    """They read numbers and targets on the host, which a replay would not."""
    packets = [getattr(torch.ops.treg, name) for name in torch.ops.treg]
    assert {"treg_loss", "pair_objective"} <= {packet.__name__ for packet in packets}
    for packet in packets:
        assert torch.Tag.cudagraph_unsafe in packet.default.tags, packet


def test_an_impossible_target_under_compile_is_refused_on_a_cpu():
    compiled = torch.compile(SCHEDULED["log-probs"], backend="aot_eager", fullgraph=True)
    b = batch("torch")
    b["target"][1, 3] = V
    with pytest.raises(ValueError, match=rf"^target: .*got {V} at index \[1, 3\]"):
        compiled(b, 1.0)


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
        patch_looks(monkeypatch, lambda x: half != captured)

    look("forward")
    loss, _ = fn(**inputs)
    look("backward")
    with pytest.raises(RuntimeError, match="both inside the capture of a CUDA graph"):
        loss.backward()
