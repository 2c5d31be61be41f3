"""Compile every kernel for one architecture without a device, through the real launchers; print one JSON row each.

    python tests/aot_worker.py sm90

A process of its own: it must not run under Triton's interpreter. A stand-in driver takes the launches, so that Triton
specialises the real arguments, compiles every configuration that is not pruned, checks shared memory, and runs nothing.
"""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_LIMIT = {"sm80": 166912, "sm90": 232448, "sm100": 232448, "sm120": 101376, "gfx942": 65536}
# what a tensor-core product looks like in the text that the compiler leaves
MATRIX_OP = {
    "sm80": r"mma\.sync",
    "sm90": r"wgmma\.mma_async",
    "sm100": r"tcgen05\.mma",
    "sm120": r"mma\.sync",
    "gfx942": r"v_mfma",
}


def target_of(arch: str) -> GPUTarget:
    return GPUTarget("cuda", int(arch[2:]), 32) if arch.startswith("sm") else GPUTarget("hip", arch, 64)


class FakeDriver:
    """Enough of a driver for `kernel[grid](cpu tensors)`."""

    def __init__(self, arch: str):
        self.target, self.arch = target_of(arch), arch
        self.utils = self

    def launcher_cls(self, src, metadata):
        return lambda *args, **kwargs: None

    def get_device_properties(self, device):
        return {
            "max_shared_mem": SHARED_LIMIT[self.arch],
            "max_num_regs": 65536,
            "multiprocessor_count": 132,
            "warpSize": 32,
        }

    def load_binary(self, name, binary, shared, device):
        return None, None, 0, 0, 1024

    def unload_module(self, module):
        pass

    def is_active(self):
        return True

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        def run_once(fn, quantiles=None, **kwargs):
            fn()
            return [1.0] * len(quantiles or [1])

        return run_once


@contextlib.contextmanager
def fake_device(arch: str):
    before = driver._active
    driver.set_active(FakeDriver(arch))
    try:
        yield
    finally:
        driver._active = before


def resources(kernel, arch: str) -> dict:
    """Registers, spilled bytes, shared memory and matrix instructions of a compiled kernel."""
    row = {"shared": kernel.metadata.shared, "fits": kernel.metadata.shared <= SHARED_LIMIT[arch]}
    if arch.startswith("sm"):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(kernel.asm["cubin"])
            f.flush()
            text = subprocess.run(
                [BIN / "cuobjdump", "--dump-resource-usage", f.name], capture_output=True, text=True
            ).stdout
        use = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        row |= {"registers": use["REG"], "spill_bytes": use["STACK"] + use["LOCAL"]}
        code = kernel.asm["ptx"]
    else:
        code = kernel.asm["amdgcn"]

        def number(key):
            return int(re.search(rf"\.{key}:\s+(\d+)", code)[1])

        row |= {"registers": number("vgpr_count"), "spill_bytes": number("private_segment_fixed_size")}
    row["matrix_ops"] = len(re.findall(MATRIX_OP[arch], code))
    row["atomics"] = len(re.findall(r"^\s*(?:@\S+ )?(?:atom|red)\.|_atomic_", code, re.M))
    return row


def launches(dtype: torch.dtype):
    """Name and launcher call for each combination of options, on tensors of a real head's alignment."""
    import treg_kernels as K
    from treg_kernels.forward import STATISTICS
    from treg_kernels.tiles import Scalars

    N, V, D = 256, 1024, 512
    hidden, weight, bias = torch.zeros(N, D, dtype=dtype), torch.zeros(V, D, dtype=dtype), torch.zeros(V, dtype=dtype)
    target, row, tile = torch.zeros(N, dtype=torch.int64), torch.zeros(N), torch.zeros(N, V, dtype=dtype)
    plain, cap = Scalars.of(1.0, None, 1.0), Scalars.of(1.0, 30.0, 0.7)

    def forward(bias, scalars, outputs=(), stash=None):
        return lambda: K.logprob_forward(hidden, weight, target, bias, scalars, -100, outputs, stash)

    if dtype == torch.bfloat16:
        yield "forward", forward(None, plain)
        yield "stash", forward(None, plain, (), tile)
        yield "gradient", lambda: K.logits_gradient(hidden, weight, target, None, plain, -100, row, row, tile)
    yield "forward, all options", forward(bias, cap, STATISTICS)
    if dtype != torch.float16:
        yield "stash, all options", forward(bias, cap, STATISTICS, tile)
    yield "gradient, all options", lambda: K.logits_gradient(hidden, weight, target, bias, cap, -100, row, row, tile)


def compiled(arch: str, dtypes: list[torch.dtype]):
    """Launch everything; yield (case, kernel name, configuration, compiled kernel)."""
    from treg_kernels import backward, forward

    functions = [forward._offset_kernel, forward._tile_kernel.fn, forward._combine_kernel, backward._gradient_kernel.fn]
    tuned = [forward._tile_kernel, backward._gradient_kernel]
    for dtype in dtypes:
        for name, launch in launches(dtype):
            for function in functions:
                function.device_caches.clear()
            for tuner in tuned:
                tuner.cache.clear()
            launch()
            for function in functions:
                for cache in function.device_caches.values():
                    for kernel in cache[0].values():
                        yield f"{name}, {str(dtype)[6:]}", function.__name__, kernel


def main(arch: str) -> None:
    from treg_kernels.configs import WIDE

    rows = []
    with fake_device(arch):
        for case, function, kernel in compiled(arch, [torch.bfloat16, torch.float16, torch.float32]):
            constants = {k[0]: v for k, v in kernel.src.constants.items()}
            named = {kernel.src.fn.arg_names[i]: v for i, v in constants.items()}
            block = {k: named[k] for k in ("BLOCK_N", "BLOCK_V", "BLOCK_D") if k in named}
            warps = kernel.metadata.num_warps
            rows.append({
                "arch": arch, "case": case, "kernel": function, **block, "warps": warps,
                "stages": kernel.metadata.num_stages, "wide": block == WIDE.kwargs,
                **resources(kernel, arch),
            })  # fmt: skip
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
