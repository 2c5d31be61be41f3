"""Host time of a step: what the CPU does before and between the launches of a GPU, in microseconds.

    python benchmarks/host_time.py [--before TREE] [--rounds 6] [--repeats 100] [--out F]
    python benchmarks/host_time.py --instructions ...

No GPU is needed. Triton compiles the real kernels for sm90, and its real launcher launches them
into a stand-in for libcuda whose functions only return. Tensors are of the CPU and tiny, so that an
operator of torch costs its dispatch and little else. Checks of values are off, as on a GPU. The
time is that of the CPU, so that what else the machine does counts little.

    counted       checks, operators, autograd, plans, launches through Triton, operators of torch
    not counted   matrix products (three in a step); what cudaLaunchKernel adds to an operator of
                  torch, some microseconds each; waits for the device; the handover to the thread
                  that autograd keeps for a GPU; the caching allocator, where a CPU's malloc stands

--before: another checkout, measured in turns with this one, so that both see the same machine.
Every round is a process of its own. The record has the least and the median of all repeats.

--instructions: those of each step with gradients besides, counted by valgrind, which must be
installed. They do not depend on what else the machine does. Counted are also the loops of PyTorch
over the tiny tensors, which a GPU would run. Takes about a minute a step and tree.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAIRS, LENGTH, D, V = 2, 32, 64, 512  # 128 rows; the head is tiny, its tile that of a large one

# Enough of libcuda for Triton's launcher and for loading what it compiles.
STUB = """
#include <stdint.h>
#define PLAIN(name) int name(void) { return 0; }
PLAIN(cuInit) PLAIN(cuCtxSetCurrent) PLAIN(cuCtxSetLimit) PLAIN(cuCtxGetLimit)
PLAIN(cuDevicePrimaryCtxRetain) PLAIN(cuModuleLoadData) PLAIN(cuModuleUnload)
PLAIN(cuFuncSetAttribute) PLAIN(cuFuncSetCacheConfig) PLAIN(cuLaunchKernelEx)
PLAIN(cuTensorMapEncodeTiled) PLAIN(cuTensorMapEncodeIm2col) PLAIN(cuOccupancyMaxActiveClusters)
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuModuleGetFunction(void **function, void *module, char *name) { *function = (void *)1;
    return 0; }
int cuGetErrorString(int error, const char **text) { *text = "stand-in"; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) {
    *value = attribute == 0 ? 1024 : 0; return 0; }
int cuPointerGetAttribute(uint64_t *data, int attribute, uint64_t pointer) {
    *data = pointer; return 0; }
int cuPointerGetAttributes(int count, int *attributes, void **data, uint64_t pointer) {
    for (int i = 0; i < count; i++) *(uint64_t *)data[i] = pointer;
    return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
        case 10: *value = 32; break;       /* lanes of a warp */
        case 12: *value = 65536; break;    /* registers of a block */
        case 16: *value = 132; break;      /* multiprocessors */
        case 97: *value = 232448; break;   /* bytes of shared memory of a block */
        default: *value = 1;
    }
    return 0; }
"""


# -- the worker: one checkout, one process


def pretend_device() -> None:
    """Launches go to sm90 through Triton's own launcher; the library sees tensors of a GPU, as far
    as that decides what the host does.
    """
    import torch
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    from treg.ops.head import gradients, selection
    from treg.ops.options import checks

    class Driver(CudaDriver):
        def __init__(self):
            super().__init__()
            self.get_device_capability = lambda device: (9, 0)
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.set_current_device = lambda device: None

    driver.set_active(Driver())
    resolve = checks.resolve_impl

    def scaled(x, factor, dtype, in_place=False):
        same = in_place and x.dtype == dtype
        out = x if same else torch.empty(x.shape, dtype=dtype, device=x.device)
        return torch.mul(x, factor, out=out)

    def on_gpu(impl, hidden):
        resolve(impl, hidden)
        return "triton"

    checks.resolve_impl = on_gpu
    checks.values_visible = lambda x: False
    if hasattr(selection, "looks"):  # few rows of a GPU are not looked at
        selection.looks = lambda x: x.shape[0] > selection.FEW_ROWS
    gradients.times_weight = lambda tile, weight, out: None
    gradients.add_transposed = lambda acc, tile, rows, *, first: None
    gradients.scaled_to = scaled  # of a CPU, 16-bit numbers go by slabs


def make_inputs(ignored: bool) -> dict:
    import torch

    torch.manual_seed(0)
    target = torch.randint(0, V, (2 * PAIRS, LENGTH))
    if ignored:
        target[:, : LENGTH // 4] = -100
    return {
        "hidden": torch.randn(2 * PAIRS, LENGTH, D, dtype=torch.bfloat16, requires_grad=True),
        "weight": torch.randn(V, D, dtype=torch.bfloat16, requires_grad=True),
        "target": target,
        "token_rewards": torch.rand(2 * PAIRS, LENGTH),
        "ref_logps": torch.randn(2 * PAIRS),
    }


def make_steps() -> dict:
    """Name of a step -> a function that makes it."""
    import torch

    from treg.ops import fused_treg_loss, linear_logprobs

    def treg(x):
        return fused_treg_loss(**x).loss

    def logprobs(x):
        return linear_logprobs(x["hidden"], x["weight"], x["target"]).logprobs

    def both(forward, x):
        out = forward(x)
        x["hidden"].grad = x["weight"].grad = None
        out.backward(torch.ones_like(out) if out.ndim else None)

    def without(forward, x):
        with torch.no_grad():
            forward(x)

    steps, every, some = {}, make_inputs(ignored=False), make_inputs(ignored=True)
    for name, forward in (("treg_fused", treg), ("treg_logprobs", logprobs)):
        steps[name, "fwd_bwd_us"] = lambda f=forward: both(f, every)
        steps[name, "fwd_us"] = lambda f=forward: f(every)
        steps[name, "no_grad_us"] = lambda f=forward: without(f, every)
        steps[f"{name}, a quarter ignored", "fwd_bwd_us"] = lambda f=forward: both(f, some)
    return steps


def make_launches() -> dict:
    """The kernels of a step alone, from tensors to launches."""
    import torch

    from treg_kernels import logits_gradient, logprob_forward
    from treg_kernels.bases import BASES
    from treg_kernels.objective import pair_objective
    from treg_kernels.tiles import Scalars

    N = 2 * PAIRS * LENGTH
    hidden, weight = (torch.randn(n, D, dtype=torch.bfloat16) for n in (N, V))
    target, stash = torch.randint(0, V, (N,)), torch.empty(N, V, dtype=torch.bfloat16)
    head = (hidden, weight, target, None, Scalars.of(1.0, None, 1.0), -100)
    norm, row, starts = torch.zeros(N, 2), torch.zeros(N), torch.arange(2 * PAIRS + 1) * LENGTH
    loss, stats, sums = torch.zeros(PAIRS), torch.zeros(11, PAIRS), torch.zeros(2 * PAIRS)
    numbers = {"beta": 0.1, "alpha": 0.25, "options": (0.0,)}
    kind = {"base": BASES["dpo"], "static": False, "length_normalised": False, "nll": False}
    of_tokens = (row, target, row, sums, None, starts)

    def of_pairs():
        pair_objective(*of_tokens, 0, PAIRS, loss, stats, row, **numbers, **kind)

    return {
        ("launches", "forward_stash_us"): lambda: logprob_forward(*head, stash=stash),
        ("launches", "forward_us"): lambda: logprob_forward(*head),
        ("launches", "gradient_us"): lambda: logits_gradient(*head, norm, row, stash),
        ("launches", "objective_us"): of_pairs,
    }


class Parts:
    """Where the time of a step goes: the functions named here, each without those within it.

    A wrapper costs about a microsecond a call, so that the parts add up to more than the step.
    """

    def __init__(self):
        self.spent: dict[str, float] = {}
        self.inner = [0.0]

    def wrap(self, part: str, owner, name: str) -> None:
        import functools
        from time import thread_time

        function = getattr(owner, name, None)
        if function is None:  # of another checkout
            return

        @functools.wraps(function)
        def timed(*args, **kwargs):
            self.inner.append(0.0)
            start = thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                took = thread_time() - start
                within = self.inner.pop()
                self.inner[-1] += took
                self.spent[part] = self.spent.get(part, 0.0) + took - within

        setattr(owner, name, timed)

    def of(self, step, repeats: int) -> dict[str, float]:
        """Microseconds of each part, medians; "others" is what no part has."""
        from time import thread_time

        found = []
        for _ in range(repeats):
            self.spent = {}
            start = thread_time()
            step()
            took = thread_time() - start
            found.append(self.spent | {"others": took - sum(self.spent.values())})
        return {
            part: round(1e6 * statistics.median(x.get(part, 0.0) for x in found), 1)
            for part in found[0]
        }


def wrap_parts(parts: Parts) -> None:
    from importlib import import_module

    from triton.runtime.jit import JITFunction

    from treg.ops import call, options

    treg_loss = import_module("treg.ops.treg_loss")
    plans = import_module("treg.ops.plans")
    kept = import_module("treg.ops.plans.kept")
    selection = import_module("treg.ops.head.selection")
    parts.wrap("checks and options", options.HeadOptions, "call")
    parts.wrap("checks and options", treg_loss.LossOptions, "__init__")
    parts.wrap("checks and options", treg_loss, "check_pairs")
    parts.wrap("the call as a string", call.Call, "text")
    parts.wrap("the call as a string", treg_loss.Call, "of")
    parts.wrap("the rows and the plan", treg_loss, "batch_of")
    parts.wrap("the rows and the plan", treg_loss, "plan_of_backward")
    parts.wrap("the rows and the plan", treg_loss, "choose_plan")
    parts.wrap("the rows and the plan", treg_loss, "note_of")
    parts.wrap("which rows are scored", selection, "rows_where")
    for plan in plans.PLANS.values():
        for name in ("forward_pairs", "backward_pairs"):
            parts.wrap("the plan at work", type(plan), name)
    parts.wrap("sums of the gradients", kept, "differentiate_rows")
    for module, names in (
        (kept, ("score_rows",)),
        (import_module("treg.ops.plans.base"), ("evaluate_pairs",)),
    ):
        for name in names:
            parts.wrap("rows to kernels", module, name)
    parts.wrap("launches", JITFunction, "run")
    for op in (treg_loss._forward, treg_loss._gradient):
        parts.wrap("operators", op, "_call")
    parts.wrap("results", treg_loss, "_result")


def work(repeats: int, with_parts: bool) -> dict:
    from time import thread_time

    pretend_device()
    steps = make_steps() | make_launches()
    for step in steps.values():
        for _ in range(3):  # compiles
            step()
    found: dict = {}
    for _ in range(repeats):
        for (name, what), step in steps.items():
            start = thread_time()
            step()
            took = 1e6 * (thread_time() - start)
            found.setdefault(name, {}).setdefault(what, []).append(took)
    if with_parts:
        parts = Parts()
        wrap_parts(parts)
        found["parts"] = parts.of(steps["treg_fused", "fwd_bwd_us"], repeats)
    return found


def only(name: str, repeats: int) -> None:
    """One step with gradients, so many times, for whoever counts."""
    pretend_device()
    step = make_steps()[name, "fwd_bwd_us"]
    for _ in range(repeats):
        step()


# -- the driver


def run_worker(tree: Path, folder: Path, *arguments: str, under: tuple[str, ...] = ()) -> str:
    """What a worker prints, on both streams. under: a program that runs it."""
    env = os.environ | {
        "PYTHONPATH": f"{tree}:{tree / 'kernels'}",
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
    }
    env.pop("TRITON_INTERPRET", None)
    command = [*under, sys.executable, __file__, "--worker", *arguments]
    made = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if made.returncode:
        raise RuntimeError(f"the measurement of {tree} failed:\n{made.stderr[-4000:]}")
    return made.stderr + made.stdout


def instructions_of(tree: Path, folder: Path, name: str, repeats: int) -> int:
    """Of a step: what so many more of them add to a process."""
    count = ("valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null")
    run_worker(tree, folder, "--only", name, "--repeats", "3")  # compiles

    def instructions(steps: int) -> int:
        arguments = ("--only", name, "--repeats", str(steps))
        said = run_worker(tree, folder, *arguments, under=count)
        line = next(line for line in said.splitlines() if line.split()[1:3] == ["I", "refs:"])
        return int(line.split()[-1].replace(",", ""))

    # the first ten fill caches of Python and PyTorch
    return (instructions(10 + repeats) - instructions(10)) // repeats


def summary(runs: list[dict]) -> dict:
    found: dict = {}
    for name, whats in runs[0].items():
        if name == "parts":
            continue
        for what in whats:
            times = [t for run in runs for t in run[name][what]]
            found.setdefault(name, {})[what] = round(min(times), 1)
            found[name][what.replace("_us", "_median_us")] = round(statistics.median(times), 1)
    found["parts of treg_fused"] = runs[-1]["parts"]
    return found


def environment() -> dict:
    import torch
    import triton

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return versions | {"triton": triton.__version__, "cpu": cpu}


def measure(trees: dict[str, Path], rounds: int, repeats: int, instructions: bool) -> dict:
    runs: dict[str, list] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "stub.c").write_text(STUB)
        shared = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*shared, "-o", folder / "libcuda.so.1", folder / "stub.c"], check=True)
        for number in range(rounds):
            for name, tree in trees.items():
                parts = ["--parts"] if number == rounds - 1 else []
                said = run_worker(tree, folder, "--repeats", str(repeats), *parts)
                runs[name].append(json.loads(said.splitlines()[-1]))
        found = {name: summary(run) for name, run in runs.items()}
        for name, tree in trees.items() if instructions else ():
            for step in ("treg_fused", "treg_logprobs"):
                found[name][step]["fwd_bwd_instructions"] = instructions_of(
                    tree, folder, step, repeats
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--before", type=Path, help="another checkout, to compare with")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=100, help="of every step in a round")
    parser.add_argument("--instructions", action="store_true", help="count them with valgrind")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--parts", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.instructions and shutil.which("valgrind") is None:
        parser.error("--instructions: expected valgrind on the PATH, found none; install it")
    if args.before and not (args.before / "treg").is_dir():
        parser.error(f"--before: expected a checkout of this project, got {args.before}")
    if args.only:
        only(args.only, args.repeats)
        return
    if args.worker:
        print(json.dumps(work(args.repeats, args.parts)))
        return
    trees = {"before": args.before.resolve()} if args.before else {}
    found = environment() | {"rows": 2 * PAIRS * LENGTH, "repeats": args.rounds * args.repeats}
    found |= measure(trees | {"after": ROOT}, args.rounds, args.repeats, args.instructions)
    text = json.dumps(found, indent=1) + "\n"
    if args.out:
        args.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
