"""`fused_treg_loss`, both implementations and every way of computing it, against the dense
reference in float64.
"""

import itertools
import sys

import pytest
import torch
from helpers import (
    DTYPES,
    EPS,
    IMPLS,
    QUICK_IMPLS,
    Case,
    assert_within_budget,
    check_against_reference,
    device_of,
    error,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from looks import patch_looks
from memory import PeakMemory
from pair_case import make_case, upstream
from torch.utils.flop_counter import FlopCounterMode

import treg.ops.call
import treg.ops.plans.pair_groups
import treg.ops.treg_loss
from treg.losses import OBJECTIVES
from treg.ops import fused_treg_loss, reference
from treg.ops.head import Head, make_tiles, torch_tiles
from treg.ops.head.selection import RowSelection

PHASES = [Phase.explicit, Phase.generate]  # shrinking runs the interpreter for minutes


def check(case: Case, dtype, impl, fn=fused_treg_loss, plain=reference.fused_treg_loss, **options):
    return check_against_reference(
        case, fn, plain, upstream, dtype, device_of(impl), plain_runs=4, impl=impl, **options
    )


@pytest.fixture
def modes(monkeypatch):
    """The ways that the calls of a test took."""
    seen = set()

    def plan_groups(*args):
        groups = real_groups(*args)
        seen.update(g.mode for g in groups)
        return groups

    def choose_plan(*args):
        plan = real_choice(*args)
        call = args[0]
        if plan.name == "kept" and call.summed and call.dtype != torch.float16:
            seen.add("at once")
        return plan

    real_groups = treg.ops.plans.pair_groups.plan_groups
    real_choice = treg.ops.treg_loss.choose_plan
    monkeypatch.setattr(treg.ops.plans.pair_groups, "plan_groups", plan_groups)
    monkeypatch.setattr(treg.ops.treg_loss, "choose_plan", choose_plan)
    return seen


def budget_for(
    case: Case, impl: str, dtype: torch.dtype, rows: int, sums: int = 0, **options
) -> int:
    """Bytes that hold `rows` stashed rows and `sums` float32 [V, D] buffers."""
    case = case.at(dtype)
    tiles = make_tiles(
        impl, Head(case.weight.detach(), case.bias, softcap=case.rest.get("softcap")), None
    )
    row = tiles.row_bytes(stash=True, outputs=case.rest.get("outputs", ()))
    return tiles.fixed_bytes + rows * row + sums * 4 * case.weight.numel()


WITH_KL = [name for name, row in OBJECTIVES.items() if "kl" in row.needs]
OF_ONE_MODEL = [name for name in OBJECTIVES if name not in WITH_KL]


@pytest.mark.parametrize("loss_type", OF_ONE_MODEL)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_objective(impl, loss_type, modes):
    check(make_case(loss_type=loss_type), torch.float32, impl)
    assert modes == {"at once"}


def plain_with_kl(hidden, weight, ref_hidden, ref_weight, target, **rest):
    """`fused_treg_loss` from dense logits of both models."""
    head = {k: rest[k] for k in ("bias", "softcap", "temperature") if k in rest}
    ref = {k: rest.pop(k) for k in ("ref_bias", "ref_softcap") if k in rest}
    ref_hidden, ref_weight = ref_hidden.to(hidden.dtype), ref_weight.to(hidden.dtype)
    kl = reference.linear_kl(hidden, weight, ref_hidden, ref_weight, target=target, **head, **ref)
    out = reference.fused_treg_loss(
        hidden, weight, target, ref_logps=kl.ref_logprobs, kl=kl.kl, **rest
    )
    return out._replace(kl=kl.kl.detach())


KL_CALLS = {
    "the mean": {},
    "each pair": {"reduction": "none"},
    "padded": {"padded": True},
    "with T-REG and weights": {"alpha": 0.4, "token_weights": True},
    "with statistics": {"outputs": ("entropy", "is_top1")},
    "head options": {"bias": True, "softcap": 4.0, "temperature": 0.7, "ref_softcap": None},
    "a small budget": {"memory_budget": 30_000_000},
}


@pytest.mark.parametrize("call", KL_CALLS)
@pytest.mark.parametrize("loss_type", WITH_KL)
@pytest.mark.parametrize("impl", IMPLS)
def test_objectives_with_kl(impl, loss_type, call):
    """Another model as the reference: other states, another D."""
    options = dict(KL_CALLS[call])
    budget = options.pop("memory_budget", None)
    if "token_weights" in OBJECTIVES[loss_type].needs:
        options["token_weights"] = True
    case = make_case(loss_type=loss_type, sums=False, **options)
    case.rest.pop("ref_logps")
    case.rest["ref_hidden"] = torch.randn(*case.hidden.shape[:-1], 24)
    case.rest["ref_weight"] = 0.3 * torch.randn(case.weight.shape[0], 24)
    found = check(case, torch.float32, impl, plain=plain_with_kl, memory_budget=budget)
    assert found["kl"].max() > 0.1


def test_the_policys_own_head_for_the_reference():
    """ref_weight None: what a reference with adapters on its body alone needs."""
    case = make_case(loss_type="tdpo1", sums=False, bias=True).at(torch.float32)
    case.rest.pop("ref_logps")
    case.rest["ref_hidden"] = torch.randn(case.hidden.shape)
    found = case.run(fused_treg_loss, upstream)
    own = {"ref_weight": case.weight.detach().clone(), "ref_bias": case.bias.detach().clone()}
    for name, x in case.run(fused_treg_loss, upstream, **own).items():
        assert torch.equal(found[name], x), name


@pytest.mark.parametrize("loss_type", ["dpo", "ipo", "messagewise", "simpo"])
@pytest.mark.parametrize("impl", IMPLS)
def test_weights_that_are_learned(impl, loss_type):
    """The gradient in token weights, beside those of the head."""
    case = make_case(loss_type=loss_type, sums=False, token_weights=True).at(torch.float64)
    weights = torch.where(case.rest["target"] == -100, 0.0, case.rest["token_weights"]).double()

    def gradients(fn, device, **more):
        leaf = weights.clone().to(device).requires_grad_()
        rest = case.rest | {"token_weights": leaf} | more
        rest = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in rest.items()}
        operands = [x.to(device) for x in (case.hidden, case.weight)]
        loss = fn(*operands, **rest).loss
        return torch.autograd.grad(loss, [leaf, case.hidden, case.weight])

    if impl == "triton":
        case.hidden, case.weight = case.hidden.float(), case.weight.float()
    found = gradients(fused_treg_loss, device_of(impl), impl=impl)
    exact = gradients(reference.fused_treg_loss, "cpu")
    for a, b in zip(found, exact, strict=True):
        assert error(a.cpu(), b.double()) <= (1e-10 if impl == "torch" else 1e-5)


BAD_KL = {
    "ref_hidden: expected the reference's hidden states for loss_type='tdpo1'": {},
    "ref_logps: expected None beside ref_hidden": {"ref_logps": -torch.rand(3, 1)},
    "filter_eps: expected None for loss_type='tdpo1'": {"filter_eps": 0.01},
    "ref_bias: expected None where ref_weight is None": {"ref_bias": torch.zeros(301)},
}


@pytest.mark.parametrize("message", BAD_KL)
def test_bad_references(message):
    case = make_case(loss_type="tdpo1").at(torch.float32)
    case.rest.pop("ref_logps")
    more = dict(BAD_KL[message])
    if more:
        more["ref_hidden"] = torch.randn(case.hidden.shape)
    with pytest.raises(ValueError, match=message):
        case.run(fused_treg_loss, upstream, **more)
    plain = make_case().at(torch.float32)
    for name in ("ref_hidden", "ref_weight", "kl_weights"):
        with pytest.raises(ValueError, match=f"{name}: expected None for loss_type='dpo'"):
            plain.run(fused_treg_loss, upstream, **{name: plain.hidden.detach()})


# the pairs have 16, 15 and 56 scored tokens; a float32 [V, D] sum is worth 10 to 20 rows of stash
WAYS = {
    "at once": ({}, None, {"at once"}),
    "stash in groups": ({}, (60, 0), {"stash"}),
    "scale": ({}, (16, 1), {"scale", "stash"}),
    "scale, one pair": ({"lengths": [30, 26]}, (17, 0), {"scale"}),
    "scale, simpo": ({"loss_type": "simpo"}, (16, 1), {"scale", "stash"}),
    "scale, ipo without regularizer": (
        {"loss_type": "ipo", "alpha": 0.0},
        (16, 1),
        {"scale", "stash"},
    ),
    "scale, weighted tokens": ({"token_weights": True, "sums": False}, (16, 1), {"scale", "stash"}),
    "scale twice between stashes": (
        {"lengths": [5, 30, 30, 5, 4, 26, 26, 4]},
        (16, 1),
        {"scale", "stash"},
    ),
    "scale, then recompute": (
        {"lengths": [30, 30, 5, 26, 26, 4], "loss_type": "cpo"},
        (16, 1),
        {"recompute", "stash"},
    ),
    "recompute": ({"loss_type": "apo_zero"}, (17, 0), {"recompute", "stash"}),
    "recompute all": ({"loss_type": "orpo"}, (3, 0), {"recompute"}),
    "recompute, static": ({"weighting": "static"}, (17, 0), {"recompute", "stash"}),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_way(impl, way, dtype, padded, modes):
    options, size, expected = WAYS[way]
    V = 301 if way != "scale, one pair" else 2000
    case = make_case(padded=padded, bias=True, V=V, **{"D": 12, **options})
    budget = None if size is None else budget_for(case, impl, dtype, *size)
    check(case, dtype, impl, memory_budget=budget)
    assert modes == expected


@pytest.mark.parametrize("impl", IMPLS)
def test_float16_takes_the_gradient_where_a_loss_scale_reaches_it(impl, modes):
    """A gradient of 1e-7 is lost in float16 unless the loss is scaled before the 16-bit products
    are formed.
    """
    case = make_case(beta=1e-4)
    scale = 2.0**16

    def scaled(fn):
        def run(*args, **kwargs):
            out = fn(*args, **kwargs)
            return out._replace(loss=out.loss * scale)

        return run

    check(case, torch.float16, impl, scaled(fused_treg_loss), scaled(reference.fused_treg_loss))
    assert not modes


HEADS = {
    "softcap": {"softcap": 5.0, "bias": True},
    "scale": {"logit_scale": 0.4, "temperature": 1.7},
    "all": {"softcap": 3.0, "logit_scale": 1.7, "temperature": 0.8, "bias": True},
}
CALLS = {
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "static": {"weighting": "static"},
    "no regularizer": {"alpha": 0.0},
    "strong": {"alpha": 0.5, "beta": 2.0},
    "smoothed": {"label_smoothing": 0.2},
    "token weights": {"token_weights": True, "sums": False},
    "reference per token": {"sums": False},
}


@pytest.mark.pairwise
@pytest.mark.parametrize("options", [*HEADS.values(), *CALLS.values()], ids=[*HEADS, *CALLS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_options(impl, dtype, options):
    if dtype == torch.float16 and impl == "torch" and "softcap" in options:
        options = {**options, "beta": 1.0}
    check(make_case(**options), dtype, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", ["weight", "hidden", "bias", "weight bias"])
def test_frozen_parts(impl, frozen):
    names = frozen.split()

    def freeze(fn):
        def run(hidden, weight, bias=None, **kwargs):
            hidden, weight, bias = (
                x.detach() if n in names else x
                for n, x in (("hidden", hidden), ("weight", weight), ("bias", bias))
            )
            return fn(hidden, weight, bias=bias, **kwargs)

        return run

    case = make_case(bias=True)
    check(case, torch.float32, impl, freeze(fused_treg_loss), freeze(reference.fused_treg_loss))


@pytest.mark.usefixtures("open_operators")
def test_matrix_products():
    """1 product forward only, 2 with a frozen head, 3 with a trainable one whatever the way, 4
    where documented.
    """
    torch.manual_seed(0)
    case = make_case([300, 200, 150, 250], D=32, V=500).at(torch.float32)
    product = 2 * 900 * 32 * 500

    def products(hidden=True, weight=True, loss_type="dpo", **options):
        given = dict(case.rest, loss_type=loss_type, **options)
        h, w = (
            case.hidden.detach().requires_grad_(hidden),
            case.weight.detach().requires_grad_(weight),
        )
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(hidden or weight):
            loss = fused_treg_loss(h, w, **given).loss.sum()
            if loss.requires_grad:
                loss.backward()
        return counter.get_total_flops() / product

    one_pair = budget_for(case, "torch", torch.float32, 500)
    part_and_sums = budget_for(case, "torch", torch.float32, 100, 1)
    part = budget_for(case, "torch", torch.float32, 40)
    assert products(False, False) == 1
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        fused_treg_loss(case.hidden, case.weight.detach(), **case.rest)
    assert counter.get_total_flops() == product
    assert products(weight=False) == 2
    assert products(weight=False, memory_budget=part) == 2
    assert products() == 3
    assert products(memory_budget=one_pair) == 3
    assert products(memory_budget=part_and_sums) == 3
    assert products(hidden=False) == 2
    assert products(reduction="none") == 3
    assert products(reduction="none", memory_budget=part) == 4
    assert products(memory_budget=part) == 4
    assert products(memory_budget=part_and_sums, loss_type="apo_zero") == 4


@pytest.mark.usefixtures("open_operators")
def test_ignored_tokens_cost_no_product():
    case = make_case([100, 100], D=16, V=200).at(torch.float32)
    rest = dict(case.rest, token_rewards=torch.zeros(206), ref_logps=torch.zeros(2))
    products = []
    for ignored in (0, 1):
        target = torch.randint(0, 200, (206,))
        target[::2] = -100 if ignored else 1
        with FlopCounterMode(display=False) as counter:
            fused_treg_loss(case.hidden, case.weight, **dict(rest, target=target)).loss.backward()
        products.append(counter.get_total_flops())
    assert products[1] * 2 == products[0]


MEMORY = [(True, "dpo"), (True, "apo_zero"), (False, "dpo")]


@pytest.mark.parametrize("impl", QUICK_IMPLS)
@pytest.mark.parametrize(
    ("trainable", "loss_type"),
    MEMORY,
    ids=["trainable", "trainable, apo_zero", "frozen"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("open_operators")
def test_memory_stays_within_the_budget(impl, loss_type, trainable, dtype, monkeypatch):
    check_memory(impl, loss_type, trainable, dtype, monkeypatch)


@pytest.mark.parametrize("impl", [x for x in IMPLS if x not in QUICK_IMPLS])
@pytest.mark.usefixtures("open_operators")
def test_memory_in_the_interpreter(impl, monkeypatch):
    check_memory(impl, "dpo", True, torch.float32, monkeypatch)


def check_memory(impl, loss_type, trainable, dtype, monkeypatch):
    """Bytes alive at once, beyond inputs: the budget, one float32 dweight, dhidden, and [N]-sized
    rows.
    """
    D, V = 24, 8000 if impl == "torch" else 1500
    monkeypatch.setattr(
        torch_tiles, "BLOCK", {"cpu": V}
    )  # its buffers would hide a stash of this size
    # a short pair, a long one, a short one: each way takes over from another
    short, held, lengths = (86, 150, (64, 256, 1024))
    if impl == "triton":  # its interpreter takes seconds for what a GPU does in microseconds
        short, held, lengths = (30, 54, (24, 80))
    for length in lengths:
        case = make_case([short, length, short] * 2, D=D, V=V, loss_type=loss_type, spread=0.05)
        case = case.at(dtype, device_of(impl))
        case.weight.requires_grad_(trainable)
        budget = budget_for(case, impl, dtype, held, 1)
        with PeakMemory(collect=impl == "triton") as memory:
            out = fused_treg_loss(
                case.hidden, case.weight, impl=impl, memory_budget=budget, **case.rest
            )
            forward = memory.peak
            out.loss.backward()
        N = case.hidden.shape[0]
        gradients = case.hidden.nbytes + trainable * 4 * case.weight.numel()
        rows = 20 * 8 * N
        assert forward <= budget + gradients + rows, f"{forward} bytes in the forward at N={N}"
        assert memory.peak <= max(budget, gradients) + gradients + rows, (
            f"{memory.peak} bytes at N={N}"
        )
        assert memory.peak < 0.5 * N * V * 4 + 2 * gradients or length == lengths[0]


def test_only_groups_of_pairs_ask_where_sequences_end(monkeypatch):
    """The ends of packed sequences may be on a GPU, which is waited for."""

    def asked(*args):
        raise AssertionError("asked")

    monkeypatch.setattr(sys.modules["treg.ops.treg_loss"], "known_ends", asked)
    case = make_case().at(torch.float32)
    for needed in (True, False):
        case.weight.requires_grad_(needed)
        fused_treg_loss(case.hidden, case.weight, **case.rest).loss.backward()
    with pytest.raises(AssertionError, match="asked"):
        case.weight.requires_grad_()
        budget = budget_for(case, "torch", torch.float32, 10, 1)
        fused_treg_loss(case.hidden, case.weight, memory_budget=budget, **case.rest)


@pytest.mark.parametrize("impl", IMPLS)
def test_padded_equals_packed(impl):
    """The same pairs in both layouts give the same numbers to rounding."""
    packed = make_case(sums=True)
    rest = packed.rest
    ends = rest["cu_seqlens"].tolist()
    pieces = [slice(a, b) for a, b in itertools.pairwise(ends)]

    def pad(x, value):
        return torch.nn.utils.rnn.pad_sequence(
            [x[p] for p in pieces], batch_first=True, padding_value=value
        )

    padded = Case(
        pad(packed.hidden, 0.0),
        packed.weight,
        None,
        {
            "target": pad(rest["target"], -100),
            "token_rewards": pad(rest["token_rewards"], 0.0),
            "ref_logps": rest["ref_logps"],
        },
    )
    device = device_of(impl)
    a = packed.at(torch.float32, device).run(fused_treg_loss, upstream, impl=impl)
    b = padded.at(torch.float32, device).run(fused_treg_loss, upstream, impl=impl)
    for name in ("token_logps", "dhidden"):
        b[name] = torch.cat([b[name][i, : p.stop - p.start] for i, p in enumerate(pieces)])
    for name in a:
        assert_within_budget(name, a[name], b[name], 0.0, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("rows", [None, 60, 17])
def test_without_looking_at_the_targets(impl, padded, rows, monkeypatch):
    """On a GPU nobody waits to learn which rows are ignored: they go through the head, and count
    for nothing.
    """
    patch_looks(monkeypatch, lambda x: False)
    case = make_case(padded=padded, softcap=5.0, bias=True, sums=False)
    check(
        case,
        torch.float32,
        impl,
        memory_budget=None if rows is None else budget_for(case, impl, torch.float32, rows, 1),
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("fits", [True, False])
def test_offsets_on_the_device(impl, fits, monkeypatch, modes):
    """cu_seqlens that only the device can read: all at once where it fits, else log-probs first."""
    monkeypatch.setattr(treg.ops.plans.pair_groups, "scored_lengths", lambda *args: None)
    everything = lambda y, _: RowSelection.all(y.shape[0])  # noqa: E731
    monkeypatch.setattr(sys.modules["treg.ops.call"], "scored_rows", everything)
    case = make_case()
    check(
        case,
        torch.float32,
        impl,
        memory_budget=None if fits else budget_for(case, impl, torch.float32, 50),
    )
    assert modes == {"at once" if fits else "recompute"}


@pytest.mark.parametrize("way", ["at once", "stash in groups", "scale", "recompute", "none"])
@pytest.mark.parametrize("impl", IMPLS)
def test_statistics(impl, way, modes):
    """Of each token, from the pass that is made anyhow; what they stand beside has the same bits
    without them.
    """
    options, size, expected = WAYS.get(way, ({"reduction": "none"}, None, set()))
    names = ("lse", "entropy", "mean_logit", "is_top1", "log_sum_sq_probs")
    case = make_case(bias=True, outputs=names, **{"D": 12, **options})
    budget = None if size is None else budget_for(case, impl, torch.float32, *size)
    check(case, torch.float32, impl, memory_budget=budget)
    assert modes == expected
    run = case.at(torch.float32, device_of(impl)).run
    found, plain = (run(fused_treg_loss, upstream, impl=impl, outputs=o) for o in (names, ()))
    assert found.keys() - plain.keys() == set(names)
    for name, x in plain.items():
        assert torch.equal(found[name], x), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("way", ["at once", "stash in groups", "scale", "recompute"])
def test_no_output_is_left_unwritten(impl, way, poisoned):
    options, size, _ = WAYS[way]
    case = make_case(bias=True, D=12, **options)
    budget = None if size is None else budget_for(case, impl, torch.float32, *size)
    found = case.at(torch.float32, device_of(impl)).run(
        fused_treg_loss, upstream, impl=impl, memory_budget=budget
    )
    for name, x in found.items():
        assert torch.isfinite(x).all(), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_inputs_same_bits(impl, dtype):
    case = make_case(bias=True)
    runs = [
        case.at(dtype, device_of(impl)).run(fused_treg_loss, upstream, impl=impl) for _ in range(2)
    ]
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name]), name


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice(impl):
    """retain_graph: the second pass gives the first one's gradients, not something scaled again."""
    case = make_case(bias=True).at(torch.float32, device_of(impl))
    loss = fused_treg_loss(case.hidden, case.weight, bias=case.bias, impl=impl, **case.rest).loss
    leaves = (case.hidden, case.weight, case.bias)
    first = torch.autograd.grad(
        loss, leaves, torch.tensor(3.0, device=loss.device), retain_graph=True
    )
    second = torch.autograd.grad(loss, leaves, torch.tensor(3.0, device=loss.device))
    for a, b in zip(first, second, strict=True):
        assert a.any() and torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_is_dpo_with_token_weights(impl):
    """d L / d lp_t = -beta w (1 + alpha rhat_t) / B on chosen tokens, +beta w (1 - alpha rhat_t) /
    B on rejected ones.

    Seen through the bias-free head: the fused dweight equals that of the log-probs under these
    coefficients.
    """
    beta, alpha = 0.3, 0.5
    device = device_of(impl)
    case = make_case(beta=beta, alpha=alpha).at(torch.float32, device)
    out = fused_treg_loss(case.hidden, case.weight, impl=impl, **case.rest)
    found = torch.autograd.grad(out.loss, case.weight)[0]
    ends = case.rest["cu_seqlens"].tolist()
    B = len(ends) // 2
    w = torch.sigmoid(out.rejected_rewards - out.chosen_rewards).double()
    rhat = torch.nan_to_num(case.rest["token_rewards"]).double()
    coef = torch.zeros_like(rhat)
    for s in range(2 * B):
        sign = 1.0 if s < B else -1.0
        tokens = slice(ends[s], ends[s + 1])
        coef[tokens] = -beta * w[s % B] * (sign + alpha * rhat[tokens]) / B
    weight = case.weight.detach().double().requires_grad_()
    logps = reference.linear_logprobs(
        case.hidden.detach().double(), weight, case.rest["target"]
    ).logprobs
    expected = torch.autograd.grad((coef * logps).sum(), weight)[0]
    assert error(found, expected) < 4 * EPS[torch.float32]


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_filter(impl, dtype, frozen):
    """filter_eps 0 leaves out nothing; a larger one changes the gradients alone, by less than the
    mass it may drop.
    """
    case = make_case([40, 30, 60, 25], D=12, V=700, bias=True)
    case.rest["target"] = torch.where(case.rest["target"] >= 0, case.rest["target"] % 200, -100)
    case.bias[256:] -= 7.0  # four of six blocks of columns are unlikely, and hold no target

    def only(fn):
        def run(hidden, weight, bias, **kwargs):
            weight, bias = (x.detach() if frozen else x for x in (weight, bias))
            return fn(hidden, weight, bias=bias, **kwargs)

        return run

    check(case, dtype, impl, only(fused_treg_loss), only(reference.fused_treg_loss), filter_eps=0.0)
    case = case.at(dtype, device_of(impl))
    exact, filtered = (
        case.run(only(fused_treg_loss), upstream, impl=impl, filter_eps=eps) for eps in (0.0, 0.01)
    )
    for name, x in exact.items():
        if name == "dhidden" or (name in ("dweight", "dbias") and not frozen):
            assert 0 < error(filtered[name], x) < 0.1, name
        else:
            assert torch.equal(filtered[name], x), name


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=PHASES,
)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=3),
    D=st.integers(1, 40),
    V=st.integers(2, 300),
    loss_type=st.sampled_from(sorted({*OF_ONE_MODEL} - {"discopop", "confpo", "figa"})),
    dtype=st.sampled_from(DTYPES[:2]),
    padded=st.booleans(),
    rows=st.integers(1, 80),
    sums=st.integers(0, 1),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 4.0]),
    alpha=st.sampled_from([0.0, 0.25]),
    weighting=st.sampled_from(["gradient", "static"]),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("impl", IMPLS)
def test_any_call(impl, lengths, D, V, rows, sums, dtype, seed, **options):
    """discopop apart: its gate multiplies rounding errors by 20, and has its own test; confpo and
    figa too: a rounding takes a token across their thresholds.
    """
    torch.manual_seed(seed)
    case = make_case(lengths + lengths[::-1], D, V, **options)
    check(case, dtype, impl, memory_budget=budget_for(case, impl, dtype, rows, sums))


@pytest.mark.parametrize("impl", IMPLS)
def test_other_options_of_an_objective(impl):
    """discopop's tau reaches the loss of the head, in both implementations."""
    case = make_case(loss_type="discopop", scalars={"tau": 0.3})
    found = check(case, torch.float32, impl)
    usual = check(make_case(loss_type="discopop"), torch.float32, impl)
    assert error(found["loss"], usual["loss"].double()) > 1e-3
