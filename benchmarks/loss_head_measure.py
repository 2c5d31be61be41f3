"""Measuring: errors against float64, peak memory, times in alternating order, and what they were measured on."""

import ctypes
import functools
import gc
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from loss_head_cases import DEVICE, IGNORE, Case, batch_of, chunk_rows, chunked_logprobs
from loss_head_peers import METHODS, step
from torch import Tensor

from treg import reference
from treg.losses import LossOptions, treg_loss

# -- errors ------------------------------------------------------------------------------------------------------


def oracle(case: Case, plain_dpo: bool = False) -> dict[str, Tensor]:
    """Exact log-probs and gradients: the dense specification in float64, a few rows at a time."""
    return _oracle(replace(case, name="", dtype=torch.float64, mode="trainable"), plain_dpo)


@functools.lru_cache(maxsize=2)
def _oracle(case: Case, plain_dpo: bool) -> dict[str, Tensor]:
    b = batch_of(case)
    hidden, weight = (x.detach().requires_grad_() for x in (b.hidden, b.weight))
    logps = chunked_logprobs(hidden, weight, b.target, b.softcap)
    lp = logps.clone().requires_grad_()
    ref = torch.zeros_like(b.ref_logps) if plain_dpo else b.ref_logps
    options = LossOptions(alpha=0.0) if plain_dpo else LossOptions()
    loss = treg_loss(lp, b.token_rewards, ref, options, mask=b.target != IGNORE).loss.mean()
    (coef,) = torch.autograd.grad(loss, lp)
    pieces = (x.flatten(0, 1).split(chunk_rows(weight)) for x in (hidden, b.target[..., None], coef[..., None]))
    for h, y, c in zip(*pieces, strict=True):
        out = reference.linear_logprobs(h, weight, y[:, 0], softcap=b.softcap, ignore_index=IGNORE)
        out.logprobs.backward(c[:, 0])
    return {"logprobs": logps, "dhidden": hidden.grad, "dweight": weight.grad}


@functools.lru_cache(maxsize=8)
def errors(name: str, case: Case) -> dict[str, float]:
    """Relative 2-norm errors of one step's results against float64; of log-probs also the largest, in nats."""
    exact = oracle(case, METHODS[name].plain_dpo)
    found = {n: x.double() for n, x in step(METHODS[name], batch_of(case)).items()}
    result = {n: ((x - exact[n]).norm() / exact[n].norm()).item() for n, x in found.items()}
    if "logprobs" in found:
        result["logprobs_max_nats"] = (found["logprobs"] - exact["logprobs"]).abs().max().item()
    return result


def checked_errors(name: str, case: Case) -> dict[str, float]:
    """`errors`; AssertionError where this project's own are over 2 * (dense PyTorch's error + one rounding).

    Dense PyTorch is `dense_log_softmax` in the case's dtype, over at most 4096 of its rows.
    """
    found = errors(name, case)
    if name.startswith("treg"):
        dense = errors("dense_log_softmax", replace(case, pairs=max(1, min(case.pairs, 2048 // case.length))))
        for what in found.keys() - {"logprobs_max_nats"}:
            rounding = torch.finfo(torch.float32 if what == "logprobs" else case.dtype).eps / 2
            allowed = 2 * (dense[what] + rounding)
            message = f"{name}, {case.name}: {what} has a relative error of {found[what]:.2e} > {allowed:.2e}"
            assert found[what] <= allowed, message
    return found


# -- memory ------------------------------------------------------------------------------------------------------


def peak_bytes(run: Callable[[], object]) -> int | None:
    """Most memory that run held at a time beyond what was held before, its results included.

    On a GPU what the allocator handed out; on a CPU resident memory; None where the system cannot tell.
    """
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is resident
    except OSError:
        return None
    before = _resident("VmHWM")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) << 10 for x in lines if x.startswith(field))


# -- time --------------------------------------------------------------------------------------------------------


class Alternation:
    """Calls timed in one process, each once a round, every other round in reverse, so that drift hits all alike."""

    def __init__(self, calls: dict[str, Callable[[], object]]):
        self.calls = calls
        self.seconds: dict[str, list[float]] = {name: [] for name in calls}
        self._order = list(calls)

    def round(self) -> None:
        for name in self._order:
            start = time.perf_counter()
            self.calls[name]()
            self.seconds[name].append(time.perf_counter() - start)
        self._order.reverse()

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, a: str, b: str) -> dict[str, float]:
        """Median over median, and the least and the greatest quotient within a round."""
        quotients = [x / y for x, y in zip(self.seconds[a], self.seconds[b], strict=True)]
        return {"ratio": self.median(a) / self.median(b), "least": min(quotients), "greatest": max(quotients)}


# -- surroundings ------------------------------------------------------------------------------------------------


@functools.cache
def environment() -> dict[str, object]:
    """Device, threads, versions and commit."""
    packages = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "trl", "transformers")
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else _cpu_model(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name))},
        "commit": commit.stdout.strip() or None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
