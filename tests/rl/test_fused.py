"""The loss of a policy from hidden states, against dense logits in float64."""

import pytest
import torch
from helpers import IMPLS, Case, assert_within_budget, check_against_reference, device_of
from memory import PeakMemory

import treg.ops.entropy
from treg.ops.head import torch_tiles
from treg.rl import LOSS_TYPES, PolicyOptions, fused_policy_loss, policy_loss

B, T, D, V = 4, 9, 16, 60
LENGTHS = (9, 4, 1, 6)
HEADS = {"plain": {}, "all": {"logit_scale": 0.8, "softcap": 4.0, "temperature": 0.7}}
OPTIONS = {"beta": 0.1, "delta": 2.0, "max_length": 8.0, "off_policy_mask_threshold": 0.05}
TOKENS = ("old_logprobs", "ref_logprobs", "ratio_weights")


def dense_scores(hidden, weight, target, bias=None, logit_scale=1.0, softcap=None, temperature=1.0):
    """Log-probs and entropies from logits, which 16-bit models round once."""
    z = hidden @ weight.T
    z = z if z.dtype == torch.float64 else z.float()
    z = (z if bias is None else z + bias) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = (z / temperature).log_softmax(-1)
    known = logp.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return known, torch.special.entr(logp.exp()).sum(-1)


def dense(hidden, weight, target, advantages, bias=None, cu_seqlens=None, **given):
    """`policy_loss` of those. Of packed sequences with holes the holes are taken out."""
    head = {name: given.pop(name) for name in HEADS["all"] if name in given}
    known, entropy = dense_scores(hidden, weight, target, bias, **head)
    scored = target != -100
    if cu_seqlens is None:
        return policy_loss(known, advantages, entropy=entropy, mask=scored, **given)
    given |= {name: given[name][scored] for name in TOKENS}
    if advantages.shape == target.shape:
        advantages = advantages[scored]
    ends = torch.tensor([0, *scored.cumsum(0)])[cu_seqlens]
    return policy_loss(known[scored], advantages, entropy=entropy[scored], cu_seqlens=ends, **given)


def case_of(options, *, packed=False, per_token=False, bias=False, head="plain"):
    """Sequences of several lengths, one with a hole; no ratio is near a bound of clipping."""
    inside = torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(1)
    target = torch.randint(V, (B, T)).masked_fill(~inside, -100)
    target[0, 3:5] = -100
    hidden, weight = torch.randn(B, T, D), torch.randn(V, D) * D**-0.5
    b = torch.randn(V) if bias else None
    logprobs, _ = dense_scores(hidden, weight, target, b, **HEADS[head])
    steps = torch.tensor([-0.5, -0.06, 0.06, 0.5])[torch.randint(4, (B, T))]
    advantages = torch.randn(B, T).masked_fill(torch.rand(B, T) < 0.5, 1.5)
    rest = {
        "target": target,
        "advantages": advantages if per_token else advantages[:, 0],
        "old_logprobs": logprobs - steps,
        "ref_logprobs": logprobs + 0.3 * torch.randn(B, T),
        "ratio_weights": 0.5 + torch.rand(B, T),
    }
    if packed:
        hidden = hidden[inside]
        rest = {k: x[inside] if x.shape == target.shape else x for k, x in rest.items()}
        rest["cu_seqlens"] = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)])
    return Case(hidden, weight, b, {**rest, **HEADS[head], "options": options})


def only_loss(found):
    return found.loss


def of_size(fn):
    """Without the mean ratio and divergence: they have the rounding of log-probs of several nats,
    and are smaller by far.
    """
    return lambda *args, **kwargs: fn(*args, **kwargs)._replace(ratio=None, kl=None)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradients_within_the_budget(loss_type, dtype, packed):
    options = PolicyOptions(loss_type, entropy_coef=0.1, **OPTIONS)
    case = case_of(options, packed=packed, per_token=True)
    check_against_reference(
        case, of_size(fused_policy_loss), of_size(dense), only_loss, dtype, "cpu", 8
    )


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("impl", IMPLS)
def test_heads(impl, head, bias, entropy_coef):
    options = PolicyOptions("dapo", entropy_coef=entropy_coef, **OPTIONS)
    case = case_of(options, packed=True, bias=bias, head=head)
    check_against_reference(
        case,
        of_size(fused_policy_loss),
        of_size(dense),
        only_loss,
        torch.float32,
        device_of(impl),
        plain_runs=8,
        impl=impl,
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("impl", IMPLS)
def test_hidden_states_of_ignored_tokens_are_not_read(impl, value):
    options = PolicyOptions("grpo", entropy_coef=0.1, top_entropy_quantile=0.6, **OPTIONS)
    case = case_of(options).at(torch.float32, device_of(impl))
    ignored = case.rest["target"] == -100
    found = []
    for filling in (0.0, value):
        case.hidden.data[ignored] = filling
        found.append(case.run(fused_policy_loss, only_loss, impl=impl))
    for name, x in found[1].items():
        assert torch.equal(x, found[0][name]), name
    assert not found[1]["dhidden"][ignored].any()


def test_entropies_that_are_only_reported_are_not_differentiated(monkeypatch):
    def no_products(*args):
        raise AssertionError("logits were made again")

    monkeypatch.setattr(treg.ops.entropy, "logits_into", no_products)
    case = case_of(PolicyOptions("dapo", top_entropy_quantile=0.5, **OPTIONS))
    found = fused_policy_loss(case.hidden, case.weight.requires_grad_(), **case.rest)
    found.loss.backward()
    _, entropy = dense_scores(case.hidden, case.weight, case.rest["target"])
    expected = entropy[case.rest["target"] != -100].mean()
    assert_within_budget("entropy", found.entropy, expected, 0.0, torch.float32)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.usefixtures("open_operators")
def test_memory_stays_within_the_budget(entropy_coef, monkeypatch):
    """Bytes alive at once, beyond inputs: the budget, a float32 dweight for the log-probs and one
    for the entropies, dhidden of each, and [N]-sized rows. [N, V] would not fit.
    """
    N, size, words, budget = 1500, 8, 3000, 2 << 20
    monkeypatch.setattr(torch_tiles, "BLOCK", {"cpu": words})
    hidden = torch.randn(N, size, requires_grad=True)
    weight = (0.05 * torch.randn(words, size)).requires_grad_()
    old = torch.full((N,), -8.0)
    ends = torch.tensor([0, 400, 1000, N])
    with PeakMemory() as memory:
        found = fused_policy_loss(
            hidden,
            weight,
            torch.randint(words, (N,)),
            torch.randn(3),
            old_logprobs=old,
            cu_seqlens=ends,
            memory_budget=budget,
            options=PolicyOptions("dapo", entropy_coef=entropy_coef),
        )
        found.loss.backward()
    gradients = hidden.nbytes + weight.nbytes
    rows = 60 * 8 * N
    assert 0 < memory.peak <= budget + 4 * gradients + rows
    assert budget + 4 * gradients + rows < 0.2 * N * words * 4


def test_what_is_refused():
    case = case_of(PolicyOptions("grpo"))
    given = {"hidden": case.hidden, "weight": case.weight, **case.rest}
    for name, x, message in (
        ("target", case.rest["target"][0], r"target: expected \[B, T\], or \[N\] with cu_seqlens"),
        ("hidden", case.hidden[:2], r"target: expected shape \[2, 9\]"),
        ("advantages", torch.zeros(9), r"advantages: expected shape \[4\], or \[4, 9\]"),
        ("temperature", 0.0, "temperature: expected a finite number > 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_policy_loss(**{**given, name: x})
    with pytest.raises(TypeError, match="options: expected PolicyOptions, got str"):
        fused_policy_loss(**{**given, "options": "grpo"})
