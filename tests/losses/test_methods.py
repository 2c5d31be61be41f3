"""Objectives that give tokens credit of their own: numbers worked out by hand, the reference in
float64, the identities that define them, and what they refuse.
"""

import math

import pytest
import torch
from helpers import IMPLS, device_of

from treg.losses import OBJECTIVES, Credit, LossOptions, Objective, TokenMask, treg_loss
from treg.losses.base import Base
from treg.operators import scalars
from treg.ops import reference

NAMES = [name for name, row in OBJECTIVES.items() if not row.alpha]
WITH_KL = [name for name in NAMES if "kl" in OBJECTIVES[name].needs]
EXACT = {"rtol": 1e-11, "atol": 1e-13}
F64 = {"dtype": torch.float64}


def s(x):
    return 1 / (1 + math.exp(-x))


def dpo(m):
    return -math.log(s(m))


# -- by hand
# One pair, beta 0.5: two chosen tokens, four rejected ones.
LOGPS = [-1.0, -2.0, -0.5, -1.0, -1.5, -0.5]
RATIOS = [0.7, 0.5, -0.1, 0.2, -0.4, -0.1]  # lp - ref; sums 1.2 and -0.4
REWARDS = [0.2, 0.1, 0.3, 0.0, -0.2, 0.1]
KL = [0.3, 0.1, 0.2, 0.1, 0.05, 0.05]  # sums 0.4 and 0.4
MASK = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
SAFE = {"chosen_safe": 1.0, "rejected_safe": 0.0}

BY_HAND = [
    # u = 1 + 0.5 r: 1.1 1.05, and 1 - 0.5 r: 0.85 1 1.1 0.95
    # sums 0.77 + 0.525 = 1.295 and -0.085 + 0.2 - 0.44 - 0.095 = -0.42
    ("tgdpo", {}, dpo(0.5 * (1.295 + 0.42))),
    # ranks of r: 1 0, of -r: 0 2 3 1; u = 1.3 0.7 and 0.7 1.1 1.3 0.9; sums 1.26 and -0.46
    ("tis_dpo", {}, dpo(0.5 * (1.26 + 0.46))),
    # r in [-0.2, 0.2]: u = 1.3 1.15; -r: 0.7 1 1.3 0.85; sums 1.485 and -0.475
    ("tis_dpo", {"clamp": 0.2}, dpo(0.5 * (1.485 + 0.475))),
    # the best of two; the two worst of four: -1 and (-1 - 1.5) / 2
    ("sepo", {}, dpo(0.5 * (-1 + 1.25))),
    ("sepo", {"keep": 0.5, "gamma": 0.1}, dpo(0.5 * (-1 + 1.25) - 0.1)),
    # u = 0.5 0.25 0.125 0.0625; sums 0.475 and -0.05625
    ("d2po", {"decay": 0.5}, dpo(0.5 * (0.475 + 0.05625))),
    # p = 0.37 0.14 with the mean 0.25, and 0.61 0.37 0.22 0.61 with the mean 0.45
    ("confpo", {}, dpo(0.5 * (-2 + 1.25))),
    # all of the chosen answer, the third token of the rejected one
    ("messagewise", {}, dpo(0.5 * (1.2 + 0.4))),
    # the first token; all but the first
    ("messagewise", {"baseline": 0.15}, dpo(0.5 * (0.7 + 0.3))),
    # 0.2 * 1 + 0.1 * 2 of two tokens: the policy is not sure of the third rejected one
    ("figa", {}, 0.2),
    # and - 0.5 * 0.2 * 1.5 of three
    ("figa", {"gate": 2.0}, (0.4 - 0.15) / 3),
    # h = 1.6, target (1.5 - 0.5) / tau
    ("bfpo", {}, (1.6 - 100) ** 2),
    ("bfpo", {"tau": 0.5, "shift": 0.25}, (1.6 - 2.5) ** 2),
    # (1.2 + 0.4) - (-0.4 + 0.4)
    ("tdpo1", {}, dpo(0.5 * (1.6 - 0.0))),
    # (1.2 + 0.2) - (-0.4 + 0.2)
    ("tdpo2", {}, dpo(0.5 * (1.4 + 0.2))),
    ("tdpo2", {"kl_weight": 2.0}, dpo(0.5 * (2.0 - 0.4))),
    # 0.7 + 0.3, and 0.2 - 0.4 + 0.1 + 0.05
    ("sparsepo", {}, dpo(0.5 * (1.0 + 0.05))),
]


def options_of(loss_type, values=None, **more):
    values = dict(values or {})
    gamma = values.pop("gamma", 0.0)
    return LossOptions(loss_type, gamma=gamma, scalars=values, **more)


def given(loss_type, device="cpu", **other):
    """The arguments of `treg_loss` for the pair above."""
    row = OBJECTIVES[loss_type]
    logps = torch.tensor(LOGPS, **F64)
    found = {"logps": logps, "token_rewards": torch.tensor(REWARDS, **F64)}
    if not row.reference_free:
        found["ref_logps"] = logps - torch.tensor(RATIOS, **F64)
    if "kl" in row.needs:
        found["kl"] = torch.tensor(KL, **F64)
    if "token_weights" in row.needs:
        found["token_weights"] = torch.tensor(MASK, **F64)
    found["cu_seqlens"] = torch.tensor([0, 2, 6])
    found = {name: x.to(device) for name, x in (found | other).items()}
    if row.pair_columns:
        found["pair_values"] = {k: torch.tensor([x], device=device) for k, x in SAFE.items()}
    return found


def test_every_method_is_worked_out():
    assert {name for name, _, _ in BY_HAND} == set(NAMES)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("loss_type", "values", "expected"), BY_HAND)
def test_loss_by_hand(loss_type, values, expected, impl):
    options = options_of(loss_type, values, beta=0.5)
    found = treg_loss(**given(loss_type, device_of(impl)), options=options, impl=impl)
    assert found.loss.tolist() == pytest.approx([expected], rel=1e-12)


# -- against the reference: the log-probs are those of a head whose weight is 1


def case(loss_type, padded=False, **more):
    """Three pairs of 20 words, ignored tokens between the scored ones; by argument name."""
    row, lengths, words = OBJECTIVES[loss_type], [7, 4, 12, 5, 9, 6], 20
    shape = (6, 12) if padded else (sum(lengths),)
    target = torch.randint(0, words, shape)
    target[torch.rand(shape) < 0.3] = -100
    ends = torch.tensor([0, *lengths]).cumsum(0)
    if padded:
        target[:, 0] = 3
        for i, length in enumerate(lengths):
            target[i, length:] = -100
    else:
        target[ends[:-1]] = 3
    ignored = target == -100

    def per_token(x):
        return torch.where(ignored, torch.nan, x)

    found = {"target": target, "token_rewards": per_token(torch.randn(shape, **F64))}
    if not row.reference_free:
        found["ref_logps"] = per_token(-3 * torch.rand(shape, **F64) - 1)
    if "token_weights" in row.needs:
        found["token_weights"] = per_token(torch.rand(shape, **F64))
    if "kl" in row.needs:
        found["kl"] = per_token(torch.rand(shape, **F64))
    if row.pair_columns:
        found["pair_values"] = {
            "chosen_safe": torch.tensor([1.0, 0.0, 1.0]),
            "rejected_safe": torch.tensor([0.0, 1.0, 1.0]),
        }
    if not padded:
        found["cu_seqlens"] = ends
    found |= {k: per_token(x(shape)) for k, x in more.items()}
    return torch.randn(*shape, words, **F64), found


VALUES = {
    "tgdpo": [{"strength": 0.5}, {"strength": 3.0}],
    "tis_dpo": [{}, {"low": 0.2, "high": 3.0}, {"clamp": 0.8}],
    "sepo": [{}, {"keep": 0.8, "gamma": 0.4}, {"keep": 1.0}],
    "d2po": [{"decay": 0.9}, {"decay": 1.2}],
    "confpo": [{"gamma": 0.3}],
    "messagewise": [{}, {"baseline": 0.4}],
    "figa": [{"gate": 3.0}, {"gate": 2.5, "added": 0.3, "removed": 2.0}],
    "bfpo": [{"tau": 0.2, "shift": 0.1}],
    "tdpo1": [{}],
    "tdpo2": [{"kl_weight": 0.7}],
    "sparsepo": [{}],
}
CASES = [(name, values) for name in NAMES for values in VALUES[name]]


def both(hidden, inputs, options, impl="torch"):
    """`treg_loss` and the reference, and their gradients in logits and in the other tensors."""
    device = device_of(impl)
    words = torch.eye(hidden.shape[-1], **F64)
    learned = [k for k in ("token_weights", "kl", "kl_weights") if k in inputs]

    def leaves(device):
        x = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        x |= {k: x[k].clone().requires_grad_() for k in learned}
        return hidden.to(device).clone().requires_grad_(), x

    h, x = leaves("cpu")
    exact = reference.fused_treg_loss(
        h,
        words,
        x.pop("target"),
        beta=options.beta,
        alpha=options.alpha,
        loss_type=options.loss_type,
        gamma=options.gamma,
        scalars=options.scalars,
        reduction="none",
        **x,
    )
    upstream = torch.tensor([1.0, -0.5, 2.0], **F64)
    exact_gradients = torch.autograd.grad(exact.loss @ upstream, [h, *(x[k] for k in learned)])

    h, x = leaves(device)
    target = x.pop("target")
    logps = reference.linear_logprobs(h, words.to(device), target).logprobs
    found = treg_loss(logps, options=options, mask=target != -100, impl=impl, **x)
    loss = found.loss @ upstream.to(device)
    gradients = torch.autograd.grad(loss, [h, *(x[k] for k in learned)])
    return found, exact, gradients, exact_gradients


def assert_same(found, exact, gradients, exact_gradients):
    for name, x in found._asdict().items():
        torch.testing.assert_close(x.cpu(), getattr(exact, name), **EXACT, msg=name)
    for a, b in zip(gradients, exact_gradients, strict=True):
        b = torch.where(b.isfinite(), b, 0.0)
        torch.testing.assert_close(a.cpu(), b, **EXACT)


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("alpha", [0.0, 0.6])
@pytest.mark.parametrize(("loss_type", "values"), CASES)
def test_values_and_gradients(loss_type, values, alpha, padded):
    if not OBJECTIVES[loss_type].regularized:
        alpha = 0.0
    hidden, inputs = case(loss_type, padded)
    options = options_of(loss_type, values, beta=0.4, alpha=alpha)
    assert_same(*both(hidden, inputs, options))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", NAMES)
def test_given_weights_multiply_the_objectives(loss_type, impl):
    """Their gradients, those of KL and of its own weights included."""
    more = {"token_weights": lambda shape: torch.rand(shape, **F64)}
    if "kl" in OBJECTIVES[loss_type].needs:
        more["kl_weights"] = lambda shape: torch.rand(shape, **F64)
    hidden, inputs = case(loss_type, **more)
    options = options_of(loss_type, VALUES[loss_type][0], beta=0.7)
    assert_same(*both(hidden, inputs, options, impl))


@pytest.mark.parametrize("loss_type", ["dpo", "ipo", "orpo", "simpo", "apo_zero"])
def test_gradient_in_weights_of_other_objectives(loss_type):
    hidden, inputs = case(loss_type, token_weights=lambda shape: torch.rand(shape, **F64))
    assert_same(*both(hidden, inputs, LossOptions(loss_type, 0.4, 0.3)))


@pytest.mark.parametrize("loss_type", NAMES)
def test_equal_rewards(loss_type):
    """Ties: the same rules as the reference's, which counts and sorts."""
    hidden, inputs = case(loss_type)
    rewards = inputs["token_rewards"]
    inputs["token_rewards"] = torch.where(rewards.isnan(), rewards, rewards.round())
    assert_same(*both(hidden, inputs, options_of(loss_type, VALUES[loss_type][0])))


# -- what each is where its weights say nothing


def loss_and_gradient(loss_type, values, inputs, **options):
    logps = inputs["logps"].clone().requires_grad_()
    rest = {k: x for k, x in inputs.items() if k != "logps"}
    if OBJECTIVES[loss_type].reference_free:
        rest.pop("ref_logps", None)
    if "kl" not in OBJECTIVES[loss_type].needs:
        rest.pop("kl", None)
    found = treg_loss(logps, options=options_of(loss_type, values, **options), **rest)
    (gradient,) = torch.autograd.grad(found.loss.sum(), logps)
    return found.loss, gradient


def pairs(n=9, **more):
    shape = (4, n)
    logps = -2 * torch.rand(shape, **F64) - 0.1
    return {
        "logps": logps,
        "token_rewards": torch.randn(shape, **F64),
        "ref_logps": logps + 0.4 * torch.randn(shape, **F64),
    } | more


ones = torch.ones(4, 9, **F64)
agreeing = torch.cat([ones[:2], -ones[2:]]) * torch.rand(4, 9, **F64).add(0.1)
IDENTITIES = {
    "TGDPO without strength is DPO": ("tgdpo", {"strength": 0.0}, "dpo", {}),
    "TIS-DPO at weights 1 is DPO": ("tis_dpo", {"low": 1.0, "high": 1.0}, "dpo", {}),
    "TIS-DPO of equal rewards is DPO": ("tis_dpo", {}, "dpo", {"token_rewards": ones}),
    "D2PO at decay 1 is DPO": ("d2po", {"decay": 1.0}, "dpo", {}),
    "message-wise is DPO where every segment agrees": (
        *("messagewise", {}, "dpo"),
        {"token_rewards": agreeing},
    ),
    "SePO of all tokens is SimPO": ("sepo", {"keep": 1.0, "gamma": 0.2}, "simpo", {}),
    "ConfPO of equal log-probs is SimPO": (
        *("confpo", {"gamma": 0.2}, "simpo"),
        {"logps": -0.7 * ones},
    ),
    "SparsePO with masks 1 is TDPO1": ("sparsepo", {}, "tdpo1", {"token_weights": ones}),
    "TDPO1 without KL is DPO": ("tdpo1", {}, "dpo", {"kl": 0 * ones}),
    "TDPO2 without KL is DPO": ("tdpo2", {}, "dpo", {"kl": 0 * ones}),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities(name):
    loss_type, values, other, more = IDENTITIES[name]
    inputs = pairs(kl=torch.rand(4, 9, **F64)) | more
    gamma = {"gamma": values["gamma"]} if "gamma" in values else {}
    found = loss_and_gradient(loss_type, values, inputs, beta=0.3, alpha=0.0)
    exact = loss_and_gradient(other, gamma, inputs, beta=0.3, alpha=0.0)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_tdpo1_is_dpo_minus_the_difference_of_kl():
    """-log sigmoid(beta * (M_w - M_l - (K_l - K_w))), and TDPO2's value at kl_weight 1."""
    inputs = pairs(kl=torch.rand(4, 9, **F64))
    M = (inputs["logps"] - inputs["ref_logps"]).sum(1)
    K = inputs["kl"].sum(1)
    m = 0.3 * (M[:2] - M[2:] - (K[2:] - K[:2]))
    exact = -torch.nn.functional.logsigmoid(m)
    found, _ = loss_and_gradient("tdpo1", {}, inputs, beta=0.3)
    torch.testing.assert_close(found, exact, **EXACT)
    found, _ = loss_and_gradient("tdpo2", {"kl_weight": 1.0}, inputs, beta=0.3)
    torch.testing.assert_close(found, exact, **EXACT)


def test_tdpo2_has_no_gradient_in_the_chosen_kl():
    inputs = pairs(kl=torch.rand(4, 9, **F64).requires_grad_())
    for loss_type, chosen in (("tdpo1", True), ("tdpo2", False)):
        loss, _ = treg_loss(**inputs, options=LossOptions(loss_type)).loss
        (gradient,) = torch.autograd.grad(loss, inputs["kl"])
        assert bool((gradient[0] != 0).all()) == chosen and bool((gradient[2] > 0).all())


def test_figa_at_weights_of_one_is_supervised_fine_tuning():
    """Rewards 1 on the chosen answer and 0 on the other: the mean negative log-likelihood."""
    inputs = pairs(token_rewards=torch.cat([ones[:2], 0 * ones[2:]]))
    found, _ = loss_and_gradient("figa", {}, inputs)
    torch.testing.assert_close(found, -inputs["logps"][:2].mean(1), **EXACT)


def test_treg_is_tgdpo_in_gradient_where_the_margins_coincide():
    """sum_t rhat_t (lp_t - ref_t) = 0 in every answer: T-REG's alpha is TGDPO's strength."""
    inputs = pairs()
    ratios = inputs["logps"] - inputs["ref_logps"]
    rewards = inputs["token_rewards"]
    inputs["token_rewards"] = rewards - ratios * (rewards * ratios).sum(1, keepdim=True) / (
        ratios.square().sum(1, keepdim=True)
    )
    _, treg = loss_and_gradient("dpo", {}, inputs, beta=0.3, alpha=0.4)
    _, tgdpo = loss_and_gradient("tgdpo", {"strength": 0.4}, inputs, beta=0.3)
    torch.testing.assert_close(treg, tgdpo, rtol=1e-9, atol=1e-12)
    # and not elsewhere
    _, treg = loss_and_gradient("dpo", {}, pairs(), beta=3.0, alpha=0.4)
    _, tgdpo = loss_and_gradient("tgdpo", {"strength": 0.4}, pairs(), beta=3.0)
    assert (treg - tgdpo).abs().max() > 1e-3


def test_the_only_token_of_an_answer():
    """Its rank is the middle, its place the first; it is its own mean."""
    inputs = pairs(1)
    _, exact = loss_and_gradient("dpo", {}, inputs, alpha=0.0)
    for loss_type in ("tis_dpo", "d2po"):
        values = {"decay": 1.0} if loss_type == "d2po" else {}
        _, found = loss_and_gradient(loss_type, values, inputs)
        torch.testing.assert_close(found, exact, **EXACT)
    _, exact = loss_and_gradient("simpo", {}, inputs, alpha=0.0)
    for loss_type in ("sepo", "confpo"):
        _, found = loss_and_gradient(loss_type, {}, inputs)
        torch.testing.assert_close(found, exact, **EXACT)


@pytest.mark.parametrize("loss_type", ["messagewise", "sparsepo", "figa"])
def test_masks_that_leave_an_answer_empty_are_counted(loss_type):
    """rho = 0 there, a finite loss, no gradient; `kept` says so."""
    inputs = pairs(kl=ones, token_rewards=torch.cat([agreeing[:1], -ones[:1], agreeing[2:]]))
    if loss_type == "sparsepo":
        inputs["token_weights"] = torch.cat([ones[:1], 0 * ones[:1], ones[2:]])
    if loss_type != "sparsepo":
        inputs.pop("kl")
    if loss_type == "figa":
        inputs.pop("ref_logps")
    inputs["logps"].requires_grad_()
    options = options_of(loss_type, {"gate": 9.0} if loss_type == "figa" else {})
    found = treg_loss(**inputs, options=options)
    assert found.kept.tolist() == [9, 0, 9, 9]
    assert found.chosen_rewards[1] == 0 and found.loss.isfinite().all()
    (gradient,) = torch.autograd.grad(found.loss.sum(), inputs["logps"])
    assert (gradient[1] == 0).all() and (gradient[[0, 2, 3]] != 0).all()


def test_kept_counts_weights_of_plain_objectives():
    weights = torch.cat([ones[:1], 0 * ones[:1], ones[:1], 2 * ones[:1]])
    weights[0, 2:5] = 0
    found = treg_loss(**pairs(token_weights=weights), options=LossOptions())
    assert found.kept.tolist() == [6, 0, 9, 9]


# -- learned masks


def test_a_learned_mask_by_hand():
    """Two layers of two numbers; layer norm makes (1, -1) and (-1, 1) of them."""
    mask = TokenMask(2, 2).double()
    with torch.no_grad():
        for score, weight, bias in zip(
            mask.scores, ((1.0, 0.0), (0.0, 2.0)), (0.5, 1.0), strict=True
        ):
            score.weight.copy_(torch.tensor([weight]))
            score.bias.fill_(bias)
    mask.mix.weight.data.copy_(torch.tensor([[2.0, -0.5]]))
    states = [torch.tensor([[3.0, 1.0], [1.0, 5.0]], **F64)] * 2
    # first token: relu(1.5) and relu(-1); second: relu(-0.5) and relu(3)
    torch.testing.assert_close(
        mask(states), torch.tensor([2 * 1.5, 0.0], **F64), rtol=1e-4, atol=1e-4
    )


def test_a_mask_learns_through_the_loss():
    """The gradient in the module's weights is that of the loss by autograd, and it falls."""
    torch.manual_seed(0)
    states = [torch.randn(4, 9, 8, **F64) for _ in range(3)]
    mask = TokenMask(8, 3).double()
    inputs = pairs(kl=torch.rand(4, 9, **F64))
    options = LossOptions("sparsepo", 0.5)

    def exact(m):
        ratios = inputs["logps"] - inputs["ref_logps"] + inputs["kl"]
        rho = 0.5 * (m * ratios).sum(1)
        return -torch.nn.functional.logsigmoid(rho[:2] - rho[2:])

    found = treg_loss(**inputs, token_weights=mask(states), options=options).loss
    torch.testing.assert_close(found, exact(mask(states)), **EXACT)
    gradients = torch.autograd.grad(found.sum(), list(mask.parameters()))
    expected = torch.autograd.grad(exact(mask(states)).sum(), list(mask.parameters()))
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    assert any(bool((x != 0).any()) for x in gradients)
    with torch.no_grad():
        for x, slope in zip(mask.parameters(), gradients, strict=True):
            x -= 0.05 * slope
        assert exact(mask(states)).sum() < found.sum()


def test_masks_of_other_states_are_refused():
    mask = TokenMask(4, 2)
    with pytest.raises(ValueError, match="states: expected 2 hidden states, one a layer, got 1"):
        mask([torch.zeros(3, 4)])
    with pytest.raises(
        ValueError, match=r"states: expected hidden states \[..., 4\], got \[3, 5\]"
    ):
        mask([torch.zeros(3, 5)] * 2)
    with pytest.raises(ValueError, match="layers: expected a positive integer, got 0"):
        TokenMask(4, 0)


# -- as an operator


@pytest.mark.parametrize("loss_type", ["tdpo2", "sparsepo", "tis_dpo", "bfpo"])
def test_the_same_in_a_graph(loss_type):
    """Compiled, with gradients in everything that can have one."""
    hidden, inputs = case(loss_type)
    options = options_of(loss_type, VALUES[loss_type][0])
    learned = [k for k in ("token_weights", "kl") if k in inputs]
    mask = inputs.pop("target") != -100
    for name, x in inputs.items():
        if isinstance(x, torch.Tensor) and x.shape == mask.shape:
            inputs[name] = torch.where(mask, x, 0.0)
    logps = torch.where(mask, -hidden[:, 0].abs(), 0.0)

    def step(logps, *weights):
        given = inputs | dict(zip(learned, weights, strict=True))
        return treg_loss(2 * logps, options=options, mask=mask, **given).loss.sum()

    def gradients(fn):
        leaves = [x.clone().requires_grad_() for x in (logps, *(inputs[k] for k in learned))]
        loss = fn(*leaves)
        return [loss, *torch.autograd.grad(loss, leaves)]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled), gradients(step), strict=True):
        assert torch.equal(a, b)


def test_the_operator_is_registered_right_with_every_slope():
    hidden, inputs = case("sparsepo", kl_weights=lambda shape: torch.rand(shape, **F64))
    mask = inputs["target"] != -100
    options = LossOptions("sparsepo")
    names = ("token_rewards", "ref_logps", "token_weights", "kl", "kl_weights")
    tensors = [torch.where(mask, inputs[k], 0.0) for k in names]
    for x in tensors[2:]:
        x.requires_grad_()
    logps = torch.where(mask, -hidden[:, 0].abs(), 0.0).requires_grad_()
    numbers = scalars(*options.numbers())
    call = f"torch 111 {options.text()}"
    given = (logps, *tensors, None, mask, inputs["cu_seqlens"], numbers, call)
    torch.library.opcheck(torch.ops.treg.pair_objective.default, given)


# -- bad input


@pytest.mark.parametrize("loss_type", NAMES)
def test_what_is_missing_is_named(loss_type):
    row, full = OBJECTIVES[loss_type], given(loss_type)
    for name in (*row.needs, *(["ref_logps"] if not row.reference_free else [])):
        inputs = {k: x for k, x in full.items() if k != name}
        inputs.setdefault("token_rewards", None)
        with pytest.raises(ValueError, match=f"{name}: expected a tensor for loss_type="):
            treg_loss(**inputs, options=LossOptions(loss_type))
    if row.reference_per_token:
        sums = torch.tensor([1.0, 2.0])
        with pytest.raises(ValueError, match=r"ref_logps: expected per-token log-probs .*, got p"):
            treg_loss(**full | {"ref_logps": sums}, options=LossOptions(loss_type))


def test_numbers_of_pairs():
    inputs, options = given("bfpo"), LossOptions("bfpo")
    values = inputs.pop("pair_values")
    safe = {"chosen_safe": values["chosen_safe"]}
    wrong = [
        (None, "pair_values: expected chosen_safe, rejected_safe for loss_type='bfpo', got none"),
        (safe, "got chosen_safe$"),
        (values | {"x": values["chosen_safe"]}, "got chosen_safe, rejected_safe, x"),
        (values | {"rejected_safe": torch.zeros(2)}, r"'rejected_safe'\]: expected shape \[1\]"),
        (values | {"rejected_safe": torch.tensor([math.nan])}, "expected finite values"),
        (values | {"rejected_safe": torch.tensor([0.5])}, "'rejected_safe'.: expected 0 or 1 for"),
    ]
    for bad, message in wrong:
        with pytest.raises(ValueError, match=message):
            treg_loss(**inputs, options=options, pair_values=bad)
    with pytest.raises(TypeError, match="pair_values: expected a mapping"):
        treg_loss(**inputs, options=options, pair_values=[1.0])
    with pytest.raises(ValueError, match="pair_values: expected none for loss_type='dpo'"):
        treg_loss(**given("d2po"), options=LossOptions(), pair_values=values)


def test_kl_is_for_those_that_take_it():
    inputs = given("d2po")
    for name in ("kl", "kl_weights"):
        with pytest.raises(ValueError, match=f"{name}: expected None for loss_type='d2po'"):
            treg_loss(**inputs, options=LossOptions("d2po"), **{name: inputs["logps"].abs()})
    with pytest.raises(ValueError, match=r"kl: expected shape \[6\]"):
        treg_loss(**given("tdpo1", kl=torch.ones(5)), options=LossOptions("tdpo1"))
    with pytest.raises(ValueError, match="kl: expected finite values"):
        treg_loss(**given("tdpo1", kl=torch.full((6,), math.nan)), options=LossOptions("tdpo1"))
    bad = -torch.ones(6)
    with pytest.raises(ValueError, match="kl_weights: expected values >= 0"):
        treg_loss(**given("tdpo1"), options=LossOptions("tdpo1"), kl_weights=bad)


BAD_OPTIONS = {
    "added: expected a number >= 0": ("figa", {"added": -1.0}),
    "removed: expected a number >= 0": ("figa", {"removed": -0.5}),
    "gate: expected a number >= 0": ("figa", {"gate": -0.1}),
    "keep: expected a share of tokens, at most 1, got 30": ("sepo", {"keep": 30.0}),
    "keep: expected a number > 0": ("sepo", {"keep": 0.0}),
    "clamp: expected a number >= 0": ("tis_dpo", {"clamp": -1.5}),
    "low: expected at most high, which is 1.3": ("tis_dpo", {"low": 1.4}),
    "low: expected a number >= 0": ("tis_dpo", {"low": -0.1}),
    "decay: expected a number > 0": ("d2po", {"decay": 0.0}),
    "tau: expected a number > 0": ("bfpo", {"tau": -1.0}),
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_options_that_would_mean_something_else(message):
    loss_type, values = BAD_OPTIONS[message]
    with pytest.raises(ValueError, match=message):
        options_of(loss_type, values)


@pytest.mark.parametrize("name", [":X", ".m:X", "json:", "no.such.module:X", "json:loads", 3])
def test_objectives_that_cannot_be_imported(name):
    with pytest.raises(ValueError, match=r"^loss_type: expected"):
        LossOptions(name)


def test_numbers_of_pairs_are_checked_in_a_graph():
    inputs, options = given("bfpo"), LossOptions("bfpo")
    values = inputs.pop("pair_values")

    def step(safe):
        return treg_loss(**inputs, options=options, pair_values=values | {"chosen_safe": safe}).loss

    compiled = torch.compile(step, backend="aot_eager")
    assert torch.equal(compiled(torch.ones(1)), step(torch.ones(1)))
    with pytest.raises(ValueError, match=r"'chosen_safe'\]: expected finite values"):
        compiled(torch.tensor([math.nan]))


def test_log_probs_of_no_sequences():
    for logps in (torch.tensor(-1.0), torch.zeros(0, 3), torch.zeros(3, 2)):
        with pytest.raises(ValueError, match="logps: expected"):
            treg_loss(logps, logps, torch.zeros(2), LossOptions())


def test_alpha_where_none_is_given():
    assert LossOptions("dpo").alpha == 0.25 and LossOptions("tgdpo").alpha == 0.0
    assert LossOptions("tgdpo", alpha=0.3).alpha == 0.3
    with pytest.raises(ValueError, match="alpha: expected 0 for loss_type='figa'"):
        LossOptions("figa", alpha=0.1)


def test_rows_that_contradict_themselves():
    def base(w, l, _):
        return Base(w - l, torch.ones_like(w), -torch.ones_like(l))

    with pytest.raises(ValueError, match=r"needs: expected some of token_rewards, .*got 'reward'"):
        Objective(base, needs=("reward",))
    with pytest.raises(ValueError, match="needs: expected a credit"):
        Objective(base, needs=("kl",))
    with pytest.raises(ValueError, match="alpha: expected 0 where regularized is False"):
        Objective(base, regularized=False)


FAULTY = {
    "a tensor": (lambda tokens, _: tokens.rewards, TypeError),
    "float32": (lambda tokens, _: Credit(tokens.rewards.float()), ValueError),
    "one a sequence": (lambda tokens, _: Credit(tokens.lengths), ValueError),
    "a norm of tokens": (lambda tokens, _: Credit(norm=tokens.rewards), ValueError),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_a_credit_that_is_something_else_is_refused(fault, monkeypatch):
    credit, error = FAULTY[fault]
    row = Objective(OBJECTIVES["dpo"].base, options={"label_smoothing": 0.0}, credit=credit)
    monkeypatch.setitem(OBJECTIVES, "faulty", row)
    with pytest.raises(error, match=r"^faulty: expected .*, got "):
        treg_loss(**given("d2po"), options=LossOptions("faulty"))
