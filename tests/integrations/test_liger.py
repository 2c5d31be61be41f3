"""`FusedLinearTRegLoss` against Liger's own loss on a CPU, and against the float64 reference where
Liger has no say.
"""

import pytest
import torch
from helpers import EPS, error
from torch.utils.flop_counter import FlopCounterMode

from treg.integrations.liger import LOSS_TYPES, FusedLinearTRegLoss
from treg.ops import reference
from treg.ops.head import torch_tiles
from treg.ops.head.memory import DEFAULT_BUDGET

OUTPUTS = (
    "chosen_logps",
    "rejected_logps",
    "chosen_logits_mean",
    "rejected_logits_mean",
    "nll_loss",
    "chosen_rewards",
    "rejected_rewards",
)
B, T, H, V = 3, 9, 12, 57
SMOOTHED = {"robust": 0.1, "exo_pair": 0.1}
F32 = 1e-5  # relative; Liger's own float32 roundings


def make_batch(dtype=torch.float32, bias=True, ignore_index=-100):
    """Prompts and padding of different lengths, garbage in ignored rows, a reference model of
    another width.
    """
    target = torch.randint(0, V, (2 * B, T))
    for i in range(2 * B):
        target[i, : 1 + i % 3] = ignore_index
        target[i, T - i % 4 :] = ignore_index
    batch = {
        "lin_weight": torch.randn(V, H) * 0.5
        + 0.1,  # so that the mean logit is not a small difference
        "_input": torch.randn(2 * B, T, H) + 0.5,
        "bias": torch.randn(V) if bias else None,
        "ref_input": torch.randn(2 * B, T, H + 3),
        "ref_weight": torch.randn(V, H + 3) * 0.5,
        "ref_bias": torch.randn(V) if bias else None,
    }
    return {"target": target, **{k: None if x is None else x.to(dtype) for k, x in batch.items()}}


def cast(batch, dtype):
    return {
        k: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x
        for k, x in batch.items()
    }


def run(loss_fn, batch, trained=("_input", "lin_weight", "bias")):
    """Loss, outputs and the gradients of 1.7 times the loss, by name."""
    given = {
        k: x.detach().clone().requires_grad_() if k in trained and x is not None else x
        for k, x in batch.items()
    }
    loss, aux = loss_fn(**given)
    leaves = {k: given[k] for k in trained if given[k] is not None}
    grads = torch.autograd.grad(1.7 * loss, list(leaves.values())) if leaves else ()
    found = {"loss": loss.detach(), **dict(zip(OUTPUTS, aux, strict=True))}
    assert not any(x.requires_grad for x in aux)
    return found | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}


def assert_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert error(actual[name], x) <= tolerance, name


def liger(**options):
    return pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss(
        compiled=False, **options
    )


# -- without token rewards: Liger's loss
# -


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(
    "options", [{}, {"average_log_prob": True}, {"compute_nll_loss": True, "alpha": 0.3}], ids=str
)
def test_equals_liger(loss_type, options):
    options = {
        "loss_type": loss_type,
        "label_smoothing": SMOOTHED.get(loss_type, 0.0),
        "beta": 0.3,
        **options,
    }
    batch = make_batch()
    assert_close(run(FusedLinearTRegLoss(**options), batch), run(liger(**options), batch), F32)


@pytest.mark.parametrize(
    "options",
    [
        {"use_ref_model": False},
        {"use_ref_model": False, "average_log_prob": True, "compute_nll_loss": True},
        {"average_log_prob": True, "compute_nll_loss": True, "alpha": -0.4},
        {"ignore_index": 0},
        {"ignore_index": -1, "average_log_prob": True, "compute_nll_loss": True},
        {"chunk_size": 2},
        {"loss_type": "robust", "label_smoothing": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_options_equal_liger(options, bias):
    batch = make_batch(bias=bias, ignore_index=options.get("ignore_index", -100))
    assert_close(run(FusedLinearTRegLoss(**options), batch), run(liger(**options), batch), F32)


def test_arguments_are_in_ligers_order():
    values = (-100, 0.3, 0.5, True, False, True, True, 2, "hinge", 0.0, 0.05)
    batch = make_batch()
    order = ("lin_weight", "_input", "target", "bias", "ref_input", "ref_weight", "ref_bias")
    assert list(FusedLinearTRegLoss(*values).forward.__annotations__)[:7] == list(order)

    def positional(loss_fn):
        return lambda **given: loss_fn(*(given[name] for name in order))

    theirs = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss(*values)
    assert_close(
        run(positional(FusedLinearTRegLoss(*values)), batch), run(positional(theirs), batch), F32
    )


@pytest.mark.parametrize(
    "trained", [(), ("_input",), ("lin_weight",), ("bias",), ("_input", "bias")], ids=str
)
@pytest.mark.parametrize("nll", [False, True], ids=["plain", "nll"])
def test_frozen_parts_equal_liger(trained, nll):
    batch = make_batch()
    found = run(FusedLinearTRegLoss(compute_nll_loss=nll), batch, trained)
    assert_close(found, run(liger(compute_nll_loss=nll), batch, trained), F32)


@pytest.mark.parametrize("nll", [False, True], ids=["plain", "nll"])
def test_reference_and_rewards_take_no_gradient(nll):
    batch = {
        k: x.requires_grad_() if k != "target" else x
        for k, x in with_rewards(torch.float32).items()
    }
    loss, aux = FusedLinearTRegLoss(treg_alpha=0.5, compute_nll_loss=nll)(**batch)
    loss.backward()
    assert {k for k, x in batch.items() if x.grad is not None} == {"_input", "lin_weight", "bias"}
    assert not any(x.requires_grad for x in aux)


def test_bfloat16_is_no_further_from_exact_than_liger():
    """Both round the logits of a tile on a CPU; twice Liger's error, and one rounding of the
    output.
    """
    batch = make_batch(torch.bfloat16)
    exact = run(FusedLinearTRegLoss(beta=0.3), cast(batch, torch.float64))
    ours, theirs = run(FusedLinearTRegLoss(beta=0.3), batch), run(liger(beta=0.3), batch)
    assert {k: x.dtype for k, x in ours.items()} == {k: x.dtype for k, x in theirs.items()}
    for name, x in exact.items():
        assert error(ours[name], x) <= 2 * (error(theirs[name], x) + EPS[torch.bfloat16]), name


def test_autocast_equals_liger():
    batch = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = run(FusedLinearTRegLoss(), batch), run(liger(), batch)
    assert {k: x.dtype for k, x in ours.items()} == {k: x.dtype for k, x in theirs.items()}
    exact = run(FusedLinearTRegLoss(), cast(batch, torch.float64))
    for name, x in exact.items():
        assert error(ours[name], x) <= 2 * (error(theirs[name], x) + EPS[torch.bfloat16]), name


def test_ignored_rows_have_no_part():
    """Where Liger's loss is NaN."""
    batch = make_batch()
    expected = run(FusedLinearTRegLoss(), batch)
    ignored = batch["target"] == -100
    dirty = {
        k: torch.where(ignored[..., None], torch.nan, batch[k]) for k in ("_input", "ref_input")
    }
    found = run(FusedLinearTRegLoss(), batch | dirty)
    means = ("chosen_logits_mean", "rejected_logits_mean")  # over all positions, whatever is there
    assert all(found.pop(name).isnan() and expected.pop(name).isfinite() for name in means)
    assert_close(found, expected, 0)


def test_large_vocabulary_mean():
    """More rows than are summed at once."""
    batch = make_batch(bias=False)
    loss_fn = FusedLinearTRegLoss(use_ref_model=False)
    batch["lin_weight"] = torch.randn(20000, H, dtype=torch.bfloat16)
    batch["_input"] = batch["_input"].bfloat16()
    mean = (
        (batch["_input"].double() @ batch["lin_weight"].double().T)
        .mean((1, 2))
        .unflatten(0, (2, B))
        .mean(1)
    )
    _, aux = loss_fn(**batch)
    assert error(torch.stack(aux[2:4]), mean) < 1e-4


# -- with token rewards
# -


def dense_reference(loss_type, smoothing, beta, alpha):
    """`treg.ops.reference` behind the same call: sums, no likelihood term."""

    def loss_fn(lin_weight, _input, target, bias, ref_input, ref_weight, ref_bias, token_rewards):
        ref = reference.linear_logprobs(ref_input, ref_weight, target, bias=ref_bias).logprobs.sum(
            -1
        )
        out = reference.fused_treg_loss(
            _input,
            lin_weight,
            target,
            token_rewards,
            ref,
            bias=bias,
            beta=beta,
            alpha=alpha,
            loss_type=loss_type,
            label_smoothing=smoothing,
        )
        logits = _input @ lin_weight.T + bias
        means = [half.mean().detach() for half in logits.chunk(2)]
        return out.loss, (
            out.chosen_logps,
            out.rejected_logps,
            *means,
            torch.zeros(()),
            out.chosen_rewards,
            out.rejected_rewards,
        )

    return loss_fn


def with_rewards(dtype=torch.float64):
    batch = make_batch(dtype)
    rewards = torch.rand(batch["target"].shape, dtype=dtype) - 0.5
    return batch | {"token_rewards": torch.where(batch["target"] == -100, torch.nan, rewards)}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_treg_equals_reference(loss_type):
    smoothing = SMOOTHED.get(loss_type, 0.0)
    batch = with_rewards()
    ours = FusedLinearTRegLoss(
        loss_type=loss_type, label_smoothing=smoothing, beta=0.2, treg_alpha=0.7
    )
    assert_close(
        run(ours, batch), run(dense_reference(loss_type, smoothing, 0.2, 0.7), batch), 1e-11
    )


@pytest.mark.parametrize("nll", [False, True], ids=["plain", "nll"])
@pytest.mark.parametrize("average", [False, True], ids=["sum", "average"])
def test_treg_gradient_weighs_each_token(nll, average):
    """d L / d lp_t = -+ beta w (1 +- treg_alpha rhat_t) / (B or B tokens), and -alpha / chosen
    tokens for the nll.
    """
    batch, beta, treg_alpha, alpha = with_rewards(), 0.3, 0.6, 0.8
    options = {"compute_nll_loss": nll, "alpha": alpha if nll else 1.0}
    ours = FusedLinearTRegLoss(
        beta=beta, average_log_prob=average, treg_alpha=treg_alpha, **options
    )
    found = run(ours, batch)

    leaves = [batch[k].clone().requires_grad_() for k in ("_input", "lin_weight", "bias")]
    scored = batch["target"] != -100
    logps = reference.linear_logprobs(
        leaves[0], leaves[1], batch["target"], bias=leaves[2]
    ).logprobs
    ref = reference.linear_logprobs(
        batch["ref_input"], batch["ref_weight"], batch["target"], bias=batch["ref_bias"]
    )
    count = (scored.sum(-1) if average else torch.ones(2 * B)).double()
    rho = beta * (logps - ref.logprobs).detach().sum(-1) / count
    w = torch.sigmoid(rho[B:] - rho[:B])
    rhat = batch["token_rewards"].nan_to_num() * scored
    coef = (
        beta
        / (B * count)[:, None]
        * torch.cat(
            [-w[:, None] * (1 + treg_alpha * rhat[:B]), w[:, None] * (1 - treg_alpha * rhat[B:])]
        )
    )
    coef[:B] -= alpha / int(scored[:B].sum()) if nll else 0
    grads = torch.autograd.grad(logps, leaves, 1.7 * coef * scored)
    for name, grad in zip(("_input", "lin_weight", "bias"), grads, strict=True):
        assert error(found[f"d{name}"], grad) < 1e-11, name

    nll_loss = -logps[:B].sum() / scored[:B].sum()
    reg = -beta * (rhat * logps).sum(-1) / count
    loss = (
        -torch.nn.functional.logsigmoid(rho[:B] - rho[B:]) + treg_alpha * w * (reg[:B] + reg[B:])
    ).mean()
    assert error(found["loss"], loss + alpha * nll_loss if nll else loss) < 1e-12
    assert error(found["nll_loss"], nll_loss if nll else torch.zeros(())) < 1e-12
    assert error(found["chosen_rewards"], rho[:B]) < 1e-12
    assert error(found["rejected_logps"], (logps.sum(-1) / count)[B:]) < 1e-12


@pytest.mark.parametrize("average", [False, True], ids=["sum", "average"])
@pytest.mark.usefixtures("open_operators")
def test_three_products_for_the_policy_and_one_for_the_reference(average, monkeypatch):
    """Where the budget does not hold all pairs at once, in which case the likelihood term takes
    more.
    """
    length, wide = 400, 500
    monkeypatch.setattr(torch_tiles, "BLOCK", {"cpu": 1 << 14})  # leave the budget to the rows
    monkeypatch.setitem(DEFAULT_BUDGET, "cpu", 3 * length * wide * 4)
    batch = {
        "lin_weight": torch.randn(wide, H),
        "_input": torch.randn(2 * B, length, H),
        "target": torch.randint(0, wide, (2 * B, length)),
        "bias": None,
        "ref_bias": None,
        "ref_input": torch.randn(2 * B, length, H + 3),
        "ref_weight": torch.randn(wide, H + 3),
    }
    policy, ref = (2 * 2 * B * length * wide * width for width in (H, H + 3))

    def products(**options):
        with FlopCounterMode(display=False) as counter:
            run(
                FusedLinearTRegLoss(average_log_prob=average, **options),
                batch,
                ("_input", "lin_weight"),
            )
        return (counter.get_total_flops() - ref) / policy

    assert products() == 3
    assert 3 < products(compute_nll_loss=True) <= 4


# -- what is refused
# -


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ipo"}, "loss_type: expected one of"),
        ({"label_smoothing": 0.1}, "label_smoothing: expected 0"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing: expected 0"),
        (
            {"loss_type": "robust", "label_smoothing": 0.5},
            "label_smoothing: expected 0 <= value < 0.5",
        ),
        ({"loss_type": "exo_pair"}, "label_smoothing: expected a number > 0"),
        ({"loss_type": "discopop", "discopop_tau": 0.1}, "discopop_tau: expected 0.05"),
        ({"beta": 0.0}, "beta: expected"),
        ({"alpha": 0.25}, "treg_alpha"),
        ({"alpha": float("nan"), "compute_nll_loss": True}, "alpha: expected a finite"),
        ({"treg_alpha": -0.1}, "treg_alpha: expected a number >= 0"),
        ({"treg_alpha": float("inf")}, "treg_alpha: expected a finite"),
    ],
    ids=str,
)
def test_options_that_cannot_be_honoured_raise(options, message):
    with pytest.raises(ValueError, match=message):
        FusedLinearTRegLoss(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {"ref_input": None}, "ref_input: expected a tensor, got None"),
        (lambda b: {"ref_weight": None}, "ref_weight: expected a tensor, got None"),
        (lambda b: {"ref_input": b["ref_input"][:, :-1]}, "ref_input: expected shape"),
        (lambda b: {"token_rewards": None}, "token_rewards: expected a tensor for treg_alpha"),
        (lambda b: {"token_rewards": b["token_rewards"][:, :-1]}, "token_rewards: expected shape"),
        (
            lambda b: {"token_rewards": torch.zeros(2 * B, T).long()},
            "token_rewards: expected a floating",
        ),
        (
            lambda b: {"target": torch.full((2 * B, T), -100)},
            "expected a scored token in every sequence",
        ),
        (lambda b: {"target": torch.full((2 * B, T), V)}, "target: expected values"),
        (
            lambda b: {k: x[1:] for k, x in b.items() if x.shape[0] == 2 * B},
            "expected an even number",
        ),
        (
            lambda b: {"_input": b["_input"].flatten(0, 1)},
            "target: expected shape|hidden: expected",
        ),
    ],
)
@pytest.mark.parametrize("average", [False, True], ids=["sum", "average"])
@pytest.mark.parametrize("nll", [False, True], ids=["plain", "nll"])
def test_bad_input_raises(change, message, average, nll):
    batch = with_rewards(torch.float32)
    loss_fn = FusedLinearTRegLoss(treg_alpha=0.5, average_log_prob=average, compute_nll_loss=nll)
    with pytest.raises(ValueError, match=message):
        loss_fn(**(batch | change(batch)))


@pytest.mark.parametrize("name", ["lin_weight", "_input", "target", "ref_input"])
def test_what_is_no_tensor_raises(name):
    with pytest.raises(TypeError, match=rf"{name}: expected a torch\.Tensor, got int"):
        FusedLinearTRegLoss()(**(make_batch() | {name: 3}))


def test_rewards_without_a_weight_raise():
    with pytest.raises(ValueError, match="token_rewards: expected None for treg_alpha=0"):
        FusedLinearTRegLoss()(**with_rewards(torch.float32))


def test_an_option_set_later_is_checked_and_used():
    batch, loss_fn = make_batch(), FusedLinearTRegLoss(beta=0.1)
    loss_fn.beta = 0.4
    assert_close(run(loss_fn, batch), run(FusedLinearTRegLoss(beta=0.4), batch), 0)
    loss_fn.loss_type = "ipo"
    with pytest.raises(ValueError, match="loss_type"):
        loss_fn(**batch)


def test_loss_types_are_ligers():
    theirs = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss
    assert set(LOSS_TYPES) == theirs._SUPPORTED_LOSS_TYPES
