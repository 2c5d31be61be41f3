"""What only a GPU can show: CUDA graphs, streams, devices, threads."""

import threading

import pytest
import torch
from helpers import check_against_reference, error
from looks import patch_looks
from pair_case import make_case, upstream

from treg.ops import fused_treg_loss, linear_logprobs, reference
from treg.ops.head import Head, make_tiles

pytestmark = pytest.mark.gpu
V, D = 3000, 256


def batch(length=300, pairs=2, frozen=False):
    case = make_case([length] * 2 * pairs, D=D, V=V, padded=True, spread=0.1).at(
        torch.bfloat16, "cuda"
    )
    case.weight.requires_grad_(not frozen)
    return case


def one_pair(case) -> int:
    """A budget for the stash of one pair."""
    tiles = make_tiles("triton", Head(case.weight.detach()), None)
    return tiles.fixed_bytes + 2 * case.hidden.shape[1] * tiles.row_bytes(stash=True)


WAYS = {
    "at once": {},
    "in groups": {"memory_budget": True},
    "of each pair": {"reduction": "none"},
    "filtered": {"filter_eps": 2.0**-12},
}


def step(case, **options):
    if options.get("memory_budget"):
        options["memory_budget"] = one_pair(case)
    loss = fused_treg_loss(case.hidden, case.weight, **case.rest, **options).loss.sum()
    leaves = [x for x in (case.hidden, case.weight) if x.requires_grad]
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("way", WAYS)
def test_captured_in_a_cuda_graph(way, frozen, monkeypatch):
    """Replayed with other inputs in the same memory, a graph gives the bits of a step that looks at
    no value.
    """
    patch_looks(monkeypatch, lambda x: False)
    case, other = batch(frozen=frozen), batch(frozen=frozen)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(case, **WAYS[way])  # kernels compile, the vendor's library makes its workspace
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step(case, **WAYS[way])
    with torch.no_grad():
        for name in ("hidden", "weight"):
            getattr(case, name).copy_(getattr(other, name))
        for name, x in case.rest.items():
            if isinstance(x, torch.Tensor):
                x.copy_(other.rest[name])
    graph.replay()
    for a, b in zip(captured, step(case, **WAYS[way]), strict=True):
        assert torch.equal(a, b)
    monkeypatch.undo()
    for a, b in zip(captured, step(case, **WAYS[way]), strict=True):
        assert error(a, b) < 5e-3


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_the_torch_implementation(dtype):
    """It runs on a GPU too, in every dtype."""
    case = make_case([20, 30], D=64, V=512, padded=True, spread=0.1).at(dtype, "cuda")
    found = case.run(lambda *a, **k: fused_treg_loss(*a, **k, impl="torch"), upstream)
    exact = case.at(torch.float64, "cuda").run(reference.fused_treg_loss, upstream)
    for name in ("token_logps", "dhidden", "dweight"):
        assert error(found[name], exact[name]) < 4 * torch.finfo(dtype).eps, name


def test_on_a_side_stream_and_in_threads():
    """Four threads, each on a stream of its own, and autograd's own threads behind them: the bits
    of one alone.
    """
    cases = [batch(length=100 + 50 * i) for i in range(4)]
    alone = [step(c) for c in cases]
    torch.cuda.synchronize()
    together = [None] * 4

    def work(i):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            together[i] = step(cases[i])
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one():
    case = batch()
    there = case.at(torch.bfloat16, "cuda:1")
    assert torch.cuda.current_device() == 0
    for a, b in zip(step(case), step(there), strict=True):
        assert torch.equal(a, b.to(a.device))


@pytest.mark.parametrize("rows", [1, 5, 128])
def test_few_rows_split_the_vocabulary(rows):
    """dhidden of few rows is added up over parts of the vocabulary, in float32."""
    from treg.ops.head.gemm import split_product, times_weight, vocabulary_parts

    tile, weight = (
        torch.randn(rows, 32768, device="cuda").bfloat16(),
        torch.randn(32768, 512, device="cuda").bfloat16(),
    )
    assert vocabulary_parts(tile, weight) > 1
    out = torch.empty(rows, 512, dtype=torch.bfloat16, device="cuda")
    times_weight(tile, weight, out)
    exact = tile.double() @ weight.double()
    assert error(out, exact) < 2.0**-8
    assert error(split_product(tile, weight, 8).sum(0), exact) < 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_values(way):
    """A head of a realistic alignment, against float64."""
    case = make_case([130, 90, 200, 70], D=D, V=V, padded=True, spread=0.1)
    options = dict(WAYS[way])
    if options.pop("filter_eps", None):
        options["filter_eps"] = 0.0
    if options.pop("memory_budget", None):
        options["memory_budget"] = one_pair(case.at(torch.bfloat16, "cuda")) // 2
    plain = {k: v for k, v in options.items() if k == "reduction"}
    check_against_reference(
        case,
        lambda *a, **k: fused_treg_loss(*a, **k, **options),
        lambda *a, **k: reference.fused_treg_loss(*a, **k, **plain),
        upstream,
        torch.bfloat16,
        "cuda",
        plain_runs=4,
    )


def test_log_prob_error_of_bfloat16_inputs():
    """Root mean square <= 1e-5 nats at logits of tens, or twice that of exact sums of the vendor's
    float32 products.

    Logits are never rounded; how a GPU's matrix unit adds up is not the kernel's to choose.
    """
    weight = torch.randn(32000, 1024, device="cuda").mul_(0.1).bfloat16()
    target = torch.randint(0, 32000, (512,), device="cuda")
    hidden = (4 * torch.randn(512, 1024, device="cuda") + weight[target]).bfloat16()
    found = linear_logprobs(hidden, weight, target).logprobs
    exact = reference.linear_logprobs(hidden.double(), weight.double(), target).logprobs
    assert exact.abs().max() > 30
    logits = torch.mm(hidden, weight.T, out_dtype=torch.float32).double()
    vendor = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    ours, theirs = ((x - exact).square().mean().sqrt().item() for x in (found, vendor))
    assert ours < max(1e-5, 2 * theirs)
