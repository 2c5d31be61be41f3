"""Tile shapes of the two GEMM kernels.

The first entry is the default, and what the interpreter runs. The wide tile needs a GPU whose tensor cores read shared
memory (sm90, sm100); elsewhere it is pruned.
"""

import triton

# the interpreter has no device to time configurations on
INTERPRET = triton.knobs.runtime.interpret


def _config(n: int, v: int, d: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_N": n, "BLOCK_V": v, "BLOCK_D": d}, num_warps=warps, num_stages=stages)


DEFAULT = _config(128, 128, 32, 8, 3)
SMALL = _config(64, 128, 32, 4, 3)
DEEP = _config(128, 128, 64, 8, 3)
WIDE = _config(128, 256, 64, 8, 3)
FLOAT32 = _config(32, 128, 32, 4, 3)  # full-precision products run outside the tensor cores
CONFIGS = [DEFAULT] if INTERPRET else [DEFAULT, SMALL, DEEP, WIDE, FLOAT32]

# the most vocabulary tiles of any configuration: partial results are allocated for them
MIN_BLOCK_V = min(c.kwargs["BLOCK_V"] for c in CONFIGS)


def prune(configs, named_args, **kwargs):
    """Drop what the current device cannot hold in registers or shared memory."""
    if len(configs) == 1:
        return configs
    target = triton.runtime.driver.active.get_current_target()
    if named_args["hidden_ptr"].element_size() == 4:
        return [FLOAT32]
    configs = [c for c in configs if c is not FLOAT32]
    if target.backend == "cuda" and target.arch // 10 in (9, 10):
        return configs
    if target.backend == "cuda" and target.arch == 80:
        return [c for c in configs if c is not WIDE]
    return [c for c in configs if c in (DEFAULT, SMALL)]
