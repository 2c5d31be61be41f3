"""The loss of a policy where no other library is at hand: layouts, reductions, what is refused."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from treg.rl import (
    KL_ESTIMATORS,
    LOSS_TYPES,
    RATIO_LEVELS,
    REDUCTIONS,
    SURROGATES,
    PolicyOptions,
    policy_loss,
)

B, T = 4, 7
LENGTHS = (7, 3, 1, 5)
OF_TOKENS = ("logprobs", "old_logprobs", "ref_logprobs", "entropy", "ratio_weights")
EVERYTHING = {
    "beta": 0.1,
    "entropy_coef": 0.2,
    "delta": 1.5,
    "top_entropy_quantile": 0.8,
    "off_policy_mask_threshold": 0.05,
    "max_length": 10.0,
}
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def batch(per_token=False, dtype=torch.float64):
    """Sequences of several lengths, from the left."""
    logprobs = -3.0 * torch.rand(B, T, dtype=dtype)
    return {
        "logprobs": logprobs.requires_grad_(),
        "advantages": torch.randn(B, T, dtype=dtype) if per_token else torch.randn(B, dtype=dtype),
        "old_logprobs": logprobs.detach() + 0.4 * torch.randn(B, T, dtype=dtype),
        "ref_logprobs": logprobs.detach() + 0.6 * torch.randn(B, T, dtype=dtype),
        "entropy": (2.0 * torch.rand(B, T, dtype=dtype)).requires_grad_(),
        "ratio_weights": 0.5 + torch.rand(B, T, dtype=dtype),
        "mask": torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(1),
    }


def gradients(loss, case):
    return torch.autograd.grad(loss, [case["logprobs"], case["entropy"]])


@pytest.mark.parametrize("per_token", [False, True], ids=["", "by token"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_packed_is_padded(loss_type, per_token):
    case, options = batch(per_token), PolicyOptions(loss_type, **EVERYTHING)
    expected = policy_loss(**case, options=options)
    mask = case["mask"]
    names = (*OF_TOKENS, *(["advantages"] if per_token else []))
    packed = {name: case[name][mask] for name in names}
    packed.setdefault("advantages", case["advantages"])
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    found = policy_loss(**packed, cu_seqlens=ends, options=options)
    for name, a in found._asdict().items():
        b = getattr(expected, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **EXACT)
    for a, b in zip(gradients(found.loss, case), gradients(expected.loss, case), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("level", RATIO_LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_what_stands_at_masked_tokens_is_not_read(loss_type, level, value):
    """Holes in the middle too, and a sequence without a scored token."""
    case = batch(per_token=True)
    options = PolicyOptions(loss_type, importance_sampling_level=level, **EVERYTHING)
    case["mask"][0, 2:4] = False
    case["mask"][2] = False
    clean = {
        name: x if name == "mask" else torch.where(case["mask"], x, 0.0).detach()
        for name, x in case.items()
    }
    found = []
    for filling in (0.0, value):
        filled = {
            name: x if name == "mask" else x.masked_fill(~case["mask"], filling)
            for name, x in clean.items()
        }
        for name in ("logprobs", "entropy"):
            filled[name].requires_grad_()
        loss = policy_loss(**filled, options=options).loss
        found.append((loss, *gradients(loss, filled)))
        assert not any(x[~case["mask"]].any() for x in found[-1][1:])
    for a, b in zip(*found, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


def test_an_advantage_of_an_empty_sequence_is_not_read():
    case = batch()
    case["mask"][2] = False
    expected = policy_loss(**case, options=PolicyOptions("grpo"))
    case["advantages"][2] = float("nan")
    assert torch.equal(policy_loss(**case, options=PolicyOptions("grpo")).loss, expected.loss)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("shape", [(B, 0), (0, T), (B, T)])
def test_nothing_scored_is_a_loss_of_0(shape, loss_type):
    logprobs = torch.full(shape, -1.0, requires_grad=True)
    entropy = torch.ones(shape, requires_grad=True)
    found = policy_loss(
        logprobs,
        torch.ones(shape[0]),
        entropy=entropy,
        options=PolicyOptions(loss_type, entropy_coef=0.1, top_entropy_quantile=0.5),
        mask=torch.zeros(shape, dtype=torch.bool),
    )
    assert found.loss.item() == 0.0
    for x in torch.autograd.grad(found.loss, [logprobs, entropy]):
        assert not x.any()


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("level", RATIO_LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_ratio_that_overflows_leaves_gradients_finite(loss_type, level, sign):
    case = batch(dtype=torch.float32)
    case["old_logprobs"] = case["logprobs"].detach() - 2000.0
    case["advantages"] = sign * case["advantages"].abs()
    case["advantages"][0] = 0.0
    case["ref_logprobs"] = case["logprobs"].detach() + 2000.0
    options = PolicyOptions(loss_type, importance_sampling_level=level, beta=0.0, entropy_coef=0.1)
    found = policy_loss(**case, options=options)
    assert found.loss.isfinite()
    assert all(x.isfinite().all() for x in gradients(found.loss, case))


def by_hand(losses, mask, *, name, max_length):
    """REDUCTIONS, sequence after sequence."""
    rows = [x[m] for x, m in zip(losses, mask, strict=True)]
    some = [x for x in rows if len(x)]
    means, sums = [x.mean() for x in some], [x.sum() for x in some]
    tokens = sum(len(x) for x in rows)
    return {
        "sequence_mean": sum(means) / len(rows),
        "sequence_sum": sum(sums) / len(rows),
        "constant": sum(sums) / (len(rows) * max_length),
        "token_mean": sum(sums) / tokens,
        "items": sum(sums) / tokens,
        "token-mean": sum(sums) / tokens,
        "token-sum": sum(sums),
        "seq-mean-token-sum": sum(sums) / len(some),
        "seq-mean-token-sum-norm": sum(sums) / len(some) / max_length,
        "seq-mean-token-mean": sum(means) / len(some),
    }[name]


@pytest.mark.parametrize("max_length", [None, 10.0])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name, max_length):
    case = batch()
    case["mask"][1] = False
    plain = {k: case[k] for k in ("logprobs", "advantages", "mask")}
    options = PolicyOptions("grpo", reduction=name, max_length=max_length)
    losses = -case["advantages"].unsqueeze(1).expand(B, T)  # of ratios of 1
    found = policy_loss(**plain, options=options).loss
    expected = by_hand(losses, case["mask"], name=name, max_length=max_length or T)
    torch.testing.assert_close(found, expected, **EXACT)
    if not options.over_step:
        return
    per_item = policy_loss(**plain, options=options, num_items=torch.tensor(6.0)).loss
    count = int(case["mask"].sum()) if "token" in name[:5] or name == "items" else 3
    torch.testing.assert_close(per_item, expected * count / 6.0, **EXACT)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_estimates_of_the_divergence(name):
    """Over the whole vocabulary the mean of k1 and k3 is the divergence. The gradient of k2, and
    those of k1 and k3 with the ratio as a factor, have its gradient as their mean.
    """
    z = torch.randn(6, dtype=torch.float64, requires_grad=True)
    policy, ref = z.log_softmax(0), torch.randn(6, dtype=torch.float64).log_softmax(0)
    p = policy.detach().exp()
    exact = (policy.exp() * (policy - ref)).sum()
    estimate = KL_ESTIMATORS[name](policy, ref)
    if name != "k2":
        torch.testing.assert_close((p * estimate).sum(), exact, **EXACT)
    (expected,) = torch.autograd.grad(exact, z, retain_graph=True)
    ratio = (policy - policy.detach()).exp()
    weighted = estimate if name == "k2" else ratio * estimate
    (found,) = torch.autograd.grad((p * weighted).sum(), z)
    torch.testing.assert_close(found, expected, **EXACT)


def test_credit_of_tokens_reaches_their_own_gradients_with_gspo_token():
    """2507.18071 Eq. 15-17: the same as GSPO where the advantage of a sequence is one number."""
    case = batch()
    del case["ratio_weights"]
    values = {}
    for level in ("sequence", "sequence_token"):
        # ratios from -8 to 10 are not clipped
        options = PolicyOptions("gspo", importance_sampling_level=level, epsilon_low=9.0)
        found = policy_loss(**case, options=options)
        values[level] = found.loss, torch.autograd.grad(found.loss, case["logprobs"])[0]
    for a, b in zip(*values.values(), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    case["advantages"] = torch.randn(B, T, dtype=torch.float64)
    (found,) = torch.autograd.grad(policy_loss(**case, options=options).loss, case["logprobs"])
    mask, lengths = case["mask"], case["mask"].sum(1, keepdim=True)
    log_ratio = torch.where(mask, case["logprobs"] - case["old_logprobs"], 0.0)
    ratio = (log_ratio.sum(1, keepdim=True) / lengths).exp()
    expected = -ratio * case["advantages"] / lengths / B
    torch.testing.assert_close(found, torch.where(mask, expected, 0.0).detach(), **EXACT)


def test_results_are_of_the_dtype_of_logprobs_and_detached():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        case = batch(dtype=dtype)
        found = policy_loss(**case, options=PolicyOptions("grpo", **EVERYTHING))
        for name, x in found._asdict().items():
            assert x.dtype == expected and x.shape == () and x.requires_grad == (name == "loss")
        assert gradients(found.loss, case)[0].dtype == dtype


def test_every_row_names_what_there_is():
    for name, row in LOSS_TYPES.items():
        assert row.surrogate in SURROGATES and row.reduction in REDUCTIONS, name
        assert row.level in RATIO_LEVELS and row.paper, name
    assert {x.surrogate for x in LOSS_TYPES.values()} == SURROGATES.keys()


def test_the_page_lists_every_row():
    page = (Path(__file__).resolve().parents[2] / "docs" / "online.md").read_text()
    for name, row in LOSS_TYPES.items():
        cells = (f"`{name}`", f"`{row.surrogate}`", f"`{row.reduction}`", f"`{row.level}`")
        assert f"| {' | '.join((*cells, row.paper))} |" in page, name
    for name in (*RATIO_LEVELS, *SURROGATES, *REDUCTIONS, *KL_ESTIMATORS):
        assert f"`{name}`" in page, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "gpro"}, "loss_type: expected one of ppo, grpo, .* got 'gpro'"),
        ({"loss_type": None}, "loss_type: expected one of .* got None"),
        ({"reduction": "mean"}, "reduction: expected one of sequence_mean, .* got 'mean'"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level: .* got 'word'"),
        ({"kl_estimator": "k4"}, "kl_estimator: expected one of k1, k2, k3, got 'k4'"),
        ({"epsilon_low": -0.1}, "epsilon_low: expected a number >= 0.0, got -0.1"),
        ({"epsilon_high": math.nan}, "epsilon_high: expected a finite number, got nan"),
        ({"delta": 0.0}, "delta: expected a number > 0.0, got 0.0"),
        ({"delta": "1"}, "delta: expected a finite number or None, got '1'"),
        ({"beta": None}, "beta: expected a finite number, got None"),
        ({"entropy_coef": -1.0}, "entropy_coef: expected a number >= 0.0, got -1.0"),
        ({"top_entropy_quantile": 1.1}, "top_entropy_quantile: .* >= 0.0 and <= 1.0, got 1.1"),
        ({"off_policy_mask_threshold": 0}, "off_policy_mask_threshold: .* > 0.0, got 0"),
        ({"use_bias_correction_kl": 1}, "use_bias_correction_kl: expected a bool, got 1"),
        ({"sapo_temperature_neg": 0.0}, "sapo_temperature_neg: .* > 0.0, got 0.0"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        PolicyOptions(**options)


def bad(x, value, at=(0, 1)):
    x = x.detach().clone()
    x[at] = value
    return x


CASE = batch()
ENDS = torch.tensor([0, 3, 7])
REFUSED = {
    "logprobs [T]": ({"logprobs": torch.zeros(T)}, r"logprobs: expected \[B, T\], or \[N\] with"),
    "logprobs NaN": (
        {"logprobs": bad(CASE["logprobs"], math.nan)},
        r"logprobs: expected finite values, got nan at index \[0, 1\]",
    ),
    "logprobs int": (
        {"logprobs": torch.zeros(B, T, dtype=torch.int64)},
        "logprobs: expected a floating-point tensor",
    ),
    "advantages [T]": (
        {"advantages": torch.zeros(T)},
        r"advantages: expected shape \[4\], or \[4, 7\] \(one per token\), got \[7\]",
    ),
    "advantages inf": (
        {"advantages": bad(CASE["advantages"], math.inf, 1)},
        "advantages: expected finite values, got inf",
    ),
    "old_logprobs [B]": (
        {"old_logprobs": torch.zeros(B)},
        r"old_logprobs: expected shape \[4, 7\] \(one per token\), got \[4\]",
    ),
    "old_logprobs -inf": (
        {"old_logprobs": bad(CASE["logprobs"], -math.inf)},
        "old_logprobs: expected finite values, got -inf",
    ),
    "sampling_logprobs inf": (
        {"sampling_logprobs": bad(CASE["logprobs"], math.inf)},
        "sampling_logprobs: expected finite values, got inf",
    ),
    "ratio_weights < 0": (
        {"ratio_weights": bad(CASE["ratio_weights"], -1.0)},
        "ratio_weights: expected values >= 0, got -1.0",
    ),
    "no reference": ({"ref_logprobs": None}, "ref_logprobs: expected a tensor for beta=0.1"),
    "no entropy": ({"entropy": None}, "entropy: expected a tensor for entropy_coef=0.2, got None"),
    "entropy detached": (
        {"entropy": CASE["entropy"].detach()},
        "entropy: expected one with a gradient for entropy_coef=0.2, got a detached one",
    ),
    "mask int": ({"mask": CASE["mask"].long()}, "mask: expected torch.bool, got torch.int64"),
    "mask [B]": ({"mask": CASE["mask"][:, 0]}, r"mask: expected shape \[4, 7\]"),
    "num_items 0": ({"num_items": 0}, "num_items: expected a finite number > 0, got 0"),
    "num_items tensor 0": (
        {"num_items": torch.tensor(0)},
        "num_items: expected a finite number > 0, got 0",
    ),
    "num_items tensor < 0": (
        {"num_items": torch.tensor([-2.0])},
        "num_items: expected a finite number > 0, got -2.0",
    ),
    "num_items [2]": ({"num_items": torch.ones(2)}, r"num_items: expected one number, got \[2\]"),
    "accumulation_steps": ({"accumulation_steps": 0}, "accumulation_steps: .* > 0, got 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_tensors(name):
    given, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        policy_loss(**{**CASE, **given}, options=PolicyOptions("dapo", **EVERYTHING))


PACKED = {
    "both": ({"mask": torch.ones(7, dtype=torch.bool)}, "mask: expected None beside cu_seqlens"),
    "[B, T]": ({"logprobs": torch.zeros(1, 7)}, r"logprobs: expected \[N\] beside cu_seqlens"),
    "end": ({"cu_seqlens": ENDS[:2]}, "cu_seqlens: expected to end at N=7 .* got 3"),
    "float": ({"cu_seqlens": ENDS.float()}, r"cu_seqlens: expected \[B\+1\] int32 or int64"),
    "empty": ({"cu_seqlens": ENDS[:0]}, r"cu_seqlens: expected \[B\+1\] int32 or int64, got \[0\]"),
}


@pytest.mark.parametrize("name", PACKED)
def test_refused_packed_tensors(name):
    given, message = PACKED[name]
    case = {"logprobs": torch.zeros(7), "advantages": torch.ones(2), "cu_seqlens": ENDS, **given}
    with pytest.raises(ValueError, match=message):
        policy_loss(**case)


def test_what_a_reduction_cannot_use_is_refused():
    case = {"logprobs": torch.zeros(7), "advantages": torch.ones(2), "cu_seqlens": ENDS}
    with pytest.raises(ValueError, match="max_length: expected a number > 0 for packed tensors"):
        policy_loss(**case, options=PolicyOptions("dr_grpo"))
    with pytest.raises(ValueError, match="num_items: expected None with reduction='token_mean'"):
        policy_loss(**case, options=PolicyOptions("bnpo"), num_items=3)
    with pytest.raises(TypeError, match="options: expected PolicyOptions, got dict"):
        policy_loss(**case, options={"loss_type": "grpo"})
    with pytest.raises(TypeError, match=r"advantages: expected a torch.Tensor, got list"):
        policy_loss(**{**case, "advantages": [1.0, 2.0]})


def test_options_are_made_again_from_their_own_fields():
    options = PolicyOptions("gspo", epsilon_low=0.1)
    assert dataclasses.replace(options) == options
    assert (options.epsilon_high, options.importance_sampling_level) == (0.1, "sequence")
