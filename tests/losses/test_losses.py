"""Objectives and T-REG on given log-probs: numbers worked out by hand, the float64 reference, and
identities.
"""

import functools
import itertools
import math

import pytest
import torch
from helpers import error

from treg.losses import OBJECTIVES, LossOptions, treg_loss
from treg.ops import reference

SMOOTHED = ("dpo", "sigmoid", "simpo", "robust", "exo_pair", "cpo")
REFERENCE_FREE = ("simpo", "orpo", "cpo")
LENGTH_NORMALISED = ("simpo", "ipo", "orpo")
TWO_WEIGHTS = ("nca_pair", "bco_pair", "apo_zero", "apo_down", "sppo_hard", "orpo")
NAMES = (
    *SMOOTHED,
    "ipo",
    "hinge",
    "nca_pair",
    "bco_pair",
    "apo_zero",
    "apo_down",
    "sppo_hard",
    "discopop",
    "orpo",
)
F64 = 1e-12  # relative; float64 sums of a few terms


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Waking a second one for a few numbers takes longer than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def options_of(loss_type, **more):
    """exo_pair has no loss without smoothing."""
    return LossOptions(
        loss_type, **{"label_smoothing": 0.1 if loss_type == "exo_pair" else 0.0, **more}
    )


def s(x):
    return 1 / (1 + math.exp(-x))


def log(x):
    return math.log(x)


def test_names_here_are_all_there_are():
    """The others give tokens credit of their own: test_methods.py."""
    assert sorted(NAMES) == sorted(name for name, row in OBJECTIVES.items() if row.alpha)


# -- by hand
# One pair, beta 0.5. Chosen: 2 tokens, log-probs -1 -2, sum -3, reference sum -4.2.
# Rejected: 4 tokens, log-probs -0.5 -1 -1.5 -0.5, sum -3.5, reference sum -3.1.
#   with a reference     rho_w = 0.5 * 1.2 = 0.6       rho_l = 0.5 * -0.4 = -0.2       m = 0.8
#   ipo, per token       rho_w = 0.6 / 2   = 0.3       rho_l = -0.2 / 4   = -0.05      m = 0.35
#   without one (cpo)    rho_w = 0.5 * -3  = -1.5      rho_l = 0.5 * -3.5 = -1.75      m = 0.25
#   simpo, per token     rho_w = -1.5 / 2  = -0.75     rho_l = -1.75 / 4  = -0.4375    m = -0.3125
#   orpo                  mean log-probs -1.5 and -0.875

LOGPS = (-1.0, -2.0, -0.5, -1.0, -1.5, -0.5)
REF_SUMS = (-4.2, -3.1)
REWARDS = (0.2, 0.1, 0.3, 0.0, -0.2, 0.1)


def by_hand(loss_type, alpha=0.0, *, logps=LOGPS, ref=REF_SUMS, **options):
    f64 = {"dtype": torch.float64}
    return treg_loss(
        torch.tensor(logps, **f64),
        torch.tensor(REWARDS, **f64),
        None if loss_type in REFERENCE_FREE else torch.tensor(ref, **f64),
        options_of(loss_type, beta=0.5, alpha=alpha, **options),
        cu_seqlens=torch.tensor([0, 2, 6], dtype=torch.int32),
    )


def with_margin(m, loss_type, **options):
    """The loss at rho_w = m, rho_l = 0: a reference sum of -3 - 2 m leaves 0.5 * 2 m."""
    return by_hand(loss_type, ref=(-3.0 - 2 * m, -3.5), **options)


BY_HAND = [
    # -log sigmoid(m), m = 0.8
    ("dpo", {}, -log(s(0.8))),
    ("sigmoid", {}, -log(s(0.8))),
    # -(1 - eps) log sigmoid(m) - eps log sigmoid(-m), eps = 0.1
    ("dpo", {"label_smoothing": 0.1}, -0.9 * log(s(0.8)) - 0.1 * log(s(-0.8))),
    ("sigmoid", {"label_smoothing": 0.1}, -0.9 * log(s(0.8)) - 0.1 * log(s(-0.8))),
    # -log sigmoid(m - gamma), m = -0.3125
    ("simpo", {}, -log(s(-0.3125))),
    ("simpo", {"gamma": 0.1875}, -log(s(-0.5))),
    ("simpo", {"gamma": 0.1875, "label_smoothing": 0.2}, -0.8 * log(s(-0.5)) - 0.2 * log(s(0.5))),
    # (m / beta - 1 / (2 beta))^2 = (0.7 - 1)^2
    ("ipo", {}, (0.35 / 0.5 - 1 / (2 * 0.5)) ** 2),
    # 1 - m
    ("hinge", {}, 0.2),
    # (-(1 - eps) log sigmoid(m) + eps log sigmoid(-m)) / (1 - 2 eps); dpo's at eps = 0
    ("robust", {}, -log(s(0.8))),
    ("robust", {"label_smoothing": 0.1}, (-0.9 * log(s(0.8)) + 0.1 * log(s(-0.8))) / 0.8),
    # KL( (p, 1 - p) || (1 - eps, eps) ), p = sigmoid(m)
    (
        "exo_pair",
        {"label_smoothing": 0.1},
        s(0.8) * log(s(0.8) / 0.9) + s(-0.8) * log(s(-0.8) / 0.1),
    ),
    (
        "exo_pair",
        {"label_smoothing": 0.01},
        s(0.8) * log(s(0.8) / 0.99) + s(-0.8) * log(s(-0.8) / 0.01),
    ),
    # -log sigmoid(rho_w) - log sigmoid(-rho_w) / 2 - log sigmoid(-rho_l) / 2
    ("nca_pair", {}, -log(s(0.6)) - log(s(-0.6)) / 2 - log(s(0.2)) / 2),
    # -log sigmoid(rho_w) - log sigmoid(-rho_l)
    ("bco_pair", {}, -log(s(0.6)) - log(s(0.2))),
    # 1 - sigmoid(rho_w) + sigmoid(rho_l)
    ("apo_zero", {}, 1 - s(0.6) + s(-0.2)),
    # sigmoid(rho_w) + 1 - sigmoid(m)
    ("apo_down", {}, s(0.6) + 1 - s(0.8)),
    # (1.2 - 1 / (2 beta))^2 + (-0.4 + 1 / (2 beta))^2
    ("sppo_hard", {}, 0.2**2 + 0.6**2),
    # (1 - g) (-log sigmoid(m)) + g exp(-m), g = sigmoid(m / 0.05)
    ("discopop", {}, (1 - s(16)) * -log(s(0.8)) + s(16) * math.exp(-0.8)),
    # -beta log sigmoid( log( p_w / (1 - p_w) ) - log( p_l / (1 - p_l) ) ) - log p_w, the mean
    # log-prob of chosen
    (
        "orpo",
        {},
        -0.5 * log(s(-1.5 - log(1 - math.exp(-1.5)) + 0.875 + log(1 - math.exp(-0.875)))) + 1.5,
    ),
    # -log sigmoid(m) + 3 / 2, m = 0.25
    ("cpo", {}, -log(s(0.25)) + 1.5),
    ("cpo", {"label_smoothing": 0.1}, -0.9 * log(s(0.25)) - 0.1 * log(s(-0.25)) + 1.5),
]


def test_every_objective_is_worked_out():
    assert {name for name, _, _ in BY_HAND} == set(NAMES)


@pytest.mark.parametrize(("loss_type", "options", "expected"), BY_HAND)
def test_loss_by_hand(loss_type, options, expected):
    assert by_hand(loss_type, **options).loss.tolist() == pytest.approx([expected], rel=F64)


def test_orpo_where_the_odds_are_whole():
    """Means log 1/2 and log 1/4: odds 1 and 1/3, their ratio 3, sigmoid(log 3) = 3/4; both branches
    of log(1 - p).
    """
    logps = [log(1 / 2)] * 2 + [log(1 / 4)] * 4
    assert by_hand("orpo", logps=logps).loss.item() == pytest.approx(
        -0.5 * log(3 / 4) + log(2), rel=F64
    )
    logps = [log(1 / 4)] * 2 + [log(3 / 4)] * 4  # odds 1/3 and 3: sigmoid(log 1/9) = 1/10
    assert by_hand("orpo", logps=logps).loss.item() == pytest.approx(
        -0.5 * log(1 / 10) + log(4), rel=F64
    )


@pytest.mark.parametrize("certain", [1e-12, 1e-6, 1e-3])
def test_orpo_near_certainty(certain):
    """Means -certain and -1: 1 - p keeps its digits."""
    logps = [-certain] * 2 + [-1.0] * 4
    ratio = -certain - log(-math.expm1(-certain)) + 1 + log(-math.expm1(-1))
    expected = 0.5 * math.log1p(math.exp(-ratio)) + certain  # -log sigmoid(x) = log(1 + e^-x)
    assert by_hand("orpo", logps=logps).loss.item() == pytest.approx(expected, rel=F64, abs=0.0)


@pytest.mark.parametrize(
    ("m", "expected"),
    [
        # g = sigmoid(0.4): almost half of each part
        (0.02, (1 - s(0.4)) * -log(s(0.02)) + s(0.4) * math.exp(-0.02)),
        # g = sigmoid(-0.6), exp(-m) above 1
        (-0.03, (1 - s(-0.6)) * -log(s(-0.03)) + s(-0.6) * math.exp(0.03)),
    ],
)
def test_discopop_at_both_signs(m, expected):
    assert with_margin(m, "discopop").loss.item() == pytest.approx(expected, rel=F64)


@pytest.mark.parametrize(
    ("m", "loss", "w"), [(0.75, 0.25, 1.0), (1.25, 0.0, 0.0), (-2.0, 3.0, 1.0)]
)
def test_hinge_on_both_sides_of_the_kink(m, loss, w):
    out = with_margin(m, "hinge")
    assert out.loss.item() == pytest.approx(loss, rel=F64)
    assert out.weights.tolist() == [w]


# L_reg(y_w) = -0.5 (0.2 * -1 + 0.1 * -2) = 0.2
# L_reg(y_l) = -0.5 (0.3 * -0.5 + 0.2 * 1.5 - 0.1 * 0.5) = -0.05
TOTALS = [
    # w = sigmoid(-m) on both
    ("dpo", {}, -log(s(0.8)) + 0.25 * s(-0.8) * (0.2 - 0.05), [s(-0.8)]),
    ("dpo", {"weighting": "static"}, -log(s(0.8)) + 0.25 * (0.2 - 0.05), [1.0]),
    # w = |d loss / d m| = (1 - eps) sigmoid(-m) - eps sigmoid(m)
    (
        "dpo",
        {"label_smoothing": 0.1},
        *(
            -0.9 * log(s(0.8))
            - 0.1 * log(s(-0.8))
            + 0.25 * (0.9 * s(-0.8) - 0.1 * s(0.8)) * (0.2 - 0.05),
            [0.9 * s(-0.8) - 0.1 * s(0.8)],
        ),
    ),
    # w_w = sigmoid(-rho_w), w_l = sigmoid(rho_l)
    (
        "bco_pair",
        {},
        -log(s(0.6)) - log(s(0.2)) + 0.25 * (s(-0.6) * 0.2 + s(-0.2) * -0.05),
        [s(-0.6), s(-0.2)],
    ),
    (
        "bco_pair",
        {"weighting": "static"},
        -log(s(0.6)) - log(s(0.2)) + 0.25 * (0.2 - 0.05),
        [1.0, 1.0],
    ),
    # w_w = 2 |1.2 - 1| / beta, w_l = 2 |-0.4 + 1| / beta
    ("sppo_hard", {}, 0.4 + 0.25 * (0.8 * 0.2 + 2.4 * -0.05), [0.8, 2.4]),
    # w = sigmoid(gamma - m); L_reg is divided by the lengths 2 and 4
    ("simpo", {"gamma": 0.1875}, -log(s(-0.5)) + 0.25 * s(0.5) * (0.2 / 2 - 0.05 / 4), [s(0.5)]),
    # w = 2 |0.7 - 1| / beta
    ("ipo", {}, 0.09 + 0.25 * 1.2 * (0.2 / 2 - 0.05 / 4), [1.2]),
    # the likelihood term has no part in w = sigmoid(-m), m = 0.25
    ("cpo", {}, -log(s(0.25)) + 1.5 + 0.25 * s(-0.25) * (0.2 - 0.05), [s(-0.25)]),
    # w = 1 below the kink
    ("hinge", {}, 0.2 + 0.25 * (0.2 - 0.05), [1.0]),
]


@pytest.mark.parametrize(("loss_type", "options", "expected", "weights"), TOTALS)
def test_treg_total_by_hand(loss_type, options, expected, weights):
    """base + alpha * (w_w L_reg(y_w) + w_l L_reg(y_l))."""
    out = by_hand(loss_type, 0.25, **options)
    assert out.loss.tolist() == pytest.approx([expected], rel=F64)
    assert out.weights.tolist() == pytest.approx(weights, rel=F64)


def test_what_else_is_returned_by_hand():
    out = by_hand("dpo", 0.25)
    found = [x.item() for x in out[1:6]]  # sums, rewards, L_reg
    assert found == pytest.approx([-3.0, -3.5, 0.6, -0.2, 0.15], rel=F64)
    out = by_hand("simpo", 0.25, gamma=0.1875)
    found = [x.item() for x in out[1:6]]  # plain sums, rewards without the margin, L_reg by length
    assert found == pytest.approx([-3.0, -3.5, -0.75, -0.4375, 0.2 / 2 - 0.05 / 4], rel=F64)


def test_token_weights_by_hand():
    """rho_w = 0.5 (2 * (-1 + 2) + 0 * ...) = 1, rho_l = 0.5 (1 * (-0.5 + 1.5) + 3 * (-1 + 1) + 0 +
    0) = 0.5.
    """
    f64 = {"dtype": torch.float64}
    out = treg_loss(
        torch.tensor(LOGPS, **f64),
        None,
        torch.tensor([-2.0, -9.0, -1.5, -1.0, -7.0, -8.0], **f64),
        LossOptions(beta=0.5, alpha=0.0),
        cu_seqlens=torch.tensor([0, 2, 6]),
        token_weights=torch.tensor([2.0, 0.0, 1.0, 3.0, 0.0, 0.0], **f64),
    )
    assert out.loss.item() == pytest.approx(-log(s(0.5)), rel=F64)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == pytest.approx((1.0, 0.5))
    assert (out.chosen_logps.item(), out.rejected_logps.item()) == pytest.approx(
        (-3.0, -3.5)
    )  # unweighted


# -- the reference
# -

B, T, D, V = 3, 4, 3, 5
LAYOUTS = ["padded-sums", "packed-sums", "packed-weighted"]


def tiny(layout, loss_type):
    """hidden, weight and the rest of a reference call in float64; a third of the tokens are
    ignored.
    """
    hidden = torch.randn(2 * B, T, D, dtype=torch.float64)
    weight = torch.randn(V, D, dtype=torch.float64)
    target = torch.randint(0, V, (2 * B, T))
    lengths = torch.tensor([4, 1, 3, 2, 4, 3])
    target[torch.arange(T) >= lengths[:, None]] = -100
    target[2, 1] = -100  # a gap inside an answer
    given = {"target": target, "token_rewards": torch.rand(2 * B, T, dtype=torch.float64) - 0.5}
    per_token = torch.randn(2 * B, T, dtype=torch.float64) - 2
    given["ref_logps"] = per_token if layout == "packed-weighted" else 3 * per_token[:, 0]
    if layout == "packed-weighted":
        given["token_weights"] = 2 * torch.rand(2 * B, T, dtype=torch.float64)
    if layout.startswith("packed"):
        kept = torch.arange(T) < (lengths + 1)[:, None]  # one ignored token is left at some ends
        ends = [0, *itertools.accumulate(kept.sum(1).tolist())]
        given = {k: v if v.ndim == 1 else v[kept] for k, v in given.items()}
        given["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
        hidden = hidden[kept]
    if loss_type in REFERENCE_FREE:
        given["ref_logps"] = None
    return hidden.requires_grad_(), weight.requires_grad_(), given


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("alpha", [0.0, 0.25])
@pytest.mark.parametrize("weighting", ["gradient", "static"])
@pytest.mark.parametrize("loss_type", NAMES)
def test_agrees_with_the_reference(loss_type, weighting, alpha, layout):
    """Every field, and the gradient through the head, pair by pair."""
    more = {"gamma": 0.3} if loss_type == "simpo" else {}
    more |= {"label_smoothing": 0.1} if loss_type in SMOOTHED else {}
    scalars = {"beta": 0.3, "alpha": alpha, "loss_type": loss_type, "weighting": weighting, **more}
    hidden, weight, given = tiny(layout, loss_type)
    expected = reference.fused_treg_loss(hidden, weight, reduction="none", **given, **scalars)
    target = given.pop("target")
    logps = reference.linear_logprobs(hidden, weight, target).logprobs
    found = treg_loss(logps, options=LossOptions(**scalars), mask=target != -100, **given)

    for name, x in found._asdict().items():
        assert error(x, getattr(expected, name)) < F64, name
    upstream = torch.randn(B, dtype=torch.float64)
    for x, exact in zip(
        torch.autograd.grad(found.loss, (hidden, weight), upstream),
        torch.autograd.grad(expected.loss, (hidden, weight), upstream),
        strict=True,
    ):
        assert error(x, exact) < F64


@pytest.mark.parametrize("margin", [-500.0, 500.0])
@pytest.mark.parametrize("loss_type", NAMES)
def test_exact_far_from_a_tie(loss_type, margin):
    """float32 at a margin of +-500 nats, which long sequences reach: loss and gradient, none of
    them NaN.
    """
    logits = torch.tensor([[min(margin, -1.0)], [min(-margin, -1.0)]]).unsqueeze(
        -1
    )  # lp is about that
    weight, target = torch.tensor([[0.0], [1.0]]), torch.ones(2, 1, dtype=torch.int64)
    ref = None if loss_type in REFERENCE_FREE else torch.zeros(2)
    scalars = {"beta": 1.0, "alpha": 0.25, "loss_type": loss_type}
    scalars |= {"label_smoothing": 0.1} if loss_type in SMOOTHED else {}
    rewards = torch.tensor([[0.25], [-0.125]])

    exact_hidden = logits.double().requires_grad_()
    exact = reference.fused_treg_loss(
        exact_hidden, weight.double(), target, rewards, ref, **scalars
    )
    hidden = logits.clone().requires_grad_()
    logps = reference.linear_logprobs(hidden, weight, target).logprobs
    found = treg_loss(logps, rewards, ref, LossOptions(**scalars))
    torch.testing.assert_close(found.loss[0].double(), exact.loss, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(found.weights.double(), exact.weights, rtol=1e-5, atol=1e-30)
    (dexact,) = torch.autograd.grad(exact.loss, exact_hidden)
    (dhidden,) = torch.autograd.grad(found.loss.sum(), hidden)
    torch.testing.assert_close(dhidden.double(), dexact, rtol=1e-5, atol=1e-30)


# -- gradients
# -


def random_pairs(pairs=B, tokens=T, ref="sums"):
    """logps (a leaf), rewards, reference log-probs and mask, padded, float64."""
    logps = -torch.rand(2 * pairs, tokens, dtype=torch.float64) * 3 - 0.05
    rewards = torch.rand_like(logps) - 0.5
    refs = -torch.rand_like(logps) * 3
    mask = torch.rand(logps.shape) < 0.7
    mask[:, 0] = True
    refs = {"sums": torch.where(mask, refs, 0).sum(1), "tokens": refs, None: None}[ref]
    return logps.requires_grad_(), rewards, refs, mask


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(
    ("loss_type", "gamma"),
    [("dpo", 0.0), ("sigmoid", 0.0), ("simpo", 0.0), ("simpo", 0.7)],
    ids=str,
)
def test_gradient_is_that_of_fixed_token_weights(loss_type, gamma, alpha):
    """dL/dlp_t = -beta w (1 + alpha rhat_t) on chosen, +beta w (1 - alpha rhat_t) on rejected;
    simpo: over |y|.
    """
    beta, simpo = 0.3, loss_type == "simpo"
    logps, rewards, ref, mask = random_pairs(ref=None if simpo else "sums")
    options = LossOptions(loss_type, beta, alpha, gamma)
    (found,) = torch.autograd.grad(
        treg_loss(logps, rewards, ref, options, mask=mask).loss.sum(), logps
    )

    lp, lengths = torch.where(mask, logps.detach(), 0.0), mask.sum(1, keepdim=True)
    rho = beta * (lp.sum(1) / lengths[:, 0] if simpo else lp.sum(1) - ref)
    w = 1 / (1 + torch.exp(rho[:B] - rho[B:] - gamma)).unsqueeze(1)  # sigmoid(gamma - m)
    expected = torch.cat(
        [-beta * w * (1 + alpha * rewards[:B]), beta * w * (1 - alpha * rewards[B:])]
    )
    expected = torch.where(mask, expected / lengths if simpo else expected, 0.0)
    assert error(found, expected) < F64


@pytest.mark.parametrize("weighting", ["gradient", "static"])
@pytest.mark.parametrize("loss_type", [n for n in NAMES if n not in ("orpo", "cpo")])
def test_gradient_is_base_gradient_and_reward(loss_type, weighting):
    """dL/dlp_t = beta (u_t g_s - alpha w_s rhat_t) [/ |y|], g_s = d base / d rho_s by central
    differences.

    orpo and cpo add the likelihood term, whose gradient is not of this form.
    """
    beta, alpha = 0.4, 0.25
    logps, rewards, ref, mask = random_pairs(ref=None if loss_type == "simpo" else "tokens")
    u = 2 * torch.rand_like(rewards)
    options = options_of(loss_type, beta=beta, alpha=alpha, weighting=weighting)
    out = treg_loss(logps, rewards, ref, options, mask=mask, token_weights=u)
    (found,) = torch.autograd.grad(out.loss.sum(), logps)

    norm = mask.sum(1, keepdim=True) if loss_type in LENGTH_NORMALISED else 1.0
    rho, h = torch.cat([out.chosen_rewards, out.rejected_rewards]), 1e-5

    def base(w, l):
        return options.base(w, l).value  # its values are checked by hand above

    w, l = rho[:B], rho[B:]
    slope = torch.cat([base(w + h, l) - base(w - h, l), base(w, l + h) - base(w, l - h)]).unsqueeze(
        1
    ) / (2 * h)
    weight = slope.abs() if weighting == "gradient" else torch.ones_like(slope)
    expected = torch.where(mask, beta * (u * slope - alpha * weight * rewards) / norm, 0.0)
    assert error(found, expected) < 1e-7  # of the differences


@pytest.mark.parametrize("loss_type", NAMES)
@pytest.mark.parametrize(
    ("alpha", "weighting"), [(0.0, "gradient"), (0.25, "static")], ids=["base", "static"]
)  # with alpha > 0 a gradient weight is held constant, which differences do not know
def test_gradcheck(loss_type, alpha, weighting):
    logps, rewards, ref, mask = random_pairs(
        2, 3, None if loss_type in REFERENCE_FREE else "tokens"
    )
    options = options_of(loss_type, alpha=alpha, beta=0.3, weighting=weighting)
    u = 2 * torch.rand_like(rewards)
    assert torch.autograd.gradcheck(
        lambda x: treg_loss(x, rewards, ref, options, mask=mask, token_weights=u).loss, (logps,)
    )


# -- one unknown scalar a pair
# -

EVERY_OPTION = [
    (name, eps, alpha, weighting)
    for name in NAMES
    for eps in ([0.1] if name == "exo_pair" else [0.0, 0.1] if name in SMOOTHED else [0.0])
    for alpha in (0.0, 0.25)
    for weighting in ("gradient", "static")
]
FALLING = (
    "dpo",
    "sigmoid",
    "simpo",
    "hinge",
    "robust",
)  # d loss / d m <= 0 at any m, without smoothing


def is_pair_scalar(name, eps, alpha, weighting):
    """From the formulas: one factor d base / d m a pair; beside rhat only where it is also w, up to
    a known sign.
    """
    if name in TWO_WEIGHTS or name == "cpo":
        return False
    return alpha == 0 or (
        weighting == "gradient" and name in FALLING and (eps == 0 or name == "robust")
    )


def known_part(options, rewards, mask, u):
    """-dL/dlp_t / w up to w: what is known of a token before any log-prob."""
    sign = torch.ones_like(rewards)
    sign[rewards.shape[0] // 2 :] = -1
    part = options.beta * (sign * u + options.alpha * rewards)
    return part / mask.sum(1, keepdim=True) if options.loss_type in LENGTH_NORMALISED else part


def spread(options, draws):
    """Largest deviation of -dL/dlp_t from one scalar a pair times the known part, over all draws,
    relative.
    """
    worst = 0.0
    for logps, rewards, ref, mask, u in draws:
        ref = None if options.loss_type in REFERENCE_FREE else ref
        loss = treg_loss(logps, rewards, ref, options, mask=mask, token_weights=u).loss
        found, known = (
            -torch.autograd.grad(loss.sum(), logps)[0] * mask,
            known_part(options, rewards, mask, u) * mask,
        )

        def by_pair(x):
            return torch.cat(x.chunk(2), 1)  # [B, 2T]

        found, known = by_pair(found), by_pair(known)
        w = (found * known).sum(1, keepdim=True) / known.square().sum(
            1, keepdim=True
        )  # least squares
        scale = found.abs().amax().clamp(min=1e-300)
        worst = max(worst, ((found - w * known).abs().amax() / scale).item())
    return worst


def draws(count=9):
    """Log-probs around a tie and far from it, so that no sign of d base / d m is missing."""
    for i in range(count):
        logps, rewards, ref, mask = random_pairs(ref="tokens")
        scale = (0.1, 1.0, 4.0)[i % 3]
        yield (
            (logps.detach() * scale).requires_grad_(),
            rewards,
            ref * scale,
            mask,
            2 * torch.rand_like(rewards),
        )


@pytest.mark.parametrize(("name", "eps", "alpha", "weighting"), EVERY_OPTION)
def test_pair_scalar(name, eps, alpha, weighting):
    """Where it is True the gradient is one scalar a pair times known numbers, where False it is
    not; never too shy.
    """
    options = LossOptions(name, 1.5, alpha, label_smoothing=eps, weighting=weighting)
    expected = is_pair_scalar(name, eps, alpha, weighting)
    assert options.pair_scalar is expected
    deviation = spread(options, draws())
    if expected:
        assert deviation < F64
    else:
        assert deviation > 1e-3


# -- relations between calls
# -

PER_PAIR = (
    "loss",
    "chosen_logps",
    "rejected_logps",
    "chosen_rewards",
    "rejected_rewards",
    "reg_loss",
)


@pytest.fixture(params=NAMES)
def call(request):
    """(a call of one objective on padded tensors, its tensors by name)."""
    name = request.param
    logps, rewards, ref, mask = random_pairs(ref=None if name in REFERENCE_FREE else "tokens")
    tensors = {"logps": logps, "token_rewards": rewards, "ref_logps": ref, "mask": mask}
    tensors |= {"token_weights": 2 * torch.rand_like(rewards)}
    options = options_of(name, beta=0.5)

    def run(changed=None):
        return treg_loss(options=options, **{**tensors, **(changed or {})})

    run.two = name in TWO_WEIGHTS
    return run, tensors


def rows_of(tensors, pairs):
    """The tensors of these pairs alone."""
    rows = torch.cat([pairs, pairs + B])
    return {k: None if v is None else v[rows] for k, v in tensors.items()}


def test_order_of_pairs_permutes_the_results(call):
    run, tensors = call
    order = torch.tensor([2, 0, 1])
    plain, permuted = run(), run(rows_of(tensors, order))
    for name in PER_PAIR:
        assert torch.equal(getattr(permuted, name), getattr(plain, name)[order]), name
    both = torch.cat([order, order + B]) if run.two else order
    assert torch.equal(permuted.weights, plain.weights[both])


def test_a_split_batch_gives_the_same_pairs(call):
    run, tensors = call
    whole = run()
    parts = [run(rows_of(tensors, pairs)) for pairs in (torch.tensor([0]), torch.tensor([1, 2]))]
    for name in PER_PAIR:
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name)), name
    halves = [[p.weights] if not run.two else p.weights.chunk(2) for p in parts]
    assert torch.equal(torch.cat([torch.cat(h) for h in zip(*halves, strict=True)]), whole.weights)


def test_swapping_chosen_and_rejected_swaps_what_is_reported(call):
    run, tensors = call
    swapped = run({k: None if v is None else v.roll(B, 0) for k, v in tensors.items()})
    plain = run()
    assert torch.equal(swapped.chosen_logps, plain.rejected_logps)
    assert torch.equal(swapped.rejected_rewards, plain.chosen_rewards)
    assert not torch.allclose(swapped.loss, plain.loss)


GARBAGE = [float("nan"), float("inf"), -1e30]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_at_masked_positions_changes_nothing(call, garbage):
    """Neither any result nor the gradient of a scored token."""
    run, tensors = call
    mask, clean = tensors["mask"], run()
    (expected,) = torch.autograd.grad(clean.loss.sum(), tensors["logps"], retain_graph=True)
    for where in ("logps", "token_rewards", "ref_logps", "token_weights"):
        if tensors[where] is not None:
            spoilt = run({where: torch.where(mask, tensors[where], garbage)})
            for name, x in clean._asdict().items():
                assert torch.equal(getattr(spoilt, name), x), (where, name)
            (found,) = torch.autograd.grad(spoilt.loss.sum(), tensors["logps"])
            assert torch.equal(found[mask], expected[mask]), where


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("where", ["token_rewards", "ref_logps", "token_weights"])
def test_masked_positions_take_no_gradient(where, garbage):
    """Exactly 0, whatever lies there: it is multiplied into hidden states further on."""
    logps, rewards, ref, mask = random_pairs(ref="tokens")
    given = {"token_rewards": rewards, "ref_logps": ref, "token_weights": torch.ones_like(rewards)}
    given[where] = torch.where(mask, given[where], garbage)
    (found,) = torch.autograd.grad(treg_loss(logps, **given, mask=mask).loss.sum(), logps)
    assert (found[mask] != 0).all()
    assert (found[~mask] == 0).all()


def test_packed_is_padded(call):
    run, tensors = call
    mask = tensors["mask"]
    packed = {k: None if v is None else v[mask] for k, v in tensors.items()} | {"mask": None}
    cu_seqlens = torch.tensor([0, *itertools.accumulate(mask.sum(1).tolist())], dtype=torch.int32)
    for name, x in run(packed | {"cu_seqlens": cu_seqlens})._asdict().items():
        assert error(x, getattr(run(), name)) < F64, name


def test_per_token_reference_is_its_sums():
    logps, rewards, ref, mask = random_pairs(ref="tokens")
    sums = torch.where(mask, ref, 0).sum(1)
    for name in PER_PAIR:
        a, b = (getattr(treg_loss(logps, rewards, r, mask=mask), name) for r in (ref, sums))
        assert error(a, b) < F64, name


def test_shape_and_dtype_of_weights_and_what_is_detached(call):
    run, _ = call
    out = run()
    assert out.weights.shape == ((2 * B,) if run.two else (B,))
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in out[1:])
    assert all(x.dtype == torch.float64 for x in out)


def test_results_keep_the_log_probs_dtype():
    """float64 rewards and reference sums beside float32 log-probs do not widen the loss."""
    logps, rewards, ref, mask = random_pairs()
    out = treg_loss(logps.detach().float(), rewards, ref, mask=mask)
    assert all(x.dtype == torch.float32 for x in out)
    assert error(out.loss, treg_loss(logps, rewards, ref, mask=mask).loss) < 1e-6


@pytest.mark.parametrize("loss_type", ["dpo", "bco_pair", "orpo"])
def test_runs_in_inference_mode(loss_type):
    """Evaluation: the same numbers where autograd is off altogether."""
    logps, rewards, ref, mask = random_pairs(ref=None if loss_type == "orpo" else "sums")
    call = functools.partial(treg_loss, logps, rewards, ref, LossOptions(loss_type), mask=mask)
    expected = call()
    with torch.inference_mode():
        found = call()
    for name, x in expected._asdict().items():
        assert torch.equal(getattr(found, name), x), name


@pytest.mark.parametrize("where", ["token_rewards", "ref_logps", "token_weights"])
def test_takes_tensors_made_in_inference_mode(where):
    """Rewards and reference log-probs come from models that are run so."""
    logps, rewards, ref, mask = random_pairs(ref="tokens")
    given = {
        "token_rewards": rewards,
        "ref_logps": ref,
        "token_weights": 2 * torch.rand_like(rewards),
    }
    (expected,) = torch.autograd.grad(treg_loss(logps, **given, mask=mask).loss.sum(), logps)
    with torch.inference_mode():
        given[where] = given[where].clone()
    (found,) = torch.autograd.grad(treg_loss(logps, **given, mask=mask).loss.sum(), logps)
    assert torch.equal(found, expected)


# -- refusals
# -


@pytest.mark.parametrize(
    ("loss_type", "ref", "weighted", "message"),
    [
        ("dpo", None, False, "ref_logps: expected a tensor for loss_type='dpo', got None"),
        (
            "simpo",
            "sums",
            False,
            "ref_logps: expected None for the reference-free loss_type='simpo', got a tensor",
        ),
        (
            "orpo",
            "tokens",
            True,
            "ref_logps: expected None for the reference-free loss_type='orpo', got a tensor",
        ),
        (
            "ipo",
            "sums",
            True,
            "ref_logps: expected per-token log-probs beside token_weights, got per-sequence sums",
        ),
    ],
)
def test_reference_that_does_not_go_with_the_objective(loss_type, ref, weighted, message):
    logps, rewards, refs, mask = random_pairs(ref=ref)
    weights = torch.ones_like(rewards) if weighted else None
    with pytest.raises(ValueError) as caught:
        treg_loss(logps, rewards, refs, LossOptions(loss_type), mask=mask, token_weights=weights)
    assert str(caught.value) == message
