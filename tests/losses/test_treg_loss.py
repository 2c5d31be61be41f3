"""`treg_loss` as an operator: schedules under torch.compile, what it refuses, what it costs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from treg.losses import LossOptions, treg_loss

ROOT = Path(__file__).resolve().parents[2]


def pairs():
    """logps (a leaf), rewards, reference sums: two pairs of five tokens, float64."""
    logps = -3 * torch.rand(4, 5, dtype=torch.float64)
    return logps.requires_grad_(), torch.rand_like(logps) - 0.5, -5 * torch.rand(4)


def step_of_numbers(logps, rewards, beta, alpha, gamma):
    options = LossOptions("simpo", beta, alpha, gamma)
    return treg_loss(logps, rewards, None, options).loss.sum()


def step_of_made_options(logps, rewards, options):
    return treg_loss(logps, rewards, None, options).loss.sum()


# -- schedules

SCHEDULE = [(0.1, 0.25, 0.0), (0.2, 0.3, 0.5), (0.3, 0.0, 0.7), (1.0, 0.5, 1.0), (0.05, 1.0, 0.1)]


@pytest.mark.parametrize("made", ["in the graph", "outside"])
@pytest.mark.parametrize(("dynamic", "graphs"), [(None, 2), (True, 1)])
def test_a_schedule_needs_no_more_graphs(dynamic, graphs, made):
    """beta, alpha and gamma change at every step: the bits of eager, loss and gradient."""
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    step = step_of_numbers if made == "in the graph" else step_of_made_options
    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic)
    logps, rewards, _ = pairs()
    for numbers in SCHEDULE:
        given = numbers if made == "in the graph" else (LossOptions("simpo", *numbers),)
        exact = step_of_numbers(logps, rewards, *numbers)
        found = compiled(logps, rewards, *given)
        assert torch.equal(found, exact)
        gradients = [torch.autograd.grad(loss, logps)[0] for loss in (found, exact)]
        assert torch.equal(*gradients)
    assert backend.frame_count <= graphs


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((-0.1, 0.25, 0.0), "beta: expected a finite number > 0, got -0.1"),
        ((0.1, -0.25, 0.0), "alpha: expected a number >= 0, got -0.25"),
        ((0.1, 0.25, float("nan")), "gamma: expected a finite number, got nan"),
    ],
)
def test_bad_numbers_are_refused_inside_a_graph(numbers, message):
    torch._dynamo.reset()
    compiled = torch.compile(step_of_numbers, fullgraph=True, backend="aot_eager", dynamic=True)
    logps, rewards, _ = pairs()
    compiled(logps, rewards, 0.1, 0.25, 0.0)
    with pytest.raises(ValueError, match=message):
        compiled(logps, rewards, *numbers)


def test_an_option_that_is_not_taken_is_refused_inside_a_graph():
    torch._dynamo.reset()

    def step(logps, rewards, ref, gamma):
        return treg_loss(logps, rewards, ref, LossOptions("dpo", gamma=gamma)).loss.sum()

    compiled = torch.compile(step, backend="aot_eager")
    with pytest.raises(ValueError, match="gamma: expected 0 for loss_type='dpo'"):
        compiled(*pairs(), 0.5)


# -- what is not scored


def test_an_infinite_upstream_stays_out_of_what_is_not_scored():
    """As a gradient scaler sends one: ignored tokens are left out, not multiplied by 0."""
    logps, rewards, ref = pairs()
    mask = torch.ones_like(logps, dtype=torch.bool)
    mask[:, 3:] = False
    loss = treg_loss(logps, rewards, ref, mask=mask).loss
    (found,) = torch.autograd.grad(loss, logps, torch.tensor([torch.inf, 1.0]))
    assert (found[~mask] == 0).all()
    assert found[[0, 2]][:, :3].isinf().all() and found[[1, 3]].isfinite().all()


# -- derivatives that there are not


def loss_of(x):
    rewards, ref = torch.full((4, 5), 0.25), torch.zeros(4)
    return treg_loss(x, rewards, ref).loss.sum()


TRANSFORMS = {
    "grad": lambda x: torch.func.grad(loss_of)(x),
    "vmap": lambda x: torch.func.vmap(loss_of)(x.unsqueeze(0)),
    "jvp": lambda x: torch.func.jvp(loss_of, (x,), (x,)),
    "jacfwd": lambda x: torch.func.jacfwd(loss_of)(x),
    "hessian": lambda x: torch.func.hessian(loss_of)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func_raise(transform):
    with pytest.raises(RuntimeError, match=r"logps: .* inside a transform of torch\.func"):
        TRANSFORMS[transform](-torch.rand(4, 5))


@pytest.mark.parametrize("name", ["logps", "token_rewards", "ref_logps", "token_weights"])
def test_forward_mode_raises(name):
    """A derivative of 0 would be silently wrong."""
    given = {"logps": -torch.rand(4, 5), "token_rewards": torch.rand(4, 5)}
    given |= {"ref_logps": torch.rand(4, 5), "token_weights": torch.rand(4, 5)}
    with torch.autograd.forward_ad.dual_level():
        given[name] = torch.autograd.forward_ad.make_dual(given[name], torch.ones(4, 5))
        with pytest.raises(RuntimeError, match=f"{name}: .* forward-mode"):
            treg_loss(**given)


def test_a_transform_over_another_argument_raises():
    x = -torch.rand(4, 5)
    with pytest.raises(RuntimeError, match="token_rewards: expected a plain tensor"):
        torch.func.grad(lambda r: treg_loss(x, r, torch.zeros(4)).loss.sum())(torch.rand(4, 5))


# -- what a first call costs

PROBE = """
import json, sys
import torch
from treg.losses import treg_loss

logps = -torch.rand(4, 5, requires_grad=True)
treg_loss(logps, torch.rand(4, 5) - 0.5, torch.zeros(4)).loss.sum().backward()
print(json.dumps([name for name in ("torch._dynamo", "sympy", "triton") if name in sys.modules]))
"""


def test_a_first_call_on_a_cpu_imports_no_compiler():
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == []
