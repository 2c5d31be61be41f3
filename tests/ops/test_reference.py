"""The reference itself, against numbers worked out by hand on a vocabulary of two."""

import math

import pytest
import torch

from treg.ops import reference

STATISTICS = ("lse", "entropy", "mean_logit", "is_top1", "log_sum_sq_probs")
F64 = {"dtype": torch.float64}
REL = 1e-13

# h = (2, 1), W = ((3, -1), (0.5, 0.25)): products 5 and 1.25
HIDDEN = torch.tensor([[2.0, 1.0]], **F64)
WEIGHT = torch.tensor([[3.0, -1.0], [0.5, 0.25]], **F64)
BIAS = torch.tensor([-4.25, 0.5], **F64)  # products and bias: 0.75 and 1.75


def log_share(a, b):
    """log( e^a / (e^a + e^b) )"""
    return -math.log(1 + math.exp(b - a))


HEADS = {
    # options, and the two logits they make
    "plain": ({}, (5.0, 1.25)),
    "bias": ({"bias": BIAS}, (0.75, 1.75)),
    "scale": ({"logit_scale": 0.25}, (1.25, 0.3125)),
    "negative-scale": ({"logit_scale": -1.0}, (-5.0, -1.25)),
    "temperature": ({"temperature": 2.5}, (2.0, 0.5)),
    "softcap": ({"softcap": 4.0}, (4 * math.tanh(1.25), 4 * math.tanh(0.3125))),
    # the scale is applied to the bias too, the softcap after both, the temperature last
    "all": (
        {"bias": BIAS, "logit_scale": 2.0, "softcap": 3.0, "temperature": 0.5},
        (6 * math.tanh(1.5 / 3), 6 * math.tanh(3.5 / 3)),
    ),
}


@pytest.mark.parametrize(("options", "logits"), HEADS.values(), ids=HEADS)
def test_log_probs_by_hand(options, logits):
    a, b = logits
    for target, expected in ((0, log_share(a, b)), (1, log_share(b, a))):
        out = reference.linear_logprobs(HIDDEN, WEIGHT, torch.tensor([target]), **options)
        assert out.logprobs.tolist() == pytest.approx([expected], rel=REL)


@pytest.mark.parametrize(("options", "logits"), HEADS.values(), ids=HEADS)
def test_statistics_by_hand(options, logits):
    a, b = logits
    p, q = math.exp(log_share(a, b)), math.exp(log_share(b, a))
    for target, top in ((0, a > b), (1, b > a)):
        out = reference.linear_logprobs(
            HIDDEN, WEIGHT, torch.tensor([target]), outputs=STATISTICS, **options
        )
        assert out.lse.item() == pytest.approx(math.log(math.exp(a) + math.exp(b)), rel=REL)
        assert out.entropy.item() == pytest.approx(-p * math.log(p) - q * math.log(q), rel=1e-11)
        assert out.mean_logit.item() == pytest.approx((a + b) / 2, rel=REL)
        assert out.is_top1.item() is top
        assert out.log_sum_sq_probs.item() == pytest.approx(math.log(p * p + q * q), rel=1e-11)


def test_a_tie_is_on_top():
    out = reference.linear_logprobs(
        torch.zeros(2, 2), WEIGHT.float(), torch.tensor([0, 1]), outputs=("is_top1",)
    )
    assert out.is_top1.tolist() == [True, True]


@pytest.mark.parametrize("ignore_index", [-7, 0, 7])  # below, inside and above the vocabulary
def test_ignored_rows_are_zero(ignore_index):
    """Whatever their hidden states are."""
    hidden = torch.cat([torch.full((1, 2), float("nan"), **F64), HIDDEN, HIDDEN])
    target = torch.tensor([ignore_index, 1, ignore_index])
    out = reference.linear_logprobs(
        hidden, WEIGHT, target, ignore_index=ignore_index, outputs=STATISTICS
    )
    assert out.logprobs.tolist() == pytest.approx([0.0, log_share(1.25, 5.0), 0.0], rel=REL)
    for name in STATISTICS:
        assert getattr(out, name)[[0, 2]].tolist() == [0, 0], name


def test_gradient_by_hand():
    """d lp_0 / d h = (1 - p) (W_0 - W_1), d lp_0 / d W = (1 - p) (h, -h), at p = e^5 / (e^5 +
    e^1.25).
    """
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    out = reference.linear_logprobs(hidden, weight, torch.tensor([0]))
    dhidden, dweight = torch.autograd.grad(out.logprobs.sum(), (hidden, weight))
    other = math.exp(log_share(1.25, 5.0))
    assert dhidden.tolist() == [pytest.approx([other * 2.5, other * -1.25], rel=1e-11)]
    assert dweight.tolist() == [
        pytest.approx(row, rel=1e-11) for row in ([2 * other, other], [-2 * other, -other])
    ]


def test_gradient_through_the_softcap_by_hand():
    """dz / da = 1 - tanh^2(a / cap) before the temperature."""
    hidden = HIDDEN.clone().requires_grad_()
    out = reference.linear_logprobs(hidden, WEIGHT, torch.tensor([0]), softcap=4.0, temperature=2.0)
    (dhidden,) = torch.autograd.grad(out.logprobs.sum(), hidden)
    a, b = math.tanh(1.25), math.tanh(0.3125)
    other = math.exp(log_share(2 * b, 2 * a))
    slopes = (1 - a**2) / 2, (1 - b**2) / 2
    expected = [other * (slopes[0] * w0 - slopes[1] * w1) for w0, w1 in ((3.0, 0.5), (-1.0, 0.25))]
    assert dhidden.tolist() == [pytest.approx(expected, rel=1e-11)]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_dtypes(dtype, expected):
    """float64 stays; 16-bit logits become float32, so that the numbers here (exact in bfloat16)
    come out exactly.
    """
    out = reference.linear_logprobs(
        HIDDEN.to(dtype), WEIGHT.to(dtype), torch.tensor([1]), outputs=STATISTICS, temperature=2.5
    )
    assert {x.dtype for name, x in out._asdict().items() if name != "is_top1"} == {expected}
    assert out.is_top1.dtype == torch.bool
    rel = REL if dtype == torch.float64 else 1e-6
    assert out.logprobs.item() == pytest.approx(log_share(0.5, 2.0), rel=rel)


def test_float64_loss():
    hidden, _, target, rewards, ref = pair()
    out = reference.fused_treg_loss(hidden, WEIGHT_OF_PAIR, target, rewards, ref)
    assert all(x.dtype == torch.float64 for x in out if x is not None) and out.lse is None


# -- a pair
#
# W = ((0), (1)): hidden x makes the log-prob of token 1 equal -log(1 + e^-x). With x = -log 3 it is
# log(1/4), with x = log 3 it is log(3/4), with x = 0 it is log(1/2).

WEIGHT_OF_PAIR = torch.tensor([[0.0], [1.0]], **F64)
LOG3 = math.log(3)


def pair():
    """chosen: log 3/4, log 1/2, one ignored; rejected: log 1/4, log 3/4, log 1/2. Padded, with its
    offsets packed.
    """
    hidden = torch.tensor([[LOG3, 0.0, 5.0], [-LOG3, LOG3, 0.0]], **F64).unsqueeze(-1)
    target = torch.tensor([[1, 1, -100], [1, 1, 1]])
    rewards = torch.tensor([[0.5, -0.25, 9.0], [0.5, 0.0, -0.5]], **F64)
    ref = torch.tensor([math.log(1 / 4), math.log(1 / 8)], **F64)
    return hidden, torch.tensor([0, 3, 6], dtype=torch.int32), target, rewards, ref


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_treg_by_hand(packed, reduction):
    """beta 1, alpha 0.5.

    rho_w = log(3/4 * 1/2) - log(1/4) = log(3/2)
    rho_l = log(1/4 * 3/4 * 1/2) - log(1/8) = log(3/4)
    m = log 2, -log sigmoid(m) = log(3/2), w = sigmoid(-m) = 1/3
    L_reg(y_w) = -(log(3/4) - log(1/2) / 2) / 2
    L_reg(y_l) = -(log(1/4) - log(1/2)) / 2
    """
    hidden, cu_seqlens, target, rewards, ref = pair()
    options = {"beta": 1.0, "alpha": 0.5, "reduction": reduction}
    if packed:
        hidden, target, rewards = hidden.flatten(0, 1), target.flatten(), rewards.flatten()
        options["cu_seqlens"] = cu_seqlens
    out = reference.fused_treg_loss(hidden, WEIGHT_OF_PAIR, target, rewards, ref, **options)
    reg = -(math.log(3 / 4) - math.log(1 / 2) / 2) / 2 - (math.log(1 / 4) - math.log(1 / 2)) / 2
    assert out.reg_loss.tolist() == pytest.approx([reg], rel=REL)
    assert out.weights.tolist() == pytest.approx([1 / 3], rel=REL)
    assert out.loss.shape == ((1,) if reduction == "none" else ())
    assert out.loss.sum().item() == pytest.approx(math.log(3 / 2) + 0.5 / 3 * reg, rel=REL)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == pytest.approx(
        (math.log(1.5), math.log(0.75))
    )
    assert (out.chosen_logps.item(), out.rejected_logps.item()) == pytest.approx(
        (math.log(3 / 8), math.log(3 / 32))
    )
    expected = [math.log(p) for p in (3 / 4, 1 / 2, 1, 1 / 4, 3 / 4, 1 / 2)]
    assert out.token_logps.flatten().tolist() == pytest.approx(expected, rel=REL)


def test_reductions_over_pairs():
    """Two pairs whose losses differ: the mean and the sum of what "none" returns."""
    hidden, _, target, rewards, _ = pair()
    hidden, target, rewards = (
        torch.cat([x[:1], 1 - x[:1], x[1:], x[1:]]) for x in (hidden, target, rewards)
    )
    target = target.clamp(0, 1)
    ref = torch.zeros(4, **F64)
    none, mean, total = (
        reference.fused_treg_loss(
            hidden, WEIGHT_OF_PAIR, target, rewards, ref, beta=1.0, reduction=r
        ).loss
        for r in ("none", "mean", "sum")
    )
    assert none[0].item() != pytest.approx(none[1].item())
    assert mean.item() == pytest.approx((none[0] + none[1]).item() / 2)
    assert total.item() == pytest.approx((none[0] + none[1]).item())
