"""`token_regularizer` on a plain objective is `treg_loss`, and its gradient is the one that its
docstring states.
"""

import pytest
import torch
from helpers import EPS

from treg.losses import OBJECTIVES, LossOptions, treg_loss
from treg.losses.regularizer import token_regularizer

B, T = 3, 7
EXACT = 1e-12  # relative, float64
OPTIONS = {
    name: {"label_smoothing": 0.1} if name in ("robust", "exo_pair") else {}
    for name, row in OBJECTIVES.items()
    if row.alpha  # with weights of its own a token's slope is no longer w
}
OPTIONS |= {"simpo": {"gamma": 0.2}, "dpo smoothed": {"label_smoothing": 0.3}}


def make_batch(scale=1.0):
    """Log-probs, rewards (0 at prompts and padding), reference sums and the mask of scored
    tokens.
    """
    mask = torch.zeros(2 * B, T, dtype=torch.bool)
    for row, length in enumerate([7, 3, 1, 2, 6, 4]):
        mask[row, row % 2 : row % 2 + length] = True
    logps = torch.where(
        mask, -scale * torch.rand(2 * B, T, dtype=torch.float64) - 0.01, 0.0
    ).requires_grad_()
    rewards = torch.where(mask, torch.rand(2 * B, T, dtype=torch.float64) - 0.5, 0.0)
    ref = logps.detach().sum(-1) + 0.3 * torch.randn(2 * B, dtype=torch.float64)
    return logps, rewards, ref, mask


def losses_of(name, alpha):
    """Whole loss, and the likelihood term that has no part in the weights, of a batch."""
    loss_type = name.split()[0]
    options = LossOptions(loss_type, 0.4, alpha, **OPTIONS[name])
    objective = options.objective

    def losses(logps, rewards, ref, mask):
        loss = treg_loss(
            logps, rewards, None if objective.reference_free else ref, options, mask=mask
        ).loss.mean()
        likelihood = -(logps.sum(-1) / mask.sum(-1))[:B].mean() if objective.nll else 0.0
        return loss, likelihood

    return losses


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("alpha", [0.0, 0.25, 3.0])
def test_it_makes_an_objective_treg(name, alpha):
    batch = make_batch()
    logps, rewards, *_ = batch
    base, likelihood = losses_of(name, 0.0)(*batch)
    term = token_regularizer(base - likelihood, logps, rewards, alpha)
    expected, _ = losses_of(name, alpha)(*batch)
    assert abs(term) > 1e-4 or not alpha
    assert (base + term - expected).abs() <= EXACT * expected.abs()
    (found,), (exact,) = (torch.autograd.grad(x, logps) for x in (base + term, expected))
    assert (found - exact).abs().max() <= EXACT * exact.abs().max()


def some_loss(logps):
    """Smooth, with slopes of either sign."""
    return (
        (logps.sin() * torch.linspace(-1, 2, logps.numel(), dtype=logps.dtype).view_as(logps))
        .sum()
        .tanh()
    )


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_gradient_is_that_of_the_base_times_one_minus_the_reward(shape):
    logps, rewards = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    logps.requires_grad_()
    alpha, base = 0.7, some_loss(logps)
    (slope,) = torch.autograd.grad(base, logps, retain_graph=True)
    term = token_regularizer(base, logps, rewards, alpha)
    assert not term.shape and term.dtype == torch.float64
    (found,) = torch.autograd.grad(base + term, logps)
    expected = slope.abs() * (slope.sign() - alpha * rewards)
    assert (found - expected).abs().max() <= EXACT * expected.abs().max()


def test_dpo_step():
    """Chosen tokens by 1 + alpha rhat, rejected ones by 1 - alpha rhat."""
    batch = make_batch()
    logps, rewards, _, mask = batch
    base, _ = losses_of("dpo", 0.0)(*batch)
    (slope,) = torch.autograd.grad(base, logps, retain_graph=True)
    (found,) = torch.autograd.grad(base + token_regularizer(base, logps, rewards, 0.25), logps)
    side = torch.tensor([1.0] * B + [-1.0] * B, dtype=torch.float64)[:, None]
    expected = slope * (1 + 0.25 * side * rewards)
    assert mask.any() and (found - expected).abs().max() <= EXACT * expected.abs().max()


def test_only_logps_have_a_gradient():
    """The slopes are constants: neither what else the base depends on nor the second derivative has
    a part.
    """
    logps = torch.randn(4, dtype=torch.float64, requires_grad=True)
    other = torch.randn(4, dtype=torch.float64, requires_grad=True)
    base = (logps.exp() * other).sum()
    rewards = torch.rand(4, dtype=torch.float64)
    term = token_regularizer(base, logps, rewards, 0.5)
    slope = (logps.exp() * other).detach()
    by_logps, by_other = torch.autograd.grad(term, [logps, other], allow_unused=True)
    assert by_other is None
    assert (by_logps + 0.5 * slope.abs() * rewards).abs().max() <= EXACT
    assert torch.autograd.grad(base, other)[0].equal(logps.exp())  # the base's graph is still there


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_dtype_of_logps(dtype):
    logps, rewards, *_ = make_batch()
    low = logps.detach().to(dtype).requires_grad_()
    exact = low.detach().double().requires_grad_()
    found = token_regularizer(low.square().sum(), low, rewards, 0.25)
    expected = token_regularizer(exact.square().sum(), exact, rewards, 0.25)
    assert found.dtype == dtype
    budget = (0.25 * 2 * exact.square() * rewards).abs().sum()
    assert (found.double() - expected).abs() <= 4 * EPS[dtype] * budget


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_scored_has_no_part(value):
    """Log-probs, rewards and slopes there may be anything."""
    logps, rewards, _, mask = make_batch()
    base = some_loss(logps[mask])
    expected = token_regularizer(base, logps, rewards, 0.5)
    (exact,) = torch.autograd.grad(base + expected, logps)
    dirty = torch.where(mask, logps.detach(), value).requires_grad_()
    dirty_rewards = torch.where(mask, rewards, value)
    base = some_loss(dirty[mask])
    term = token_regularizer(base, dirty, dirty_rewards, 0.5, mask=mask)
    (found,) = torch.autograd.grad(term, dirty)
    (slope,) = torch.autograd.grad(base, dirty)
    assert mask.any() and not mask.all() and abs(expected) > 1e-4
    assert (term - expected).abs() <= EXACT * expected.abs()
    assert not found[~mask].any()
    assert (found + slope - exact).abs().max() <= EXACT * exact.abs().max()


def test_a_slope_that_is_not_scored_has_no_part():
    logps, rewards, _, mask = make_batch()
    clean = some_loss(logps[mask])
    expected = token_regularizer(clean, logps, rewards, 0.5)
    # the slope of sqrt at 0 is infinite
    base = some_loss(logps[mask]) + (0.0 * logps[~mask]).abs().sqrt().sum()
    assert not torch.autograd.grad(base, logps, retain_graph=True)[0][~mask].isfinite().any()
    term = token_regularizer(base, logps, rewards, 0.5, mask=mask)
    assert (term - expected).abs() <= EXACT * expected.abs()
    with pytest.raises(ValueError, match="base: expected finite derivatives in logps"):
        token_regularizer(base, logps, rewards, 0.5)


def test_scored_tokens_alone():
    """A mask leaves out what would count without one."""
    logps, rewards, _, mask = make_batch()
    some = mask.clone()
    some[0, 2] = some[3, 2] = False
    base = some_loss(logps)
    (slope,) = torch.autograd.grad(base, logps, retain_graph=True)
    term = token_regularizer(base, logps, rewards, 0.5, mask=some)
    expected = -0.5 * (slope.abs() * rewards * logps.detach())[some].sum()
    assert (term - expected).abs() <= EXACT * expected.abs()
    assert (term - token_regularizer(base, logps, rewards, 0.5)).abs() > 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("reward", [0.0, 0.3])
def test_log_probs_that_are_not_finite_are_refused(value, reward):
    logps = torch.zeros(2, 3)
    logps[1, 2] = value
    logps.requires_grad_()
    rewards = torch.full((2, 3), reward)
    base = logps[0].exp().sum()
    with pytest.raises(ValueError, match=rf"logps: .*got {value} at index \[1, 2\] .*pass mask"):
        token_regularizer(base, logps, rewards, 0.5)
    scored = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"logps: .*a scored token must have a probability above"):
        token_regularizer(base, logps, rewards, 0.5, mask=scored)
    scored[1, 2] = False
    assert token_regularizer(base, logps, rewards, 0.5, mask=scored).isfinite()


def make_inputs(**replace):
    logps = torch.randn(2, 3, requires_grad=True)
    inputs = {
        "base": logps.square().sum(),
        "logps": logps,
        "token_rewards": torch.zeros(2, 3),
        "alpha": 0.25,
    }
    return inputs | replace


@pytest.mark.parametrize(
    "replace, message",
    [
        (
            {"token_rewards": torch.zeros(2, 4)},
            r"token_rewards: expected the shape of logps \[2, 3\], got \[2, 4\]",
        ),
        (
            {"token_rewards": torch.tensor([[0.0, 1, 2], [0, float("nan"), 0]])},
            "token_rewards: expected finite",
        ),
        ({"token_rewards": torch.full((2, 3), float("inf"))}, "token_rewards: expected finite"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask: expected shape \[2, 3\]"),
        ({"mask": torch.ones(2, 3)}, "mask: expected torch.bool, got torch.float32"),
        (
            {"token_rewards": torch.ones(2, 3, dtype=torch.int64)},
            "token_rewards: expected a floating-point tensor",
        ),
        ({"token_rewards": torch.ones(2, 3, device="meta")}, "token_rewards: expected a tensor"),
        ({"alpha": -0.1}, r"alpha: expected a number >= 0 \(0: no regularizer\), got -0.1"),
        ({"alpha": float("nan")}, "alpha: expected a finite number, got nan"),
        ({"base": torch.tensor(1.0)}, "base: expected a loss that is differentiable in logps"),
        ({"logps": torch.randn(2, 3)}, "base: expected a loss that is differentiable in logps"),
        (
            {"base": torch.randn((), requires_grad=True) * 2},
            "base: expected a scalar function of logps",
        ),
        ({"logps": torch.randn(2, 3, requires_grad=True)}, "compute base from this very tensor"),
    ],
)
def test_bad_input(replace, message):
    with pytest.raises(ValueError, match=message):
        token_regularizer(**make_inputs(**replace))


def test_a_mask_that_is_no_tensor():
    with pytest.raises(TypeError, match=r"mask: expected a torch\.Tensor or None, got list"):
        token_regularizer(**make_inputs(mask=[[True] * 3] * 2))


def test_a_base_of_several_numbers():
    logps = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="base: expected a scalar function"):
        token_regularizer(logps.square().sum(-1), logps, torch.zeros(2, 3), 0.25)


def test_no_gradients():
    logps = torch.randn(2, 3, requires_grad=True)
    with torch.no_grad():
        base = logps.square().sum()
    with pytest.raises(ValueError, match=r"outside torch\.no_grad"):
        token_regularizer(base, logps, torch.zeros(2, 3), 0.25)
