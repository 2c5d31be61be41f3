"""verl's fused head, served by treg: against dense PyTorch.

Runs against verl itself where it can be imported, see tests/support/verl_stub.py.
"""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch
import torch.distributed as dist
from helpers import EPS, assert_within_budget, error
from tiny import tiny_llama
from verl_stub import REAL

import treg.ops.entropy
from treg.integrations import verl as integration


def dense(hidden, weight, labels, temperature=1.0, widen=False):
    """Log-probs and entropies [N]. widen: from logits of 16 bits in float32, as trainers do."""
    logits = hidden.reshape(-1, hidden.shape[-1]) @ weight.T
    logp = ((logits.float() if widen else logits) / temperature).log_softmax(-1)
    return logp.gather(-1, labels.reshape(-1, 1))[:, 0], -(logp.exp() * logp).sum(-1)


def make_inputs(*shape, dtype=torch.float64, D=12, V=40):
    hidden = (2 * torch.randn(*shape, D)).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, shape)


def assert_same(actual, expected, leaves, tolerance, seed=1):
    """Log-probs, entropies, and the gradients of a mixture of both in every leaf."""
    generator = torch.Generator().manual_seed(seed)
    mixes = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in expected]
    grads = []
    for found in (actual, expected):
        total = sum((mix * x.double()).sum() for mix, x in zip(mixes, found, strict=True))
        grads.append(torch.autograd.grad(total, leaves))
    for a, b in zip((*actual, *grads[0]), (*expected, *grads[1]), strict=True):
        assert error(a, b) <= tolerance


# -- the op


@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 2)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", [100, 3], ids=["one chunk", "chunks"])
def test_op_is_dense(shape, temperature, rows, monkeypatch):
    hidden, weight, labels = make_inputs(*shape)
    monkeypatch.setattr(treg.ops.entropy, "_tile_rows", lambda *args: rows)
    found = integration.linear_cross_entropy(hidden, weight, labels, temperature, "none")
    assert [list(x.shape) for x in found] == [[labels.numel()]] * 2
    assert_same(found, dense(hidden, weight, labels, temperature), (hidden, weight), 1e-12)


def results(fn, hidden, weight, labels, temperature) -> list[torch.Tensor]:
    """Log-probs, entropies, and the gradients of a mixture of both."""
    found = fn(hidden, weight, labels, temperature)
    mixes = torch.randn(2, labels.numel(), generator=torch.Generator().manual_seed(1))
    total = sum((mix * x).sum() for mix, x in zip(mixes, found, strict=True))
    return [*found, *torch.autograd.grad(total, (hidden, weight))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op_errs_as_little_as_plain_pytorch(dtype):
    hidden, weight, labels = make_inputs(50, dtype=dtype)
    exact = results(
        dense, *(x.detach().double().requires_grad_() for x in (hidden, weight)), labels, 0.7
    )
    plain = results(lambda h, w, *rest: dense(h, w, *rest, widen=True), hidden, weight, labels, 0.7)
    found = results(integration.linear_cross_entropy, hidden, weight, labels, 0.7)
    assert found[0].dtype == found[1].dtype == torch.float32
    for name, a, b, c in zip(
        ("logprobs", "entropy", "dhidden", "dweight"), found, exact, plain, strict=True
    ):
        assert_within_budget(name, a, b, error(c, b), dtype)


def test_op_under_autocast():
    """The operands are rounded once, as those of a linear layer are."""
    hidden, weight, labels = make_inputs(50, dtype=torch.float32)
    rounded = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    expected = results(integration.linear_cross_entropy, *rounded, labels, 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(integration.linear_cross_entropy, hidden, weight, labels, 0.7)
    for a, b in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for a, b in zip(found[2:], expected[2:], strict=True):
        # not rounded to 16 bits, as those of bfloat16 operands are
        assert a.dtype == torch.float32 and b.dtype == torch.bfloat16
        assert error(a, b) < EPS[torch.bfloat16]


@pytest.mark.parametrize("reduction", ["sum", "mean", "SUM", None])
def test_reductions(reduction):
    hidden, weight, labels = make_inputs(6)
    logps, entropy = integration.linear_cross_entropy(hidden, weight, labels, None, reduction)
    expected = dense(hidden, weight, labels)[0]
    reduced = {"sum": expected.sum(), "mean": expected.mean(), "none": expected}[
        (reduction or "none").lower()
    ]
    torch.testing.assert_close(logps, reduced)
    assert entropy.shape == (6,)


def test_entropy_gradient_of_a_frozen_head():
    hidden, weight, labels = make_inputs(6)
    frozen = weight.detach()
    found = integration.linear_cross_entropy(hidden, frozen, labels)
    assert_same(found, dense(hidden, frozen, labels), (hidden,), 1e-12)


@pytest.mark.parametrize(
    "coefficient", [0.0, None], ids=["entropy_coeff 0", "no entropy in the loss"]
)
def test_entropy_that_is_not_asked_for_costs_nothing(coefficient, monkeypatch):
    def no_products(*args):
        raise AssertionError("logits were made again")

    monkeypatch.setattr(treg.ops.entropy, "logits_into", no_products)
    hidden, weight, labels = make_inputs(6)
    logps, entropy = integration.linear_cross_entropy(hidden, weight, labels)
    loss = logps.sum() if coefficient is None else logps.sum() - coefficient * entropy.mean()
    expected = torch.autograd.grad(dense(hidden, weight, labels)[0].sum(), (hidden, weight))
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
        assert error(a, b) <= 1e-12


def test_labels_that_are_ignored():
    hidden, weight, labels = make_inputs(6)
    labels[[1, 4]] = -100
    kept = labels != -100
    logps, entropy = integration.linear_cross_entropy(hidden, weight, labels)
    assert not logps[~kept].any() and not entropy[~kept].any()
    expected = dense(hidden[kept], weight, labels[kept])
    actual = torch.autograd.grad((logps + 2 * entropy).sum(), (hidden, weight))
    for a, b in zip(
        actual,
        torch.autograd.grad((expected[0] + 2 * expected[1]).sum(), (hidden, weight)),
        strict=True,
    ):
        assert error(a, b) <= 1e-12


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_what_ignored_rows_hold_has_no_part(value):
    """1e6: logits whose exponential overflows."""
    hidden, weight, labels = make_inputs(6, dtype=torch.float32)
    labels[[1, 4]] = -100
    kept = labels != -100
    with torch.no_grad():
        hidden[~kept] = value
    logps, entropy = integration.linear_cross_entropy(hidden, weight, labels, 0.7)
    found = torch.autograd.grad((logps + 2 * entropy).sum(), (hidden, weight))
    assert not logps[~kept].any() and not entropy[~kept].any() and not found[0][~kept].any()
    rest = hidden.detach()[kept].requires_grad_()
    logps, entropy = dense(rest, weight, labels[kept], 0.7)
    expected = torch.autograd.grad((logps + 2 * entropy).sum(), (rest, weight))
    assert error(found[0][kept], expected[0]) <= 1e-5
    assert error(found[1], expected[1]) <= 1e-5


def rowwise_temperature(shape):
    """Of few values, as of packed sequences that were sampled at different temperatures."""
    rows = torch.arange(int(np.prod(shape)))
    return torch.tensor([0.7, 1.0, 2.5])[rows % 3].reshape(shape)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 2)], ids=str)
@pytest.mark.parametrize("form", ["as labels", "flat", "equal"])
def test_a_temperature_for_each_row(shape, form):
    hidden, weight, labels = make_inputs(*shape)
    temperature = torch.full(shape, 0.7) if form == "equal" else rowwise_temperature(shape)
    given = temperature.reshape(-1) if form == "flat" else temperature
    labels.reshape(-1)[2] = -100
    scored = labels.reshape(-1) != -100
    found = integration.linear_cross_entropy(hidden, weight, labels, given)
    expected = dense(hidden, weight, labels.clamp(min=0), temperature.reshape(-1, 1).double())
    zero = torch.zeros((), dtype=torch.float64)
    expected = [torch.where(scored, x, zero) for x in expected]
    assert_same(found, expected, (hidden, weight), 1e-7)  # float32 holds 0.7 to 1e-8


def test_a_temperature_for_each_row_and_a_reduction():
    hidden, weight, labels = make_inputs(6)
    temperature = rowwise_temperature((6,)).double()
    found = integration.linear_cross_entropy(hidden, weight, labels, temperature, "mean")
    logps, entropy = dense(hidden, weight, labels, temperature[:, None])
    assert_same(found, (logps.mean(), entropy), (hidden, weight), 1e-12)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_temperature_of_one_element(shape):
    hidden, weight, labels = make_inputs(5)
    temperature = torch.full(shape, 0.7, dtype=torch.float64)
    found = integration.linear_cross_entropy(hidden, weight, labels, temperature)
    assert_same(found, dense(hidden, weight, labels, 0.7), (hidden, weight), 1e-12)


@pytest.mark.parametrize(
    "temperature, message",
    [
        (torch.ones(3), r"shape \[2, 3\] \(that of labels\), \[6\] or one element, got \[3\]"),
        (torch.ones(3, 2), r"or one element, got \[3, 2\]"),
        (torch.ones(0), r"or one element, got \[0\]"),
        (torch.tensor([1.0, 1, 1, 1, float("nan"), 1]), "expected finite values > 0, got nan"),
        (torch.tensor([1.0, 1, 1, 1, float("inf"), 1]), "expected finite values > 0, got inf"),
        (torch.tensor([1.0, 1, 1, 0.0, 1, 1]), r"expected finite values > 0, got 0\.0"),
        (torch.tensor([1.0, 1, 1, -0.5, 1, 1]), r"expected finite values > 0, got -0\.5"),
        (torch.tensor(0.0), "expected a finite number > 0, got 0.0"),
        (0.0, "expected a finite number > 0, got 0.0"),
        (torch.ones(6, dtype=torch.bool), "expected a number or a tensor of numbers"),
        (torch.ones(6, dtype=torch.complex64), "expected a number or a tensor of numbers"),
    ],
)
def test_temperatures_that_are_refused(temperature, message):
    hidden, weight, labels = make_inputs(2, 3)
    with pytest.raises(ValueError, match=f"temperature: .*{message}"):
        integration.linear_cross_entropy(hidden, weight, labels, temperature)


def test_a_temperature_that_wants_a_gradient_is_refused():
    """It would be lost."""
    hidden, weight, labels = make_inputs(2, 3)
    temperature = torch.ones(6, requires_grad=True)
    with pytest.raises(ValueError, match="temperature: expected no gradient"):
        integration.linear_cross_entropy(hidden, weight, labels, temperature)


def train(hidden, weight, labels, group=None) -> dict[str, torch.Tensor]:
    """Log-probs, entropies, and gradients of a loss of both."""
    temperature = rowwise_temperature(labels.shape)
    logps, entropy = integration.linear_cross_entropy(
        hidden, weight, labels, temperature, "none", group
    )
    loss = (torch.arange(labels.numel()) * logps).sum() - 3.0 * entropy.square().sum()
    grads = torch.autograd.grad(loss, (hidden, weight))
    return dict(
        zip(("logps", "entropy", "dhidden", "dweight"), (logps, entropy, *grads), strict=True)
    )


def seeded_inputs():
    torch.manual_seed(5)
    return make_inputs(9)


def vocabulary_worker(rank: int, size: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    hidden, weight, labels = seeded_inputs()
    part = weight.detach().chunk(size)[rank].clone().requires_grad_()
    torch.save(train(hidden, part, labels, dist.group.WORLD), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_op_over_a_split_vocabulary(tmp_path):
    workers = [processes.start(__file__, "2", tmp_path, rank) for rank in range(2)]
    processes.wait_for_all(workers, 120)
    assert [worker.wait() for worker in workers] == [0, 0], workers[0].said() + workers[1].said()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    expected = train(*seeded_inputs())
    for one in found:
        assert error(one["logps"], expected["logps"]) <= 1e-12
        assert error(one["entropy"], expected["entropy"]) <= 1e-12
    assert error(found[0]["dhidden"] + found[1]["dhidden"], expected["dhidden"]) <= 1e-12
    assert error(torch.cat([one["dweight"] for one in found]), expected["dweight"]) <= 1e-12


def test_op_refuses():
    hidden, weight, labels = make_inputs(3)
    with pytest.raises(
        ValueError, match="reduction: expected 'none', 'sum' or 'mean', got 'batchmean'"
    ):
        integration.linear_cross_entropy(hidden, weight, labels, 1.0, "batchmean")
    with pytest.raises(ValueError, match="target: expected values in"):
        integration.linear_cross_entropy(hidden, weight, labels + weight.shape[0])


# -- where verl looks it up
# -


def stub_forward(
    self, input_ids, attention_mask=None, position_ids=None, temperature=1.0, return_dict=None, **_
):
    """verl.models.transformers.dense_common.forward_with_triton_backend."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    hidden = self.model(
        input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    )[0]
    rolled = torch.roll(input_ids, shifts=-1, dims=-1)
    log_probs, entropy = linear_cross_entropy(
        hidden, self.lm_head.weight, rolled, temperature, "none"
    )
    return SimpleNamespace(log_probs=log_probs, entropy=entropy)


@pytest.mark.parametrize("entropy_coeff", [0.0, 0.3])
def test_policy_step_through_verls_forward(entropy_coeff, verl_modules):
    """Remove-padding mode: one row of packed sequences; loss and every gradient of a
    policy-gradient step.
    """
    forward = stub_forward
    if REAL:
        from verl.models.transformers.dense_common import forward_with_triton_backend as forward
    integration.install_op()
    model = tiny_llama(48, hidden_size=16, intermediate_size=32).double()
    ids, temperature, advantage = torch.randint(48, (1, 12)), 0.8, torch.randn(12).double()
    position = torch.cat([torch.arange(7), torch.arange(5)])[None]
    # as verl's fsdp engine takes them out of the model's output
    output = forward(
        model,
        input_ids=ids,
        attention_mask=None,
        position_ids=position,
        temperature=temperature,
        use_cache=False,
        return_dict=True,
    )
    log_probs, entropy = output.log_probs.squeeze(0), output.entropy.squeeze(0)
    loss = -(advantage * log_probs).mean() - entropy_coeff * entropy.mean()

    hidden = model.model(ids, position_ids=position, use_cache=False)[0]
    expected = dense(hidden, model.lm_head.weight, torch.roll(ids, -1, -1), temperature)
    oracle = -(advantage * expected[0]).mean() - entropy_coeff * expected[1].mean()
    torch.testing.assert_close(loss, oracle)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(oracle, parameters), strict=True
    ):
        assert error(a, b) <= 1e-10


def test_install_op_reaches_modules_that_imported_by_value(verl_modules):
    integration.install_op()
    assert verl_modules.kernel.linear_cross_entropy is integration.linear_cross_entropy
    assert verl_modules.fused.linear_cross_entropy is integration.linear_cross_entropy
    integration.install_op()
    assert verl_modules.kernel.linear_cross_entropy is integration.linear_cross_entropy


def test_example(verl_modules):
    before = verl_modules.agent_loop.AgentLoopOutput.as_dict
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "verl_treg.py"))
    assert verl_modules.kernel.linear_cross_entropy is integration.linear_cross_entropy
    assert verl_modules.agent_loop.AgentLoopOutput.as_dict is not before
    assert "treg_grpo" in verl_modules.core.ADV_ESTIMATOR_REGISTRY


def test_install_op_refuses_another_signature(verl_modules, monkeypatch):
    class LinearCrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, labels, reduction="mean"):
            pass

    before = verl_modules.kernel.linear_cross_entropy
    monkeypatch.setattr(verl_modules.kernel, "LinearCrossEntropy", LinearCrossEntropy)
    with pytest.raises(
        RuntimeError, match=r"got \['hidden', 'weight', 'labels', 'reduction'\] in version"
    ):
        integration.install_op()
    assert verl_modules.kernel.linear_cross_entropy is before


@pytest.mark.parametrize(
    "install",
    [integration.install_op, integration.install_token_scores, integration.install_advantages],
)
def test_without_verl(install, monkeypatch):
    for name in [name for name in sys.modules if name == "verl" or name.startswith("verl.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(ImportError, match=r"verl: expected verl >= 0\.9 with verl\."):
        install()


if __name__ == "__main__":  # a process of test_op_over_a_split_vocabulary
    vocabulary_worker(int(sys.argv[3]), int(sys.argv[1]), sys.argv[2])
