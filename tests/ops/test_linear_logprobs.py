"""`linear_logprobs`, both implementations, against the dense reference in float64."""

import gc
import weakref

import pytest
import torch
from helpers import (
    DEVICE,
    DTYPES,
    IMPLS,
    QUICK_IMPLS,
    Case,
    assert_within_budget,
    check_against_reference,
    device_of,
    error,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from looks import patch_looks
from memory import PeakMemory
from torch.utils.flop_counter import FlopCounterMode

import treg.ops.plans.columns
import treg.ops.plans.kept
from treg.ops import linear_logprobs, reference
from treg.ops.head import Head, make_tiles, torch_tiles
from treg.ops.head import memory as budgets
from treg.ops.head.torch_tiles import TorchTiles
from treg.ops.head.triton_tiles import TritonTiles
from treg.ops.plans.kept import kept_rows

OUTPUTS = ("lse", "entropy", "mean_logit", "is_top1", "log_sum_sq_probs")
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.3, "temperature": 0.7},
    "all": {"bias": True, "softcap": 3.0, "logit_scale": 1.7, "temperature": 1.3},
}


@pytest.fixture
def cheap_passes(monkeypatch):
    """Few rows are worth keeping already, and no tile has more than 16."""
    monkeypatch.setattr(budgets, "PASS_ROWS", {"cpu": 2})
    monkeypatch.setattr(budgets, "PASS_ROWS_GPU", 2)
    for tiles in (TorchTiles, TritonTiles):
        monkeypatch.setattr(tiles, "max_rows", 16)


@pytest.fixture
def kept(monkeypatch):
    """How many rows each call of a test kept, and of how many."""
    seen = []
    score = treg.ops.plans.kept.score_rows

    def spy(batch, outputs, stash):
        seen.append((0 if stash is None else stash.shape[0], len(batch.rows)))
        return score(batch, outputs, stash)

    monkeypatch.setattr(treg.ops.plans.kept, "score_rows", spy)
    return seen


def make_case(
    N=37, D=80, V=517, *, bias=False, spread=0.3, ignored=3, outputs=OUTPUTS, **head
) -> Case:
    """Random rows; the first and some later ones ignored. Logits of standard deviation spread *
    sqrt(D).
    """
    target = torch.randint(0, V, (N,))
    target[torch.randperm(N)[:ignored]] = -100
    rest = {"target": target, "outputs": outputs, **head}
    return Case(
        torch.randn(N, D), torch.randn(V, D) * spread, torch.randn(V) if bias else None, rest
    )


def weighted(out):
    """A different upstream gradient for every token."""
    g = torch.linspace(
        -1.0, 2.0, out.logprobs.numel(), device=out.logprobs.device, dtype=out.logprobs.dtype
    )
    return (out.logprobs.flatten() * g).sum()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_values_statistics_and_gradients(impl, dtype, head):
    case = make_case(**HEADS[head])
    check_against_reference(
        case,
        linear_logprobs,
        reference.linear_logprobs,
        weighted,
        dtype,
        device_of(impl),
        impl=impl,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_head(impl, dtype):
    """Two products: dhidden is made in the forward and takes the upstream gradient afterwards."""
    case = make_case(softcap=5.0)

    def fn(hidden, weight, **kwargs):
        return linear_logprobs(hidden, weight.detach(), **kwargs)

    def plain(hidden, weight, **kwargs):
        return reference.linear_logprobs(hidden, weight.detach(), **kwargs)

    found = check_against_reference(case, fn, plain, weighted, dtype, device_of(impl), impl=impl)
    assert not found["dweight"].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_hidden(impl):
    """Gradients of weight and bias alone."""
    case = make_case(bias=True)

    def frozen(fn):
        return lambda hidden, weight, **kwargs: fn(hidden.detach(), weight, **kwargs)

    check_against_reference(
        case,
        frozen(linear_logprobs),
        frozen(reference.linear_logprobs),
        weighted,
        torch.float32,
        device_of(impl),
        impl=impl,
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_logprobs_without_rounded_logits(impl):
    """rms error 1e-5 nats at logits of up to some 50: a thousandth of what bfloat16 logits
    leave.
    """
    case = make_case(N=64, D=256, V=1031, spread=0.8, ignored=0).at(torch.bfloat16)
    exact = case.at(torch.float64).run(reference.linear_logprobs, weighted)["logprobs"]
    options = {"logits_dtype": torch.float32} if impl == "torch" else {}
    found = case.at(torch.bfloat16, device_of(impl)).run(
        linear_logprobs, weighted, impl=impl, **options
    )["logprobs"]
    rms = (found.cpu().double() - exact).square().mean().sqrt().item()
    assert exact.abs().max() > 30
    assert rms <= 1e-5, f"rms error {rms:.2e} nats"
    assert (found <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_targets_far_below_the_maximum(impl, dtype):
    """Targets up to hundreds of nats below the most likely token, in the row's first, a middle and
    its last column.

    Beyond 2**48 above the target's logit the stash takes another offset and is rescaled: the frozen
    head shows it.
    """
    V = 300
    case = make_case(N=12, D=64, V=V, ignored=0, outputs=(), spread=0.05)
    peaks = torch.linspace(0, 300, 12)
    columns = torch.arange(12) * 25 % V
    case.weight[columns] += peaks[:, None] * case.hidden / case.hidden.square().sum(1, keepdim=True)
    case.rest["target"] = torch.tensor([0, V - 1, 150, 1, 299, 7, 128, 127, 255, 256, 42, 43])
    z = case.hidden @ case.weight.T
    assert (z.amax(1) - z.gather(1, case.rest["target"][:, None])[:, 0]).max() > 100
    for frozen in (False, True):

        def head(fn, frozen=frozen):
            return lambda h, w, **kwargs: fn(h, w.detach() if frozen else w, **kwargs)

        check_against_reference(
            case,
            head(linear_logprobs),
            head(reference.linear_logprobs),
            weighted,
            dtype,
            device_of(impl),
            impl=impl,
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_certain_targets(impl):
    """log p near 0 keeps its relative accuracy in Triton, and is never above 0 in either."""
    case = make_case(N=16, D=32, V=257, ignored=0, outputs=(), spread=0.01)
    case.rest["target"] = torch.randperm(257)[:16]
    case.weight[case.rest["target"]] += (
        torch.linspace(4, 14, 16)[:, None] * case.hidden / case.hidden.square().sum(1)[:, None]
    )
    exact = case.at(torch.float64).run(reference.linear_logprobs, weighted)["logprobs"]
    found = (
        case.at(torch.float32, device_of(impl))
        .run(linear_logprobs, weighted, impl=impl)["logprobs"]
        .cpu()
    )
    assert exact.min() > -3 and exact.max() > -1e-3
    assert (found <= 0).all()
    if impl == "triton":
        assert ((found.double() - exact) / exact).abs().max() < 3e-5
    else:
        assert (found.double() - exact).abs().max() < 2e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "shape",
    [(0, 16, 17), (1, 1, 1), (1, 16, 2), (5, 80, 517), (129, 33, 128), (64, 64, 256)],
    ids=str,
)
def test_edges_of_shape(impl, shape):
    """No rows, one row, one token of vocabulary, sizes at and beside a tile's."""
    N, D, V = shape
    case = make_case(N, D, V, ignored=0)
    check_against_reference(
        case,
        linear_logprobs,
        reference.linear_logprobs,
        weighted,
        torch.float32,
        device_of(impl),
        impl=impl,
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_all_ignored(impl):
    case = make_case(N=6, ignored=6)
    found = case.at(torch.float32, device_of(impl)).run(linear_logprobs, weighted, impl=impl)
    for name, x in found.items():
        assert not x.any(), name


LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.T.contiguous().T,
    "strided rows": lambda x: x.repeat_interleave(2, 0)[::2],
    "strided columns": lambda x: x.repeat_interleave(3, 1)[:, ::3],
    "offset": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 1))[3:-1, 1:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_layouts(impl, layout):
    """Any strides give the bits of the contiguous ones up to rounding; so do leading dimensions."""
    device = device_of(impl)
    case = make_case(N=24, D=48, V=133)
    h, w = case.hidden.to(device), case.weight.to(device)
    target = case.rest["target"].to(device)
    exact = reference.linear_logprobs(h.double(), w.double(), target).logprobs
    got = linear_logprobs(LAYOUTS[layout](h), LAYOUTS[layout](w), target, impl=impl).logprobs
    assert_within_budget("logprobs", got, exact, 0.0, torch.float32)
    reshaped = linear_logprobs(
        h.reshape(2, 3, 4, 48), w, target.reshape(2, 3, 4), impl=impl
    ).logprobs
    assert reshaped.shape == (2, 3, 4)
    assert torch.equal(reshaped.flatten(), linear_logprobs(h, w, target, impl=impl).logprobs)


@settings(max_examples=16, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    N=st.integers(0, 70),
    D=st.integers(1, 90),
    V=st.integers(1, 400),
    head=st.sampled_from(sorted(HEADS)),
    dtype=st.sampled_from(DTYPES),
    frozen=st.booleans(),
    budget_rows=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("impl", IMPLS)
def test_any_shape_option_and_budget(
    impl, N, D, V, head, dtype, frozen, budget_rows, seed, cheap_passes
):
    torch.manual_seed(seed)
    case = make_case(N, D, V, ignored=min(N, seed % 5), outputs=(), **HEADS[head])

    def with_head(fn):
        return lambda h, w, **kwargs: fn(h, w.detach() if frozen else w, **kwargs)

    budget = least_budget(case, dtype, impl) * budget_rows
    check_against_reference(
        case,
        with_head(linear_logprobs),
        with_head(reference.linear_logprobs),
        weighted,
        dtype,
        device_of(impl),
        plain_runs=4,
        impl=impl,
        memory_budget=budget,
    )


def only(fn, needs: str):
    """fn where no other of hidden, weight and bias takes a gradient."""

    def run(hidden, weight, bias, **kwargs):
        given = {"hidden": hidden, "weight": weight, "bias": bias}
        given = {k: x if k in needs.split() else x.detach() for k, x in given.items()}
        return fn(**given, **kwargs)

    return run


def least_budget(case: Case, dtype: torch.dtype, impl: str) -> int:
    """Bytes for one row, as the error for one byte says."""
    case = case.at(dtype, device_of(impl))
    target = case.rest["target"]
    with pytest.raises(ValueError, match=r"^memory_budget: expected at least") as caught:
        kwargs = {k: v for k, v in case.rest.items() if k not in ("target", "outputs")}
        linear_logprobs(
            case.hidden,
            case.weight.detach(),
            target,
            bias=case.bias,
            impl=impl,
            memory_budget=1,
            **kwargs,
        )
    return 2 * int(str(caught.value).split()[4])


def tiles_of(case: Case, dtype: torch.dtype, impl: str):
    case, head = case.at(dtype, device_of(impl)), {k: case.rest.get(k) for k in ("softcap",)}
    return make_tiles(impl, Head(case.weight.detach(), case.bias, **head), None)


def budget_for(case: Case, dtype: torch.dtype, impl: str, rows: int) -> int:
    """Bytes that hold `rows` stashed rows."""
    tiles = tiles_of(case, dtype, impl)
    return tiles.fixed_bytes + rows * tiles.row_bytes(stash=True, outputs=case.rest["outputs"])


@pytest.mark.pairwise
@pytest.mark.parametrize("needs", ["hidden weight bias", "weight bias", "hidden weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ignored", [0, 7])
@pytest.mark.parametrize("impl", IMPLS)
def test_rows_kept_beside_rows_computed_again(impl, ignored, dtype, needs, kept, cheap_passes):
    """The stash of some rows is kept for the backward, the logits of the others are computed twice:
    one gradient.
    """
    case = make_case(
        N=60, D=24, V=300, ignored=ignored, bias=True, softcap=4.0, outputs=("entropy",)
    )

    check_against_reference(
        case,
        only(linear_logprobs, needs),
        only(reference.linear_logprobs, needs),
        weighted,
        dtype,
        device_of(impl),
        impl=impl,
        memory_budget=budget_for(case, dtype, impl, 40),
    )
    count = 60 if impl == "triton" and DEVICE == "cuda" else 60 - ignored
    assert kept[0][1] == count and 20 < kept[0][0] < 40


@pytest.mark.pairwise
@pytest.mark.parametrize("needs", ["hidden weight bias", "weight", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ignored", [0, 7])
@pytest.mark.parametrize("impl", IMPLS)
def test_least_memory(impl, ignored, dtype, needs, monkeypatch):
    """The gradients of one part of the vocabulary after the other."""
    parts = []
    original = treg.ops.plans.columns.add_transposed
    monkeypatch.setattr(
        treg.ops.plans.columns,
        "add_transposed",
        lambda *a, **k: (parts.append(a), original(*a, **k)),
    )
    case = make_case(
        N=60,
        D=24,
        V=300,
        ignored=ignored,
        bias=True,
        softcap=4.0,
        logit_scale=1.5,
        outputs=("entropy",),
    )
    for tiles in (TorchTiles, TritonTiles):
        monkeypatch.setattr(
            tiles, "column_bytes", lambda self, rows: 1 << 40
        )  # as few words at a time as there may be

    check_against_reference(
        case,
        only(linear_logprobs, needs),
        only(reference.linear_logprobs, needs),
        weighted,
        dtype,
        device_of(impl),
        impl=impl,
        memory_budget="least",
    )
    assert (
        len(parts) == {"hidden weight bias": 6, "weight": 3, "bias": 0}[needs]
    )  # 128, 128 and 44 words


@pytest.mark.usefixtures("open_operators")
def test_least_memory_has_no_float32_sum_of_dweight(monkeypatch):
    """Beyond inputs and gradients: the budget, and dhidden in float32."""
    monkeypatch.setattr(torch_tiles, "BLOCK", {"cpu": 40_000})
    monkeypatch.setattr(budgets, "LEAST_BUDGET", {"cpu": 14 << 20})
    case = make_case(N=200, D=64, V=40_000, spread=0.05, outputs=()).at(torch.bfloat16)
    with PeakMemory() as memory:
        out = linear_logprobs(case.hidden, case.weight, memory_budget="least", **case.rest)
        weighted(out).backward()
    gradients = case.hidden.nbytes + case.weight.nbytes
    assert (
        memory.peak <= gradients + budgets.LEAST_BUDGET["cpu"] + 8 * case.hidden.numel() + 200 * 200
    )
    with PeakMemory() as small:
        out = linear_logprobs(
            case.hidden, case.weight, memory_budget=budgets.LEAST_BUDGET["cpu"], **case.rest
        )
        weighted(out).backward()
    assert small.peak > memory.peak + case.weight.nbytes


def test_dweight_of_many_tiles_is_rounded_once(cheap_passes, kept):
    """bfloat16: dweight is a float32 sum unless one product makes it."""
    case = make_case(N=400, D=16, V=150, ignored=0, outputs=())
    runs = [
        case.at(torch.bfloat16).run(linear_logprobs, weighted, memory_budget=budget)
        for budget in (None, budget_for(case, torch.bfloat16, "torch", 60))
    ]
    assert kept[0] == (400, 400) and 0 < kept[1][0] < 60
    exact = (
        case.at(torch.bfloat16)
        .at(torch.float64)
        .run(reference.linear_logprobs, weighted)["dweight"]
    )
    one, many = (error(run["dweight"], exact) for run in runs)
    assert many < 1.3 * one


@pytest.mark.usefixtures("open_operators")
def test_matrix_products(kept):
    """1 product forward only, 2 with a frozen head, 3 with a trainable one where its stash is kept,
    4 where not.
    """
    N, D, V = 900, 32, 500
    case = make_case(N, D, V, bias=True, ignored=0, outputs=())
    product = 2 * N * D * V

    def products(needs, dtype=torch.float32, **options):
        at = case.at(dtype)
        given = {"hidden": at.hidden, "weight": at.weight, "bias": at.bias}
        given = {k: x if k in needs.split() else x.detach() for k, x in given.items()}
        with FlopCounterMode(display=False) as counter:
            out = linear_logprobs(target=at.rest["target"], **given, **options)
            if needs:
                weighted(out).backward()
        return counter.get_total_flops() / product

    assert products("") == 1
    assert products("hidden") == 2
    assert products("hidden weight bias") == pytest.approx(
        3, abs=0.05
    )  # dbias: a product with one column
    assert products("hidden weight") == 3
    assert products("weight") == 2
    assert products("bias") == pytest.approx(1, abs=0.05)
    assert products("hidden weight", memory_budget="least") == 4
    assert products("hidden", memory_budget="least") == 2
    assert (
        products("weight", torch.float16) == 3
    )  # 4 with dhidden, whose float16 product the counter does not see
    assert (
        products("hidden weight", memory_budget=budget_for(case, torch.float32, "torch", 30)) == 4
    )
    kept.clear()
    some = products("hidden weight", memory_budget=budget_for(case, torch.float32, "torch", 700))
    assert kept[0][1] == N and 500 < kept[0][0] < 700
    assert some == pytest.approx(4 - kept[0][0] / N, abs=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
def test_kept_rows_fit_and_are_as_many_as_pay(impl):
    """Beside a tile of the others, within the budget; all products together are within 15 % of the
    fewest.
    """
    case = make_case(N=1, D=16, V=1000, outputs=())
    tiles = tiles_of(case, torch.float32, impl)
    P, row = (
        budgets.pass_rows(case.hidden.to(device_of(impl)).device),
        tiles.row_bytes(stash=True),
    )
    partly = 0
    for capacity in (1, 40, 100, 700, 3000):
        budget = budget_for(case, torch.float32, impl, capacity)
        for count in (capacity, capacity + 1, 2 * capacity, 1000, 20000):
            n = kept_rows(tiles, budget, count, ())
            if count <= capacity:
                assert n == count
                continue
            assert 0 <= n < capacity
            step = budgets.tile_step(tiles, budget, stash=True, reserved=n * 4000)
            assert tiles.fixed_bytes + n * 4000 + step * row <= budget

            def cost(k, count=count, capacity=capacity):
                return count - k + P * (count - k) / min(tiles.max_rows, capacity - k) + P * (k > 0)

            assert 3 * count + cost(n) <= 1.15 * (3 * count + min(map(cost, range(capacity))))
            partly += n > 0
    assert partly >= 5


MEMORY_CASES = [
    pytest.param(*x.values, dtype, id=f"{dtype}-{x.id}", marks=x.marks)
    for dtype in (torch.float32, torch.bfloat16)
    for x in (IMPLS if dtype == torch.float32 else QUICK_IMPLS)
]


@pytest.mark.parametrize(("impl", "dtype"), MEMORY_CASES)
@pytest.mark.usefixtures("open_operators")
def test_memory_stays_within_the_budget(impl, dtype, monkeypatch, kept):
    """Bytes alive at once, beyond inputs: the budget, a float32 dweight, dhidden, and [N]-sized
    rows; none after.
    """
    D, V = 24, 4000 if impl == "torch" else 2000
    monkeypatch.setattr(
        torch_tiles, "BLOCK", {"cpu": V}
    )  # its buffers would hide a stash of this size
    for N in (60, 130, 1200) if impl == "torch" else (60, 130):
        case = make_case(N, D, V, spread=0.05, outputs=())
        budget = budget_for(case, dtype, impl, 90)
        case = case.at(dtype, device_of(impl))
        with PeakMemory(collect=impl == "triton") as memory:
            out = linear_logprobs(
                case.hidden, case.weight, impl=impl, memory_budget=budget, **case.rest
            )
            forward = memory.peak
            weighted(out).backward()
            gc.collect()
            left = sum(size for ref, size in memory._alive.values() if not ref.expired())
        gradients, rows = case.hidden.nbytes + 4 * case.weight.numel(), 20 * 8 * N
        assert forward <= budget + rows, f"{forward} bytes in the forward at N={N}"
        assert memory.peak <= max(budget, gradients) + gradients + rows, (
            f"{memory.peak} bytes at N={N}"
        )
        assert left <= gradients + rows, f"{left} bytes after the backward at N={N}"
    assert all(n > 0 for n, _ in kept)
    assert kept[0][0] == kept[0][1] and kept[1][0] < kept[1][1]


@pytest.mark.parametrize("some", [False, True], ids=["all kept", "some kept"])
@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice(impl, some, cheap_passes, kept):
    """retain_graph gives the same bits again; log-probs used twice give twice the gradient."""
    case = make_case(N=60, D=24, V=300, bias=True, ignored=0, outputs=())
    budget = budget_for(case, torch.float32, impl, 40) if some else None
    case = case.at(torch.float32, device_of(impl))
    leaves = (case.hidden, case.weight, case.bias)
    out = linear_logprobs(
        case.hidden, case.weight, bias=case.bias, impl=impl, memory_budget=budget, **case.rest
    )
    first = torch.autograd.grad(weighted(out), leaves, retain_graph=True)
    second = torch.autograd.grad(weighted(out), leaves, retain_graph=True)
    double = torch.autograd.grad(weighted(out) + weighted(out), leaves)
    assert (0 < kept[0][0] < 60) == some
    for a, b, c in zip(first, second, double, strict=True):
        assert a.any() and torch.equal(a, b)
        assert error(c, 2 * a) < 1e-6


@pytest.mark.parametrize("room", [40, 100], ids=["some kept", "all kept"])
@pytest.mark.parametrize("trained", ["hidden weight bias", "hidden", "bias", "hidden bias"])
@pytest.mark.parametrize("impl", IMPLS)
def test_nan_upstream_at_ignored_rows(impl, trained, room, monkeypatch, cheap_passes):
    """As `0 * inf` in a loss leaves it: what is not scored takes no gradient, looked at or not."""
    case = make_case(N=60, D=24, V=300, ignored=9, outputs=(), bias=True)
    budget = budget_for(case, torch.float32, impl, room)

    def upstream(out):
        fill = case.rest["target"].to(out.logprobs.device) == -100
        return (out.logprobs * torch.where(fill, float("nan"), 1.5)).sum()

    def finite(out):
        return (out.logprobs * 1.5).sum()

    for looks in (True, False):
        if not looks:
            patch_looks(monkeypatch, lambda x: False)
        runs = []
        for loss in (upstream, finite):
            at = case.at(torch.float32, device_of(impl))
            for name in ("hidden", "weight", "bias"):
                getattr(at, name).requires_grad_(name in trained)
            runs.append(at.run(linear_logprobs, loss, impl=impl, memory_budget=budget))
        for name in runs[0]:
            assert torch.equal(runs[0][name], runs[1][name]), name
            assert runs[0][name].isfinite().all(), name


UPSTREAMS = {
    "sum": lambda out: out.logprobs.sum(),  # one number, expanded
    "every second": lambda out: (out.logprobs[::2] * 3).sum(),
    "reversed": lambda out: (
        out.logprobs.flip(0) * torch.arange(out.logprobs.shape[0]).to(out.logprobs)
    ).sum(),
    "strided": lambda out: torch.stack([out.logprobs, -2 * out.logprobs], 1).square().sum(),
}


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("target", ["plain", "strided", "expanded"])
@pytest.mark.parametrize("impl", IMPLS)
def test_layouts_of_rows(impl, target, upstream):
    """Upstream gradients and targets of any strides; nothing ignored, so that rows are taken as
    they lie.
    """
    case = make_case(N=40, D=16, V=90, ignored=0, outputs=())
    y = case.rest["target"]
    case.rest["target"] = {
        "plain": y,
        "strided": y.repeat_interleave(2)[::2],
        "expanded": y[:1].expand(40),
    }[target]
    check_against_reference(
        case,
        linear_logprobs,
        reference.linear_logprobs,
        UPSTREAMS[upstream],
        torch.float32,
        device_of(impl),
        impl=impl,
    )


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_nan_at_ignored_rows_stays_there(impl, frozen, monkeypatch):
    """Also where nobody looks which rows are ignored, as on a GPU."""
    patch_looks(monkeypatch, lambda x: False)
    case = make_case(N=20, bias=True, ignored=5, outputs=OUTPUTS)
    clean = case.at(torch.float32, device_of(impl))
    case.hidden[case.rest["target"] == -100] = float("nan")
    dirty = case.at(torch.float32, device_of(impl))
    for c in (clean, dirty):
        c.weight.requires_grad_(not frozen)
        c.bias.requires_grad_(not frozen)
    clean, dirty = (c.run(linear_logprobs, weighted, impl=impl) for c in (clean, dirty))
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name


@pytest.mark.parametrize("N", [20, 128])
@pytest.mark.parametrize(
    "outputs", [(), ("lse", "entropy", "is_top1", "log_sum_sq_probs")], ids=["", "statistics"]
)
@pytest.mark.parametrize("impl", IMPLS)
def test_vocabulary_masked_by_the_bias(impl, outputs, N):
    """A bias of -inf takes tokens out; every statistic stays finite."""
    case = make_case(N=N, V=300, bias=True, ignored=0, outputs=outputs)
    case.bias[[3, 150, 299]] = -float("inf")
    case.bias[128:256] = -float("inf")  # a whole tile
    case.rest["target"] = torch.randint(4, 100, (N,))
    check_against_reference(
        case,
        linear_logprobs,
        reference.linear_logprobs,
        weighted,
        torch.float32,
        device_of(impl),
        plain_runs=2,
        impl=impl,
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_weight_is_saved_by_autograd_alone(impl):
    """After the backward nothing of the graph holds the weight; a weight changed before it is
    noticed.
    """
    case = make_case(N=4, outputs=()).at(torch.float32, device_of(impl))
    weight = case.weight * 1.0
    out = linear_logprobs(case.hidden, weight, impl=impl, **case.rest).logprobs
    with torch.no_grad():
        weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    weight = case.weight * 1.0
    gone = weakref.ref(weight)
    out = linear_logprobs(case.hidden, weight, impl=impl, **case.rest).logprobs
    out.sum().backward()
    del weight
    gc.collect()
    assert gone() is None and out is not None


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("impl", IMPLS)
def test_no_output_is_left_unwritten(impl, trainable, poisoned):
    """With every allocation poisoned by NaN nothing of it comes out."""
    case = make_case(N=19, D=40, V=133, bias=True, softcap=5.0).at(torch.float32, device_of(impl))
    case.weight.requires_grad_(trainable)
    case.bias.requires_grad_(trainable)
    found = case.run(linear_logprobs, weighted, impl=impl)
    for name, x in found.items():
        assert torch.isfinite(x).all(), name


@pytest.mark.parametrize("impl", IMPLS)
def test_same_inputs_same_bits(impl):
    case = make_case(N=150, D=70, V=300, bias=True).at(torch.bfloat16, device_of(impl))
    first, second = (case.run(linear_logprobs, weighted, impl=impl) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_an_impossible_target_gives_nan_not_a_number(impl):
    """Where values are not checked (a GPU), a target outside the vocabulary shows as NaN; torch
    raises.
    """
    from treg_kernels import logprob_forward
    from treg_kernels.tiles import Scalars

    target = torch.tensor([1, 7, -3, 2**40, -100], device=DEVICE)
    hidden, weight = torch.randn(5, 8, device=DEVICE), torch.randn(7, 8, device=DEVICE)
    stash = torch.empty(5, 7, device=DEVICE)
    for tile in (None, stash):
        got = logprob_forward(
            hidden, weight, target, None, Scalars.of(1.0, None, 1.0), -100, (), tile
        )["logprobs"].cpu()
        assert torch.isfinite(got[[0, 4]]).all() and got[4] == 0
        assert got[1:4].isnan().all()


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
def test_float64(trainable):
    """The torch implementation holds no number in float32 on the way."""
    case = make_case(**HEADS["all"]).at(torch.float64)
    case.weight.requires_grad_(trainable)
    case.bias.requires_grad_(trainable)
    exact = case.run(reference.linear_logprobs, weighted)
    for name, x in case.run(linear_logprobs, weighted).items():
        assert error(x, exact[name]) < 1e-14, name


def test_gradcheck():
    """The torch implementation in float64, trainable and frozen, in several tiles."""
    case = make_case(N=5, D=3, V=11, bias=True, ignored=1, outputs=()).at(torch.float64)
    options = {"softcap": 2.0, "logit_scale": 0.7, "temperature": 1.2}

    def fn(h, w, b):
        return linear_logprobs(h, w, case.rest["target"], bias=b, **options).logprobs

    assert torch.autograd.gradcheck(fn, (case.hidden, case.weight, case.bias))
    assert torch.autograd.gradcheck(
        lambda h: fn(h, case.weight.detach(), case.bias.detach()), (case.hidden,)
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_only_logprobs_carry_a_gradient(impl):
    case = make_case(N=4).at(torch.float32, device_of(impl))
    out = linear_logprobs(case.hidden, case.weight, impl=impl, **case.rest)
    assert out.logprobs.requires_grad
    for name in OUTPUTS:
        assert not getattr(out, name).requires_grad, name
    upstream = torch.ones_like(out.logprobs, requires_grad=True)
    grad = torch.autograd.grad((out.logprobs * upstream).sum(), case.hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_grad_saves_nothing(impl):
    case = make_case(N=4, outputs=()).at(torch.float32, device_of(impl))
    with torch.no_grad():
        assert not linear_logprobs(
            case.hidden, case.weight, impl=impl, **case.rest
        ).logprobs.requires_grad


def test_autocast_casts_both_operands():
    """float32 master weights under autocast: the numbers of bfloat16 operands, gradients in
    float32.
    """
    case = make_case(N=20, outputs=()).at(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprobs(case.hidden, case.weight, case.rest["target"])
    h, w = case.hidden.detach().bfloat16(), case.weight.detach().bfloat16()
    assert torch.equal(out.logprobs, linear_logprobs(h, w, case.rest["target"]).logprobs)
    out.logprobs.sum().backward()
    exact = case.at(torch.float64).run(reference.linear_logprobs, lambda o: o.logprobs.sum())
    assert case.weight.grad.dtype == torch.float32
    assert error(case.weight.grad, exact["dweight"]) < 2e-2


@pytest.mark.parametrize("budget", [None, "least"])
def test_an_ignore_index_beyond_the_vocabulary_while_nobody_looks(
    budget, cheap_passes, monkeypatch
):
    """As in a CUDA graph: ignored rows are computed, and their target must index nothing."""
    case = make_case(outputs=()).at(torch.float32)
    ignored = case.weight.shape[0] + 5
    target = case.rest["target"].masked_fill(case.rest["target"] == -100, ignored)
    assert (target == ignored).any()
    if budget is None:
        budget = budget_for(case, torch.float32, "torch", 2)
    options = case.rest | {"target": target, "ignore_index": ignored, "memory_budget": budget}
    leaves = (case.hidden, case.weight)

    def gradients():
        return torch.autograd.grad(weighted(linear_logprobs(*leaves, **options)), leaves)

    exact = gradients()
    patch_looks(monkeypatch, lambda x: False)
    for a, b in zip(gradients(), exact, strict=True):
        assert error(a, b) < 1e-6


@pytest.mark.usefixtures("open_operators")
def test_a_frozen_head_is_not_cast_again_in_the_backward():
    """Under autocast: what the backward multiplies by was made in the forward."""
    hidden, weight = torch.randn(8, 64, requires_grad=True), torch.randn(4000, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprobs(hidden, weight, torch.arange(8))
    with PeakMemory() as memory:
        out.logprobs.sum().backward()
    assert 0 < memory.peak < weight.numel()


def test_a_backward_under_autocast_keeps_float32():
    """What was computed in float32 is differentiated in float32."""
    case = make_case(N=20, outputs=()).at(torch.float32)
    plain = case.run(linear_logprobs, weighted)
    out = linear_logprobs(case.hidden, case.weight, case.rest["target"])
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(weighted(out), (case.hidden, case.weight))
    assert torch.equal(grads[0], plain["dhidden"]) and torch.equal(grads[1], plain["dweight"])


def test_rounded_logits_are_an_option_not_a_surprise():
    """bfloat16 on a CPU: rounded logits by default, as documented; exact ones on request."""
    case = make_case(N=64, D=64, V=1000, ignored=0, outputs=()).at(torch.bfloat16)
    exact = case.at(torch.float64).run(reference.linear_logprobs, weighted)["logprobs"]
    errors = {
        d: error(
            linear_logprobs(case.hidden, case.weight, case.rest["target"], logits_dtype=d).logprobs,
            exact,
        )
        for d in (None, torch.bfloat16, torch.float32)
    }
    assert errors[None] == errors[torch.bfloat16] > 1e-4
    assert errors[torch.float32] < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offset", [1000.0, -10_000.0])
def test_a_common_offset_of_the_logits_costs_no_digits(impl, offset):
    """All logits of a row rise alike: the rounding of their logsumexp must not multiply all
    probabilities of the row, whose sum then leaves the gradient.
    """
    case = make_case(N=60, D=24, V=300, ignored=5, outputs=())
    case.hidden[:, 0] = 1.0
    case.weight[:, 0] += offset
    check_against_reference(
        case,
        linear_logprobs,
        reference.linear_logprobs,
        weighted,
        torch.float32,
        device_of(impl),
        impl=impl,
        memory_budget="least",
    )


@pytest.mark.parametrize("budget", [None, "least"])
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_scored(impl, rows, budget):
    """No row, or none with a target: gradients of 0."""
    device = device_of(impl)
    hidden = torch.randn(rows, 8, device=device, requires_grad=True)
    weight = torch.randn(30, 8, device=device, requires_grad=True)
    target = torch.full((rows,), -100, device=device)
    out = linear_logprobs(hidden, weight, target, impl=impl, memory_budget=budget).logprobs
    dhidden, dweight = torch.autograd.grad(out.sum(), (hidden, weight))
    assert not out.any() and not dhidden.any() and not dweight.any()


@pytest.mark.parametrize("needs", ["hidden weight bias", "hidden"])
@pytest.mark.parametrize("budget", [None, "least", "few rows"])
@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_gives_gradients_in_float32(impl, budget, needs, cheap_passes):
    """Of float32 tensors: the products are bfloat16, and no sum is rounded to it at the end."""
    case = make_case(N=60, D=24, V=300, bias=True, outputs=())
    if budget == "few rows":
        budget = budget_for(case, torch.bfloat16, impl, 40)
    device = device_of(impl)
    runs = []
    for dtype in (torch.float32, torch.bfloat16):
        at = case.at(torch.bfloat16).at(dtype, device)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.float32):
            fn = only(linear_logprobs, needs)
            runs.append(at.run(fn, weighted, impl=impl, memory_budget=budget))
    exact = (
        case.at(torch.bfloat16)
        .at(torch.float64)
        .run(only(reference.linear_logprobs, needs), weighted)
    )
    for name in ("dhidden", "dweight") if "weight" in needs else ("dhidden",):
        wide, narrow = (run[name] for run in runs)
        assert wide.dtype == torch.float32 and narrow.dtype == torch.bfloat16
        assert error(wide.bfloat16(), narrow) < 1e-3  # the same numbers, rounded later
        assert error(wide, exact[name]) <= error(narrow, exact[name])


def forward_mode(hidden, weight, target):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(hidden, torch.ones_like(hidden))
        linear_logprobs(dual, weight, target)


def of_func(transform):
    def call(hidden, weight, target):
        def total(h):
            return linear_logprobs(h, weight, target).logprobs.sum()

        transform(total, hidden)

    return call


TRANSFORMS = {
    "forward_ad": forward_mode,
    "jvp": of_func(lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))),
    "jacfwd": of_func(lambda f, x: torch.func.jacfwd(f)(x)),
    "grad": of_func(lambda f, x: torch.func.grad(f)(x)),
    "vmap": of_func(lambda f, x: torch.func.vmap(f)(x.unsqueeze(0))),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_refused_by_name(transform):
    """Once silently zero in forward mode."""
    hidden, weight = torch.randn(4, 8), torch.randn(30, 8)
    with pytest.raises(RuntimeError, match=r"^hidden: expected a .*loss\.backward\(\)"):
        TRANSFORMS[transform](hidden, weight, torch.randint(30, (4,)))
