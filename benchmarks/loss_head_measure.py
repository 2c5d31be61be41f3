"""Measuring: errors against float64, peak memory, times in alternating order, and what they were
measured on.
"""

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
from loss_head_methods import loss_of
from loss_head_peers import METHODS, step
from torch import Tensor

from treg.ops import reference

# -- errors

GATED_ROWS = (
    2048 if DEVICE == "cuda" else 1 << 30
)  # of a larger case a sample of rows and tokens is checked
SAMPLED_ROWS, SAMPLED_TOKENS = 1024, 2048
OURS = "treg"


def sample(case: Case) -> tuple[Tensor, Tensor]:
    """Rows of hidden and tokens of the vocabulary whose results are checked: all of a small case.

    Of a larger one random rows, and half random tokens, half targets, whose rows of dweight are its
    largest.
    """
    if case.rows <= GATED_ROWS:
        return torch.arange(case.rows, device=DEVICE), torch.arange(case.vocab, device=DEVICE)
    g = torch.Generator(DEVICE).manual_seed(1)
    rows = torch.randperm(case.rows, generator=g, device=DEVICE)[:SAMPLED_ROWS].sort().values
    target = batch_of(case).target.flatten()
    target = target[target != IGNORE]
    some = target[torch.randperm(len(target), generator=g, device=DEVICE)[: SAMPLED_TOKENS // 2]]
    tokens = torch.randperm(case.vocab, generator=g, device=DEVICE)[: SAMPLED_TOKENS // 2]
    return rows, torch.cat([some, tokens]).unique()


def oracle(case: Case, loss: str) -> dict[str, Tensor]:
    """What a step must give: log-probs and dhidden of the sampled rows, dweight of the sampled
    tokens, in float64.
    """
    return _oracle(replace(case, name="", mode="trainable"), loss)


@functools.lru_cache(maxsize=2)
def _oracle(case: Case, loss: str) -> dict[str, Tensor]:
    b = batch_of(case)
    rows, tokens = sample(case)
    weight, target = b.weight.detach().double(), b.target.flatten()
    hidden = b.hidden.detach().flatten(0, 1)
    mine = hidden[rows].double().requires_grad_()
    logps = (
        b.logprobs.flatten().double()
    )  # those of rows that are not in the sample are from float32
    logps[rows] = chunked_logprobs(mine, weight, target[rows], b.softcap)
    lp = logps.view(b.target.shape).requires_grad_()
    coef = torch.autograd.grad(loss_of(loss, b, lp), lp)[0].flatten()
    for h, y, c in zip(
        *(x.split(chunk_rows(weight)) for x in (mine, target[rows], coef[rows])), strict=True
    ):
        out = reference.linear_logprobs(h, weight, y, softcap=b.softcap, ignore_index=IGNORE)
        out.logprobs.backward(c)
    dweight = torch.zeros(len(tokens), case.hidden, dtype=torch.float64, device=DEVICE)
    for part in torch.arange(case.rows, device=DEVICE).split(chunk_rows(weight)):
        h, y = hidden[part].double(), target[part]
        z, slope = _capped(h @ weight[tokens].T, b.softcap)
        z_y, _ = _capped((h * weight[y.clamp(min=0)]).sum(1), b.softcap)
        p = torch.exp(z - (z_y - logps[part])[:, None])
        g = ((y[:, None] == tokens).double() - p) * slope * coef[part, None]
        dweight.addmm_(g.T, h)
    return {"logprobs": logps[rows], "dhidden": mine.grad, "dweight": dweight}


def _capped(a: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Logits, and their derivative in a."""
    if softcap is None:
        return a, torch.ones_like(a)
    t = torch.tanh(a / softcap)
    return softcap * t, 1 - t * t


@functools.lru_cache(maxsize=8)
def errors(name: str, case: Case) -> dict[str, float]:
    """Relative 2-norm errors of one step's results against float64; of log-probs also absolute
    ones, in nats.

    `rows` and `tokens` say of how many rows log-probs and dhidden, and of how many tokens dweight
    were looked at.
    """
    exact = oracle(case, METHODS[name].loss)
    rows, tokens = sample(case)
    where = {"logprobs": rows, "dhidden": rows, "dweight": tokens}
    result: dict[str, float] = {}
    for what, x in step(METHODS[name], batch_of(case)).items():
        flat = x.flatten() if what == "logprobs" else x.flatten(0, -2)
        gap = flat[where[what]].double() - exact[what]
        result[what] = _short((gap.norm() / exact[what].norm()).item())
        if what == "logprobs":
            scored = (batch_of(case).target.flatten()[rows] != IGNORE).sum()
            result["logprobs_max_nats"] = _short(gap.abs().max().item())
            result["logprobs_rms_nats"] = _short((gap.square().sum() / scored).sqrt().item())
    return {**result, "rows": len(rows), "tokens": len(tokens)} if result else {}


def _short(x: float) -> float:
    return float(f"{x:.3g}")


def checked_errors(name: str, case: Case) -> dict[str, float]:
    """`errors`; AssertionError where this project's own are over 2 * (dense PyTorch's error + one
    rounding).

    Dense PyTorch is `dense_log_softmax` in the case's dtype, over about 2048 of its rows.
    """
    found = errors(name, case)
    if name.startswith(OURS):
        dense = errors(
            "dense_log_softmax", replace(case, pairs=max(1, min(case.pairs, 1024 // case.length)))
        )
        for what in found.keys() & {"logprobs", "dhidden", "dweight"}:
            rounding = torch.finfo(torch.float32 if what == "logprobs" else case.dtype).eps / 2
            allowed = 2 * (dense[what] + rounding)
            message = f"{what} has a relative error of {found[what]:.2e} > {allowed:.2e}"
            assert found[what] <= allowed, f"{name}, {case.name}: {message}"
    return found


# -- memory


def peak_bytes(run: Callable[[], object]) -> int | None:
    """Most memory that run held at a time beyond what was held before, its results included.

    On a GPU what the allocator handed out; on a CPU resident memory; None where the system cannot
    tell.
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
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # the high-water mark starts again at what is resident
    except OSError:
        return None
    before = _resident("VmHWM")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) << 10 for x in lines if x.startswith(field))


# -- time


class Alternation:
    """Calls timed in one process, each once a round, every other round in reverse, so that drift
    hits all alike.

    Back to back without a pause, which leaves a GPU hot and maybe throttled; with one the device is
    idle before each call, and cool. On a GPU by events, which are read when `seconds` is. On a CPU
    the time in which the process itself ran, of all its threads, is kept beside: `cpu_seconds`.
    """

    def __init__(
        self,
        calls: dict[str, Callable[[], object]],
        pause: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """clock: of a CPU; with `time.process_time` and one thread other work hardly counts."""
        self.calls, self.pause, self.clock = calls, pause, clock
        self._seconds: dict[str, list[float]] = {name: [] for name in calls}
        self.cpu_seconds: dict[str, list[float]] = {name: [] for name in calls}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._order = list(calls)

    def round(self) -> None:
        for name in self._order:
            if self.pause:
                synchronize()
                time.sleep(self.pause)
            if DEVICE == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                self.calls[name]()
                end.record()
                self._events.append((name, start, end))
            else:
                began, ran = self.clock(), time.process_time()
                self.calls[name]()
                self._seconds[name].append(self.clock() - began)
                self.cpu_seconds[name].append(time.process_time() - ran)
        self._order.reverse()

    def drop(self, name: str) -> None:
        """From the next round on without this call; its times so far are forgotten."""
        self._order.remove(name)
        del self._seconds[name], self.cpu_seconds[name]
        self._events = [event for event in self._events if event[0] != name]

    @property
    def seconds(self) -> dict[str, list[float]]:
        """Of each call, in the order of the rounds."""
        if self._events:
            synchronize()
            for name, start, end in self._events:
                self._seconds[name].append(start.elapsed_time(end) / 1e3)
            self._events.clear()
        return self._seconds

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, a: str, b: str) -> dict[str, float]:
        """Median over median, and the least and the greatest quotient within a round."""
        return ratio_of(self.seconds[a], self.seconds[b])


def ratio_of(a: list[float], b: list[float]) -> dict[str, float]:
    """Median over median, and the least and the greatest quotient within a round."""
    quotients = [x / y for x, y in zip(a, b, strict=True)]
    return {
        "ratio": statistics.median(a) / statistics.median(b),
        "least": min(quotients),
        "greatest": max(quotients),
    }


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


# -- surroundings

PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "trl", "transformers")
GPU_PACKAGES = ("quack-kernels", "verl", "nvidia-cutlass-dsl", "apache-tvm-ffi")


def environment() -> dict[str, object]:
    """Device, threads as they are now, versions and commit."""
    return {**_environment(), "threads": torch.get_num_threads()}


@functools.cache
def _environment() -> dict[str, object]:
    packages = PACKAGES + GPU_PACKAGES * (DEVICE == "cuda")
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else _cpu_model(),
        **(
            {
                "driver": _output(
                    "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
                ),
                "cuda": torch.version.cuda or torch.version.hip,
            }
            if DEVICE == "cuda"
            else {}
        ),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name))},
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"),
    }


def ceilings() -> dict[str, float]:
    """What the GPU reaches here: a large bfloat16 product, and a copy counting bytes read and
    written.
    """
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(256, (1 << 31,), device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(source)
    run = Alternation({"product": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)})
    for _ in range(13):
        run.round()
    product, copy = (statistics.median(run.seconds[name][3:]) for name in ("product", "copy"))
    return {
        "matmul_tflops": 2 * 8192**3 / product / 1e12,
        "copy_gb_per_s": 2 * source.numel() / copy / 1e9,
    }


def _output(*command: str) -> str | None:
    """What a command prints, or None where there is none such or nothing."""
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return found.stdout.strip().partition("\n")[0] or None


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
