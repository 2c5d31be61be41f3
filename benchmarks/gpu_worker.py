"""The process of `gpu_run.py` that touches the GPU: a job a line on its input, what it does and
finds on its output.

    {"do": "environment"} or {"do": "cell", "name": ..., "excluded": {...}}        in
    {"at": method} ... {"result": {...}}                                           out

It ends when its input does, with its parent, or at an exception: then the GPU may be unusable for
what comes next.
"""

import ctypes
import json
import os
import signal
import sys
from contextlib import suppress

import torch
from loss_head_cases import CASES, DEVICE, gpu_cases, tiny
from loss_head_cell import measure_cell, summary
from loss_head_measure import ceilings, environment


def small_step() -> None:
    """A fused and a composed step on odd shapes, for tools that watch memory accesses."""
    from treg.ops import fused_treg_loss, linear_logprobs

    torch.manual_seed(0)
    for softcap in (None, 30.0):
        hidden = torch.randn(4, 37, 136, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(517, 136, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        target = torch.randint(517, (4, 37), device=DEVICE)
        target[:, :9] = -100
        rewards, ref = torch.rand(4, 37, device=DEVICE) - 0.5, torch.zeros(4, device=DEVICE)
        loss = fused_treg_loss(hidden, weight, target, rewards, ref, softcap=softcap).loss
        loss = loss + linear_logprobs(hidden, weight, target, softcap=softcap).logprobs.mean()
        for gradient in torch.autograd.grad(loss, (hidden, weight)):
            assert gradient.isfinite().all()


def cells(small: bool) -> list:
    """The cells to measure, in order; small: the whole matrix, each with hardly any work."""
    return [tiny(case) for case in gpu_cases()] if small else CASES


def main() -> None:
    if "--small-step" in sys.argv:
        small_step()
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    by_name = {case.name: case for case in cells("--tiny" in sys.argv)}

    def say(**message) -> None:
        print(json.dumps(message), file=out)

    for line in sys.stdin:
        job = json.loads(line)
        if job["do"] == "environment":
            found = {
                "environment": environment(),
                "ceilings": ceilings() if DEVICE == "cuda" else None,
            }
        else:
            found = measure_cell(by_name[job["name"]], job["excluded"], lambda name: say(at=name))
            for method in found["methods"].values():
                method.update(
                    {kind: summary(method[kind]) for kind in ("hot", "cool") if kind in method}
                )
        say(result=found)


if __name__ == "__main__":
    main()
