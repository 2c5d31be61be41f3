"""Calls of a vocabulary-parallel head, shared by test_vocab_parallel.py and the processes that it
starts.

TRITON_INTERPRET=1 torchrun --nproc_per_node R tests/support/vocab_parallel_worker.py DIR

Each rank leaves what it got in DIR/R-rank.pt. Tensors are on the CPU, on a machine with a GPU too.
"""

import contextlib
import dataclasses
import faulthandler
import sys
import warnings
import zlib
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers import Case
from looks import patch_looks
from torch.utils.flop_counter import FlopCounterMode

import treg.ops
import treg.ops.head.memory
import treg.ops.plans.vocab_parallel
from treg.ops import VocabShard, fused_treg_loss, linear_logprobs
from treg.ops.head import Head, make_tiles

SIZES = {2: (23, 14), 3: (20, 10, 7)}  # rows of the weight on each rank
OUTPUTS = ("lse", "entropy", "mean_logit", "log_sum_sq_probs")
HEAD = {"softcap": 3.0, "logit_scale": 1.7, "temperature": 1.3}
N, D = 40, 24


@dataclasses.dataclass(frozen=True)
class Call:
    """One call on all ranks. sizes: None for SIZES."""

    head: dict = dataclasses.field(default_factory=dict)
    impl: str = "torch"
    dtype: torch.dtype = torch.float32
    bias: bool = False
    target: str = "random"
    needs: tuple[str, ...] = ("hidden", "weight", "bias")
    rows: int | None = None  # rows of stash that memory_budget holds
    kept: str = "all"  # "all", "some", "none": what is to be kept of them
    outputs: tuple[str, ...] = ()
    blind: bool = False  # nobody may look at values, as on a GPU
    loss: dict | None = None  # arguments of fused_treg_loss; None: linear_logprobs
    dtensor: bool = False
    sizes: dict[int, tuple[int, ...]] | None = None

    def parts(self, world: int) -> tuple[int, ...]:
        return (self.sizes or SIZES)[world]


CHUNKS = {2: (19, 18), 3: (13, 13, 11)}  # 37 rows as torch.chunk parts them
ANY = {
    "plain": Call(),
    "every option and output": Call(HEAD, bias=True, outputs=OUTPUTS),
    "some kept": Call(HEAD, bias=True, rows=22, kept="some"),
    "none kept": Call(HEAD, bias=True, rows=2, kept="none"),
    "not looked at": Call(HEAD, bias=True, blind=True, outputs=OUTPUTS),
    "not looked at, some kept": Call(bias=True, blind=True, rows=24, kept="some"),
    "bfloat16": Call(bias=True, dtype=torch.bfloat16),
    "bfloat16, some kept": Call(HEAD, bias=True, dtype=torch.bfloat16, rows=22, kept="some"),
    "float16": Call(bias=True, dtype=torch.float16, kept="none"),
    "targets on the last rank": Call(target="last rank", outputs=OUTPUTS),
    "targets on the first rank": Call(HEAD, target="first rank", bias=True),
    "nearly certain": Call(target="certain"),
    "far apart": Call(target="far"),
    "frozen head": Call(HEAD, bias=True, needs=("hidden",)),
    "frozen hidden": Call(HEAD, bias=True, needs=("weight", "bias")),
    "bias alone": Call(bias=True, needs=("bias",)),
    "forward only": Call(outputs=OUTPUTS, needs=(), kept="none"),
    "ignored all": Call(target="ignored"),
    "ignored token": Call({"ignore_index": 5}, rows=22, kept="some"),
    "ignored minus two": Call({"ignore_index": -2}, bias=True, blind=True, rows=24, kept="some"),
    "one token a rank": Call(sizes={2: (1, 1), 3: (1, 1, 1)}),
    "dpo": Call(loss={}, outputs=OUTPUTS),
}
# beside a norm of 1500 nats, float32 has not the accuracy that the others are held to
FAR = "far apart, none kept"
TORCH = {
    "float64": Call(HEAD, bias=True, dtype=torch.float64, outputs=OUTPUTS),
    "DTensor": Call(HEAD, bias=True, dtensor=True, sizes=CHUNKS),
    "DTensor, bfloat16": Call(dtensor=True, dtype=torch.bfloat16, sizes=CHUNKS),
    "DTensor, dpo": Call(dtensor=True, loss={}, sizes=CHUNKS),
    "simpo": Call(loss={"loss_type": "simpo", "gamma": 0.3}, bias=True),
    "orpo": Call(loss={"loss_type": "orpo"}, rows=22, kept="some"),
    "apo_zero": Call(HEAD, loss={"loss_type": "apo_zero", "reduction": "none"}),
    "ipo, frozen head": Call(loss={"loss_type": "ipo", "alpha": 0.0}, needs=("hidden",)),
}
ANY[FAR] = Call(target="far", rows=2, kept="none")
# each word of the first rank has a logit of -inf
FORBIDDEN = {"bias": True, "target": "forbidden", "outputs": ("lse", "entropy", "log_sum_sq_probs")}
ANY["forbidden"] = Call(**FORBIDDEN)
ANY["forbidden, not looked at"] = Call({"temperature": 0.7}, blind=True, **FORBIDDEN)
ANY["forbidden, none kept"] = Call(rows=2, kept="none", **FORBIDDEN)
ANY["common offset"] = Call(target="offset", rows=2, kept="none")
CALLS = {
    f"{impl}: {name}": dataclasses.replace(call, impl=impl)
    for impl, calls in (("torch", ANY | TORCH), ("triton", ANY))
    for name, call in calls.items()
}
LENGTHS = (12, 9, 11, 8)  # tokens of two pairs


def case_of(name: str, world: int) -> Case:
    """The whole head's case, the same in every process. Some rows are ignored."""
    call = CALLS[name]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {world}".encode()))

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    sizes = call.parts(world)
    V = sum(sizes)
    low, high = {
        "last rank": (V - sizes[-1], V),
        "first rank": (0, sizes[0]),
        "forbidden": (sizes[0] + 1, V),
    }.get(call.target, (0, V))
    target = torch.randint(low, high, (N,), generator=generator)
    hidden, weight = randn(N, D), randn(V, D) * 0.3
    if call.target in (
        "certain",
        "far",
    ):  # one token of each row is 4 to 30 nats above, or 50 to 1500
        rows = D if call.target == "certain" else V  # of which each has its own
        target = torch.where(torch.arange(N) < rows, torch.arange(N) * 7 % V, -100)
        hidden = torch.eye(N, D) if call.target == "certain" else hidden
        top = target if call.target == "certain" else (target + V // 2) % V
        peaks = torch.linspace(*((4, 30) if call.target == "certain" else (50, 1500)), rows)
        weight = weight * 0.01
        for t in range(rows):
            weight[top[t]] += peaks[t] * hidden[t] / hidden[t].square().sum()
    if call.target == "offset":  # all logits of a row are near -10000
        hidden[:, 0], weight[:, 0] = -100.0, 100.0
    target[:: 1 if call.target == "ignored" else 6] = call.head.get("ignore_index", -100)
    rest = {"target": target, "outputs": call.outputs, **call.head}
    if call.loss is not None:

        def rand(n):
            return torch.rand(n, generator=generator)

        rest |= {
            "token_rewards": rand(N) - 0.5,
            "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).int(),
            **call.loss,
        }
        if call.loss.get("loss_type") not in ("simpo", "orpo"):
            rest["ref_logps"] = -3 * torch.tensor(LENGTHS) * rand(len(LENGTHS))
    bias = randn(V) if call.bias else None
    if call.target == "forbidden":
        assert bias is not None
        bias[: sizes[0] + 1] = -float("inf")
    return Case(hidden, weight, bias, rest)


def upstream(out):
    """A different upstream gradient for every token; a loss as it is."""
    if not hasattr(out, "logprobs"):
        return (out.loss * torch.linspace(1.7, -0.4, out.loss.numel()).squeeze()).sum()
    return (out.logprobs * torch.linspace(-1.0, 2.0, N, dtype=out.logprobs.dtype)).sum()


def only(fn, needs):
    """fn, with the operands that need no gradient cut off."""

    def run(hidden, weight, bias=None, **kwargs):
        given = {"hidden": hidden, "weight": weight, "bias": bias}
        given = {k: x if x is None or k in needs else x.detach() for k, x in given.items()}
        return fn(**given, **kwargs)

    return run


class Watch:
    """Collectives of this process, and rows kept of those scored, while it is entered."""

    def __enter__(self):
        self.gathers, self.sums, self.kept = [], [], []
        self.stack = contextlib.ExitStack()

        def spy(owner, name, note):
            fn = getattr(owner, name)

            def run(*args, **kwargs):
                result = fn(*args, **kwargs)
                note(result, args)
                return result

            self.stack.enter_context(mock.patch.object(owner, name, run))

        spy(dist, "all_gather", lambda _, args: self.gathers.append(args[1].numel()))
        spy(dist, "all_reduce", lambda _, args: self.sums.append((args[0].numel(), args[0].dtype)))
        spy(treg.ops.plans.vocab_parallel, "score_rows", self._note_kept)
        return self

    def _note_kept(self, _, args):
        batch, _, stash = args
        self.kept.append((0 if stash is None else stash.shape[0], len(batch.rows)))

    def __exit__(self, *_):
        self.stack.close()


def budget_of(call: Call, case: Case) -> int | None:
    if call.rows is None:
        return None
    head = Head(case.weight.detach(), case.bias, softcap=call.head.get("softcap"))
    tiles = make_tiles(call.impl, head, None)
    return tiles.fixed_bytes + call.rows * tiles.row_bytes(stash=True)


def run(name: str) -> dict:
    """What this rank gets: outputs, gradients, collectives, rows kept, matrix products of its own
    part.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    call, whole = CALLS[name], case_of(name, world)
    if call.target == "forbidden":
        whole.hidden[whole.rest["target"] == -100] = float("nan")
    sizes = call.parts(world)
    start = sum(sizes[:rank])

    def part(x):
        return None if x is None else x[start : start + sizes[rank]]

    options = {"impl": call.impl}
    if call.dtensor:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (world,))
        case = whole.at(call.dtype)
        case.weight, case.bias = (
            None if x is None else distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_()
            for x in (case.weight, case.bias)
        )
        case.hidden = distribute_tensor(case.hidden.detach(), mesh, [Replicate()]).requires_grad_()
    else:
        case = dataclasses.replace(whole, weight=part(whole.weight), bias=part(whole.bias)).at(
            call.dtype
        )
        options["shard"] = VocabShard(start, dist.group.WORLD)
        options["memory_budget"] = budget_of(call, case)
    fn = only(linear_logprobs if call.loss is None else fused_treg_loss, call.needs)
    grad = contextlib.nullcontext() if call.needs else torch.no_grad()
    patches = pytest.MonkeyPatch.context()
    with patches as patch, grad, Watch() as watch, FlopCounterMode(display=False) as counter:
        patch_looks(patch, lambda x: not call.blind)
        if call.needs:
            found = case.run(fn, upstream, **options)
        else:
            out = fn(case.hidden, case.weight, bias=case.bias, **case.rest, **options)
            found = {k: x for k, x in out._asdict().items() if x is not None}
    for key, leaf in {"dhidden": case.hidden, "dweight": case.weight, "dbias": case.bias}.items():
        if call.dtensor and key in found:
            assert found[key].placements == leaf.placements, key
            assert found[key].full_tensor().shape == leaf.shape, key
            found[key] = found[key].to_local()
    products = counter.get_total_flops() / (2 * D * sizes[rank])  # in rows
    return {
        "found": found,
        "gathers": watch.gathers,
        "sums": watch.sums,
        "kept": watch.kept,
        "products": products,
    }


def message(error, fn, *args, **kwargs) -> str:
    """What the error says that every rank raises."""
    try:
        fn(*args, **kwargs)
    except error as caught:
        return str(caught)
    return "nothing was raised"


def refused() -> dict[str, str]:
    """Errors by name; no rank may wait for another in any of them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    rank, world = dist.get_rank(), dist.get_world_size()
    V = 5 * world
    h, w, y = torch.ones(4, 3), torch.ones(5, 3), torch.tensor([0, 3, V - 1, -100])
    shard = VocabShard.even(w, dist.group.WORLD)
    assert shard.start == rank * 5 and VocabShard.even(w).start == rank * 5

    def call(error=ValueError, weight=w, target=y, hidden=h, **options):
        return message(error, linear_logprobs, hidden, weight, target, **{"shard": shard} | options)

    mesh, square = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (world, 1))
    whole, parts = torch.ones(V, 3), [2, 3, 20][-world:]
    other = dist.new_group([0])
    found = {
        "outputs": call(outputs=("lse", "is_top1")),
        "negative target": call(target=torch.tensor([0, 3, -2, -100])),
        "target on no rank": call(target=torch.tensor([0, 3, V, -100])),
        "overlap": call(shard=VocabShard(0, dist.group.WORLD), target=torch.tensor([0, 0, 0, 1])),
        "gap": call(
            shard=VocabShard(6 * rank, dist.group.WORLD), target=torch.tensor([0, 0, 0, 1])
        ),
        "other targets": call(target=torch.tensor([0, rank, 3, 4])),
        "shard": call(TypeError, shard=5),
        "start": message(ValueError, VocabShard, -1, dist.group.WORLD),
        "group": message(ValueError, VocabShard, 0, "world"),
        "foreign group": message(ValueError, VocabShard, 0, other) if rank else "",
        "Shard(1)": call(
            weight=distribute_tensor(torch.ones(V, 3 * world), mesh, [Shard(1)]), shard=None
        ),
        "Partial": call(weight=DTensor.from_local(whole, mesh, [Partial()]), shard=None),
        "two dimensions": call(
            weight=distribute_tensor(whole, square, [Shard(0), Replicate()]), shard=None
        ),
        "hidden": call(hidden=distribute_tensor(torch.ones(4 * world, 3), mesh, [Shard(0)])),
        "shard and DTensor": call(weight=distribute_tensor(whole, mesh, [Shard(0)])),
        "bias alone": call(shard=None, bias=distribute_tensor(torch.ones(V), mesh, [Shard(0)])),
        "empty part": call(
            weight=distribute_tensor(
                torch.ones(world + 2 - world % 2, 3)[: 2 * world - 2], mesh, [Shard(0)]
            ),
            shard=None,
        )
        if world == 3
        else "",
        "other parts": call(
            weight=DTensor.from_local(
                torch.ones(parts[rank], 3),
                mesh,
                [Shard(0)],
                run_check=False,
                shape=(sum(parts), 3),
                stride=(3, 1),
            ),
            shard=None,
        ),
    }
    return found


def not_a_number() -> dict[str, torch.Tensor]:
    """Where values are not looked at (a GPU), impossible and differing targets give NaN, and only
    there.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    V, found = 5 * world, {}
    for impl in ("torch", "triton"):
        for looked in ("none", "differ"):
            torch.manual_seed(0)
            h, w = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
            y = torch.tensor([1, V, 3, -100] if looked == "none" else [1, rank, 3, -100])
            with mock.patch.object(
                treg.ops.plans.vocab_parallel, "values_visible", lambda x: False
            ):
                out = linear_logprobs(h, w, y, shard=VocabShard.even(w), impl=impl, outputs=OUTPUTS)
            out.logprobs.sum().backward()
            key = f"{impl} {looked}"
            found |= {f"{key} {k}": x.detach() for k, x in out._asdict().items() if x is not None}
            found |= {f"{key} dhidden": h.grad, f"{key} dweight": w.grad}
    return found


def replicated() -> dict[str, torch.Tensor]:
    """A weight that is whole on every rank is one process's, gradient included."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = case_of("torch: plain", dist.get_world_size()).at(torch.float32)
    w = distribute_tensor(whole.weight.detach(), mesh, [Replicate()]).requires_grad_()
    with Watch() as watch:
        logprobs = linear_logprobs(whole.hidden, w, whole.rest["target"]).logprobs
        upstream(treg.ops.LinearLogprobs(logprobs)).backward()
    assert not watch.gathers and not watch.sums and w.grad.placements == w.placements
    return {
        "logprobs": logprobs.detach(),
        "dweight": w.grad.to_local(),
        "dhidden": whole.hidden.grad,
    }


def twice() -> list[list[torch.Tensor]]:
    """Gradients of two backwards through one graph, and of a third through log-probs used twice."""
    rank, world = dist.get_rank(), dist.get_world_size()
    whole, sizes = case_of("torch: plain", world), SIZES[world]
    start = sum(sizes[:rank])
    case = dataclasses.replace(whole, weight=whole.weight[start : start + sizes[rank]]).at(
        torch.float32
    )
    out = linear_logprobs(case.hidden, case.weight, case.rest["target"], shard=VocabShard(start))
    leaves = (case.hidden, case.weight)
    return [
        list(torch.autograd.grad(loss, leaves, retain_graph=True))
        for loss in (upstream(out), upstream(out), upstream(out) + upstream(out))
    ]


def autocast() -> dict[str, torch.Tensor]:
    """float32 leaves under bfloat16 autocast."""
    rank, world = dist.get_rank(), dist.get_world_size()
    whole, sizes = case_of("torch: bfloat16", world), SIZES[world]
    start = sum(sizes[:rank])
    case = dataclasses.replace(
        whole,
        weight=whole.weight[start : start + sizes[rank]],
        bias=whole.bias[start : start + sizes[rank]],
    ).at(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprobs(
            case.hidden, case.weight, case.rest["target"], bias=case.bias, shard=VocabShard(start)
        )
    upstream(out).backward()
    return {
        "logprobs": out.logprobs.detach(),
        "dhidden": case.hidden.grad,
        "dweight": case.weight.grad,
    }


def no_rows() -> tuple:
    hidden, weight = torch.ones(0, 3, requires_grad=True), torch.ones(5, 3, requires_grad=True)
    out = linear_logprobs(
        hidden, weight, torch.zeros(0, dtype=torch.int64), shard=VocabShard.even(weight)
    )
    out.logprobs.sum().backward()
    return tuple(out.logprobs.shape), weight.grad


def main(folder: Path) -> None:
    import interpreter_bf16

    interpreter_bf16.install()
    warnings.filterwarnings(
        "ignore", ".*encountered in.*", RuntimeWarning
    )  # of lanes that a kernel masks out
    treg.ops.head.memory.PASS_ROWS = {"cpu": 2}  # few rows are worth keeping already
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    results = {name: run(name) for name in CALLS}
    for fn in (refused, not_a_number, replicated, twice, autocast, no_rows):
        results[fn.__name__] = fn()
    torch.save(results, folder / f"{world}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(280, exit=True)  # before the test loses patience
    main(Path(sys.argv[1]))
