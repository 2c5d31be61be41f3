"""Time of `linear_kl` on a CPU, against dense PyTorch and Liger.

    python benchmarks/bars_kl.py [--rounds 7] [--out benchmarks/results/cpu/linear_kl.json]

N = 2048 rows, D = 512 for both heads, V = 32000, float32, a trainable head, forward and backward;
all take turns in one process. With targets the loss has a log-prob beside each divergence. Liger
gives the mean of the divergences alone: its loss of distillation, without its hard part. The floor
is the four matrix products, and nothing else, into buffers that are there.

Other work on the machine shows in the spread of a ratio and in the load average; less in "one
thread", where the seconds are those in which the process itself was running.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from loss_head_measure import Alternation, environment
from torch import Tensor

from treg.ops import linear_kl, reference

OURS, DENSE, LIGER, FLOOR = "linear_kl", "dense", "liger_jsd", "four bare products"
TARGETS, ROOM = ", with targets", ", with targets, in 1 GiB"
RATIOS = (
    (OURS, DENSE),
    (OURS + TARGETS, DENSE + TARGETS),
    (OURS + ROOM, DENSE + TARGETS),
    (OURS, LIGER),
    (FLOOR, DENSE),
    (FLOOR, OURS),
)


class Sizes(NamedTuple):
    rows: int = 2048
    hidden: int = 512
    vocab: int = 32000


TIMED = Sizes()


class Operands(NamedTuple):
    hidden: Tensor
    weight: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    target: Tensor
    coef: Tensor  # of each log-prob in the loss

    @classmethod
    def of(cls, sizes: Sizes) -> "Operands":
        """Two heads that are not far apart, as after some training."""
        g = torch.Generator().manual_seed(0)
        N, D, V = sizes
        hidden, weight = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g) / 16
        ref_hidden = hidden + torch.randn(N, D, generator=g) / 10
        ref_weight = weight + torch.randn(V, D, generator=g) / 100
        target = torch.randint(V, (N,), generator=g)
        coef = torch.randn(N, generator=g)
        return cls(
            hidden.requires_grad_(), weight.requires_grad_(), ref_hidden, ref_weight, target, coef
        )


def dense(x: Operands, targets: bool) -> Tensor:
    """Logits of both heads, their log-softmaxes, and the sum over all words."""
    with torch.no_grad():
        log_q = (x.ref_hidden @ x.ref_weight.T).log_softmax(-1)
    log_p = (x.hidden @ x.weight.T).log_softmax(-1)
    loss = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    if targets:
        logps = log_p.gather(-1, x.target.unsqueeze(-1)).squeeze(-1)
        loss = loss + (x.coef * logps).sum()
    return loss


def ours(x: Operands, targets: bool, budget: int | None = None) -> Tensor:
    target = x.target if targets else None
    out = linear_kl(*x[:4], target=target, memory_budget=budget)
    return out.kl.mean() + ((x.coef * out.logprobs).sum() if targets else 0.0)


def liger(x: Operands) -> Tensor:
    """Beta 0 makes its divergence the forward one."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False
    )
    return loss(*x[:4], x.target)


def step(loss: Callable[..., Tensor], x: Operands, *options) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward: the loss, dhidden and dweight."""
    found = loss(x, *options)
    return found.detach(), *torch.autograd.grad(found, (x.hidden, x.weight))


def bare_products(x: Operands) -> Callable[[], None]:
    hidden, weight = x.hidden.detach(), x.weight.detach()
    tile = torch.zeros(hidden.shape[0], weight.shape[0])
    dhidden, dweight = torch.zeros_like(hidden), torch.zeros_like(weight)

    def run() -> None:
        torch.mm(x.ref_hidden, x.ref_weight.T, out=tile)
        torch.mm(hidden, weight.T, out=tile)
        torch.mm(tile, weight, out=dhidden)
        torch.mm(tile.T, hidden, out=dweight)

    return run


def alternation(sizes: Sizes = TIMED, clock: Callable[[], float] = time.perf_counter):
    """The calls to time, warm; this project's are first checked against float64."""
    check(Operands.of(sizes._replace(rows=64, vocab=min(sizes.vocab, 4000))))
    x = Operands.of(sizes)
    calls: dict[str, Callable[[], object]] = {
        OURS: lambda: step(ours, x, False),
        DENSE: lambda: step(dense, x, False),
        OURS + TARGETS: lambda: step(ours, x, True),
        OURS + ROOM: lambda: step(ours, x, True, 1 << 30),
        DENSE + TARGETS: lambda: step(dense, x, True),
        FLOOR: bare_products(x),
    }
    try:
        step(liger, Operands.of(sizes._replace(rows=64)))
        calls[LIGER] = lambda: step(liger, x)
    except ImportError:
        pass
    calls[OURS]()
    return Alternation(calls, clock=clock)


def check(x: Operands) -> None:
    """AssertionError where an error is over twice dense PyTorch's and a rounding."""
    wide = Operands(*(t.detach().double() if t.is_floating_point() else t for t in x))
    for t in (wide.hidden, wide.weight):
        t.requires_grad_()
    for targets in (False, True):
        kl = reference.linear_kl(*wide[:4], target=wide.target)
        loss = kl.kl.mean() + ((wide.coef * kl.logprobs).sum() if targets else 0.0)
        exact = (loss, *torch.autograd.grad(loss, (wide.hidden, wide.weight)))
        for a, b, c in zip(step(ours, x, targets), step(dense, x, targets), exact, strict=True):
            allowed = 2 * ((b - c).norm() / c.norm() + torch.finfo(torch.float32).eps)
            assert (a - c).norm() / c.norm() <= allowed, (a - c).norm() / c.norm()


def times(run: Alternation) -> dict[str, object]:
    """Median and best seconds of each call, and this project's over the others'."""
    return {
        "rounds": len(run.seconds[OURS]),
        "median_seconds": {name: run.median(name) for name in run.calls},
        "best_seconds": {name: min(run.seconds[name]) for name in run.calls},
        "ratios": {f"{a} / {b}": run.ratio(a, b) for a, b in RATIOS if {a, b} <= run.calls.keys()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "cpu" / "linear_kl.json"
    )
    args = parser.parse_args()
    load: list[float] = [os.getloadavg()[0]]
    found: dict[str, object] = {"environment": environment()}
    for name, clock in (("time", time.perf_counter), ("one thread", time.process_time)):
        if name == "one thread":
            torch.set_num_threads(1)
        run = alternation(clock=clock)
        for _ in range(args.rounds):
            run.round()
        found[name] = times(run)
        load.append(os.getloadavg()[0])
        print(name, json.dumps(found[name], indent=2), flush=True)
    found["load_average"] = load  # over a minute: before, after each
    args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
