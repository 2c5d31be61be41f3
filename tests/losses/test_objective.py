"""The preference loss in one launch and its PyTorch twin, against autograd in float64."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from autograd_loss import pair_loss as reference_loss
from autograd_loss import reward_gradient
from helpers import DEVICE, EPS, IMPLS, device_of

from treg.losses import OBJECTIVES, LossOptions, treg_loss
from treg.losses.pairs import (
    STATS,
    Given,
    PairOutputs,
    TokenInputs,
    evaluate_pairs,
    pair_loss,
    spans_of,
)
from treg.operators import scalars
from treg.results import PairLoss
from treg_kernels.bases import BASES

# those of test_methods.py have no Triton form
NAMES = sorted(name for name, row in OBJECTIVES.items() if row.alpha)
SMOOTHED = [name for name in NAMES if "label_smoothing" in OBJECTIVES[name].options]
LENGTHS = [5, 1, 9, 3, 4, 12]  # three pairs
REFERENCE_FREE = [name for name in NAMES if OBJECTIVES[name].reference_free]


def pair_objective(
    logps,
    token_rewards,
    ref_logps,
    token_weights,
    target,
    cu_seqlens,
    options,
    impl,
    ignore_index=-100,
):
    """PairLoss and d sum_b loss_b / d lp_t, of tensors with any strides."""
    inputs = TokenInputs(
        None if target is None else target.reshape(-1).contiguous(),
        Given(token_rewards, ref_logps, token_weights).flat(),
        spans_of(logps, cu_seqlens),
        ignore_index,
    )
    rows = logps.reshape(-1).contiguous()
    outputs = PairOutputs.empty(inputs.pairs, rows)
    evaluate_pairs(impl, rows, inputs, options, outputs)
    return pair_loss(outputs.loss, outputs.stats, options), outputs.coef.view(logps.shape)


def options_of(loss_type, **more):
    """exo_pair has no loss without smoothing."""
    return LossOptions(
        loss_type, **{"label_smoothing": 0.1 if loss_type == "exo_pair" else 0.0, **more}
    )


def make(
    loss_type,
    lengths=LENGTHS,
    *,
    ref="sequence",
    weighted=False,
    rewards=True,
    ignored=0,
    dtype=torch.float64,
):
    """Random packed pairs by name, the arguments of `pair_loss`; `mask` None where nothing is
    ignored.
    """
    n, sequences = sum(lengths), len(lengths)
    logps = -3 * torch.rand(n, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    mask = None
    if ignored:
        mask = torch.rand(n) > ignored
        mask[cu_seqlens[:-1]] = True
    if OBJECTIVES[loss_type].reference_free:
        ref = None
    refs = {
        None: lambda: None,
        "token": lambda: logps + 0.5 * torch.randn(n, dtype=torch.float64),
        "sequence": lambda: (
            torch.stack([x.sum() for x in logps.split(lengths)]) + torch.randn(sequences)
        ),
    }
    found = {
        "logps": logps,
        "token_rewards": torch.rand(n) - 0.5 if rewards else None,
        "ref_logps": refs[ref](),
        "token_weights": 2 * torch.rand(n) if weighted else None,
        "mask": mask,
        "cu_seqlens": cu_seqlens,
    }
    return {
        k: x.to(dtype) if x is not None and x.is_floating_point() else x for k, x in found.items()
    }


def padded(x: dict, sequences: int) -> dict:
    """Sequences of one length, as [2B, T]."""
    n = x["logps"].shape[0]
    return {
        k: v.reshape(sequences, -1) if v is not None and v.shape == (n,) else v
        for k, v in dict(x, cu_seqlens=None).items()
    }


def expected(x: dict, options: LossOptions) -> tuple[PairLoss, torch.Tensor]:
    """What autograd makes of `pair_loss` in float64."""
    x = {
        k: v.detach().double() if v is not None and v.is_floating_point() else v
        for k, v in x.items()
    }
    logps = x.pop("logps").requires_grad_()
    rest = [x[k] for k in ("token_rewards", "ref_logps")]
    out = reference_loss(logps, *rest, options, x["cu_seqlens"], x["mask"], x["token_weights"])
    (coef,) = torch.autograd.grad(out.loss.sum(), logps)
    return PairLoss(*(v.detach() for v in out)), coef


def to_device(x: dict, impl: str) -> dict:
    return {k: v if v is None else v.to(device_of(impl)) for k, v in x.items()}


def run(x: dict, options: LossOptions, impl: str) -> tuple[PairLoss, torch.Tensor]:
    x = to_device(x, impl)
    names = ("logps", "token_rewards", "ref_logps", "token_weights", "mask", "cu_seqlens")
    out, coef = pair_objective(*(x[k] for k in names), options, impl)
    return PairLoss(*(v.cpu() for v in out)), coef.cpu()


def assert_close(found, exact, tolerance: float, floor: float) -> None:
    """Loss, statistics and coefficients: each number relative to itself, down to floor."""
    for name, a, b in zip(
        (*PairLoss._fields, "coef"), (*found[0], found[1]), (*exact[0], exact[1]), strict=True
    ):
        torch.testing.assert_close(
            a.double(),
            b,
            rtol=tolerance,
            atol=floor,
            equal_nan=True,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def assert_equal(found, exact) -> None:
    """To float64 rounding of a few sums."""
    assert_close(found, exact, 1e-11, 1e-12)


def check(x: dict, options: LossOptions, impl: str) -> None:
    assert_equal(run(x, options, impl), expected(x, options))


# -- values and coefficients
# -


def test_every_objective_has_a_kernel():
    assert sorted(BASES) == NAMES


@pytest.mark.pairwise
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weighting", ["gradient", "static"])
@pytest.mark.parametrize("loss_type", NAMES)
def test_objectives(loss_type, weighting, impl):
    check(make(loss_type), options_of(loss_type, beta=0.3, alpha=0.7, weighting=weighting), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", NAMES)
def test_everything_at_once(loss_type, impl):
    """Per-token reference, token weights, ignored tokens, smoothing and margin where there are
    any.
    """
    smoothing = {"label_smoothing": 0.2} if loss_type in SMOOTHED else {}
    gamma = {"gamma": 0.4} if loss_type == "simpo" else {}
    x = make(loss_type, ref="token", weighted=True, ignored=0.3)
    check(x, options_of(loss_type, beta=0.6, alpha=0.4, **smoothing, **gamma), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", ["dpo", "ipo", "orpo", "nca_pair"])
@pytest.mark.parametrize("rewards", [True, False])
def test_without_a_regularizer(loss_type, rewards, impl):
    check(make(loss_type, rewards=rewards), options_of(loss_type, alpha=0.0), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", ["dpo", "sppo_hard"])
def test_alpha_zero_ignores_an_infinite_regularizer(loss_type, impl):
    """A log-prob of -inf under a reward of 0 would be NaN; so would 0 * w, infinite for
    sppo_hard.
    """
    x, options = make(loss_type), LossOptions(loss_type, alpha=0.0)
    x["logps"][1], x["token_rewards"][1] = -torch.inf, 0.0
    out, coef = run(x, options, impl)
    exact, exact_coef = expected(x, options)
    assert out.loss[0] == exact.loss[0] == torch.inf
    torch.testing.assert_close(coef, exact_coef)


@pytest.mark.pairwise
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss_type", NAMES)
def test_outputs_are_rounded_once(loss_type, dtype, impl):
    """Inputs of 32 and 16 bits are exact in float64: nothing is rounded but what comes out."""
    x = make(loss_type, ref="token", weighted=True, ignored=0.2, dtype=dtype)
    found = run(x, options_of(loss_type, beta=0.5), impl)
    assert found[0].loss.dtype == found[1].dtype == dtype
    exact = expected(x, options_of(loss_type, beta=0.5))
    assert_close(found, exact, EPS[dtype], 1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ref", ["sequence", "token"])
def test_padded(ref, impl):
    x = make("dpo", [6] * 4, ref=ref, ignored=0.3)
    exact = expected(x, LossOptions())
    # as they come from a shift by one: [:, :-1] of a longer tensor
    for k, v in padded(x, 4).items():
        x[k] = torch.cat([v, v[:, :1]], 1)[:, :-1] if v is not None and v.ndim == 2 else v
    assert not x["logps"].is_contiguous()
    found = run(x, LossOptions(), impl)
    assert found[1].shape == (4, 6)
    assert_equal((found[0], found[1].reshape(-1)), exact)


@pytest.mark.parametrize("impl", IMPLS)
def test_targets_and_starts_as_the_head_has_them(impl):
    """int64 targets with any ignore_index, int32 starts."""
    x = make("dpo", ignored=0.4)
    exact = expected(x, LossOptions())
    for ignore_index in (-100, 0, 7):
        x_here = dict(
            x, mask=torch.where(x["mask"], 3, ignore_index), cu_seqlens=x["cu_seqlens"].int()
        )
        d = to_device(x_here, impl)
        names = ("logps", "token_rewards", "ref_logps", "token_weights", "mask", "cu_seqlens")
        out, coef = pair_objective(*(d[k] for k in names), LossOptions(), impl, ignore_index)
        assert_equal((PairLoss(*(v.cpu() for v in out)), coef.cpu()), exact)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", [[1, 1], [3, 2], [1024, 1], [1, 1025], [2500, 2048]], ids=str)
def test_one_pair(lengths, impl):
    check(
        make("nca_pair", lengths, ref="token", weighted=True, ignored=0.1),
        LossOptions("nca_pair", beta=0.01),
        impl,
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_many_uneven_pairs(impl):
    lengths = torch.randint(1, 40, (34,)).tolist()
    check(make("orpo", lengths, ignored=0.5), LossOptions("orpo"), impl)


# -- where numbers are extreme
# -


MARGINS = [-1e4, -700.0, -40.0, -1.0, -1e-9, 0.0, 1e-9, 1.0, 40.0, 700.0, 1e4]


def with_rewards(rho_w: list[float], rho_l: list[float], loss_type: str, **options):
    """Pairs whose implicit rewards are these: two tokens each, beta 1 unless given."""
    options = options_of(loss_type, **{"beta": 1.0, **options})
    rho = torch.tensor([*rho_w, *rho_l], dtype=torch.float64)
    norm = 2 if options.objective.length_normalised else 1
    logps = torch.stack([rho * norm / options.beta, torch.zeros_like(rho)], 1).reshape(-1)
    return {
        "logps": logps,
        "token_rewards": torch.rand_like(logps) - 0.5,
        "ref_logps": None if options.objective.reference_free else torch.zeros_like(rho),
        "token_weights": None,
        "mask": None,
        "cu_seqlens": torch.arange(0, 2 * len(rho) + 1, 2),
    }, options


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", NAMES)
def test_extreme_margins(loss_type, impl):
    """1e-15 is what autograd's own 1 - sigmoid is rounded to."""
    if OBJECTIVES[loss_type].reference_free:
        rho_w, rho_l = [-0.5 + min(m, 0.0) for m in MARGINS], [-0.5 - max(m, 0.0) for m in MARGINS]
    else:
        rho_w, rho_l = [0.5 * m for m in MARGINS], [-0.5 * m for m in MARGINS]
    x, options = with_rewards(rho_w, rho_l, loss_type)
    found, exact = run(x, options, impl), expected(x, options)
    assert all(torch.isfinite(v).all() for v in (*found[0], found[1]))
    assert_close(found, exact, 1e-11, 1e-15)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", ["dpo", "simpo", "robust"])
def test_small_losses_keep_their_digits(loss_type, impl):
    """-log sigmoid(40) = log(1 + exp(-40)) = 4e-18 is far below the rounding of 1."""
    x, options = with_rewards([-1.0], [-41.0], loss_type, alpha=0.0)
    out, coef = run(x, options, impl)
    tiny = math.exp(-40)
    norm = 2 if loss_type == "simpo" else 1
    assert out.loss.item() == pytest.approx(math.log1p(tiny), rel=1e-12, abs=0)
    assert out.weights.item() == pytest.approx(tiny / (1 + tiny), rel=1e-12, abs=0)
    assert coef.tolist() == pytest.approx([-tiny / norm] * 2 + [tiny / norm] * 2, rel=1e-12, abs=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_orpo_odds(impl):
    """Answers from certain (odds clamped, no gradient beyond) to impossible, on either side.

    At the bound itself, -1e-12, there are two slopes, and versions of PyTorch differ in which one
    they take.
    """
    certain = [0.0, -1e-13, -9.9e-13, -1.0000001e-12, -1e-9, -1e-3, -0.6931, -0.6932, -50.0, -1e6]
    usual = [-1.5] * len(certain)
    x, options = with_rewards(certain + usual + certain, usual + certain + certain, "orpo")
    assert_close(run(x, options, impl), expected(x, options), 1e-11, 1e-15)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", NAMES)
def test_long_improbable_answers(loss_type, impl):
    """Sums of -1e6 nats that differ by little."""
    x = make(loss_type, ref="token")
    x["logps"] *= 2e5
    if x["ref_logps"] is not None:
        x["ref_logps"] = x["logps"] + torch.randn_like(x["logps"])
    check(x, options_of(loss_type), impl)


# -- what must not matter, and what must
# -


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", ["dpo", "orpo", "sppo_hard"])
def test_ignored_rows_are_not_read(loss_type, impl, poisoned):
    x = make(loss_type, ref="token", weighted=True, ignored=0.5)
    out, coef = run(x, options_of(loss_type), impl)
    dirty = {
        k: torch.where(x["mask"], v, torch.nan) if v is not None and v.is_floating_point() else v
        for k, v in x.items()
    }
    again, again_coef = run(dirty, options_of(loss_type), impl)
    assert not x["mask"].all() and (coef[~x["mask"]] == 0).all()
    assert torch.equal(coef, again_coef)
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", ["dpo", "simpo", "cpo"])
def test_a_sequence_without_a_scored_token(loss_type, impl):
    """Its pair gets what autograd gives, NaN where a mean is taken; the others are what they
    were.
    """
    x = make(loss_type, ignored=0.3)
    x["mask"][: LENGTHS[0]] = False
    found, exact = run(x, options_of(loss_type), impl), expected(x, options_of(loss_type))
    assert found[0].loss[0].isnan() == (loss_type != "dpo")
    scored = torch.where(x["mask"], exact[1], 0.0)
    assert_equal(found, (exact[0], scored))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", NAMES)
def test_nan_in_a_scored_row_gives_nan(loss_type, impl):
    x = make(loss_type)
    x["logps"][0] = torch.nan
    out, coef = run(x, options_of(loss_type), impl)
    assert out.loss[0].isnan() and torch.isfinite(out.loss[1:]).all()
    assert torch.isfinite(coef[LENGTHS[0] : sum(LENGTHS[:3])]).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", ["dpo", "apo_down"])
@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 1), (1, 2), (0, 3), (2, 0)])
def test_some_of_the_pairs(loss_type, first, count, impl):
    """Only what belongs to pairs first..first+count-1 is written, and only their log-probs are
    needed.
    """
    x = to_device(make(loss_type, ignored=0.3, ref="token"), impl)
    options, B = options_of(loss_type), len(LENGTHS) // 2
    exact, exact_coef = run(
        {k: None if v is None else v.cpu() for k, v in x.items()}, options, impl
    )
    pair = torch.repeat_interleave(torch.arange(2 * B) % B, torch.tensor(LENGTHS))
    inside = (pair >= first) & (pair < first + count)
    logps = torch.where(inside.to(x["logps"].device), x["logps"], torch.nan)
    outputs = PairOutputs.empty(B, logps)
    loss, stats, coef = outputs.loss, outputs.stats, outputs.coef
    for out in (loss, stats, coef):
        out.fill_(123.0)
    given = Given(x["token_rewards"], x["ref_logps"])
    inputs = TokenInputs(x["mask"], given, spans_of(logps, x["cu_seqlens"]))
    evaluate_pairs(impl, logps, inputs, options, outputs, first, count)
    here = torch.arange(B).sub(first).ge(0) & torch.arange(B).lt(first + count)
    assert torch.equal(coef.cpu(), torch.where(inside, exact_coef, 123.0))
    assert torch.equal(loss.cpu(), torch.where(here, exact.loss, 123.0))
    for name, row in zip(STATS[:5], stats, strict=False):
        assert torch.equal(row.cpu(), torch.where(here, getattr(exact, name), 123.0)), name
    assert (stats.cpu()[:, ~here] == 123.0).all() and not (stats.cpu()[:, here] == 123.0).any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", NAMES)
def test_slopes_are_signed(loss_type, impl):
    x = to_device(make(loss_type), impl)
    options, B = options_of(loss_type), len(LENGTHS) // 2
    inputs = TokenInputs(None, Given(x["token_rewards"], x["ref_logps"]), x["cu_seqlens"])
    outputs = PairOutputs.empty(B, x["logps"])
    evaluate_pairs(impl, x["logps"], inputs, options, outputs)
    named = dict(zip(STATS, outputs.stats.cpu(), strict=True))
    slopes = reward_gradient(named["chosen_rewards"], named["rejected_rewards"], options)
    for side, slope in zip(("chosen", "rejected"), slopes, strict=True):
        torch.testing.assert_close(named[f"{side}_slope"], slope, rtol=1e-11, atol=1e-15)
        torch.testing.assert_close(named[f"{side}_weight"], slope.abs(), rtol=1e-11, atol=1e-15)


# -- the operator
# -


def call(x: dict, options: LossOptions, impl: str, logps=None) -> PairLoss:
    rest = {k: x[k] for k in ("cu_seqlens", "mask", "token_weights")}
    return treg_loss(
        x["logps"] if logps is None else logps,
        x["token_rewards"],
        x["ref_logps"],
        options,
        **rest,
        impl=impl,
    )


LAYOUTS = {
    "packed": lambda loss_type: make(loss_type, ignored=0.3),
    "padded": lambda loss_type: padded(
        make(loss_type, [7] * 6, ref="token", weighted=True, ignored=0.3), 6
    ),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss_type", ["dpo", "orpo", "bco_pair"])
def test_operator_equals_autograd(loss_type, layout, impl):
    x, options = to_device(LAYOUTS[layout](loss_type), impl), options_of(loss_type, beta=0.5)
    upstream = torch.rand(3, dtype=torch.float64, device=device_of(impl)) - 0.3
    leaves = [x["logps"].clone().requires_grad_() for _ in range(2)]
    kept = [x[k] for k in ("cu_seqlens", "mask", "token_weights")]
    found = call(x, options, impl, 2 * leaves[0])
    exact = reference_loss(2 * leaves[1], x["token_rewards"], x["ref_logps"], options, *kept)
    assert [v.requires_grad for v in found] == [True] + [False] * 7
    for out in (found, exact):
        out.loss.backward(upstream)
    for a, b in zip((*found, leaves[0].grad), (*exact, leaves[1].grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operator_is_registered_right(layout, impl):
    x = to_device(LAYOUTS[layout]("dpo"), impl)
    logps = x["logps"].requires_grad_()
    options = LossOptions("dpo", 0.1, 0.25, 0.0, 0.1, "gradient")
    inputs = (
        logps,
        *(x[k] for k in ("token_rewards", "ref_logps", "token_weights")),
        *(None, None, None),
        *(x[k] for k in ("mask", "cu_seqlens")),
        scalars(*options.numbers()),
        f"{impl} 000 {options.text()}",
    )
    torch.library.opcheck(torch.ops.treg.pair_objective.default, inputs)
    upstream, coef = (
        torch.rand(3, dtype=logps.dtype, device=logps.device),
        torch.rand_like(logps.detach()),
    )
    rest = (x["mask"], x["cu_seqlens"], logps.detach())
    torch.library.opcheck(torch.ops.treg.pair_objective_grad.default, (upstream, [coef], *rest))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operator_under_compile(layout, impl):
    """The graph has no break, forward and backward equal the eager ones; other options, another
    graph.
    """
    torch.compiler.reset()
    x = to_device(LAYOUTS[layout]("simpo"), impl)

    def step(logits, options):
        out = call(x, options, impl, torch.nn.functional.logsigmoid(logits))
        return out.loss.mean(), out.chosen_rewards

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for options in (LossOptions("simpo"), LossOptions("simpo", beta=2.0, gamma=0.5)):
        results = []
        for function in (step, compiled):
            logits = x["logps"].clone().requires_grad_()
            loss, rewards = function(logits, options)
            loss.backward()
            assert not rewards.requires_grad
            results.append((loss.detach(), rewards, logits.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_second_derivative_raises(impl):
    x = to_device(make("dpo"), impl)
    logps = x["logps"].requires_grad_()
    (grad,) = torch.autograd.grad(call(x, LossOptions(), impl).loss.sum(), logps, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.square().sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_graph_without_a_gradient(impl):
    x = to_device(make("dpo"), impl)
    with torch.inference_mode():
        inside = call(x, LossOptions(), impl)
    outside = call(x, LossOptions(), impl)
    assert not outside.loss.requires_grad and torch.equal(inside.loss, outside.loss)


BAD = {
    "token_rewards: expected shape": {"token_rewards": torch.zeros(3)},
    "token_rewards: expected a torch.Tensor": {"token_rewards": None},
    "token_rewards: expected finite": {"token_rewards": torch.full((sum(LENGTHS),), torch.nan)},
    "ref_logps: expected a tensor": {"ref_logps": None},
    "ref_logps: expected per-token": {"token_weights": torch.ones(sum(LENGTHS))},
    "mask: expected torch.bool": {"mask": torch.ones(sum(LENGTHS))},
    "mask: expected a scored token": {"mask": torch.zeros(sum(LENGTHS), dtype=torch.bool)},
    "cu_seqlens: expected to end": {"cu_seqlens": torch.tensor([0, 1, 2])},
    "cu_seqlens: expected an even": {"cu_seqlens": torch.tensor([0, sum(LENGTHS)])},
    "cu_seqlens: expected a torch.Tensor": {"cu_seqlens": [0, 1, 2]},
    "logps: expected": {"cu_seqlens": None},
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, impl):
    """CPU tensors: values are looked at there."""
    x = dict(make("dpo"), **BAD[message])
    with pytest.raises((TypeError, ValueError), match=message):
        call(x, LossOptions(), "torch" if DEVICE == "cuda" else impl)


# -- what the compiler makes of it
# -

COMPILE = """
import json, sys
import torch
from aot_worker import fake_device, resources
from treg_kernels import objective
from treg_kernels.bases import BASES

options = {"beta": 0.1, "alpha": 0.25, "options": (0.1, 0.2)}
everything = {"static": False, "length_normalised": True, "nll": True, **options}
nothing = {"static": True, "length_normalised": False, "nll": False, **options}

def launch(name, dtype, bare):
    row, stats = torch.zeros(64, dtype=dtype), torch.zeros(11, 4, dtype=dtype)
    if bare:
        tokens = (row, torch.zeros(64, dtype=torch.bool), None, None, None)
        starts = torch.zeros(9, dtype=torch.int64)
    else:
        tokens = (row, torch.zeros(64, dtype=torch.int64), row, row, row)
        starts = torch.zeros(9, dtype=torch.int32)
    results, rest = (stats[0].clone(), stats, row), nothing if bare else everything
    objective.pair_objective(*tokens, starts, 1, 2, *results, base=BASES[name], **rest)

arch, names = sys.argv[1], sys.argv[2:]
cases = [(name, torch.float32, False) for name in names]
cases += [("orpo", torch.bfloat16, False)]
cases += [("dpo", torch.float64, True), ("dpo", torch.float16, True)]
rows = []
with fake_device(arch):
    for case in cases:
        objective._pair_kernel.device_caches.clear()
        launch(*case)
        for cache in objective._pair_kernel.device_caches.values():
            named = {"case": [case[0], str(case[1])]}
            rows += [{**named, **resources(k, arch)} for k in cache[0].values()]
print(json.dumps(rows))
"""


@pytest.mark.aot
@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100", "sm120", "gfx942"])
def test_compiles_ahead_of_time(arch):
    """float64 exp and log on every backend; no spills, no atomics. All objectives on one, the
    longest on the others.
    """
    names = sorted(set(BASES) - {"sigmoid"}) if arch == "sm90" else ["orpo"]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parents[1] / "support"), *(p for p in sys.path if p)]
    )
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, arch, *names], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    assert len(rows) == len(names) + 3
    assert all(r["fits"] and r["spill_bytes"] == 0 and r["atomics"] == 0 for r in rows), rows
