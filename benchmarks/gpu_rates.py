"""How fast a GPU is and how near the kernels come: the vendor's products at real shapes, each
kernel beside the bare product of its shape, and where a step of few rows spends its time.

    rate       2 N D V / time, TFLOP/s: of a kernel's whole launch sequence, epilogue included
    ratio      the bare product's median over the kernel's, timed in turns, hot

A kernel is timed with the tile that `configs` gives, and then in every other form that is a
candidate with the same shape: tiles are data, so a form that a field of `configs.Tile` selects is
timed like any other. A form's results are compared with those of the first ("off" says by how much
they differ); one that raises is recorded as failed, and the others go on.
"""

import statistics
import time
from collections.abc import Callable

import torch
import tune_tiles
from loss_head_cases import DEVICE, HEADS, Case, batch_of, blank_batch
from loss_head_measure import Alternation, synchronize
from loss_head_methods import OWN, step

from treg_kernels import configs
from treg_kernels.configs import Tile

ROWS, ROUNDS = 4096, 7
HOST_ROWS = (128, 512, 2048)
ODD = {128256: 128257}  # a head with one added word, whose rows are not aligned


def head_of(name: str, tiny: bool) -> tuple[int, int, float | None]:
    """D, V, softcap."""
    D, V, cap = HEADS[name]
    return (64, 264, cap) if tiny else (D, V, cap)


def seconds(calls: dict[str, Callable], rounds: int = ROUNDS, warm: int = 2) -> dict[str, float]:
    """Medians of calls in turns."""
    run = Alternation(calls)
    for _ in range(rounds + warm):
        run.round()
    return {name: statistics.median(times[warm:]) for name, times in run.seconds.items()}


# -- ceilings


def product_rates(tiny: bool, at: Callable[[str], None]) -> dict:
    """TFLOP/s of [4096, D] x [D, V] of every head, with a bfloat16 and a float32 result."""
    found = {}
    rows = 32 if tiny else ROWS
    for name in HEADS:
        at(name)
        D, V, _ = head_of(name, tiny)
        times = seconds(_products(rows, D, V))
        found[name] = {kind: _rate(rows, D, V, x) for kind, x in times.items()}
    return found


def _products(rows: int, D: int, V: int) -> dict[str, Callable]:
    hidden, weight = _normal(rows, D), _normal(V, D).T
    calls = {"bfloat16": lambda: torch.mm(hidden, weight)}
    if DEVICE == "cuda":
        out = torch.empty(rows, V, device=DEVICE)
        calls["float32"] = lambda: torch.mm(hidden, weight, out_dtype=torch.float32, out=out)
    return calls


def _normal(*size: int) -> torch.Tensor:
    return torch.randn(size, device=DEVICE).bfloat16()


def _rate(N: int, D: int, V: int, x: float) -> float:
    return float(f"{2e-12 * N * D * V / x:.4g}")


# -- kernels


def forms(kind: str, N: int, D: int, V: int) -> dict[str, Tile]:
    """The tile of a launch, and candidates of the same shape in another form, by what differs."""
    tile = configs.tile_for(kind, tune_tiles.DTYPE, N, V, D)
    found = {"": tile}
    for other in configs.CANDIDATES[configs.architecture()]:
        differs = [name for name in Tile._fields if getattr(tile, name) != getattr(other, name)]
        if differs and not set(differs) & {"n", "v", "d", "warps", "stages"}:
            found[", ".join(f"{name}={getattr(other, name)}" for name in differs)] = other
    return found


def kernel_rates(
    name: str,
    tiny: bool,
    at: Callable[[str], None],
    part: Callable[[dict], None] = lambda found: None,
) -> dict:
    """{"kinds": {kind: {"mm_tflops", "ms", "tflops", "ratio", "tile", "forms": {...}}}, ...} of a
    head.

    part: is given what is known after every form. Raises where the GPU is unusable after one.
    """
    D, V, cap = head_of(name, tiny)
    N = 40 if tiny else ROWS
    x, scalars = tune_tiles.inputs(N, D, V, cap)
    found = {"rows": N, "hidden": D, "vocab": V, "softcap": cap, "kinds": {}}

    def timed(run: Callable) -> dict[str, float]:
        product = lambda: torch.mm(x["hidden"], x["weight"].T, out=x["out"])  # noqa: E731
        times = seconds({"run": run, "mm": product}, *(1, 1) if tiny else ())
        return {
            "ms": float(f"{1e3 * times['run']:.4g}"),
            "tflops": _rate(N, D, V, times["run"]),
            "ratio": float(f"{times['mm'] / times['run']:.4g}"),
            "mm_tflops": _rate(N, D, V, times["mm"]),
        }

    for kind in configs.KINDS:
        at(f"{name} {kind}")
        tiles = forms(kind, N, D, V)
        run = tune_tiles.call(kind, tiles[""], x, scalars)
        rate = {**timed(run), "tile": tiles.pop("")._asdict(), "forms": {}}
        found["kinds"][kind] = rate
        part(found)
        exact = tune_tiles.results(run, x) if tiles else {}
        for form, tile in tiles.items():
            at(f"{name} {kind} {form}")
            run = tune_tiles.call(kind, tile, x, scalars)
            try:
                off = tune_tiles.off(tune_tiles.results(run, x), exact)
                rate["forms"][form] = {**timed(run), **({"off": off} if off else {})}
            except Exception as e:
                rate["forms"][form] = {"failed": f"{type(e).__name__}: {e}"[:300]}
                synchronize()
            part(found)
    return found


def launch(name: str, tiny: bool) -> dict[str, str]:
    """One launch of every form of a head's kernels, and what did not compile or run."""
    D, V, cap = head_of(name, tiny)
    N = 40 if tiny else ROWS
    x, scalars = tune_tiles.inputs(N, D, V, cap)
    wrong = {}
    for kind in configs.KINDS:
        for form, tile in forms(kind, N, D, V).items():
            try:
                tune_tiles.call(kind, tile, x, scalars)()
            except Exception as e:
                wrong[f"{kind} {form}"] = f"{type(e).__name__}: {e}"[:300]
                synchronize()
    return wrong


# -- the host


def host_case(N: int, V: int, tiny: bool) -> Case:
    D = HEADS["llama-3-8b"][0]
    case = Case("", 1, N // 2, D, V, torch.bfloat16, "trainable")
    return case if not tiny else Case("", 1, 8, 32, 97, torch.float32, "trainable")


def host(
    N: int, V: int, tiny: bool, launch_only: bool, rounds: int = 30
) -> dict[str, dict[str, float]]:
    """Milliseconds of a step, forward and backward, by method; medians.

    wall      from an idle GPU until it is idle again
    returns   until the call returns
    events    between two events on the stream, of steps that follow each other
    busy      the sum of the GPU's own times of all kernels, by the profiler; None where it has none

    The host is what a step waits for where wall is more than busy.
    """
    case = host_case(N, V, tiny)
    names = ("treg_fused", "treg_logprobs", "gemm_3")
    names = tuple(name for name in names if OWN[name].applies_to(case))
    batch = blank_batch(case) if launch_only else batch_of(case)
    calls = {name: lambda m=OWN[name]: step(m, batch) for name in names}
    if launch_only:
        for name, call in calls.items():
            if OWN[name].gives != "products":
                call()
        return {}
    found = {}
    for name, call in calls.items():
        call()
        walls, returns = [], []
        for _ in range(2 if tiny else rounds):
            synchronize()
            began = time.perf_counter()
            call()
            returns.append(time.perf_counter() - began)
            synchronize()
            walls.append(time.perf_counter() - began)
        found[name] = {"wall": _ms(walls), "returns": _ms(returns)}
    events = Alternation(calls)
    for _ in range(2 if tiny else rounds):
        events.round()
    for name, times in events.seconds.items():
        found[name]["events"] = _ms(times)
    for name, call in calls.items():  # after all times: a profiler may leave launches slower
        found[name]["busy"] = _busy(call)
    return found


def _ms(times: list[float]) -> float:
    return float(f"{1e3 * statistics.median(times):.4g}")


def _busy(call: Callable, steps: int = 3) -> float | None:
    """Milliseconds of the GPU's kernels in one call."""
    if DEVICE != "cuda":
        return None
    try:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(steps):
                call()
            synchronize()
        total = sum(event.self_device_time_total for event in profiled.key_averages())
        return float(f"{total / 1e3 / steps:.4g}") if total else None
    except Exception:  # a machine may not let its counters be read
        return None
