"""Several processes, and weights that are not all there: the gradients of one process with all of
them.
"""

import functools
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import processes
import sharded_worker as worker

from treg.heads import install_head
from treg.ops import fused_treg_loss

FSDP_WORKER = Path(__file__).parents[1] / "support" / "fsdp_worker.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every layout in two processes of gloo."""
    folder = tmp_path_factory.mktemp("sharded")
    processes.run(worker.__file__, folder, ranks=2)
    return folder


@functools.cache
def dense(tied: bool = False, lora: bool = False) -> dict:
    """Loss, log-probs and gradients by name, in float64, written out."""
    model, batch = worker.make_model(tied, lora).double(), worker.make_batch()
    logits = model(input_ids=batch["ids"]).logits[:, :-1]
    target = batch["labels"][:, 1:]
    logps = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0] * (
        target != -100
    )
    beta, alpha, B = 0.1, 0.25, worker.B
    rho = beta * (logps.sum(1) - batch["ref"].double())
    w = torch.sigmoid(rho[B:] - rho[:B]).detach()
    reg = -(beta * batch["rewards"].double() * logps).sum(1)
    loss = (
        -torch.nn.functional.logsigmoid(rho[:B] - rho[B:]) + alpha * w * (reg[:B] + reg[B:])
    ).mean()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "logps": logps.detach(), "grads": grads}


@functools.cache
def alone(
    way: str, tied: bool = False, lora: bool = False, dtype: torch.dtype = torch.float32
) -> dict:
    """The same of treg, in one process."""
    model = worker.make_model(tied, lora).to(dtype)
    install_head(model)
    loss, logps = worker.WAYS[way](model, worker.make_batch())
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "logps": logps.detach(), "grads": grads}


def check(found: dict, expected: dict, tolerance: float) -> None:
    torch.testing.assert_close(
        found["loss"].double(), expected["loss"].double(), rtol=tolerance, atol=0
    )
    torch.testing.assert_close(
        found["logps"].double(), expected["logps"].double(), rtol=tolerance, atol=tolerance
    )
    assert found["grads"].keys() == expected["grads"].keys()
    for name, grad in found["grads"].items():
        exact = expected["grads"][name].double()
        error = (grad.double() - exact).norm() / exact.norm()
        assert error < tolerance, (name, error)


def exactly(way: str) -> float:
    """In float64. A llama's norms are float32 even then, and what a pair shares is summed there."""
    return 3e-7 if way == "shared" else 1e-12


@pytest.mark.parametrize("way", worker.WAYS)
@pytest.mark.parametrize("options", [{}, {"tied": True}, {"lora": True}], ids=str)
def test_one_process(way, options):
    check(alone(way, **options, dtype=torch.float64), dense(**options), exactly(way))


@pytest.mark.parametrize("way", worker.WAYS)
@pytest.mark.parametrize("layout", worker.LAYOUTS)
def test_two_processes(folder, layout, way):
    found = torch.load(folder / f"{layout}-{way}.pt")
    expected = alone(way, **worker.LAYOUTS[layout][1])
    first = expected | {"logps": expected["logps"][[0, worker.B]]}  # the pair of process 0
    check(found, first, 1e-6)


def test_sequence_parallel(folder):
    """Half of the tokens of every sequence in each of two processes."""
    found = torch.load(folder / "sequence_parallel.pt")
    batch, (hidden, weight) = worker.make_batch(), worker.bare_head()
    hidden.requires_grad_()
    out = fused_treg_loss(
        hidden, weight, batch["labels"][:, 1:], batch["rewards"], batch["ref"], beta=0.1, alpha=0.25
    )
    out.loss.backward()
    for name, exact in (("dhidden", hidden.grad), ("dweight", weight.grad)):
        assert (found[name] - exact).norm() < 1e-6 * exact.norm(), name


class Zero3:
    """DeepSpeed ZeRO-3's partitioned parameters for one process, as its parameter_offload.py hooks
    them up.

    Outside of its module's forward and backward a parameter is an empty tensor that knows its shape
    (`ds_shape`). A module gathers its own ones before its forward and releases them after; an
    autograd function on its outputs gathers them before its backward, and one on its inputs
    releases them after. Outputs are looked for in tuples and dicts.
    """

    def __init__(self, model):
        self.full, self.names, self.events = {}, {}, []
        for name, p in model.named_parameters():
            self.full[p], self.names[p] = p.data, name
            p.ds_shape, p.ds_id = p.shape, id(p)
            self.release(p)
        for module in model.modules():
            module.register_forward_pre_hook(self.before)
            module.register_forward_hook(self.after)

    def gather(self, p):
        p.data = self.full[
            p
        ].clone()  # another place each time: what was kept of the old one is not it

    def release(self, p):
        p.data = p.data.new_empty(0)

    def own(self, module):
        return list(module.parameters(recurse=False))

    def before(self, module, args):
        for p in self.own(module):
            self.events.append(("forward", self.names[p]))
            self.gather(p)
        return self.applied(self.release_own, module, args) if args else None

    def after(self, module, args, output):
        self.release_own(module)
        return self.applied(self.gather_own, module, output)

    def applied(self, then, module, value):
        if isinstance(value, (tuple, list)):
            parts = [self.applied(then, module, x) for x in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if isinstance(value, dict):
            for key in value:
                value[key] = self.applied(then, module, value[key])
            return value
        wanted = isinstance(value, torch.Tensor) and value.requires_grad
        return self.InBackward.apply(then, module, value) if wanted else value

    def gather_own(self, module):
        for p in self.own(module):
            self.events.append(("backward", self.names[p]))
            self.gather(p)

    def release_own(self, module):
        for p in self.own(module):
            self.release(p)

    class InBackward(torch.autograd.Function):
        """x as it is; then(module) before its gradient goes on."""

        @staticmethod
        def forward(ctx, then, module, x):
            ctx.then, ctx.module = then, module
            return x.detach()

        @staticmethod
        def backward(ctx, grad):
            ctx.then(ctx.module)
            return None, None, grad


@pytest.mark.parametrize("way", worker.WAYS)
@pytest.mark.parametrize("options", [{}, {"lora": True}], ids=str)
@pytest.mark.parametrize("early", [True, False])
def test_zero3(way, options, early):
    """Weights that are empty outside of their module: gathered for the head in the forward and in
    the backward.
    """
    model = worker.make_model(**options).double()
    if early:
        install_head(model)
    zero = Zero3(model)
    if not early:  # a model that was loaded in parts: the check waits for the first forward
        assert install_head(model).pending
    zero.events.clear()
    loss, logps = worker.WAYS[way](model, worker.make_batch())
    head = [kind for kind, name in zero.events if "lm_head" in name and "lora" not in name]
    assert head == ["forward"] if early else set(head) == {"forward"}
    assert all(p.numel() == 0 for p in model.parameters())
    loss.backward()
    assert any(kind == "backward" and "lm_head" in name for kind, name in zero.events)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    check(
        {"loss": loss.detach(), "logps": logps.detach(), "grads": grads},
        dense(**options),
        exactly(way),
    )


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


def test_trainers_under_fsdp2(tmp_path):
    """Two processes log what one does: loss, norm of the gradient, every metric; and TRL what
    treg's trainer does.
    """
    pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from treg.demo.world import MODEL, preference_rows
    from treg.rewards.annotate import AnnotateOptions, annotate

    data = tmp_path / "annotated.parquet"
    sources = [
        {"stream": "contrastive", "name": "contrastive"},
        {"stream": "marks", "name": "spans", "column": "wrong_{side}"},
    ]
    mixed = {"sources": sources, "mix": {"contrastive": 1.0}}
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    annotate(
        model,
        AutoTokenizer.from_pretrained(MODEL),
        preference_rows(0, 8, "train"),
        data,
        AnnotateOptions(per_token=True, rewards="several", rewards_options=mixed),
        progress=False,
    )
    logs = {}
    for name, size, more in (("alone", 1, {}), ("fsdp", 2, FSDP2)):
        processes.run(FSDP_WORKER, data, tmp_path, 4 // size, ranks=size, env=more)
        logs[name] = json.loads((tmp_path / f"{name}.json").read_text())
    for kind, expected in logs["alone"].items():
        for line, found in zip(expected[:2], logs["fsdp"][kind][:2], strict=True):
            assert line.keys() == found.keys() and {"loss", "grad_norm"} <= line.keys()
            # while the policy is the reference, margins are 0 but for roundings: no sign to compare
            unmoved = abs(line["rewards/margins"]) < 1e-5
            for key, value in line.items():
                if unmoved and key in ("rewards/accuracies", "treg/alignment"):
                    continue
                assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-4), (kind, key)
    assert {"shift/bad", "shift/unmarked"} <= logs["fsdp"]["TRegTrainer"][1].keys()
    for ours, theirs in zip(
        logs["alone"]["TRegTrainer"][:2], logs["alone"]["TRegDPOTrainer"][:2], strict=True
    ):
        shared = {
            "loss",
            "grad_norm",
            "rewards/margins",
            "treg/reg_loss",
            "logps/chosen",
            "entropy",
        }
        assert all(theirs[key] == pytest.approx(ours[key], rel=1e-4, abs=1e-5) for key in shared)
