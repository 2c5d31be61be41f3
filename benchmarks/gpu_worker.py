"""The processes of `gpu_run.py` that touch the GPU.

    gpu_worker.py [--tiny]              a job a line on its input, what it does and finds on its
                                        output
        {"ready": true}                                                                 out
        {"do": "truth", "name": ..., "seconds": ...}                                    in
        {"at": what} ... {"part": {...}} ... {"result": {...}, "bye": false, "broken": ""}  out
    gpu_worker.py --compile K N         all jobs on its input; it launches what they launch, but
                                        compiles each N-th kernel alone
    gpu_worker.py --list                the same without a GPU; compiles nothing, and says how many
                                        kernels there are
    gpu_worker.py --small-step          for tools that watch memory accesses

A worker ends when its input does, with its parent, or where it has become unusable for what comes
next: "bye" says so. "broken" says why, where it is the GPU that answers no more.
"""

import contextlib
import ctypes
import gc
import itertools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from loss_head_cases import CASES, DEVICE, gpu_cases, tiny
from loss_head_cell import Timing, launch_cell, measure_cell, summarised
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


@dataclass(frozen=True)
class Desk:
    """Where a job says what it does, and how long it may take."""

    tiny: bool
    say: Callable[..., None]
    left: Callable[[], float]
    launch: bool = False  # the launches alone, once: no oracle, no times
    mine: Callable[[], bool] = lambda: True  # of other projects' methods, while launching alone

    def at(self, name: str) -> None:
        self.say(at=name)

    def part(self, found: dict) -> None:
        self.say(part=found)


# -- jobs


def do_environment(work: dict, desk: Desk) -> dict:
    from gpu_rates import product_rates

    if desk.launch:
        return {}
    found = {"environment": environment(), "clocks": clocks()}
    desk.part(found)
    found["ceilings"] = ceilings() if DEVICE == "cuda" else None
    desk.part(found)
    found["products"] = product_rates(desk.tiny, desk.at)
    return {**found, "clocks_after": clocks()}


def clocks() -> str | None:
    """What nvidia-smi says of clocks, power, temperature and whether the clock is held down."""
    from loss_head_measure import _output

    fields = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,memory.used"
    return _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")


def do_truth(work: dict, desk: Desk) -> dict:
    import gpu_truth

    sizes = gpu_truth.Sizes(desk.tiny)
    if desk.launch:
        gpu_truth.launch(work["name"], sizes)
        return {}
    found = gpu_truth.run(work["name"], sizes)
    # after a capture that broke the thread's stream may still be the capture's
    return {**found, "ends": work["name"] in gpu_truth.GRAPHS and "error" in found}


def do_rates(work: dict, desk: Desk) -> dict:
    import gpu_rates

    if desk.launch:
        return gpu_rates.launch(work["name"], desk.tiny)
    return gpu_rates.kernel_rates(work["name"], desk.tiny, desk.at, desk.part)


def do_tiles(work: dict, desk: Desk) -> dict:
    import tune_tiles

    if desk.launch:
        D, V, softcap = tune_tiles.heads(desk.tiny)[work["name"]]
        N = 200 if desk.tiny else 512  # enough for every tile
        return tune_tiles.launch(work["kind"], N, D, V, softcap)
    lines = tune_tiles.tune(
        *(Path(work["folder"]), work["name"], work["kind"], desk.tiny, desk.left),
        commit=work.get("commit"),
    )
    late = {"late": "rows"} if desk.left() <= 0 else {}
    return {"fastest": lines, **late}


def do_host(work: dict, desk: Desk) -> dict:
    from gpu_rates import host

    return host(work["rows"], work["vocab"], desk.tiny, desk.launch)


def do_cell(work: dict, desk: Desk) -> dict:
    case = next(case for case in cells(desk.tiny) if case.name == work["name"])
    methods, cool = work.get("methods"), work.get("cool")
    timing = Timing(
        methods=None if methods is None else tuple(methods),
        cool=None if cool is None else tuple(cool),
        left=desk.left,
    )
    if desk.launch:
        return launch_cell(case, timing, desk.mine)
    found = measure_cell(
        case,
        work.get("excluded", {}),
        desk.at,
        timing,
        lambda found: desk.part(summarised(found)),
    )
    return summarised(found)


JOBS = {
    "environment": do_environment,
    "truth": do_truth,
    "rates": do_rates,
    "tiles": do_tiles,
    "host": do_host,
    "cell": do_cell,
}


# -- a worker


def serve(small: bool) -> None:
    out = own_output()

    def say(**message) -> None:
        print(json.dumps(message), file=out)

    say(ready=True)
    for line in sys.stdin:
        work = json.loads(line)
        say(at=work_name(work))
        end = time.monotonic() + work.get("seconds", float("inf"))
        desk = Desk(small, say, lambda end=end: end - time.monotonic())
        try:
            result = JOBS[work["do"]](work, desk)
        except Exception as e:
            traceback.print_exc()
            result = {"failed": _short(e)}
        ends, broken = result.pop("ends", False), tidy()
        say(result=result, bye=bool(ends or broken), broken=broken)
        if ends or broken:
            return


def own_output():
    """Where to say things: what libraries print is no answer, and goes to the standard error."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return out


def tidy() -> str:
    """Give memory back; why the GPU answers no more, or ""."""
    try:
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError as e:
        return _short(e)
    return ""


# -- compiling


class Share:
    """Lets one process of several compile each n-th kernel of this project, and leave the others
    out: neither compiled nor launched, so that what follows works on memory with no meaning.

    All processes meet the kernels in the same order. They are told apart by Triton's own key of a
    specialisation.
    """

    def __init__(self, k: int, n: int):
        self.k, self.n = k, n
        self.met: dict[tuple, bool] = {}  # key: whether it is this process's
        self.wrong: dict[str, str] = {}  # of kernels that did not compile
        self.failed: set[tuple] = set()  # their keys: each is tried once
        self.units = itertools.count()

    def ours(self, module: str, name: str, key: object) -> bool:
        """Whether this process compiles a kernel."""
        if not module.startswith("treg_kernels"):
            return True
        return self.met.setdefault((module, name, str(key)), len(self.met) % self.n == self.k)

    def mine(self) -> bool:
        """Whether the next of the units that are not divided is this process's."""
        return next(self.units) % self.n == self.k

    @contextlib.contextmanager
    def installed(self):
        """In the place where Triton compiles what its memory does not hold. Its hook for this
        purpose fails in 3.6 where a kernel takes a function.
        """
        from triton.runtime.jit import JITFunction

        compile_kernel = JITFunction._do_compile

        def do_compile(kernel, key, *rest, **more):
            module, name = kernel.fn.__module__, kernel.fn.__qualname__
            this = (module, name, str(key))
            if this in self.failed or not self.ours(*this):
                return None  # Triton then launches nothing
            try:
                return compile_kernel(kernel, key, *rest, **more)
            except Exception as e:  # the others do not see it: here, too, what follows goes on
                self.failed.add(this)
                self.wrong[name] = _short(e)
                return None

        JITFunction._do_compile = do_compile
        try:
            yield
        finally:
            JITFunction._do_compile = compile_kernel


def compile_share(small: bool, k: int, n: int) -> None:
    """Launch what the jobs on the input launch; say after each what was compiled so far and what
    went wrong. Ends with an error where the GPU answers no more.
    """
    out = own_output()
    share, wrong = Share(k, n), {}
    with share.installed():
        for work in json.load(sys.stdin):
            print(json.dumps({"at": work_name(work)}), file=out)
            wrong |= launched(work, small, share)
            if broken := tidy():
                wrong[f"GPU, after {work_name(work)}"] = broken
            print(json.dumps({"result": told(share, wrong)}), file=out)
            if broken:
                raise SystemExit(f"the GPU answers no more after {work_name(work)}: {broken}")


def launched(work: dict, small: bool, share: Share) -> dict[str, str]:
    """What went wrong in the launches of a job."""
    desk = Desk(small, lambda **_: None, lambda: float("inf"), True, share.mine)
    try:
        found = JOBS[work["do"]](work, desk)
        return {f"{work_name(work)}: {name}": why for name, why in found.items() if why}
    except Exception as e:
        return {work_name(work): _short(e)}


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def work_name(work: dict) -> str:
    return " ".join(str(work[key]) for key in ("do", "name", "kind", "rows") if key in work)


def told(share: Share, wrong: dict[str, str]) -> dict:
    return {
        "kernels": len(share.met),
        "compiled": sum(share.met.values()),
        "wrong": wrong | share.wrong,
    }


def list_kernels() -> None:
    """The kernels of the jobs on the input, at small sizes, counted by a stand-in for a GPU."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
    from aot_worker import fake_device

    from treg.ops import options

    options.checks.resolve_impl = lambda impl, hidden: "triton"  # of tensors on a CPU too
    share = Share(-1, 1)
    counts, wrong = {}, {}
    with fake_device("sm90"), share.installed():
        for work in json.load(sys.stdin):
            before = len(share.met)
            wrong |= launched(work, True, share)
            counts[work_name(work)] = len(share.met) - before
    print(json.dumps({**told(share, wrong), "new": counts}))


def main() -> None:
    arguments = sys.argv[1:]
    small = "--tiny" in arguments
    if "--small-step" in arguments:
        small_step()
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if "--list" in arguments:
        list_kernels()
    elif "--compile" in arguments:
        at = arguments.index("--compile")
        compile_share(small, int(arguments[at + 1]), int(arguments[at + 2]))
    else:
        serve(small)


if __name__ == "__main__":
    main()
