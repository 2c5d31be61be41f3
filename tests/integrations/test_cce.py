"""`linear_cross_entropy` against dense PyTorch in float64, and against cut-cross-entropy's own code
where it runs.
"""

import enum
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import EPS, error
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import treg.integrations.cce
from treg.integrations.cce import IMPLS, LinearCrossEntropy, linear_cross_entropy
from treg.ops import linear_logprobs
from treg.results import LinearLogprobs

D, V = 11, 43
SHAPES = {"2-D": (23,), "3-D": (3, 9), "4-D": (2, 3, 6)}
F64, F32 = 1e-12, 2e-6  # relative


def make_inputs(shape=(3, 9), dtype=torch.float64, bias=False, ignore_index=-100, ignored=0.3):
    targets = torch.randint(0, V, shape)
    targets[torch.rand(shape) < ignored] = ignore_index
    e, c = torch.randn(*shape, D), torch.randn(V, D)
    b = torch.randn(V).to(dtype) if bias else None
    return {"e": e.to(dtype), "c": c.to(dtype), "targets": targets, "bias": b}


def dense(e, c, targets, bias=None, ignore_index=-100, softcap=None, reduction="mean", shift=0):
    """Loss and lse as CCE documents them, in plain PyTorch."""
    shift = int(shift)
    e, targets = e[..., : e.shape[-2] - shift, :], targets[..., shift:]
    logits = e @ c.T if bias is None else e @ c.T + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(
        logits.reshape(-1, V), targets.reshape(-1), ignore_index=ignore_index, reduction=reduction
    )
    lse = torch.where(targets == ignore_index, 0.0, logits.logsumexp(-1))
    return loss.view(targets.shape) if reduction == "none" else loss, lse


def ours(**given):
    return linear_cross_entropy(**given, return_lse=True)


def run(fn, inputs, z=0.0, **options):
    """Outputs, and the gradients of a weighted sum of them; z: the weight of the squared lse."""
    leaves = {
        k: inputs[k].detach().clone().requires_grad_()
        for k in ("e", "c", "bias")
        if inputs[k] is not None
    }
    loss, lse = fn(**(inputs | leaves), **options)
    weights = torch.linspace(1.7, -0.4, max(1, loss.numel()), dtype=loss.dtype).view(loss.shape)
    total = (weights * loss).sum() + (z * lse**2).sum()
    grads = torch.autograd.grad(total, list(leaves.values()))
    return {"loss": loss.detach(), "lse": lse.detach()} | {
        f"d{k}": g for k, g in zip(leaves, grads, strict=True)
    }


def assert_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert error(actual[name], x) <= tolerance, name


# -- values and gradients
# -


@pytest.mark.parametrize("shift", [0, 1, True, 2], ids=repr)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("z", [0.0, 0.05], ids=["loss", "loss and z-loss"])
def test_equals_dense(shape, reduction, shift, z):
    inputs = make_inputs(SHAPES[shape])
    options = {"reduction": reduction, "shift": shift}
    assert_close(run(ours, inputs, z, **options), run(dense, inputs, z, **options), F64)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("softcap", [None, 2.5], ids=["no cap", "cap"])
@pytest.mark.parametrize("ignore_index", [-100, 5])
@pytest.mark.parametrize("z", [0.0, 0.05], ids=["loss", "loss and z-loss"])
def test_heads_equal_dense(bias, softcap, ignore_index, z):
    inputs = make_inputs(bias=bias, ignore_index=ignore_index)
    options = {"softcap": softcap, "ignore_index": ignore_index, "shift": 1}
    assert_close(run(ours, inputs, z, **options), run(dense, inputs, z, **options), F64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precision_of_gradients(dtype):
    """Within twice the error of dense PyTorch at the dtype; its lse needs no difference of
    roundings, ours does.
    """
    inputs = make_inputs((4, 64), dtype, bias=True)
    exact = run(dense, {k: x if k == "targets" else x.double() for k, x in inputs.items()}, 0.05)
    found, plain = run(ours, inputs, 0.05), run(dense, inputs, 0.05)
    for name, x in exact.items():
        assert found[name].dtype == (dtype if name.startswith("d") else torch.float32)
        assert error(found[name], x) <= 2 * (error(plain[name], x) + EPS[dtype]), name


@pytest.mark.parametrize("z", [0.0, 0.05], ids=["loss", "loss and z-loss"])
@pytest.mark.parametrize("trained", ["e", "c", "bias"])
def test_frozen_parts(trained, z):
    inputs = make_inputs(bias=True)
    leaf = inputs[trained].detach().clone().requires_grad_()
    expected = run(dense, inputs, z)[f"d{trained}"]
    loss, lse = ours(**(inputs | {trained: leaf}))
    total = 1.7 * loss + (z * lse**2).sum() if z else 1.7 * loss
    assert error(torch.autograd.grad(total, leaf)[0], expected) <= F64


def test_return_lse_changes_nothing_else():
    inputs = make_inputs((4, 64), torch.float32)
    plain = linear_cross_entropy(**inputs)
    loss, lse = linear_cross_entropy(**inputs, return_lse=True)
    assert torch.equal(plain, loss) and not lse.requires_grad
    assert not linear_cross_entropy(**inputs, return_lse=True)[1].requires_grad
    leaf = {"e": inputs["e"].clone().requires_grad_()}
    with torch.no_grad():
        assert not linear_cross_entropy(**(inputs | leaf), return_lse=True)[1].requires_grad
    assert torch.equal(
        lse, linear_logprobs(inputs["e"], inputs["c"], inputs["targets"], outputs=("lse",)).lse
    )
    # the lse that carries a gradient is the same number
    assert (
        error(linear_cross_entropy(**(inputs | leaf), return_lse=True)[1], lse)
        <= EPS[torch.float32]
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [0, 1])
def test_nothing_scored(reduction, shift):
    """The mean of nothing is nan, as in F.cross_entropy; gradients are zero."""
    inputs = make_inputs(ignored=1.0)
    if shift:
        inputs["targets"][:, 0] = 3  # never a target after the shift
    e, c = (inputs[k].requires_grad_() for k in ("e", "c"))
    loss, lse = ours(**inputs, reduction=reduction, shift=shift)
    exact, exact_lse = dense(**inputs, reduction=reduction, shift=shift)
    torch.testing.assert_close(loss, exact, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(lse, exact_lse)
    for grad in torch.autograd.grad(loss.sum() + lse.sum(), (e, c)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_the_mean_of_nothing_asks_for_no_infinite_gradient(monkeypatch):
    """A coefficient of -inf for each ignored token would be a GPU's to multiply by 0."""
    inputs, logprobs = make_inputs(ignored=1.0), torch.zeros(3, 9, requires_grad=True)
    monkeypatch.setattr(
        treg.integrations.cce, "linear_logprobs", lambda *_, **__: LinearLogprobs(logprobs)
    )
    linear_cross_entropy(**inputs).backward()
    assert torch.equal(logprobs.grad, torch.zeros(3, 9))


def test_ignored_rows_have_no_part():
    inputs = make_inputs(bias=True)
    expected = run(ours, inputs, 0.05, shift=1)
    ignored = F.pad(inputs["targets"][:, 1:], (0, 1), value=-100) == -100
    dirty = inputs | {"e": torch.where(ignored[..., None], torch.nan, inputs["e"])}
    assert_close(run(ours, dirty, 0.05, shift=1), expected, 0)


def test_inputs_are_left_alone():
    inputs = make_inputs()
    before = {k: x.clone() for k, x in inputs.items() if x is not None}
    run(ours, inputs, 0.1, shift=2)
    assert all(torch.equal(inputs[k], x) for k, x in before.items())


@pytest.mark.parametrize(
    "impl", [*IMPLS, enum.IntEnum("LinearCrossEntropyImpl", "CCE TORCH_COMPILE").TORCH_COMPILE]
)
def test_precision_options_have_no_effect(impl):
    inputs = make_inputs(dtype=torch.float32)
    options = {
        "impl": impl,
        "filter_eps": None if impl == "cce" else 0.5,
        "accum_e_fp32": True,
        "accum_c_fp32": True,
        "filter_e_grad": False,
        "filter_c_grad": False,
    }
    assert_close(run(ours, inputs, **options), run(ours, inputs), 0)


def test_module():
    inputs = make_inputs(bias=True, ignore_index=7)
    options = {"ignore_index": 7, "softcap": 3.0, "reduction": "none", "shift": 2}
    positional = LinearCrossEntropy(
        7, 3.0, "none", 2, "auto", False, False, True, True, "cce_exact", True
    )
    assert_close(run(positional, inputs, 0.1), run(dense, inputs, 0.1, **options), F64)
    inputs = make_inputs(bias=True)
    assert error(LinearCrossEntropy()(**inputs), dense(**inputs)[0]) <= F64
    with pytest.raises(ValueError, match="impl: expected"):
        LinearCrossEntropy(impl="triton")(**inputs)


# -- a vocabulary in parts
# -

PARALLEL = {
    "loss": ({}, 0.0),
    "loss and z-loss": ({"shift": 1}, 0.05),
    "cap": ({"softcap": 2.5, "reduction": "none"}, 0.05),
}


def make_parallel_inputs(bias):
    """First and last id of either part among the targets."""
    torch.manual_seed(0)
    inputs = make_inputs(bias=bias)
    inputs["targets"][1, 1:7] = torch.tensor([0, 28, 29, V - 1, -100, 28])
    return inputs


def parallel_worker(rank: int, size: int, folder: str) -> None:
    """Saves what rank sees of each case: all of e's gradient, its own rows of c's and the bias'."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    for case, (options, z) in PARALLEL.items():
        inputs = make_parallel_inputs(bias=True)
        start, stop = (0, 29, V)[rank : rank + 2]  # parts of different sizes
        part = inputs | {k: inputs[k][start:stop] for k in ("c", "bias")}
        group = SimpleNamespace(start=start, stop=stop, group=None)
        torch.save(
            run(ours, part, z, **options, vocab_parallel_options=group),
            f"{folder}/{case}-{rank}.pt",
        )
    inputs = make_parallel_inputs(bias=False)
    rows = distribute_tensor(inputs["c"], init_device_mesh("cpu", (size,)), [Shard(0)])
    found = run(ours, inputs | {"c": rows}, 0.05)
    torch.save(found | {"dc": found["dc"].full_tensor()}, f"{folder}/DTensor-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("parallel"))
    torch.multiprocessing.spawn(parallel_worker, args=(2, folder), nprocs=2)
    return folder


@pytest.mark.parametrize("case", PARALLEL)
def test_vocab_parallel_equals_dense(folder, case):
    options, z = PARALLEL[case]
    expected = run(dense, make_parallel_inputs(bias=True), z, **options)
    first, second = (torch.load(f"{folder}/{case}-{rank}.pt") for rank in range(2))
    whole = {k: torch.cat([first[k], second[k]]) for k in ("dc", "dbias")}
    assert_close(first | whole, expected, F64)
    assert_close(second | whole, expected, F64)


def test_dtensor_equals_dense(folder):
    expected = run(dense, make_parallel_inputs(bias=False), 0.05)
    for rank in range(2):
        assert_close(torch.load(f"{folder}/DTensor-{rank}.pt"), expected, F64)


# -- cut-cross-entropy's own code
# -


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("more", [{}, {"softcap": 2.5, "ignore_index": 5}], ids=str)
def test_equals_cce(shape, reduction, shift, more):
    """Its torch_compile implementation, not compiled."""
    theirs = pytest.importorskip("cut_cross_entropy").linear_cross_entropy
    inputs = make_inputs(SHAPES[shape], torch.float32, ignore_index=more.get("ignore_index", -100))
    options = {"reduction": reduction, "shift": shift, "impl": "torch_compile", **more}

    def cce(bias, **given):
        return theirs(**given), torch.zeros(())

    with torch.compiler.set_stance("force_eager"):
        expected = run(cce, inputs, **options)
    found = run(ours, inputs, **options)
    assert {k: x.dtype for k, x in found.items()} == {k: x.dtype for k, x in expected.items()}
    for name in ("loss", "de", "dc"):
        assert error(found[name], expected[name]) <= F32, name


def test_enum_is_accepted():
    impls = pytest.importorskip("cut_cross_entropy").LinearCrossEntropyImpl
    inputs = make_inputs(dtype=torch.float32)
    for impl in impls:
        assert torch.equal(
            linear_cross_entropy(**inputs, impl=impl), linear_cross_entropy(**inputs)
        )


# -- what is refused
# -


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "avg"}, "reduction: expected"),
        ({"shift": 9}, r"shift: expected a bool or an int in \[0, 9\)"),
        ({"shift": -1}, "shift: expected"),
        ({"shift": 1.0}, "shift: expected"),
        ({"filter_eps": "low"}, "filter_eps: expected"),
        ({"filter_eps": True}, "filter_eps: expected"),
        ({"impl": "triton"}, "impl: expected one of"),
        ({"impl": enum.IntEnum("Impl", "OTHER").OTHER}, "impl: expected one of"),
        ({"softcap": 0.0}, "softcap: expected"),
        ({"ignore_index": 0.5}, "ignore_index: expected"),
        (
            {"targets": torch.tensor(3), "e": torch.zeros(D).double()},
            r"targets: expected shape \[..., T\]",
        ),
        ({"targets": torch.full((3, 9), V)}, "target: expected values"),
        ({"targets": torch.zeros(3, 8).long()}, "target: expected shape"),
        ({"targets": torch.zeros(3, 9).int()}, "target: expected torch.int64"),
        ({"c": torch.zeros(V, D)}, "weight: expected torch.float64"),
    ],
    ids=str,
)
def test_bad_input_raises(options, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(make_inputs() | options))


@pytest.mark.parametrize(
    ("change", "raised", "message"),
    [
        ({"group": 0}, ValueError, "group: expected an initialized process group"),
        (
            {"stop": V + 1},
            ValueError,
            rf"vocab_parallel_options: expected stop - start = {V} \(rows of c\)",
        ),
        (
            {"reduce_e_grad": False},
            ValueError,
            "vocab_parallel_options: expected reduce_e_grad=True",
        ),
        (
            None,
            TypeError,
            r"vocab_parallel_options: expected a VocabParallelOptions .* without \['group'\]",
        ),
    ],
    ids=str,
)
def test_bad_vocab_parallel_options_raise(change, raised, message):
    options = {"start": 0, "stop": V} | ({"group": None} | change if change else {})
    with pytest.raises(raised, match=message):
        linear_cross_entropy(**make_inputs(), vocab_parallel_options=SimpleNamespace(**options))


def test_what_is_no_tensor_raises():
    options = SimpleNamespace(start=0, stop=V, group=None)
    with pytest.raises(TypeError, match=r"c: expected a torch\.Tensor"):
        linear_cross_entropy(**(make_inputs() | {"c": None}), vocab_parallel_options=options)
    with pytest.raises(TypeError, match=r"targets: expected a torch\.Tensor"):
        linear_cross_entropy(**(make_inputs() | {"targets": [[0] * 9] * 3}))


def test_the_old_order_of_arguments_is_refused():
    """e, c, targets, ignore_index, ... and, of the module, ignore_index, softcap, reduction,
    filter_eps, shift.
    """
    x = make_inputs()
    with pytest.raises(TypeError, match=r"bias: expected a torch\.Tensor or None, got int"):
        linear_cross_entropy(x["e"], x["c"], x["targets"], -100)
    with pytest.raises(ValueError, match="shift: expected"):
        LinearCrossEntropy(-100, None, "mean", "high", 1)(x["e"], x["c"], x["targets"])
    with pytest.raises(ValueError, match="filter_eps: expected"):
        LinearCrossEntropy(-100, None, "mean", 0, True)(x["e"], x["c"], x["targets"])
