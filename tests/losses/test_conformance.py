"""What every row of OBJECTIVES has to keep, and that a new row is all that an objective needs."""

import math

import pytest
import torch
from autograd_loss import pair_loss, reward_gradient
from helpers import IMPLS, check_against_reference, device_of
from pair_case import make_case, upstream

from treg.losses import OBJECTIVES, Base, LossOptions, Objective, treg_loss
from treg.losses.base import ARGUMENTS
from treg.ops import fused_treg_loss, reference
from treg.results import TRegLoss

SCALES = (1e-9, 1e-3, 0.3, 1.7, 40.0, 700.0, 1e4)
REWARDS = [-x for x in reversed(SCALES)] + [0.0, *SCALES]


def grid(rewards=REWARDS):
    """rho_w and rho_l: every pair of these rewards."""
    pairs = torch.cartesian_prod(*[torch.tensor(rewards, dtype=torch.float64)] * 2)
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()


def numbers_of_pairs(loss_type, count):
    """Numbers of pairs of 0 and 1, those that the objective needs."""
    found = {}
    for i, name in enumerate(OBJECTIVES[loss_type].pair_columns):
        found[name] = torch.arange(count, dtype=torch.float64).div(i + 1, rounding_mode="floor") % 2
    return found


def option_sets(loss_type):
    """Each option that the objective declares at two values or three, all together."""
    values = {"gamma": (0.0, 0.7), "label_smoothing": (0.0, 0.1, 0.3)}
    objective, found = OBJECTIVES[loss_type], [{}]
    for name, default in objective.options.items():
        tried = values.get(name, (default, 3 * default + 0.2))
        if name in objective.positive:
            tried = [x for x in tried if x > 0]
        found = [{**others, name: x} for others in found for x in tried]
    return [values for values in found if allowed(objective, values)]


def allowed(objective, values):
    try:
        if objective.check is not None:
            objective.check(values)
    except ValueError:
        return False
    return True


def options_of(loss_type, values, **more):
    arguments = {name: x for name, x in values.items() if name in ARGUMENTS}
    scalars = {name: x for name, x in values.items() if name not in ARGUMENTS}
    return LossOptions(loss_type, scalars=scalars, **arguments, **more)


CASES = [
    pytest.param(name, values, beta, id=f"{name}-{values}-{beta}")
    for name in OBJECTIVES
    for values in option_sets(name)
    for beta in (0.1, 1.0, 3.0)
]


@pytest.mark.parametrize(("loss_type", "values", "beta"), CASES)
def test_slopes_are_those_of_the_value(loss_type, values, beta):
    """1e-15 is what autograd's own 1 - sigmoid is rounded to."""
    options = options_of(loss_type, values, beta=beta)
    rho_w, rho_l = grid()
    numbers = numbers_of_pairs(loss_type, len(rho_w))
    found = options.base(rho_w, rho_l, numbers)
    exact = reward_gradient(rho_w, rho_l, options, numbers)
    for name, x in found._asdict().items():
        assert x.shape == rho_w.shape and x.dtype == torch.float64, name
        assert torch.isfinite(x).all(), name
    for slope, by_autograd in zip(found[1:], exact, strict=True):
        torch.testing.assert_close(slope, by_autograd, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_flags_say_what_the_slopes_are(loss_type):
    """margin_only, decreasing and decreasing_smoothed: true where claimed, claimed where true."""
    objective = OBJECTIVES[loss_type]
    rho_w, rho_l = grid([x for x in REWARDS if abs(x) < 100])
    opposite, falling, falling_smoothed = True, True, True
    for values in option_sets(loss_type):
        numbers = numbers_of_pairs(loss_type, len(rho_w))
        base = options_of(loss_type, values, beta=1.0).base(rho_w, rho_l, numbers)
        opposite &= torch.equal(base.slope_l, -base.slope_w)
        never_rises = bool((base.slope_w <= 0).all())
        falling_smoothed &= never_rises
        if not values.get("label_smoothing"):
            falling &= never_rises
    assert objective.margin_only == opposite
    if objective.margin_only and "label_smoothing" not in objective.positive:
        assert objective.decreasing == falling
    if objective.decreasing and "label_smoothing" in objective.options:
        assert objective.decreasing_smoothed == falling_smoothed


@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_rows_say_where_they_come_from(loss_type):
    assert "arXiv" in OBJECTIVES[loss_type].paper


@pytest.mark.parametrize("weighting", ["gradient", "static"])
@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_options_come_back_from_text_and_numbers(loss_type, weighting):
    for values in option_sets(loss_type):
        alpha = 0.7 if OBJECTIVES[loss_type].regularized else 0.0
        options = options_of(loss_type, values, beta=0.3, alpha=alpha, weighting=weighting)
        numbers = options.numbers()
        assert numbers == (0.3, alpha, *values.values())
        again = LossOptions.of(options.text(), numbers)
        assert again == options and hash(again) == hash(options)
        for i in range(len(numbers)):
            if i == 1 and not alpha:
                continue
            changed = [0.4 if i == k else x for k, x in enumerate(numbers)]
            if not allowed(OBJECTIVES[loss_type], dict(zip(values, changed[2:], strict=True))):
                continue
            assert LossOptions.of(options.text(), changed) != options


@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_what_an_objective_does_not_take_is_refused(loss_type):
    objective = OBJECTIVES[loss_type]
    (values, *_) = option_sets(loss_type)
    taken = ", ".join(objective.options) or "no options"
    for name in ("gamma", "label_smoothing", "tau", "nonsense"):
        if name in objective.options:
            continue
        with pytest.raises(ValueError) as caught:
            options_of(loss_type, {**values, name: 0.25})
        message = str(caught.value)
        assert name in message and f"loss_type={loss_type!r}, which takes {taken}" in message


@pytest.mark.parametrize("bad", [math.nan, math.inf, "0.1", None, True])
def test_options_of_scalars_are_finite_numbers(bad):
    with pytest.raises(ValueError, match="tau: expected a finite number, got"):
        LossOptions("discopop", scalars={"tau": bad})


@pytest.mark.parametrize("bad", [0.0, -0.05])
def test_positive_options(bad):
    with pytest.raises(ValueError, match="tau: expected a number > 0 for loss_type='discopop'"):
        LossOptions("discopop", scalars={"tau": bad})
    with pytest.raises(ValueError, match="label_smoothing: expected"):
        LossOptions("exo_pair", label_smoothing=bad)


def test_scalars_must_be_a_mapping_of_further_options():
    with pytest.raises(TypeError, match="scalars: expected a mapping"):
        LossOptions("discopop", scalars=("tau", 0.1))
    with pytest.raises(ValueError, match="scalars: expected gamma as an argument of its own"):
        LossOptions("simpo", scalars={"gamma": 0.1})


def test_the_callers_mapping_is_not_kept():
    given = {"tau": 0.1}
    options = LossOptions("discopop", scalars=given)
    given["tau"] = -1.0
    assert options.scalars == {"tau": 0.1}
    assert LossOptions("discopop").scalars == {"tau": 0.05}


def test_rows_that_contradict_themselves():
    with pytest.raises(ValueError, match="expected gamma to be 0 by default"):
        Objective(scratch, options={"gamma": 0.5})
    with pytest.raises(ValueError, match="positive: expected names among options, got 'tau'"):
        Objective(scratch, positive=("tau",))


@pytest.mark.parametrize("impl", IMPLS)
def test_tau_by_hand(impl):
    """m = 0.8, tau = 0.4: g = sigmoid(2)."""
    g, m = 1 / (1 + math.exp(-2.0)), 0.8
    expected = (1 - g) * math.log1p(math.exp(-m)) + g * math.exp(-m)
    rho = torch.tensor([[0.6], [-0.2]], dtype=torch.float64, device=device_of(impl))
    options = LossOptions("discopop", 1.0, 0.0, scalars={"tau": 0.4})
    found = treg_loss(rho, None, torch.zeros_like(rho), options, impl=impl)
    assert found.loss.item() == pytest.approx(expected, rel=1e-12)


# -- an objective of a user: one function, one row


def scratch(rho_w, rho_l, scalars):
    """(1 - m)^2 / strength + log(1 + exp(-rho_w))."""
    rest, strength = 1 - (rho_w - rho_l), scalars["strength"]
    value = rest**2 / strength - torch.nn.functional.logsigmoid(rho_w)
    slope_l = 2 * rest / strength
    return Base(value, -slope_l - torch.sigmoid(-rho_w), slope_l)


@pytest.fixture
def scratch_row(monkeypatch):
    row = Objective(scratch, margin_only=False, options={"strength": 2.0}, positive=("strength",))
    monkeypatch.setitem(OBJECTIVES, "scratch", row)


@pytest.mark.usefixtures("scratch_row")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("strength", [2.0, 0.7])
def test_scratch_objective_through_treg_loss(impl, strength):
    """Without a Triton form it is computed in PyTorch, under either implementation."""
    options = LossOptions("scratch", 0.3, 0.4, scalars={"strength": strength})
    logps = -3 * torch.rand(6, 5, dtype=torch.float64)
    rewards, ref = torch.rand_like(logps) - 0.5, logps + torch.randn_like(logps)
    mask = torch.rand(logps.shape) < 0.7
    mask[:, 0] = True
    u = torch.rand_like(logps)

    leaf = logps.clone().requires_grad_()
    exact = pair_loss(leaf, rewards, ref, options, None, mask, u)
    (exact_gradient,) = torch.autograd.grad(exact.loss.sum(), leaf)
    device = device_of(impl)
    leaf = logps.to(device).requires_grad_()
    rest = [x.to(device) for x in (rewards, ref)]
    more = {"mask": mask.to(device), "token_weights": u.to(device)}
    found = treg_loss(leaf, *rest, options, **more, impl=impl)
    (gradient,) = torch.autograd.grad(found.loss.sum(), leaf)
    for name, x in found._asdict().items():
        torch.testing.assert_close(x.cpu(), getattr(exact, name), rtol=1e-11, atol=1e-12, msg=name)
    torch.testing.assert_close(gradient.cpu(), exact_gradient, rtol=1e-11, atol=1e-12)


def dense(hidden, weight, target, token_rewards, ref_logps, cu_seqlens, reduction, **scalars):
    """`fused_treg_loss` from dense logits, and autograd of the objective's value."""
    logps = reference.linear_logprobs(hidden, weight, target).logprobs
    options = LossOptions(**scalars)
    out = pair_loss(logps, token_rewards, ref_logps, options, cu_seqlens, target != -100, None)
    loss = out.loss.mean() if reduction == "mean" else out.loss
    return TRegLoss(loss, *out[1:], logps.detach())


@pytest.mark.usefixtures("scratch_row")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("impl", IMPLS)
def test_scratch_objective_through_the_head(impl, reduction):
    """As one operator, and as log-probs with `treg_loss` after them."""
    case = make_case(loss_type="scratch", beta=0.3, reduction=reduction)
    check_against_reference(
        case, fused_treg_loss, dense, upstream, torch.float32, device_of(impl), impl=impl
    )


FAULTY = {
    "a tuple": (lambda w, l, _: (w - l, torch.ones_like(w), -torch.ones_like(l)), TypeError),
    "a mean": (
        lambda w, l, _: Base((w - l).mean(), torch.ones_like(w), -torch.ones_like(l)),
        ValueError,
    ),
    "float32": (
        lambda w, l, _: Base((w - l).float(), torch.ones_like(w), -torch.ones_like(l)),
        ValueError,
    ),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_a_formula_that_gives_something_else_is_refused(fault, monkeypatch):
    formula, error = FAULTY[fault]
    monkeypatch.setitem(OBJECTIVES, "faulty", Objective(formula))
    logps, rewards = -torch.rand(4, 5), torch.rand(4, 5)
    with pytest.raises(error, match=r"^faulty: expected .*, got "):
        treg_loss(logps, rewards, torch.zeros(4), LossOptions("faulty"))
